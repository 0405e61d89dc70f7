from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import MetaTensor

from scripts.config import InputError
from scripts.report import GradeTable, SubjectReport, grade_row, summarise
from scripts.results import ResultsFile
from scripts.transforms import LabelToRegionsd
from scripts.uncertainty import calibration_bins, region_of_interest

TO_WT = LabelToRegionsd("pred", ["WT"], {"WT": [1]})


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
        "prob": meta(0.02 + 0.9 * label),
        "uncertainty": meta(0.5 * label),
        "sample_dice": torch.tensor([0.75]),
        "to_brain": torch.tensor([1.0]),
    }


def results(folder, dataset="d", model="m", gt_dir="g"):
    return ResultsFile(str(folder / "evaluation_results.json"), dataset, model, gt_dir)


def test_evaluation_files(tmp_path, item):
    report = SubjectReport(str(tmp_path / "out"), ["WT"], {"subset": "all"}, results(tmp_path))
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
    for name in ("overlays/s1_overlay.png", "reliability.png", "risk_coverage.png"):
        assert (tmp_path / "out" / name).is_file()


def test_evaluation_judges_uncertainty(tmp_path, item):
    wrong = item["pred"].clone()
    wrong[:, 2, 3, 1:3] = 0  # 2 voxels are missed, with full uncertainty
    unsure = item["uncertainty"].clone()
    unsure[:, 2, 3, 1:3] = 1
    report = SubjectReport(str(tmp_path / "out"), ["WT"], {}, results(tmp_path))
    engine = SimpleNamespace(state=SimpleNamespace(output=[item | {"pred": wrong, "uncertainty": unsure}]))
    report.started(engine)
    report.iteration_completed(engine)
    row = report.rows[0]
    assert row["error_auroc_WT"] == 1
    share = share_of_lesion(item)  # it has probability 0.92, all else 0.02
    assert row["ece_lesion_WT"] == pytest.approx(0.08 * share + 0.02 * (1 - share), abs=1e-3)
    assert row["volume_low_ml_WT"] == 0  # no voxel is as sure as 0.95
    assert row["volume_high_ml_WT"] == pytest.approx(row["true_volume_ml_WT"])
    assert row["sample_dice_WT"] == 0.75
    report.completed(engine)
    scores = json.loads((tmp_path / "out" / "summary.json").read_text())["uncertainty"]["WT"]
    assert scores["volume_coverage"]["value"] == 1
    assert scores["ece_lesion"]["value"] == pytest.approx(row["ece_lesion_WT"])
    assert scores["quality_rank"]["value"] is None  # one subject has no rank


def share_of_lesion(item):
    label = np.asarray(item["label"][0]) > 0
    return label.sum() / region_of_interest(label, label).sum()


def test_grades_csv(tmp_path, item):
    table = GradeTable(str(tmp_path), {"LGG": 0, "HGG": 1}, ["WT"], TO_WT)
    table.started(None)
    del item["label"]
    for name, prob in (("s1", 0.7), ("s2", 0.2), ("s3", float("nan"))):
        table.iteration_completed(
            SimpleNamespace(state=SimpleNamespace(output=[item | {"subject": name, "hgg_prob": prob}]))
        )
    written = pd.read_csv(tmp_path / "grades.csv", keep_default_na=False)
    assert written[["subject", "hgg_prob", "grade"]].to_numpy().tolist() == [
        ["s1", "0.7", "HGG"], ["s2", "0.2", "LGG"], ["s3", "", ""]
    ]  # fmt: skip
    assert list(written.columns[3:]) == [
        "volume_expected_ml_WT", "volume_low_ml_WT", "volume_high_ml_WT", "expected_dice_WT", "sample_dice_WT"
    ]  # fmt: skip
    assert written["volume_high_ml_WT"].tolist() == pytest.approx([4 * 4 * 2 * 8 / 1000] * 3)


def test_inference_outlines_the_regions_of_its_label_map(tmp_path, item, monkeypatch):
    """Whatever values they have: here 255 is background."""
    drawn = []
    monkeypatch.setattr("scripts.report.plot_overlay", lambda image, pred, *rest: drawn.append(pred))
    label = item.pop("label")
    item["pred"] = MetaTensor(torch.where(label.as_tensor() > 0, 0, 255), meta=label.meta)
    to_regions = LabelToRegionsd("pred", ["disc", "cup"], {"disc": [128, 0], "cup": [0]}, background_label=255)
    table = GradeTable(str(tmp_path), {"LGG": 0, "HGG": 1}, ["WT"], to_regions)
    table.started(None)
    table.iteration_completed(SimpleNamespace(state=SimpleNamespace(output=[item])))
    assert drawn[0].shape == (2, 16, 16, 4)
    assert drawn[0].sum(axis=(1, 2, 3)).tolist() == [32, 32]


def test_grades_that_share_a_class_are_named_together(item):
    grades = [grade_row(item | {"hgg_prob": p}, ["WT"], {"G2": 0, "G3": 1, "G4": 1})["grade"] for p in (0.2, 0.7)]
    assert grades == ["G2", "G3/G4"]


def test_summary_of_several_regions():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"grade": [0, 1] * 10, "hgg_prob": [0.2, 0.9] * 10})
    columns = ["dice", "iou", "hd95", "true_volume_ml", "volume_low_ml", "volume_high_ml", "expected_dice"]
    for name in [*columns, "brier", "error_auroc", "aurc"]:
        for region in ("TC", "WT"):
            table[f"{name}_{region}"] = rng.uniform(size=20)
    table["expected_dice_TC"] = table["dice_TC"] ** 2
    prob = rng.uniform(size=(20, 1000))
    keys = [f"{region} {voxels}" for region in ("TC", "WT") for voxels in ("brain", "lesion")]
    bins = {key: np.stack([calibration_bins(p, p > 0.5) for p in prob]) for key in keys}
    summary = summarise(table, ["TC", "WT"], bins)
    assert summary["uncertainty"]["TC"]["quality_rank"]["value"] == pytest.approx(1)
    assert summary["uncertainty"]["TC"]["ece_brain"]["value"] == pytest.approx(0.25, abs=0.01)
    inside = table.eval("volume_low_ml_WT <= true_volume_ml_WT <= volume_high_ml_WT").mean()
    assert summary["uncertainty"]["WT"]["volume_coverage"]["value"] == pytest.approx(inside)
    assert set(summary["segmentation"]) == {"TC", "WT"}
    assert summary["grading"]["auc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    cell = summary["segmentation"]["WT"]["dice"]["mean"]
    assert cell["low"] < cell["value"] < cell["high"]


def test_results_of_several_models_share_a_file(tmp_path):
    table = pd.DataFrame(
        {"dice_disc": [0.8, 1.0], "iou_disc": [0.7, 0.9], "dice_cup": [0.5, 0.7], "iou_cup": [0.3, 0.5]}
    )
    results(tmp_path, model="A").write(table, ["disc"])
    results(tmp_path, model="B").write(table, ["disc", "cup"])
    results(tmp_path, model="A").write(table[1:], ["disc"])
    content = json.loads((tmp_path / "evaluation_results.json").read_text())
    assert list(content) == ["dataset", "threshold", "evaluation_models", "gt_dir", "results"]
    assert [content[key] for key in ("dataset", "threshold", "gt_dir")] == ["d", 0.5, "g"]
    assert content["evaluation_models"] == ["A", "B"]
    assert content["results"]["A"] == {"dice": 1.0, "iou": 0.9, "num_samples": 1}
    both = content["results"]["B"]
    assert (both["dice"], both["iou"], both["num_samples"]) == (pytest.approx(0.75), pytest.approx(0.6), 2)
    assert both["regions"]["cup"] == {"dice": pytest.approx(0.6), "iou": pytest.approx(0.4)}


@pytest.mark.parametrize(
    ("other", "message"), [({"dataset": "e"}, "of dataset 'd', not 'e'"), ({"gt_dir": "h"}, "'h'")]
)
def test_results_of_another_data_set_are_not_mixed(tmp_path, other, message):
    results(tmp_path).write(pd.DataFrame({"dice_a": [1.0], "iou_a": [1.0]}), ["a"])
    with pytest.raises(InputError, match=message):
        results(tmp_path, **other)


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_file_that_holds_no_results_is_not_replaced(tmp_path, text):
    (tmp_path / "evaluation_results.json").write_text(text)
    with pytest.raises(InputError, match="not a file of results"):
        results(tmp_path)
