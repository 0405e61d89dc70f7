from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import image as mpimg

from scripts.report.plots import plot_ablation, plot_overlay, plot_reliability, plot_risk_coverage, write_overlay
from scripts.report.uncertainty import calibration_bins, risk_coverage


def test_overlay_shows_the_patients_left_on_the_right(tmp_path):
    shape = (32, 32, 3)
    image, mask = np.zeros(shape), np.zeros(shape)
    image[:, :, :] = 0.1
    image[2:6, 24:30, 1] = 1  # axes are R, A, S: this is left and anterior
    mask[2:6, 24:30, 1] = 1
    plot_overlay(image, mask[None], mask, None, "s", tmp_path / "o.png")
    picture = mpimg.imread(tmp_path / "o.png")[..., :3]
    left_panel = picture[:, : picture.shape[1] * 4 // 10]
    rows, columns = np.nonzero((left_panel[..., 0] > 0.8) & (left_panel[..., 1] < 0.2))  # the red contour
    assert rows.mean() < left_panel.shape[0] / 2
    assert columns.mean() > left_panel.shape[1] / 2


def test_diagrams_of_two_regions(tmp_path):
    rng = np.random.default_rng(0)
    prob = rng.uniform(size=(3, 1000))
    bins = np.stack([calibration_bins(p, rng.uniform(size=1000) < p) for p in prob])
    empty = np.zeros_like(bins)
    empty[:, :, 0] = 1
    risks = np.stack([risk_coverage(p, rng.uniform(size=1000) < p) for p in prob])
    plot_reliability({"TC": bins, "WT": empty}, tmp_path / "reliability.png")
    plot_risk_coverage({"TC": risks, "WT": risks / 2}, tmp_path / "risk.png")
    for name in ("reliability.png", "risk.png"):
        picture = mpimg.imread(tmp_path / name)[..., :3]
        for colour in ([31, 119, 180], [255, 127, 14]):  # a line for each region
            assert (np.abs(picture - np.array(colour) / 255).max(axis=-1) < 0.02).sum() > 20


def test_overlay_outlines_every_region(tmp_path):
    image, outer, inner = np.zeros((40, 40, 1)), np.zeros((40, 40, 1)), np.zeros((40, 40, 1))
    outer[5:35, 5:35] = inner[15:25, 15:25] = 1
    reds = []
    for masks in ([outer], [outer, inner]):
        plot_overlay(image, np.stack(masks), image, None, "s", tmp_path / "o.png")
        picture = mpimg.imread(tmp_path / "o.png")
        reds.append(((picture[..., 0] > 0.8) & (picture[..., 1] < 0.2)).sum())
    assert reds[1] > 1.2 * reds[0]


def test_ablation_has_a_dot_for_each_seed(tmp_path):
    runs = pd.DataFrame({"arm": ["a", "a", "b"], "seed": [0, 1, 0], "dice": [0.5, 0.6, 0.9], "auc": np.nan})
    plot_ablation(runs, ["dice", "auc"], tmp_path / "ablation.png")
    picture = mpimg.imread(tmp_path / "ablation.png")[..., :3]
    orange = np.abs(picture - np.array([255, 127, 14]) / 255).max(axis=-1) < 0.1
    rows, columns = np.nonzero(orange)  # the bar of the arm with two seeds
    assert len(rows) > 10
    assert rows.max() < picture.shape[0] / 2
    assert columns.max() < picture.shape[1] / 2  # the right half is the AUC, which is missing


def test_the_shown_samples_are_spread_over_all(tmp_path, item, monkeypatch):
    drawn = []
    monkeypatch.setattr("scripts.report.plots.plot_overlay", lambda *args: drawn.extend(args[-1]))
    samples = [item["label"] * (number in (0, 5, 10)) for number in range(16)]
    write_overlay(item, np.zeros((16, 16, 4)), "", tmp_path, samples)
    assert [bool(sample.any()) for sample in drawn] == [True, True, True]
