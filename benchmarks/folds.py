"""Scores of all folds of a cross-validation together: every subject is judged by the weights that never saw it.

Example:
    python benchmarks/folds.py runs/tcga/fold*/evaluate --against runs/dropout/fold*/evaluate
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import markdown  # noqa: E402
from scripts.report.annotators import METHODS  # noqa: E402
from scripts.report.evaluation import grade_scores, graded_subjects  # noqa: E402
from scripts.report.intervals import with_intervals  # noqa: E402
from scripts.report.metrics import mean_of_defined  # noqa: E402

COLUMNS = ("dice_", "hd95_", "expected_dice_", "covered_", "ece_lesion_", "error_auroc_")
ANNOTATORS = ("ged_", "diversity_", "matched_iou_", "crps_", "coverage_", "vote_brier_")


def main() -> None:
    """Print each score with its 95 % interval over patients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output_dir of each fold's evaluation")
    parser.add_argument("--against", nargs="+", type=Path, help="the same of another training: this one minus that")
    parser.add_argument("--subjects", nargs="+", help="only these subjects")
    args = parser.parse_args()
    table = read(args.folders, args.subjects)
    print(f"{len(table)} subjects of {table['patient'].nunique()} patients")
    scores = subject_scores(table) | quality_scores(table) | graded_scores(table)
    if args.against:
        other = read(args.against, args.subjects).set_index("subject").loc[table["subject"]].reset_index()
        names = [name for name in table if name.startswith("dice_")]
        difference = table[names].sub(other[names]).add_prefix("difference of ")
        scores |= means(difference, table["patient"])
    print(markdown(pd.DataFrame([{"score": name, **cell} for name, cell in scores.items()])))
    if found := vote_errors(args.folders):
        print("\nECE against the share of the annotators, mean of the folds")
        print(markdown(pd.DataFrame(found)))


def read(folders: Sequence[Path], subjects: Sequence[str] | None) -> pd.DataFrame:
    """The tables of all folds as one."""
    table = pd.concat([pd.read_csv(folder / "subjects.csv", dtype={"patient": str}) for folder in folders])
    if repeated := table["subject"][table["subject"].duplicated()].tolist():
        raise SystemExit(f"in several folds: {repeated[:3]}")
    return (table[table["subject"].isin(subjects)] if subjects else table).reset_index(drop=True)


def means(table: pd.DataFrame, patients: pd.Series) -> dict:
    """Mean of each column, with its interval."""
    return with_intervals(
        lambda rows: {name: mean_of_defined(table[name].to_numpy()[rows]) for name in table}, patients
    )


def subject_scores(table: pd.DataFrame) -> dict:
    """Means of the scores of masks, median Dice, and share of subjects with a Dice below 0.5."""
    chosen = table[[name for prefix in COLUMNS + ANNOTATORS for name in table if name.startswith(prefix)]]
    dice = chosen[[name for name in chosen if name.startswith("dice_")]]
    found = means(chosen.join(dice.lt(0.5).astype(float).add_suffix(" below 0.5")), table["patient"])
    return found | with_intervals(
        lambda rows: dice.iloc[rows].median().add_prefix("median ").to_dict(), table["patient"]
    )


def quality_scores(table: pd.DataFrame) -> dict:
    """How well the expected Dice of each region fits the true one.

    ``quality_rank`` is Spearman's rank correlation, ``quality_error`` the mean absolute difference, and ``missed`` the
    share of all subjects whose Dice is below 0.5 although it is expected above 0.8.
    """
    regions = [name.removeprefix("expected_dice_") for name in table if name.startswith("expected_dice_")]

    def scores(rows: np.ndarray) -> dict[str, float]:
        found = {}
        for region in regions:
            expected, dice = (table[f"{name}_{region}"].iloc[rows] for name in ("expected_dice", "dice"))
            found[f"quality_rank_{region}"] = spearmanr(expected, dice).statistic
            found[f"quality_error_{region}"] = (expected - dice).abs().mean()
            found[f"missed_{region}"] = ((dice < 0.5) & (expected > 0.8)).mean()
        return found

    return with_intervals(scores, table["patient"])


def vote_errors(folders: Sequence[Path]) -> list[dict]:
    """Expected calibration error of each method and region against the share of the annotators; empty for one."""
    summaries = [json.loads((folder / "summary.json").read_text()).get("annotators", {}) for folder in folders]
    return [
        {"region": region} | {name: np.mean([s[region][f"ece_{name}"]["value"] for s in summaries]) for name in METHODS}
        for region in summaries[0]
    ]


def graded_scores(table: pd.DataFrame) -> dict:
    """Scores of the grade of all folds; empty without grades."""
    grades = [name.removeprefix("prob_") for name in table if name.startswith("prob_")]
    graded = graded_subjects(table, grades) if grades else table[:0]
    return with_intervals(grade_scores(graded, grades), graded["patient"]) if len(graded) else {}


if __name__ == "__main__":
    main()
