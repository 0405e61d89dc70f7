from __future__ import annotations

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from conftest import MODALITIES
from scripts.data.subjects import load_subjects
from scripts.tools.phantom import MEANS, make_dataset, make_subject


def test_written_as_brats_folders_with_grades(phantoms):
    items = load_subjects(str(phantoms), MODALITIES)
    assert len(items) == 10
    assert sum(item["grade"] == 0 for item in items) == 4
    assert list(pd.read_csv(phantoms / "name_mapping.csv").columns) == ["Grade", "BraTS_2020_subject_ID"]
    header = nib.load(items[0]["image"][0])
    assert header.shape == (32, 32, 8)
    assert nib.aff2axcodes(header.affine) == ("L", "P", "S")


def test_the_seed_fixes_every_voxel(tmp_path):
    images, segmentation = make_subject("HGG", (32, 32, 8), seed=7)
    again, same = make_subject("HGG", (32, 32, 8), seed=7)
    assert all(np.array_equal(images[m], again[m]) for m in MEANS)
    assert np.array_equal(segmentation, same)
    assert not np.array_equal(images["t1"], make_subject("HGG", (32, 32, 8), seed=8)[0]["t1"])
    for name in ("a", "b"):
        make_dataset(tmp_path / name, num_subjects=2, shape=(16, 16, 4), seed=1)
    assert (tmp_path / "a/name_mapping.csv").read_text() == (tmp_path / "b/name_mapping.csv").read_text()


@pytest.mark.parametrize("grade", ["LGG", "HGG"])
def test_anatomy(grade):
    for seed in range(5):
        images, segmentation = make_subject(grade, (48, 48, 16), seed)
        brain = images["t1"] > 0
        assert 0.15 < brain.mean() < 0.6
        assert all(np.array_equal(images[m] > 0, brain) for m in MEANS)
        assert set(np.unique(segmentation)) <= {0, 1, 2, 4}
        assert 0.02 < (segmentation > 0).sum() / brain.sum() < 0.35
        assert brain[segmentation > 0].all()
        tumour, healthy = images["flair"][segmentation > 0].mean(), images["flair"][brain & (segmentation == 0)].mean()
        assert tumour > 1.1 * healthy


def test_grading_is_neither_trivial_nor_impossible():
    share = []
    for grade in ("LGG", "HGG"):
        for seed in range(40):
            segmentation = make_subject(grade, (32, 32, 12), seed)[1]
            share.append((segmentation == 4).sum() / (segmentation > 0).sum())
    auc = roc_auc_score([0] * 40 + [1] * 40, share)
    assert 0.85 < auc < 0.999
