"""Scores of finished evaluations: read those of one, and collect those of several models in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scripts.config import InputError, atomic_path

THRESHOLD = 0.5  # of the probability, as in validate::postprocessing
SET_ANOTHER_FILE = "set validate::report::results::file to another file"
TASKS = {"dice": "segmentation", "iou": "segmentation", "auc": "grading", "f1": "grading", "accuracy": "grading"}


@dataclass(frozen=True)
class Results:
    """Scores of one evaluation.

    Args:
        scores: means over the subjects.
        subjects: one row per subject with ``subject`` and the scores that are compared in pairs.
        parts: a score of each part, mean over the subjects: Dice of a region or structure, PSNR of a method.
    """

    scores: dict[str, float]
    subjects: pd.DataFrame
    parts: dict[str, float]


def read_results(folder: Path, training: Mapping[str, Any]) -> Results:
    """Scores of an evaluation of this bundle; NaN for those of a task that was not trained.

    The grade of a subject is scored by ``error``, its Brier score (0 to 1).

    Args:
        folder: of ``summary.json`` and ``subjects.csv``.
        training: keys of the training.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    masks, grading = summary["segmentation"], summary["grading"]
    tasks = training.get("loss::tasks", list(TASKS.values()))
    parts = {region: float(mask["dice"]["mean"]["value"]) for region, mask in masks.items()}
    scores = {
        name: float(np.mean([mask[name]["mean"]["value"] for mask in masks.values()])) for name in ("dice", "iou")
    }
    scores |= {
        name: float(np.nan if (v := grading[name]["value"]) is None else v) for name in ("auc", "f1", "accuracy")
    }
    table = pd.read_csv(folder / "subjects.csv")
    prob = table.filter(regex="^prob_")
    truth = pd.get_dummies(pd.Categorical(table["grade"], categories=range(prob.shape[1])), dtype=float).to_numpy()
    error = (np.square(prob - truth).sum(axis=1, skipna=False) / 2).where(table["grade"] >= 0)
    subjects = {
        "subject": table["subject"],
        "dice": table.filter(regex="^dice_").mean(axis=1) if "segmentation" in tasks else np.nan,
        "error": error if "grading" in tasks else np.nan,
    }
    return Results(
        {name: value if TASKS[name] in tasks else np.nan for name, value in scores.items()},
        pd.DataFrame(subjects),
        parts if "segmentation" in tasks else {},
    )


class ResultsFile:
    """``evaluation_results.json``: mean Dice and IoU of each model that was evaluated on the same true masks.

    Args:
        file: the JSON file. If it exists, its results of other models are kept.
        dataset: name of the data set.
        model: name of the model; its earlier result is replaced.
        gt_dir: folder of the true masks.

    Raises:
        InputError: if ``file`` holds results of another data set or mask folder, or is not such a file.
    """

    def __init__(self, file: str, dataset: str, model: str, gt_dir: str) -> None:
        self.file, self.model = Path(file), model
        self.head = {"dataset": dataset, "threshold": THRESHOLD, "gt_dir": gt_dir}
        self._read()

    def _read(self) -> dict[str, Any]:
        """Results of each model in the file; empty if there is no file."""
        if not self.file.is_file():
            return {}
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            results, head = dict(content["results"]), {key: content[key] for key in self.head}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{self.file}' is not a file of results ({error!r}); {SET_ANOTHER_FILE}") from error
        for key, value in self.head.items():
            if head[key] != value:
                raise InputError(
                    f"'{self.file}' holds results of {key} '{head[key]}', not of '{value}'; {SET_ANOTHER_FILE}"
                )
        return results

    def write(self, table: pd.DataFrame, regions: Sequence[str]) -> None:
        """Add the means over subjects and regions to the file. With several regions, also add the means of each region.

        Args:
            table: one row per subject with ``dice_<region>`` and ``iou_<region>``.
            regions: names of the regions.
        """
        means = {
            region: {name: float(table[f"{name}_{region}"].mean()) for name in ("dice", "iou")} for region in regions
        }
        result: dict[str, Any] = pd.DataFrame(means).mean(axis=1).to_dict() | {"num_samples": len(table)}
        results = self._read() | {self.model: result | ({"regions": means} if len(means) > 1 else {})}
        head = {"dataset": self.head["dataset"], "threshold": THRESHOLD, "evaluation_models": list(results)}
        content = head | {"gt_dir": self.head["gt_dir"], "results": results}
        with atomic_path(self.file) as path:
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
