"""Table of the peer bench: scores and paired differences, with intervals over patients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scripts.report.evaluation import grade_scores, graded_subjects
from scripts.report.intervals import with_intervals
from scripts.report.metrics import mean_of_defined

SCORES = ("dice", "auc", "log_loss")


def compare(folders: Mapping[str, Mapping[int, list[Path]]], resamples: int = 1000) -> pd.DataFrame:
    """One row per arm: Dice, AUC, log loss, their differences to the first arm, and costs; means over the seeds.

    Args:
        folders: of each arm and seed, those of its folds, with ``subjects.csv`` and ``cost.json``.
        resamples: of the bootstrap.
    """
    tables = {name: without_masks([read(found) for found in seeds.values()]) for name, seeds in folders.items()}
    first, *others = tables
    subjects = tables[first][0]["subject"]
    for name, found in tables.items():
        if not all(table["subject"].equals(subjects) for table in found):
            raise SystemExit(f"'{name}' has other subjects than '{first}': give both the same folds")

    def statistic(rows: np.ndarray) -> dict[tuple[str, str], float]:
        values = {name: scores_of(found, rows) for name, found in tables.items()}
        found = {(name, score): value for name, scores in values.items() for score, value in scores.items()}
        for name in others:
            found |= {(name, f"{score}, minus {first}"): values[name][score] - values[first][score] for score in SCORES}
        return found

    table = pd.DataFrame(index=list(tables)).rename_axis("arm")
    for (name, score), cell in with_intervals(statistic, tables[first][0]["patient"], resamples=resamples).items():
        table.loc[name, score] = cell_text(cell)
    costs = {name: cost_of([folder for seed in seeds.values() for folder in seed]) for name, seeds in folders.items()}
    return table.join(pd.DataFrame(costs).T).fillna("-").reset_index()


def read(folders: Sequence[Path]) -> pd.DataFrame:
    """Scores of the folds."""
    tables = [pd.read_csv(folder / "subjects.csv", dtype={"patient": str}) for folder in folders]
    return pd.concat(tables).sort_values("subject", ignore_index=True)


def without_masks(tables: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """The tables of an arm; without Dice if no mask of any run has a voxel, as those of a classifier."""
    areas = pd.concat(tables).filter(regex="^(area_px|volume_ml)_")
    if not areas.shape[1] or areas.to_numpy().any():
        return list(tables)
    return [table.drop(columns=table.filter(regex="^dice_").columns) for table in tables]


def scores_of(tables: Sequence[pd.DataFrame], rows: np.ndarray) -> dict[str, float]:
    """Mean over the seeds of each score of the subjects in the given rows; NaN for what an arm does not do."""
    each = pd.DataFrame([scores_of_seed(table.iloc[rows]) for table in tables])
    return each.reindex(columns=SCORES).mean().to_dict()


def scores_of_seed(table: pd.DataFrame) -> dict[str, float]:
    """Scores of the subjects in a table."""
    found = {"dice": mean_of_defined(table.filter(regex="^dice_").to_numpy().ravel())}
    grades = [name.removeprefix("prob_") for name in table if name.startswith("prob_")]
    if not grades:
        return found
    graded = graded_subjects(table, grades)
    scores = grade_scores(graded, grades)(np.arange(len(graded)))
    return found | {name: scores[name] for name in SCORES if name in scores}


def cell_text(cell: Mapping[str, float | None]) -> str:
    """``value (low to high)``."""
    if cell["value"] is None:
        return "-"
    return "{value:.3f} ({low:.3f} to {high:.3f})".format(**cell)


def cost_of(folders: list[Path]) -> dict[str, float]:
    """Mean costs of the runs of an arm."""
    costs = pd.DataFrame([json.loads((folder / "cost.json").read_text()) for folder in folders])
    return costs.mean().to_dict()
