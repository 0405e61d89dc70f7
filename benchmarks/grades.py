"""Log loss of calibrated grades, less that of the class frequencies alone, by the number of patients and the prior.

Simulates networks that assume equal frequencies of two grades and are off by a constant. Those that learned something
are too sure or too unsure by a factor; those that learned nothing give random grades. Each network is calibrated with
few patients by :func:`scripts.calibration.grades.fit_grades` and judged on 2000 others. Below 0 the grade is worth more
than the frequencies.

Example:
    python benchmarks/grades.py
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import markdown  # noqa: E402
from scripts.calibration.fits import calibrate, fit_temperature, to_classes  # noqa: E402
from scripts.calibration.grades import fit_grades  # noqa: E402
from scripts.report.metrics import grade_losses  # noqa: E402


def main() -> None:
    """Print one row per number of patients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    rows = []
    for learned, patients in itertools.product((True, False), (5, 10, 30, 100)):
        rng = np.random.default_rng(0)
        excess = pd.DataFrame([simulate(rng, patients, learned) for _ in range(args.repeats)])
        kind = "something" if learned else "nothing"
        rows.append({"learned": kind, "patients": patients, **excess.mean().round(3)})
    print(markdown(pd.DataFrame(rows)))


def simulate(rng: np.random.Generator, patients: int, learned: bool) -> dict[str, float]:
    """Log loss of one network with each calibration, less that of the class frequencies."""
    separation, share = rng.uniform(0.5, 2.5), rng.uniform(0.3, 0.8)
    factor, offset = np.exp(rng.normal(0, 0.6)), rng.normal(0, 0.5)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        truth = (rng.random(count) < share).astype(int)
        centre = (2 * truth - 1) * separation / 2 if learned else 0
        evidence = rng.normal(centre, 1, count) * separation  # the log likelihood ratio of what was learned
        return to_classes(expit(evidence * factor + offset)), truth

    (prob, truth), (new, new_truth) = draw(patients), draw(2000)
    prior_bias = np.log([1 - share, share])
    frequencies = grade_losses(np.tile([1 - share, share], (len(new_truth), 1)), new_truth)["log_loss"]

    def excess(fitted: np.ndarray) -> float:
        return grade_losses(fitted, new_truth)["log_loss"] - frequencies

    found = {"as it is": excess(new), "prior alone": excess(calibrate(new, 1.0, prior_bias))}
    found["temperature alone"] = excess(calibrate(new, *fit_temperature(prob, truth)))
    for slope in ((1.0, 0.3), (1.0, 0.5), (0.7, 0.4), (0.5, 0.5)):
        fitted = fit_grades(prob, truth, prior_bias, slope)[:2]
        name = "slope {:g} +- {:g}".format(*slope)
        found[name] = excess(calibrate(new, *fitted))
    return found


if __name__ == "__main__":
    main()
