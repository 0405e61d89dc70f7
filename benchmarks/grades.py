"""Excess log loss of calibrated grades by the number of patients and the width of the priors of the fit.

Simulates networks that assume equal frequencies of two grades, are too sure or too unsure by a factor, and are off by a
constant. Each is calibrated with few patients by :func:`scripts.report.calibration.fit_grades` and judged on 2000
others, against the ideal calibration.

Example:
    python benchmarks/grades.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit, logit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import markdown  # noqa: E402
from scripts.report import calibration  # noqa: E402
from scripts.report.metrics import grade_losses  # noqa: E402


def main() -> None:
    """Print one row per number of patients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    rows = []
    for patients in (5, 13, 30, 100):
        rng = np.random.default_rng(0)
        excess = pd.DataFrame([simulate(rng, patients) for _ in range(args.repeats)])
        rows.append({"patients": patients, **excess.mean().round(3)})
    print(markdown(pd.DataFrame(rows)))


def simulate(rng: np.random.Generator, patients: int) -> dict[str, float]:
    """Excess log loss of one network with each calibration."""
    separation, share = rng.uniform(0.5, 2.5), rng.uniform(0.3, 0.8)
    temperature, offset = np.exp(rng.normal(0, 0.6)), rng.normal(0, 0.5)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        truth = (rng.random(count) < share).astype(int)
        evidence = rng.normal((2 * truth - 1) * separation / 2, 1) * separation  # log likelihood ratio
        return calibration.to_classes(expit(evidence * temperature + offset)), truth

    (prob, truth), (new, new_truth) = draw(patients), draw(2000)
    prior_bias = np.log([1 - share, share])
    ideal = (logit(new[:, 1].clip(1e-12, 1 - 1e-12)) - offset) / temperature + logit(share)
    best = grade_losses(calibration.to_classes(expit(ideal)), new_truth)["log_loss"]

    def excess(fitted: np.ndarray) -> float:
        return grade_losses(fitted, new_truth)["log_loss"] - best

    found = {"none": excess(new), "prior alone": excess(calibration.calibrate(new, 1.0, prior_bias))}
    found["temperature alone"] = excess(calibration.calibrate(new, *calibration.fit_temperature(prob, truth)))
    for calibration.PRIOR_SD in (0.25, 0.5, 1.0, 2.0):
        fitted = calibration.fit_grades(prob, truth, prior_bias)
        found[f"both, sd {calibration.PRIOR_SD:g}"] = excess(calibration.calibrate(new, *fitted))
    return found


if __name__ == "__main__":
    main()
