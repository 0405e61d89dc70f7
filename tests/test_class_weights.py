from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest

from scripts.config import InputError
from scripts.organs.class_weights import class_weights


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
