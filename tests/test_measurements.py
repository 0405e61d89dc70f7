from __future__ import annotations

import math

import numpy as np
import pytest

from scripts.networks.measurements import measure, measurement_names, num_measurements

REGIONS, MODALITIES = ["TC", "WT"], ["t1", "flair"]


def ellipsoid(radii, side=40):
    """Mask of an ellipsoid with the given radii, in voxels."""
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij")) - side // 2
    return (np.square(grid / np.reshape(radii, (3, 1, 1, 1))).sum(axis=0) <= 1)[None]


def measured(image, masks, spacing=(1.0, 1.0, 1.0)):
    values = measure(image, masks, spacing)
    regions, modalities = (names[: len(array)] for names, array in ((REGIONS, masks), (MODALITIES, image)))
    assert len(values) == num_measurements(len(regions), len(modalities))
    return dict(zip(measurement_names(regions, modalities), values, strict=True))


def test_size_and_extents_are_in_mm():
    mask = ellipsoid((12, 8, 4))
    found = measured(np.zeros((1, *mask.shape[1:])), mask, (1.0, 1.0, 2.0))
    assert found["TC present"] == 1
    assert math.exp(found["TC size"]) == pytest.approx(mask.sum() * 2)
    extents = [math.exp(found[f"TC extent {axis}"]) for axis in "xyz"]
    assert extents == pytest.approx([25, 17, 18])


def test_a_ball_is_round_and_an_ellipsoid_is_long_or_flat():
    zeros = np.zeros((1, 40, 40, 40))
    ball, long, flat = (measured(zeros, ellipsoid(radii)) for radii in ((9, 9, 9), (16, 6, 6), (14, 14, 4)))
    assert ball["TC roundness"] == pytest.approx(1, abs=0.05)
    assert ball["TC elongation"] == pytest.approx(0, abs=0.02)
    assert ball["TC flatness"] == pytest.approx(0, abs=0.02)
    assert max(long["TC roundness"], flat["TC roundness"]) < ball["TC roundness"] - 0.05
    assert long["TC elongation"] > 0.5 > abs(long["TC flatness"])
    assert flat["TC flatness"] > 0.5 > abs(flat["TC elongation"])


def test_intensities_of_each_modality_against_the_rim():
    mask = ellipsoid((8, 8, 8))
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.5, mask.shape)
    found = measured(np.concatenate([mask * 3.0 - 1, noise]), mask)
    assert found["TC t1 mean"] == 2
    assert found["TC t1 deviation"] == 0
    assert found["TC t1 contrast"] == 3
    assert found["TC flair deviation"] == pytest.approx(0.5, abs=0.03)
    assert found["TC flair contrast"] == pytest.approx(0, abs=0.05)


def test_an_absent_modality_has_no_intensities():
    mask = ellipsoid((8, 8, 8))
    found = measured(np.concatenate([np.zeros(mask.shape), mask * 3.0 - 1]), mask)
    assert all(math.isnan(found[f"TC t1 {name}"]) for name in ("mean", "deviation", "contrast"))
    assert found["TC flair mean"] == 2


def test_parts_are_counted():
    mask = ellipsoid((6, 6, 6))
    assert measured(np.zeros((1, 40, 40, 40)), mask)["TC parts"] == 0
    mask[0, :3, :3, :3] = True
    assert measured(np.zeros((1, 40, 40, 40)), mask)["TC parts"] == pytest.approx(math.log(2))


def test_an_empty_region_is_absent_and_the_other_is_measured():
    mask = ellipsoid((6, 6, 6))
    found = measured(np.ones((1, 40, 40, 40)), np.concatenate([np.zeros_like(mask), mask]))
    assert found.pop("TC present") == 0
    assert all(np.isnan(value) for name, value in found.items() if name.startswith("TC"))
    assert np.isfinite([value for name, value in found.items() if name.startswith("WT")]).all()


def test_a_picture_is_measured_in_shares_of_its_sides():
    """The ratio of two heights, such as cup to disc, is a difference of measurements."""
    disc, cup = (ellipsoid(radii)[..., 20:21] for radii in ((12, 16, 1), (6, 8, 1)))
    found = measured(np.zeros((1, 40, 40, 1)), np.concatenate([cup, disc]), (0.3, 0.3, 1.0))
    assert math.exp(found["WT extent y"]) == pytest.approx(33 / 40)
    assert math.exp(found["TC extent y"] - found["WT extent y"]) == pytest.approx(17 / 33)
    assert math.exp(found["WT size"]) == pytest.approx(disc.mean())
    assert np.isnan([found["WT extent z"], found["WT flatness"]]).all()


@pytest.mark.parametrize("shape", [(8, 8, 8), (8, 8, 1)])
@pytest.mark.parametrize("voxels", [1, 2, 8])
def test_the_smallest_and_the_largest_masks_are_measured(shape, voxels):
    mask = np.zeros((1, *shape), bool)
    mask[0, :voxels, :voxels, :1] = True
    found = measured(np.ones((1, *shape)), mask)
    assert not np.isinf(list(found.values())).any()
    assert np.isfinite(found["TC size"])
    full = measured(np.ones((1, *shape)), np.ones_like(mask))
    assert np.isnan(full["TC t1 contrast"])  # there is no rim
