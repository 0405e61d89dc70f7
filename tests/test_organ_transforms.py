from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd, Spacingd

from scripts.config import InputError
from scripts.data.transforms import CheckHounsfieldd, NeighboursToChannelsd
from scripts.organs.transforms import CompactLabelsd, HUWindowsd, SliceSpacingd

STRUCTURES = ["spleen", "liver", "costal_cartilages"]  # numbers 1, 5 and 117


def test_windows_clip_and_scale():
    image = torch.tensor([-2000.0, -160, 40, 240, 3000])[None, :, None]
    found = HUWindowsd("image", [[-160, 240], [-1000, 1000]])({"image": image})["image"]
    assert found.shape == (2, 5, 1)
    assert torch.allclose(found[0, :, 0], torch.tensor([0, 0, 0.5, 1, 1]))
    assert torch.allclose(found[1, :, 0], torch.tensor([0, 0.42, 0.52, 0.62, 1]))


@pytest.mark.parametrize("windows", [[], [[0]], [[1, 1]], [[2, 1]], ["ab"], None, [[0, "1"]], [0, 1]])
def test_windows_must_be_pairs(windows):
    with pytest.raises(InputError, match="windows="):
        HUWindowsd("image", windows)


def test_labels_become_classes_and_return():
    labels = MetaTensor(torch.tensor([[0.0, 1, 5, 117, 2]]), meta={"filename_or_obj": "a"})
    compact = CompactLabelsd("label", STRUCTURES)({"label": labels})["label"]
    assert compact.tolist() == [[0, 1, 2, 3, 0]]
    assert compact.meta["filename_or_obj"] == "a"
    assert labels.tolist() == [[0, 1, 5, 117, 2]]
    restored = CompactLabelsd("label", STRUCTURES, inverse=True)({"label": compact})["label"]
    assert restored.tolist() == [[0, 1, 5, 117, 0]]


@pytest.mark.parametrize("value", [0.5, -1.0, 118.0, 300.0, float("nan")])
def test_other_labels_are_refused(value):
    with pytest.raises(InputError, match="subject 's1'.*no whole number from 0 to 117"):
        CompactLabelsd("label", STRUCTURES)({"label": torch.tensor([[1.0, value]]), "subject": "s1"})


def test_neighbours_become_channels():
    volume = torch.arange(2 * 2 * 3).reshape(1, 2, 2, 3)
    found = NeighboursToChannelsd("image", ["label"])({"image": volume, "label": volume})
    assert found["image"].shape == (3, 2, 2)
    assert torch.equal(found["image"][1], found["label"][0])
    assert torch.equal(found["label"], volume[..., 1])


def test_an_image_without_air_gives_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        CheckHounsfieldd("image")({"image": torch.tensor([-1000.0, 100]), "subject": "ct"})
        assert not caplog.text
        CheckHounsfieldd("image")({"image": torch.tensor([0.0, 100]), "subject": "mr"})
    assert "subject 'mr': the darkest voxel is 0" in caplog.text


def test_the_spacing_and_its_inverse_are_those_of_monai():
    """On an oblique grid, with items whose keys begin like that of the image, as MONAI Label has them."""
    c, s = np.cos(0.3), np.sin(0.3)
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = torch.tensor([[-0.8 * c, -0.8 * s, 0], [-0.8 * s, 0.8 * c, 0], [0, 0, 2.5]])
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 40, 36, 37)).astype(np.float32))
    image = MetaTensor(values, affine=affine, meta={"filename_or_obj": "ct.nii.gz"})
    results = []
    for spacing in (Spacingd("image", (1.5, 1.5, -1), mode="bilinear"), SliceSpacingd("image", 1.5)):
        transform = Compose([Orientationd("image", axcodes="RAS", labels=None), spacing])
        others = {"image_path": "ct.nii.gz"} if isinstance(spacing, SliceSpacingd) else {}
        item = transform({"image": image.clone(), **others})
        labels = MetaTensor((torch.as_tensor(item["image"]) > 0.2).to(torch.uint8), meta=item["image"].meta)
        back = Invertd("pred", transform, orig_keys="image", nearest_interp=True)(item | {"pred": labels})["pred"]
        results.append((torch.as_tensor(item["image"]), torch.as_tensor(back), back.affine))
    (image_1, labels_1, affine_1), (image_2, labels_2, affine_2) = results
    assert torch.allclose(image_1, image_2, atol=1e-4)
    assert labels_2.dtype == torch.uint8
    assert torch.equal(labels_1, labels_2)
    assert torch.allclose(affine_1, affine_2)
    assert torch.allclose(affine_2, affine)
