from __future__ import annotations

import pandas as pd
import pytest
import torch
from monai.data import MetaTensor

from scripts.data.grades import grade_names
from scripts.data.regions import LabelToRegionsd, RegionCoding
from scripts.report.tables import GradeTable, estimates, grade_row

TO_WT = LabelToRegionsd("pred", RegionCoding(["WT"], {"WT": [1]}))


def test_grades_csv(tmp_path, item, evaluate_items):
    table = GradeTable(str(tmp_path), {"LGG": 0, "HGG": 1}, ["WT"], ["t1"], TO_WT)
    del item["label"]
    items = []
    for name, prob in (("s1", [0.3, 0.7]), ("s2", [0.8, 0.2]), ("s3", None)):
        found = {key: value for key, value in item.items() if key != "grade_prob"}
        found |= {"subject": name} | ({} if prob is None else {"grade_prob": torch.tensor(prob)})
        items.append(found)
    evaluate_items(table, items)
    written = pd.read_csv(tmp_path / "grades.csv", keep_default_na=False)
    assert written[["subject", "prob_LGG", "prob_HGG", "grade"]].to_numpy().tolist() == [
        ["s1", "0.3", "0.7", "HGG"], ["s2", "0.8", "0.2", "LGG"], ["s3", "", "", ""]
    ]  # fmt: skip
    assert list(written.columns[4:]) == [
        "prior_LGG", "prior_HGG", "volume_expected_ml_WT", "volume_low_ml_WT", "volume_high_ml_WT",
        "volume_from_WT", "expected_dice_WT", "sample_dice_WT"
    ]  # fmt: skip
    assert written["volume_high_ml_WT"].tolist() == pytest.approx([4 * 4 * 2 * 8 / 1000] * 3)


def test_the_reasons_of_a_grade_are_written_the_strongest_first(tmp_path, item, evaluate_items):
    table = GradeTable(str(tmp_path), {"LGG": 0, "HGG": 1}, ["WT"], ["t1"], TO_WT)
    del item["label"]
    added = torch.zeros(2, 13)
    added[1, [0, 2, 11]] = torch.tensor([0.5, -2.0, 1.0])
    graded = {"grade_prob": torch.tensor([0.3, 0.7]), "measurements": torch.arange(12.0), "grade_reasons": added}
    evaluate_items(table, [item | {"subject": "s1"} | graded, item | {"subject": "s2"}])
    written = pd.read_csv(tmp_path / "grade_reasons.csv")
    assert written["reason"].tolist() == ["WT size", "WT t1 deviation", "grading head"]
    assert written["subject"].tolist() == ["s1"] * 3
    assert written["value"].tolist()[:2] == [1, 10]
    assert written["for_HGG"].tolist() == [-2, 1, 0.5]
    assert table.answer(item | graded)["reasons"][0]["reason"] == "WT size"
    assert "reasons" not in table.answer(item)
    evaluate_items(table, [item | {"subject": "s2"}])
    assert not (tmp_path / "grade_reasons.csv").exists()  # that of the run before is gone


def test_volumes_can_be_those_of_the_samples(item):
    voxel = 8 / 1000
    assert estimates(item, ["WT"])["volume_from_WT"] == "levels"
    sampled = item | {"volumes_from": torch.tensor(1), "sample_volumes": torch.tensor([10.0, 20, 30, 40, 50])}
    row = estimates(sampled, ["WT"])
    assert row["volume_from_WT"] == "samples"
    assert row["volume_expected_ml_WT"] == pytest.approx(30 * voxel)
    assert row["volume_low_ml_WT"] == pytest.approx(12 * voxel)
    assert row["volume_high_ml_WT"] == pytest.approx(48 * voxel)
    assert row["expected_dice_WT"] == estimates(item, ["WT"])["expected_dice_WT"]


def test_the_calibration_says_which_dice_to_expect(item):
    """Without one, the level sets of the probability say it."""
    row = estimates(item, ["WT"])
    assert row["expected_dice_WT"] == pytest.approx(0.9)
    calibrated = item | {"expected_dice": torch.tensor([0.25])}
    assert estimates(calibrated, ["WT"]) == row | {"expected_dice_WT": 0.25}


def test_inference_outlines_the_regions_of_its_label_map(tmp_path, item, monkeypatch, evaluate_items):
    """The label values do not matter: here 255 is the background."""
    drawn = []
    monkeypatch.setattr("scripts.report.plots.plot_overlay", lambda image, pred, *rest: drawn.append(pred))
    label = item.pop("label")
    item["pred"] = MetaTensor(torch.where(label.as_tensor() > 0, 0, 255), meta=label.meta)
    to_regions = LabelToRegionsd(
        "pred", RegionCoding(["disc", "cup"], {"disc": [128, 0], "cup": [0]}, background_label=255)
    )
    table = GradeTable(str(tmp_path), {"LGG": 0, "HGG": 1}, ["WT"], ["t1"], to_regions)
    evaluate_items(table, [item])
    assert drawn[0].shape == (2, 16, 16, 4)
    assert drawn[0].sum(axis=(1, 2, 3)).tolist() == [32, 32]


@pytest.mark.parametrize(("prob", "grade"), [([0.8, 0.2], "G2"), ([0.3, 0.7], "G3/G4")])
def test_grades_that_share_a_class_are_named_together(item, prob, grade):
    row = grade_row(item | {"grade_prob": torch.tensor(prob)}, ["WT"], grade_names({"G2": 0, "G3": 1, "G4": 1}))
    assert row["grade"] == grade
    assert row["prob_G3/G4"] == pytest.approx(prob[1])


def test_three_grades(item):
    three = {"grade_prob": torch.tensor([0.2, 0.3, 0.5]), "grade_prior": torch.ones(3) / 3}
    row = grade_row(item | three, ["WT"], ["G2", "G3", "G4"])
    assert row["grade"] == "G4"
    assert [row[f"prob_{name}"] for name in ("G2", "G3", "G4")] == pytest.approx([0.2, 0.3, 0.5])
