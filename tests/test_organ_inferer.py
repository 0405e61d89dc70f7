from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from scripts.config import InputError
from scripts.organs import inferer as module
from scripts.organs.inferer import PatchInferer, StructureInferer

WINDOWS = [[-1000, 0], [0, 1000]]


class Thresholds(nn.Module):
    """An oracle: class 1 where the first window is above a half, class 2 where the second is, else background."""

    def __init__(self, middle=0):
        super().__init__()
        self.middle = middle

    def forward(self, x):
        low, high = x[:, self.middle], x[:, x.shape[1] // 2 + self.middle]
        return torch.stack([torch.full_like(low, 0.5), low * (high < 0.5), high], dim=1) * 20


@pytest.fixture
def volume():
    return torch.randint(-1200, 1200, (1, 1, 40, 36, 7), generator=torch.Generator().manual_seed(0)).float()


def expected(volume):
    classes = torch.zeros_like(volume)
    classes[volume > -500] = 1
    classes[volume >= 500] = 2
    return classes


def test_each_voxel_gets_its_class(volume):
    """In windows that overlap, and in slices larger and smaller than a window."""
    for size in (16, 32, 64):
        found = StructureInferer(WINDOWS, roi_size=size).predict(volume, Thresholds())
        assert found["pred"].shape == volume.shape
        assert found["pred"].dtype == torch.uint8
        wrong = (found["pred"] != expected(volume)) & ((volume + 500).abs() > 2) & ((volume - 500).abs() > 2)
        assert not wrong.any()
        assert (found["structure_prob"] > 0.4).all()


def test_the_number_of_slices_at_a_time_does_not_matter(volume, monkeypatch):
    found = StructureInferer(WINDOWS, roi_size=32).predict(volume, Thresholds())
    monkeypatch.setattr(module, "CHUNK", 1)
    other = StructureInferer(WINDOWS, roi_size=32).predict(volume, Thresholds())
    assert torch.equal(found["pred"], other["pred"])
    assert torch.allclose(found["structure_prob"], other["structure_prob"])


def test_neighbours_are_channels_and_repeat_at_the_ends(volume):
    """The channel of the slice below gives the mask of the volume shifted by one slice."""
    found = StructureInferer(WINDOWS, num_slices=3, roi_size=64).predict(volume, Thresholds(middle=0))["pred"]
    alone = StructureInferer(WINDOWS, roi_size=64).predict(volume, Thresholds())["pred"]
    assert torch.equal(found[..., 1:], alone[..., :-1])
    assert torch.equal(found[..., 0], alone[..., 0])


def test_a_structure_that_is_nowhere_has_no_probability(volume):
    found = StructureInferer(WINDOWS, roi_size=64).predict(volume.clamp(max=0), Thresholds())
    assert found["structure_prob"][0].isnan().tolist() == [False, True]


def test_the_metadata_stays(volume):
    image = MetaTensor(volume, meta={"subject": "s0001"})
    inferer = StructureInferer(WINDOWS)
    assert inferer.predict(image, Thresholds())["pred"].meta["subject"] == "s0001"
    assert torch.equal(inferer(volume, Thresholds()), inferer.predict(volume, Thresholds())["pred"])


@pytest.mark.parametrize("options", [{"overlap": 1.0}, {"overlap": -0.1}, {"overlap": "0"}, {"sw_batch_size": 0}])
def test_other_overlaps_and_batches_are_refused(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}=.* must be a"):
        StructureInferer([[-160, 240]], **options)


@pytest.mark.parametrize("num_slices", [0, 2, 7, "3"])
def test_other_numbers_of_slices_are_refused(num_slices):
    with pytest.raises(InputError, match="must be 1, 3 or 5"):
        StructureInferer(WINDOWS, num_slices=num_slices)


def test_patches_give_each_voxel_its_class(volume):
    found = PatchInferer(WINDOWS, (16, 16, 4)).predict(MetaTensor(volume, meta={"name": "s1"}), Thresholds())["pred"]
    assert found.dtype == torch.uint8
    assert found.meta["name"] == "s1"
    wrong = (found != expected(volume)) & ((volume + 500).abs() > 2) & ((volume - 500).abs() > 2)
    assert not wrong.any()
