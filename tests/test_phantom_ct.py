from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from scripts.organs.merge_structures import merge
from scripts.organs.structures import catalogue
from scripts.tools import phantom_ct


def subject(index=0, **options):
    return phantom_ct.make_subject(np.random.default_rng([0, index]), **options)


def centre(mask):
    return np.argwhere(mask).mean(axis=0)


def test_a_subject_has_24_structures_of_the_catalogue_which_do_not_overlap():
    image, structures = subject()
    assert image.shape == phantom_ct.SHAPE
    assert image.dtype == np.int16
    assert sum(structures.values()).max() == 1
    names = {name for index in range(5) for name in subject(index)[1]}
    assert len(names) == 24
    assert names <= catalogue().keys()


def test_left_and_right_and_levels_are_where_they_belong():
    """In RAS the first axis runs from left to right, the last from the feet to the head."""
    _, structures = subject()
    for name, mask in structures.items():
        if name.endswith("_left") and (other := name.replace("_left", "_right")) in structures:
            assert centre(mask)[0] < centre(structures[other])[0], name
    assert centre(structures["liver"])[0] > centre(structures["spleen"])[0]
    levels = [f"vertebrae_{level}" for level in ("L3", "L2", "L1", "T12")]
    heights = [centre(structures[level])[2] for level in levels]
    assert heights == sorted(heights)
    assert all(centre(structures["heart"])[1] > centre(structures[level])[1] for level in levels)


def test_hounsfield_units_follow_the_phase():
    arterial = []
    for index in range(8):
        image, structures = subject(index)
        assert np.median(image[structures["lung_upper_lobe_left"]]) < -700
        assert np.median(image[structures["hip_left"]]) > 250
        assert image[0, 0, 0] < -900
        arterial.append(np.median(image[structures["aorta"]]) > 200)
    assert 0 < sum(arterial) < 8


def test_subjects_differ_and_are_reproducible():
    image, structures = subject()
    assert np.array_equal(image, subject()[0])
    assert not np.array_equal(structures["liver"], subject(1)[1]["liver"])
    gallbladders = ["gallbladder" in subject(index, shape=(16, 16, 12), spacing=(20, 20, 40))[1] for index in range(40)]
    assert 0.5 < np.mean(gallbladders) < 1


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(phantom_ct, "SHAPE", (32, 32, 24))
    monkeypatch.setattr(phantom_ct, "SPACING", (10.0, 10.0, 20.0))
    monkeypatch.setattr(phantom_ct.make_subject, "__defaults__", ((32, 32, 24), (10.0, 10.0, 20.0)))


def test_the_folders_are_those_that_are_merged(tmp_path, monkeypatch, small):
    monkeypatch.setattr("sys.argv", ["phantom_ct", "--output_dir", str(tmp_path), "--num_subjects", "5"])
    phantom_ct.main()
    assert merge(tmp_path) == {}
    labels = nib.load(tmp_path / "s0001" / "labels.nii.gz")
    assert nib.aff2axcodes(labels.affine) == ("R", "A", "S")
    assert len(np.unique(np.asarray(labels.dataobj))) >= 24
    lists = (tmp_path / "meta.csv").read_text()
    assert [lists.count(f";{split}") for split in ("train", "val", "test")] == [3, 1, 1]
