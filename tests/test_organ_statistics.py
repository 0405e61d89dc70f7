from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from conftest import SHARED_DATA
from scripts.organs.statistics import structure_statistics
from scripts.organs.structures import catalogue
from scripts.organs.writing import label_table


def test_volume_mean_and_border():
    labels, image = np.zeros((6, 6, 6), np.uint8), np.full((6, 6, 6), -1000.0)
    labels[1:3, 1:3, 1:3], image[1:3, 1:3, 1:3] = catalogue()["liver"]["number"], 60
    labels[5, 2, 2], image[5, 2, 2] = catalogue()["aorta"]["number"], 300
    found = structure_statistics(labels, image, np.diag([2.0, 2.0, 3.0, 1.0]))
    assert found["liver"] == {"volume_mm3": 96.0, "mean_hu": 60.0, "touches_border": False}
    assert found["aorta"] == {"volume_mm3": 12.0, "mean_hu": 300.0, "touches_border": True}
    assert found["heart"] == {"volume_mm3": 0.0, "mean_hu": 0.0, "touches_border": False}


@pytest.mark.skipif(not (SHARED_DATA / "totalsegmentator").is_dir(), reason="needs ../shared/data/totalsegmentator")
def test_the_statistics_of_totalsegmentator_from_its_own_label_map():
    """Volumes are exact and HU agree to 1e-4, for all 117 names."""
    folder = SHARED_DATA / "totalsegmentator"
    labels, image = (nib.load(folder / name) for name in ("example_seg_fast.nii.gz", "example_ct_sm.nii.gz"))
    found = structure_statistics(np.asarray(labels.dataobj), image.get_fdata(), image.affine)
    published = json.loads((folder / "example_seg_fast" / "statistics.json").read_text())
    assert list(found) == list(published)
    for name, values in published.items():
        assert found[name]["volume_mm3"] == values["volume"]
        assert found[name]["mean_hu"] == pytest.approx(values["intensity"], abs=1e-4)


@pytest.mark.skipif(not (SHARED_DATA / "totalsegmentator").is_dir(), reason="needs ../shared/data/totalsegmentator")
def test_the_names_in_the_header_are_written_as_totalsegmentator_does():
    import xml.etree.ElementTree as ElementTree

    published = (
        nib.load(SHARED_DATA / "totalsegmentator" / "example_seg_fast.nii.gz").header.extensions[0].get_content()
    )
    theirs, ours = (ElementTree.fromstring(text) for text in (published, label_table(set(range(1, 118)))))
    labels = [{label.get("Key"): label.text for label in root.iter("Label")} for root in (theirs, ours)]
    assert labels[0].items() <= labels[1].items()
