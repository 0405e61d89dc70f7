"""Evaluation of label maps: scores of each structure, beside those of the prior, with intervals over patients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from scripts.config import atomic_path
from scripts.data.pictures import read_volume
from scripts.data.split import patient
from scripts.data.writing import write_csv
from scripts.organs.plots import plot_preview, plot_structures
from scripts.organs.structures import catalogue
from scripts.organs.training_labels import prior_of
from scripts.report.intervals import with_intervals
from scripts.report.results import Results
from scripts.sampling.report import Report

TOLERANCE = 3.0  # mm, of the normalised surface distance
SCORES = ("dice", "nsd", "hd95", "prior_dice")


class StructureReport(Report):
    """Report of an evaluation: ``structures.csv``, ``summary.json``, ``structures.png`` and an overlay of each subject.

    A row of the table is a structure of a subject that is in the truth or in the prediction. A structure that is only
    in the prediction is ``invented`` and has no score; one that is only in the truth has Dice and NSD 0 and no HD95.

    Args:
        output_dir: folder of the files.
        structures: names of the classes, in their order.
        prior: result of :func:`scripts.organs.training_labels.majority_prior`.
        patient_pattern: see :func:`scripts.data.split.patient`.
        seed: of the intervals.
        settings: plain data that are saved with the summary.
    """

    def __init__(
        self,
        output_dir: str,
        structures: Sequence[str],
        prior: np.ndarray,
        patient_pattern: str,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.structures = list(structures)
        self.prior = prior
        self.patient_pattern = patient_pattern
        self.seed = seed
        self.settings = dict(settings or {})

    def rows_of(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        affine = np.asarray(item["pred"].affine)
        pred, truth = (torch.as_tensor(item[key])[0].cpu().numpy().astype(np.uint8) for key in ("pred", "label"))
        prior = prior_of(self.prior, truth.shape, affine)
        subject = {"subject": item["subject"], "patient": patient(item["subject"], self.patient_pattern)}
        file = self.output_dir / "overlays" / f"{item['subject']}_preview.png"
        plot_preview(read_volume(item["pred"].meta["filename_or_obj"]), pred, affine, item["subject"], file, truth)
        rows = structure_rows(pred, truth, prior, nib.affines.voxel_sizes(affine), self.structures)
        return [subject | row for row in rows]

    def write(self, rows: list[dict[str, Any]]) -> None:
        table = pd.DataFrame(rows)
        write_csv(table, self.output_dir / "structures.csv")
        found = summary(table, self.structures, self.seed)
        with atomic_path(self.output_dir / "summary.json") as path:
            path.write_text(json.dumps({"settings": self.settings, **found}, indent=1), encoding="utf-8")
        plot_structures(found["structures"], self.output_dir / "structures.png")
        for name, cell in found["mean over structures"].items():
            numbers = ["-" if cell[key] is None else f"{cell[key]:.3f}" for key in ("value", "low", "high")]
            print("{:<12} {}   95 % interval {} to {}".format(name, *numbers))


def structure_rows(
    pred: np.ndarray, truth: np.ndarray, prior: np.ndarray, spacing: Sequence[float], structures: Sequence[str]
) -> list[dict[str, Any]]:
    """Scores of the structures in the truth or in the prediction.

    Args:
        pred: numbers of the structures ``[H, W, S]``.
        truth: likewise.
        prior: likewise.
        spacing: of the voxels, mm.
        structures: names.
    """
    rows, voxel = [], float(np.prod(spacing))
    for name in structures:
        number = catalogue()[name]["number"]
        one, two = pred == number, truth == number
        if one.any() or two.any():
            row = {"structure": name, "volume_mm3": one.sum() * voxel, "true_volume_mm3": two.sum() * voxel}
            row |= {"invented": bool(not two.any()), "missed": bool(not one.any())}
            rows.append(row | _mask_scores(one, two, spacing) | {"prior_dice": _dice(prior == number, two)})
    return rows


def _dice(one: np.ndarray, two: np.ndarray) -> float:
    """Dice of masks; NaN if the second, the truth, is empty."""
    return float(2 * (one & two).sum() / (one.sum() + two.sum())) if two.any() else np.nan


def _mask_scores(one: np.ndarray, two: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """``dice``, ``nsd`` at 3 mm and ``hd95`` (mm) of a prediction and the truth, computed in their bounding box."""
    if not one.any() or not two.any():
        score = 0.0 if two.any() else np.nan
        return {"dice": score, "nsd": score, "hd95": np.nan}
    voxels = np.argwhere(one | two)
    box = tuple(
        slice(max(0, low - 1), high + 2) for low, high in zip(voxels.min(axis=0), voxels.max(axis=0), strict=True)
    )
    pred, truth = (torch.as_tensor(mask[box])[None, None].float() for mask in (one, two))
    mm = list(map(float, spacing))
    nsd = compute_surface_dice(pred, truth, class_thresholds=[TOLERANCE], include_background=True, spacing=mm)
    hd95 = compute_hausdorff_distance(pred, truth, percentile=95, include_background=True, spacing=mm)
    return {"dice": _dice(one, two), "nsd": float(nsd), "hd95": float(hd95)}


def summary(table: pd.DataFrame, structures: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Scores of each structure, and their mean over structures, with 95 % intervals over patients."""
    patients = table["patient"].to_numpy()

    def means(rows: np.ndarray) -> dict[str, float]:
        each = table.iloc[rows].groupby("structure")[list(SCORES)].mean()
        values = {f"{name}/{score}": each[score].get(name, np.nan) for name in structures for score in SCORES}
        return values | {f"/{score}": each[score].mean() for score in SCORES}

    found = with_intervals(means, patients, seed)
    counts = table.groupby("structure")[["invented", "missed"]].sum()
    present = table[~table["invented"]].groupby("structure").size()
    per_structure = {
        name: {score: found[f"{name}/{score}"] for score in SCORES}
        | {"subjects": int(present.get(name, 0))}
        | {key: int(counts[key].get(name, 0)) for key in ("invented", "missed")}
        for name in structures
    }
    return {
        "subjects": int(table["subject"].nunique()),
        "mean over structures": {score: found[f"/{score}"] for score in SCORES},
        "structures": per_structure,
    }


def read_results(folder: Path, training: Mapping[str, Any]) -> Results:
    """Scores of an evaluation of this bundle: means over the structures.

    Args:
        folder: of ``summary.json`` and ``structures.csv``.
        training: keys of the training, which make no difference here.
    """
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    means = {score: found["mean over structures"][score]["value"] for score in SCORES}
    parts = {name: scores["dice"]["value"] for name, scores in found["structures"].items()}
    counts = {"at 0": sum(value == 0 for value in parts.values())}
    table = pd.read_csv(folder / "structures.csv")
    subjects = table.groupby("subject")[["dice", "nsd"]].mean().reset_index()
    return Results(_numbers(means) | counts, subjects, _numbers(parts))


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: np.nan if value is None else value for name, value in values.items()}
