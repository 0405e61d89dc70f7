"""Scores of all folds of a cross-validation together: every subject is judged by the weights that never saw it.

Example:
    python benchmarks/folds.py runs/tcga/fold*/evaluate
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import markdown  # noqa: E402
from scripts.report.intervals import with_intervals  # noqa: E402
from scripts.report.metrics import grade_losses, grading_scores, mean_of_defined  # noqa: E402


def main() -> None:
    """Print each score with its 95 % interval over patients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output_dir of each fold's evaluation")
    parser.add_argument("--subjects", nargs="+", help="only these subjects")
    args = parser.parse_args()
    table = pd.concat([pd.read_csv(folder / "subjects.csv", dtype={"patient": str}) for folder in args.folders])
    if repeated := table["subject"][table["subject"].duplicated()].tolist():
        parser.error(f"in several folds: {repeated[:3]}")
    if args.subjects:
        table = table[table["subject"].isin(args.subjects)]
    print(f"{len(table)} subjects of {table['patient'].nunique()} patients")
    print(markdown(pd.DataFrame(rows(table.reset_index(drop=True)))))


def rows(table: pd.DataFrame) -> list[dict]:
    """One row per score."""
    names = [
        name
        for prefix in ("dice_", "hd95_", "expected_dice_", "covered_", "ece_lesion_", "error_auroc_")
        for name in table
        if name.startswith(prefix)
    ]
    found = with_intervals(
        lambda r: {name: mean_of_defined(table[name].to_numpy()[r]) for name in names}, table["patient"]
    )
    found |= with_intervals(
        lambda r: {f"median {n}": float(table[n].iloc[r].median()) for n in names if n.startswith("dice_")},
        table["patient"],
    )
    grades = [name.removeprefix("prob_") for name in table if name.startswith("prob_")]
    graded = table[table["grade"] >= 0].dropna(subset=[f"prob_{name}" for name in grades]) if grades else table[:0]
    if len(graded):
        truth = graded["grade"].to_numpy(int)
        prob, prior = (graded[[f"{kind}_{name}" for name in grades]].to_numpy(float) for kind in ("prob", "prior"))

        def scores(chosen):
            losses = grade_losses(prob[chosen], truth[chosen])
            prior_loss = grade_losses(prior[chosen], truth[chosen])["log_loss"]
            return grading_scores(truth[chosen], prob[chosen], grades) | losses | {"log_loss_of_prior": prior_loss}

        found |= with_intervals(scores, graded["patient"])
    return [{"score": name, **cell} for name, cell in found.items()]


if __name__ == "__main__":
    main()
