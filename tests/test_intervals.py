from __future__ import annotations

import math

import numpy as np
import pytest

from scripts.report.intervals import with_intervals
from scripts.report.metrics import grading_scores


def test_interval_of_a_mean():
    values = np.random.default_rng(0).normal(0.8, 0.1, 200)
    cell = with_intervals(lambda v: {"mean": v.mean()}, values)["mean"]
    half = 1.96 * values.std() / math.sqrt(200)
    assert cell["value"] == pytest.approx(values.mean())
    assert cell["low"] == pytest.approx(values.mean() - half, abs=0.004)
    assert cell["high"] == pytest.approx(values.mean() + half, abs=0.004)


def test_interval_of_undefined_and_of_one_subject():
    one = with_intervals(lambda v: {"mean": v.mean()}, [0.5])
    assert one == {"mean": {"value": 0.5, "low": None, "high": None}}
    grade, prob = np.array([1, 1, 1]), np.array([[0.4, 0.6], [0.3, 0.7], [0.7, 0.3]])
    cells = with_intervals(lambda rows: grading_scores(grade[rows], prob[rows], ["LGG", "HGG"]), range(3))
    assert cells["auc"] == {"value": None, "low": None, "high": None}
    assert cells["accuracy"]["low"] < cells["accuracy"]["value"] < cells["accuracy"]["high"]
