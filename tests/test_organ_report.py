from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scripts.organs.plots import plot_preview, plot_structures
from scripts.organs.report import structure_rows, summary
from scripts.organs.structures import numbers

STRUCTURES = ["spleen", "liver", "heart"]
SPLEEN, LIVER, HEART = numbers(STRUCTURES)
SPACING = (1.0, 1.0, 2.0)


def cube(number, shift=0, size=8):
    labels = np.zeros((20, 20, 12), np.uint8)
    labels[4 + shift : 4 + shift + size, 4 : 4 + size, 3:7] = number
    return labels


def rows_of(pred, truth, prior=None):
    prior = np.zeros_like(truth) if prior is None else prior
    return {row["structure"]: row for row in structure_rows(pred, truth, prior, SPACING, STRUCTURES)}


def test_a_perfect_prediction_scores_exactly_1_whatever_is_absent():
    rows = rows_of(cube(LIVER), cube(LIVER), cube(LIVER))
    assert list(rows) == ["liver"]
    row = rows["liver"]
    assert (row["dice"], row["nsd"], row["hd95"], row["prior_dice"]) == (1.0, 1.0, 0.0, 1.0)
    assert row["volume_mm3"] == row["true_volume_mm3"] == 8 * 8 * 4 * 2.0
    assert not row["invented"]
    assert not row["missed"]


def test_a_shift_has_the_distances_of_its_spacing():
    row = rows_of(cube(LIVER, shift=4), cube(LIVER))["liver"]
    assert row["dice"] == pytest.approx(0.5)
    assert row["hd95"] == pytest.approx(4.0)
    assert 0 < row["nsd"] < 1
    assert rows_of(cube(LIVER, shift=2), cube(LIVER))["liver"]["nsd"] == 1.0  # within 3 mm


def test_missed_and_invented_structures():
    rows = rows_of(cube(HEART), cube(LIVER))
    assert (rows["liver"]["missed"], rows["liver"]["dice"], rows["liver"]["nsd"]) == (True, 0.0, 0.0)
    assert rows["heart"]["invented"]
    assert np.isnan(
        [rows["liver"]["hd95"], rows["heart"]["dice"], rows["heart"]["nsd"], rows["heart"]["prior_dice"]]
    ).all()


def test_the_summary_averages_what_is_defined():
    table = []
    for subject, pred, truth in [
        ("a", cube(LIVER), cube(LIVER)),
        ("b", cube(LIVER, 4), cube(LIVER)),
        ("c", cube(HEART), cube(SPLEEN)),
    ]:
        table += [{"subject": subject, "patient": subject} | row for row in rows_of(pred, truth).values()]
    found = summary(pd.DataFrame(table), STRUCTURES)
    assert found["subjects"] == 3
    liver, spleen, heart = (found["structures"][name] for name in ("liver", "spleen", "heart"))
    assert liver["dice"]["value"] == pytest.approx(0.75)
    assert liver["subjects"] == 2
    assert (spleen["dice"]["value"], spleen["missed"]) == (0.0, 1)
    assert (heart["dice"]["value"], heart["invented"], heart["subjects"]) == (None, 1, 0)
    assert found["mean over structures"]["dice"]["value"] == pytest.approx((0.75 + 0) / 2)
    assert liver["dice"]["low"] <= 0.75 <= liver["dice"]["high"]


def test_pictures(tmp_path):
    """An empty prediction and any orientation can be drawn."""
    image = np.random.default_rng(0).normal(0, 100, (20, 20, 12))
    for name, affine in (("a", np.diag([1.0, 1, 2, 1])), ("b", np.diag([-1.0, -1, 2, 1])[[0, 2, 1, 3]])):
        plot_preview(image, np.zeros(image.shape, np.uint8), affine, "s1", tmp_path / f"{name}.png")
        plot_preview(image, cube(LIVER), affine, "s1", tmp_path / f"{name}_truth.png", cube(SPLEEN))
    table = pd.DataFrame([{"subject": "a", "patient": "a"} | row for row in rows_of(cube(LIVER), cube(LIVER)).values()])
    plot_structures(summary(table, STRUCTURES)["structures"], tmp_path / "structures.png")
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())


def test_the_patients_right_is_on_the_left_of_the_picture(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("scripts.organs.plots._draw_slice", lambda axes, image, labels, spacing: drawn.append(labels))
    labels = np.zeros((20, 20, 12), np.uint8)
    labels[15:, :, :] = LIVER  # in LPS the last voxels are on the left of the patient
    plot_preview(np.zeros(labels.shape), labels, np.diag([-1.0, -1, 2, 1]), "s1", tmp_path / "a.png")
    axial = drawn[0]
    assert (axial[:5] == LIVER).all()  # towards the right, so on the right of the mirrored picture
    assert not axial[5:].any()
