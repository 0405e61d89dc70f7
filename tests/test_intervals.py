from __future__ import annotations

import math

import numpy as np
import pytest

from scripts.report.intervals import with_intervals
from scripts.report.metrics import grading_scores


def mean_of(values):
    return lambda rows: {"mean": np.asarray(values)[rows].mean()}


def test_interval_of_a_mean():
    values = np.random.default_rng(0).normal(0.8, 0.1, 200)
    cell = with_intervals(mean_of(values), [str(i) for i in range(200)])["mean"]
    half = 1.96 * values.std() / math.sqrt(200)
    assert cell["value"] == pytest.approx(values.mean())
    assert cell["low"] == pytest.approx(values.mean() - half, abs=0.004)
    assert cell["high"] == pytest.approx(values.mean() + half, abs=0.004)


def test_rows_of_a_patient_are_drawn_together():
    """Copies of a patient's picture add no information, so they must not narrow the interval."""
    values = np.random.default_rng(0).normal(0.8, 0.1, 20)
    patients = [str(i) for i in range(20)]
    once = with_intervals(mean_of(values), patients)["mean"]
    five_times = with_intervals(mean_of(np.repeat(values, 5)), np.repeat(patients, 5))["mean"]
    assert five_times == pytest.approx(once)
    as_if_independent = with_intervals(mean_of(np.repeat(values, 5)), [str(i) for i in range(100)])["mean"]
    ratio = (five_times["high"] - five_times["low"]) / (as_if_independent["high"] - as_if_independent["low"])
    assert ratio == pytest.approx(math.sqrt(5), rel=0.15)


def test_interval_of_undefined_and_of_one_subject():
    assert with_intervals(mean_of([0.5]), ["a"]) == {"mean": {"value": 0.5, "low": None, "high": None}}
    grade, prob = np.array([1, 1, 1]), np.array([[0.4, 0.6], [0.3, 0.7], [0.7, 0.3]])
    cells = with_intervals(lambda rows: grading_scores(grade[rows], prob[rows], ["LGG", "HGG"]), ["a", "b", "c"])
    assert cells["auc"] == {"value": None, "low": None, "high": None}
    assert cells["accuracy"]["low"] < cells["accuracy"]["value"] < cells["accuracy"]["high"]
