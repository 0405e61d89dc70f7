"""Slices that are larger than what the network sees."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import run_configs
from scripts.config import InputError
from scripts.data.transforms import SliceIndicesd
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.net import MedSegDiff
from scripts.networks.base import SegmentationNetwork
from scripts.sampling.inferer import VolumeInferer
from test_net import TINY, randomise


class PixelNetwork(SegmentationNetwork):
    """Every pixel depends on its own intensity and noise alone, so windows cannot change it."""

    has_calib_map = True
    cls_head = torch.nn.Identity()

    def __init__(self):
        super().__init__(GaussianDiffusion(20), in_channels=2, out_channels=1, num_grades=2, divisor=4)

    def condition(self, image):
        return {"calib_map": image[:, :1]}

    def forward(self, image, x_t=None, timesteps=None, condition=None, estimate=None):
        bright = image.mean(dim=(1, 2, 3))
        return x_t + image.mean(dim=1, keepdim=True), torch.stack([bright, -bright], dim=1), condition["calib_map"]


@pytest.fixture
def volume():
    return torch.randn(1, 2, 40, 40, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "settings", [{}, {"num_samples": 3}, {"num_inference_steps": 4, "eta": 1.0}, {"start_timestep": 10}]
)
def test_windows_see_the_noise_of_the_whole_slice(volume, settings):
    whole, parts = (
        VolumeInferer(window=window, seed=3, **settings).predict(volume, PixelNetwork()) for window in (None, 16)
    )
    for name in ("pred", "prob", "uncertainty", "calib_prob"):
        assert torch.allclose(whole[name], parts[name], atol=1e-5), name
    assert whole["grade_prob"].shape == parts["grade_prob"].shape == (1, 2)


def test_the_batch_of_windows_does_not_matter(volume):
    network = randomise(MedSegDiff(GaussianDiffusion(), in_channels=2, **TINY))
    first, other = (
        VolumeInferer(window=16, num_inference_steps=2, num_samples=2, sampling_batch_size=size).predict(
            volume, network
        )
        for size in (2, 64)
    )
    for name in ("pred", "grade_prob", "calib_prob"):
        assert torch.allclose(first[name], other[name], atol=1e-5), name


def test_a_stochastic_network_samples_in_windows(volume):
    conditioning = ["highway", "stochastic"]
    network = randomise(MedSegDiff(GaussianDiffusion(), in_channels=2, conditioning=conditioning, **TINY))
    result = VolumeInferer(window=16, num_samples=3, keep_samples=True).predict(volume, network)
    assert result["samples"].shape == (1, 3, 40, 40, 3)
    assert result["seg_prob"].shape == result["prob"].shape == (1, 1, 40, 40, 3)


def test_the_grade_is_that_of_the_windows_with_the_mask():
    image = torch.full((1, 2, 32, 32, 1), -2.0)
    image[..., :16, :16, :] = 3.0  # the windows with the mask say grade 0
    result = VolumeInferer(window=16).predict(image, PixelNetwork())
    assert result["grade_prob"][0, 0] > 0.7
    assert VolumeInferer().predict(image, PixelNetwork())["grade_prob"][0, 0] < 0.3


def test_empty_windows_are_not_sampled(volume):
    """The network would find something in them, and it was never trained on them."""
    volume[..., 16:, :] = 0
    volume[..., 16:, :, :] = 0
    network = PixelNetwork()
    sizes = []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    result = VolumeInferer(window=16).predict(volume, network)
    assert sum(sizes) == 3 * 4  # in each slice, the first window and those that overlap it
    assert not result["pred"][..., 24:, :, :].any()
    assert result["pred"][..., :16, :16, :].any()
    assert result["grade_prob"].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("window", [None, 16])
def test_grades_and_measurements_are_not_rounded(volume, window):
    network = randomise(MedSegDiff(GaussianDiffusion(), in_channels=2, **TINY))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = VolumeInferer(window=window, keep_measurements=True).predict(volume, network)
    assert result["grade_prob"].dtype == result["measurements"].dtype == torch.float32
    assert result["grade_prob"].sum() == pytest.approx(1, abs=1e-6)


def test_a_slice_that_fits_is_sampled_whole(volume):
    network = randomise(MedSegDiff(GaussianDiffusion(), in_channels=2, **TINY))
    whole, fits = (VolumeInferer(window=window).predict(volume, network)["pred"] for window in (None, 40))
    assert torch.equal(whole, fits)


def test_every_foreground_voxel_can_be_the_centre_of_a_window():
    label, image = torch.zeros(1, 20, 20, 2), torch.ones(1, 20, 20, 2)
    label[0, 3, 5, 1] = 1  # smaller than the grid of the background
    image[:, :, :10] = 0
    found = SliceIndicesd("label", window=16)({"image": image, "label": label})
    assert found["fg_indices"].tolist() == [(3 * 20 + 5) * 2 + 1]
    rows, columns, slices = np.unravel_index(found["bg_indices"], (20, 20, 2))
    assert set(rows.tolist()) == set(range(0, 20, 2))
    assert set(columns.tolist()) == set(range(10, 20, 2))  # nothing of the part that is 0
    assert set(slices.tolist()) == {0, 1}


def test_train_evaluate_and_infer_in_windows(phantoms, tmp_path):
    folders = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}
    sizes = {"image_size": 16, "slice_size": 40}
    run_configs(["train.yaml"], **sizes, **folders)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["settings"]["slice_size"] == 40
    run_configs(["train.yaml", "evaluate.yaml"], **sizes, **folders)
    scores = json.loads((tmp_path / "summary.json").read_text())
    assert 0 <= scores["segmentation"]["WT"]["dice"]["mean"]["value"] <= 1
    run_configs(["inference.yaml"], **folders | {"output_dir": str(tmp_path / "masks")})
    assert len(list((tmp_path / "masks").glob("*_seg.nii.gz"))) == 10
    with pytest.raises(InputError, match="trained with slice_size=40, now it is None"):
        run_configs(["train.yaml", "evaluate.yaml"], image_size=16, **folders)


def test_a_slice_must_hold_a_window(phantoms, tmp_path):
    folders = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}
    for size in (16, "wide", [64]):
        with pytest.raises(InputError, match=r"slice_size=.* must be a whole number, image_size=32 or more"):
            run_configs(["train.yaml"], slice_size=size, **folders)
