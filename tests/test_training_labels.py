from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest

from scripts.config import InputError
from scripts.organs.training_labels import class_weights, majority_prior, prior_of


@pytest.fixture
def items(tmp_path):
    """80 voxels of background, 16 of the spleen (1), 4 of the liver (5)."""
    labels = np.zeros(100, np.uint8)
    labels[:16], labels[16:20] = 1, 5
    nib.save(nib.Nifti1Image(labels.reshape(10, 10, 1), np.eye(4)), tmp_path / "labels.nii.gz")
    return [{"subject": "s1", "image": [], "label": [str(tmp_path / "labels.nii.gz")]}]


def test_the_square_root_of_the_median_frequency_over_the_frequency(items):
    found = class_weights(items * 3, ["spleen", "liver"])
    assert found.tolist() == pytest.approx([(10 / 80) ** 0.5, (10 / 16) ** 0.5, (10 / 4) ** 0.5])


def test_structures_that_were_not_chosen_are_background(items):
    assert class_weights(items, ["liver"]).tolist() == pytest.approx([(4 / 96) ** 0.5, 1])


def test_absent_structures(items, caplog):
    with caplog.at_level(logging.WARNING):
        assert class_weights(items, ["spleen", "heart"])[2] == 1
    assert "1 structures are in no training subject: ['heart']" in caplog.text
    with pytest.raises(InputError, match=r"no training subject has a voxel of \['heart'\]"):
        class_weights(items, ["heart"])


def test_the_prior_is_the_most_frequent_structure_of_each_place(tmp_path):
    """Three subjects, one of them stored from right to left and with another shape."""
    items = []
    for index, (shape, sign) in enumerate([((8, 4, 4), 1), ((8, 4, 4), 1), ((16, 4, 4), -1)]):
        labels = np.zeros(shape, np.uint8)
        labels[shape[0] // 2 :] = 1  # the right half
        labels[: shape[0] // 4] = 5 if index == 0 else 0
        volume = labels if sign > 0 else labels[::-1]
        file = tmp_path / f"{index}.nii.gz"
        nib.save(nib.Nifti1Image(volume, np.diag([sign, 1, 1, 1])), file)
        items.append({"subject": str(index), "image": [], "label": [str(file)]})
    prior = majority_prior(items, ["spleen", "liver"])
    assert prior.shape == (64, 64, 64)
    assert (prior[32:] == 1).all()
    assert (prior[:32] == 0).all()
    assert (majority_prior(items[:1], ["spleen", "liver"])[:16] == 5).all()
    flipped = prior_of(prior, (10, 4, 4), np.diag([-1, 1, 1, 1]))
    assert flipped.shape == (10, 4, 4)
    assert (flipped[:5] == 1).all()
    assert (flipped[5:] == 0).all()
