from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from scripts.report.evaluation import SubjectReport, format_summary, summarise
from scripts.report.results import ResultsFile
from scripts.report.uncertainty import calibration_bins, region_of_interest

GRADES = {"LGG": 0, "HGG": 1}


def results(folder, dataset="d", model="m", gt_dir="g"):
    return ResultsFile(str(folder / "evaluation_results.json"), dataset, model, gt_dir)


def test_evaluation_files(tmp_path, item, evaluate_items):
    report = SubjectReport(str(tmp_path / "out"), ["WT"], GRADES, {"chosen_by": 1}, results(tmp_path), r"(s)\d")
    evaluate_items(report, [item, item | {"subject": "s2", "grade": -1}])
    table = pd.read_csv(tmp_path / "out" / "subjects.csv")
    assert table["subject"].tolist() == ["s1", "s2"]
    assert table["dice_WT"].tolist() == [1, 1]
    assert table["true_volume_ml_WT"].tolist() == pytest.approx([4 * 4 * 2 * 8 / 1000] * 2)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["graded_subjects"] == 1
    assert (summary["subjects"], summary["patients"]) == (2, 1)
    assert "1 of them chose the weights" in format_summary(summary)
    assert summary["grading"]["auc"]["value"] is None
    assert summary["segmentation"]["WT"]["dice"]["mean"] == {"value": 1.0, "low": None, "high": None}
    for name in ("overlays/s1_overlay.png", "reliability.png", "risk_coverage.png", "grade_calibration.png"):
        assert (tmp_path / "out" / name).is_file()


def test_evaluation_judges_uncertainty(tmp_path, item, evaluate_items):
    wrong = item["pred"].clone()
    wrong[:, 2, 3, 1:3] = 0  # 2 voxels are missed and have uncertainty 1
    unsure = item["uncertainty"].clone()
    unsure[:, 2, 3, 1:3] = 1
    report = SubjectReport(str(tmp_path / "out"), ["WT"], GRADES, {}, results(tmp_path))
    (row,) = evaluate_items(report, [item | {"pred": wrong, "uncertainty": unsure}])
    assert row["error_auroc_WT"] == 1
    share = share_of_lesion(item)  # its probability is 0.92, that of the other voxels 0.02
    assert row["ece_lesion_WT"] == pytest.approx(0.08 * share + 0.02 * (1 - share), abs=1e-3)
    assert row["volume_low_ml_WT"] == 0  # no probability exceeds 0.95
    assert row["volume_high_ml_WT"] == pytest.approx(row["true_volume_ml_WT"])
    assert row["sample_dice_WT"] == 0.75
    scores = json.loads((tmp_path / "out" / "summary.json").read_text())["uncertainty"]["WT"]
    assert scores["volume_coverage"]["value"] == 1
    assert scores["ece_lesion"]["value"] == pytest.approx(row["ece_lesion_WT"])
    assert scores["quality_rank"]["value"] is None  # undefined for one subject


def share_of_lesion(item):
    label = np.asarray(item["label"][0]) > 0
    return label.sum() / region_of_interest(label, label).sum()


def test_summary_of_several_regions():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"grade": [0, 1] * 10, "prob_LGG": [0.8, 0.1] * 10, "prob_HGG": [0.2, 0.9] * 10})
    table = table.assign(prior_LGG=0.5, prior_HGG=0.5, patient=[str(i) for i in range(20)])
    for name in ("dice", "iou", "hd95", "expected_dice", "brier", "error_auroc", "aurc"):
        for region in ("TC", "WT"):
            table[f"{name}_{region}"] = rng.uniform(size=20)
    table["expected_dice_TC"] = table["dice_TC"] ** 2
    table["covered_TC"], table["covered_WT"] = np.nan, [1.0] * 17 + [0.0] * 3
    prob = rng.uniform(size=(20, 1000))
    keys = [f"{region} {voxels}" for region in ("TC", "WT") for voxels in ("foreground", "lesion")]
    bins = {key: np.stack([calibration_bins(p, p > 0.5) for p in prob]) for key in keys}
    summary = summarise(table, ["TC", "WT"], ["LGG", "HGG"], bins)
    assert summary["uncertainty"]["TC"]["quality_rank"]["value"] == pytest.approx(1)
    error = (table["dice_TC"] - table["dice_TC"] ** 2).mean()
    assert summary["uncertainty"]["TC"]["quality_error"]["value"] == pytest.approx(error)
    assert summary["uncertainty"]["TC"]["ece_foreground"]["value"] == pytest.approx(0.25, abs=0.01)
    assert summary["uncertainty"]["WT"]["volume_coverage"]["value"] == pytest.approx(0.85)
    assert summary["uncertainty"]["TC"]["volume_coverage"] == {"value": None, "low": None, "high": None}
    expected = -(math.log(0.8) + math.log(0.9)) / 2
    assert summary["grading"]["log_loss"]["value"] == pytest.approx(expected)
    assert summary["grading"]["log_loss_of_prior"]["value"] == pytest.approx(math.log(2))
    assert set(summary["segmentation"]) == {"TC", "WT"}
    assert summary["grading"]["auc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    cell = summary["segmentation"]["WT"]["dice"]["mean"]
    assert cell["low"] < cell["value"] < cell["high"]


def test_a_task_without_grades(tmp_path, item, evaluate_items):
    """Columns and scores come from the task: an item needs no grade."""
    report = SubjectReport(str(tmp_path / "out"), ["WT"], None, {}, results(tmp_path))
    for key in ("grade", "grade_prob", "grade_prior"):
        del item[key]
    evaluate_items(report, [item])
    table = pd.read_csv(tmp_path / "out" / "subjects.csv")
    assert not [name for name in table if "grade" in name or "prob" in name]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["grading"] == {}
    assert summary["segmentation"]["WT"]["dice"]["mean"]["value"] == 1
