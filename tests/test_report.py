from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import image as mpimg
from monai.data import MetaTensor

from scripts.report import GradeTable, SubjectReport, plot_overlay, summarise


@pytest.fixture
def item(tmp_path):
    """An evaluated subject with a truth of 4 x 4 x 2 voxels, stored as L, P, S with 2 mm voxels."""
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    file = tmp_path / "s1" / "s1_t1.nii.gz"
    file.parent.mkdir()
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(16, 16, 4)).astype(np.float32), affine), file)
    label = torch.zeros(1, 16, 16, 4)
    label[:, 2:6, 3:7, 1:3] = 1

    def meta(array):
        return MetaTensor(array, affine=affine, meta={"filename_or_obj": str(file)})

    return {
        "subject": "s1",
        "grade": 1,
        "hgg_prob": 0.7,
        "label": meta(label),
        "pred": meta(label.clone()),
        "uncertainty": meta(0.5 * label),
    }


def test_evaluation_files(tmp_path, item):
    report = SubjectReport(str(tmp_path / "out"), ["WT"], {"subset": "all"})
    state = SimpleNamespace(state=SimpleNamespace(output=[item]))
    report.started(state)
    report.iteration_completed(state)
    report.iteration_completed(SimpleNamespace(state=SimpleNamespace(output=[item | {"subject": "s2", "grade": -1}])))
    report.completed(state)
    table = pd.read_csv(tmp_path / "out" / "subjects.csv")
    assert table["subject"].tolist() == ["s1", "s2"]
    assert table["dice_WT"].tolist() == [1, 1]
    assert table["true_volume_ml_WT"].tolist() == pytest.approx([4 * 4 * 2 * 8 / 1000] * 2)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["graded_subjects"] == 1
    assert summary["grading"]["auc"]["value"] is None
    assert summary["segmentation"]["WT"]["dice"]["mean"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert (tmp_path / "out" / "overlays" / "s1_overlay.png").is_file()


def test_grades_csv(tmp_path, item):
    table = GradeTable(str(tmp_path), {"LGG": 0, "HGG": 1})
    table.started(None)
    del item["label"]
    for name, prob in (("s1", 0.7), ("s2", 0.2), ("s3", float("nan"))):
        table.iteration_completed(
            SimpleNamespace(state=SimpleNamespace(output=[item | {"subject": name, "hgg_prob": prob}]))
        )
    assert (tmp_path / "grades.csv").read_text().splitlines() == [
        "subject,hgg_prob,grade",
        "s1,0.7,HGG",
        "s2,0.2,LGG",
        "s3,,",
    ]


def test_grades_that_share_a_class_are_named_together(tmp_path):
    assert GradeTable(str(tmp_path), {"G2": 0, "G3": 1, "G4": 1}).names == ["G2", "G3/G4"]


def test_overlay_shows_the_patients_left_on_the_right(tmp_path):
    shape = (32, 32, 3)
    image, mask = np.zeros(shape), np.zeros(shape)
    image[:, :, :] = 0.1
    image[2:6, 24:30, 1] = 1  # axes point right, anterior, superior: this is left, anterior
    mask[2:6, 24:30, 1] = 1
    plot_overlay(image, mask, mask, None, "s", tmp_path / "o.png")
    picture = mpimg.imread(tmp_path / "o.png")[..., :3]
    left_panel = picture[:, : picture.shape[1] * 4 // 10]
    rows, columns = np.nonzero((left_panel[..., 0] > 0.8) & (left_panel[..., 1] < 0.2))  # the red contour
    assert rows.mean() < left_panel.shape[0] / 2
    assert columns.mean() > left_panel.shape[1] / 2


def test_summary_of_several_regions():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"grade": [0, 1] * 10, "hgg_prob": [0.2, 0.9] * 10})
    for name in ("dice", "iou", "hd95"):
        for region in ("TC", "WT"):
            table[f"{name}_{region}"] = rng.uniform(size=20)
    summary = summarise(table, ["TC", "WT"])
    assert set(summary["segmentation"]) == {"TC", "WT"}
    assert summary["grading"]["auc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    cell = summary["segmentation"]["WT"]["dice"]["mean"]
    assert cell["low"] < cell["value"] < cell["high"]
