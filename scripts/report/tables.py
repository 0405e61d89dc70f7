"""Rows of the tables of subjects, and ``grades.csv`` and ``grade_reasons.csv`` of inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from scripts.data.grades import grade_names
from scripts.data.writing import write_csv
from scripts.networks.calibration import VOLUMES_FROM
from scripts.networks.measurements import measurement_names
from scripts.report.plots import read_background, write_overlay
from scripts.report.uncertainty import sampled_volume, size_unit, volume_estimate, volume_interval
from scripts.sampling.probability import temperature_scaled
from scripts.sampling.report import Report


class GradeTable(Report):
    """Report of an inference: ``grades.csv``, ``grade_reasons.csv`` and one overlay per subject.

    A row holds the probability of each grade, the likeliest grade, volumes and quality of each region, and the
    modalities that were used. The reasons are only written if the grade depends on measurements of the mask
    (:func:`grade_reasons`).

    Args:
        output_dir: folder of the files.
        grade_labels: class index of each grade.
        regions: names of the region channels.
        modalities: names of the image channels.
        to_regions: turns the label map ``pred`` of an item back into region channels.
    """

    def __init__(
        self,
        output_dir: str,
        grade_labels: Mapping[str, int],
        regions: Sequence[str],
        modalities: Sequence[str],
        to_regions: Callable[[Mapping[str, Any]], dict[str, Any]],
    ) -> None:
        self.output_dir = Path(output_dir)
        self.regions = list(regions)
        self.measured = measurement_names(regions, modalities)
        self.to_regions = to_regions
        self.grades = grade_names(grade_labels)

    def answer(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The row of an item, and the reasons of its grade if there are; MONAI Label sends them to its client."""
        reasons = grade_reasons(item, self.measured, self.grades)
        row = grade_row(self.to_regions(item), self.regions, self.grades)
        return row | ({"reasons": reasons} if reasons else {})

    def rows_of(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        row, found = self.answer(item), self.to_regions(item)
        grade = row["grade"]
        title = item["subject"] + (f"  {grade}: {row[f'prob_{grade}']:.2f}" if grade else "")
        samples = [self.to_regions({"pred": mask[None]})["pred"] for mask in item.get("samples", ())]
        write_overlay(found, read_background(item), title, self.output_dir, samples)
        return [row]

    def write(self, rows: list[dict[str, Any]]) -> None:
        reasons = [reason for row in rows for reason in row.get("reasons", ())]
        write_csv(pd.DataFrame(rows).drop(columns="reasons", errors="ignore"), self.output_dir / "grades.csv")
        file = self.output_dir / "grade_reasons.csv"
        if reasons:
            write_csv(pd.DataFrame(reasons), file)
        else:
            file.unlink(missing_ok=True)  # of an earlier run, whose grades were others


def grade_row(item: Mapping[str, Any], regions: Sequence[str], grades: Sequence[str]) -> dict[str, Any]:
    """Row of ``grades.csv`` of an item whose maps lie on the input's grid.

    Args:
        item: an inferred item, with the region channels ``pred [R, H, W, S]``.
        regions: names of the region channels.
        grades: names of the grades.
    """
    prob = grade_columns(item, grades)
    grade = "" if any(map(np.isnan, prob.values())) else grades[int(np.argmax(list(prob.values())))]
    prior = grade_columns(item, grades, "prior")
    used = {"modalities": item["modalities"]} if "modalities" in item else {}
    return {"subject": item["subject"], **prob, "grade": grade, **prior, **estimates(item, regions), **used}


def grade_reasons(item: Mapping[str, Any], measured: Sequence[str], grades: Sequence[str]) -> list[dict[str, Any]]:
    """What the grade of an item rests on, the strongest first; empty if it rests on the head alone.

    ``for_<grade>`` is what the head or a measurement adds to the logit of a grade, against an average subject.

    Args:
        item: an inferred item.
        measured: names of its measurements.
        grades: names of the grades.
    """
    if "grade_reasons" not in item:
        return []
    added = torch.as_tensor(item["grade_reasons"]).T.tolist()
    values = [float("nan"), *torch.as_tensor(item["measurements"]).tolist()]
    rows = [
        {"subject": item["subject"], "reason": name, "value": value}
        | {f"for_{grade}": part for grade, part in zip(grades, parts, strict=True)}
        for name, value, parts in zip(["grading head", *measured], values, added, strict=True)
        if any(parts)
    ]
    return sorted(rows, key=lambda row: -max(abs(row[f"for_{grade}"]) for grade in grades))


def grade_columns(item: Mapping[str, Any], grades: Sequence[str], kind: str = "prob") -> dict[str, float]:
    """Probability of each grade (``prob_<grade>``), or the prior that it assumes; NaN without grading."""
    values = torch.as_tensor(item.get(f"grade_{kind}", [float("nan")] * len(grades))).tolist()
    return {f"{kind}_{name}": value for name, value in zip(grades, values, strict=True)}


def estimates(item: Mapping[str, Any], regions: Sequence[str]) -> dict[str, Any]:
    """What is known of each region without the truth: volumes, expected Dice, agreement of the samples.

    The calibration decides whether the volumes are those of level sets of the probability or those of the samples.
    Without a calibration, the expected Dice is that of the level sets, too.

    Args:
        item: an evaluated item; ``sample_volumes [N * R]`` are needed if the volumes are those of the samples.
        regions: names of its channels.
    """
    row: dict[str, Any] = {}
    size = size_unit(item)
    volumes_from = VOLUMES_FROM[int(item["volumes_from"])]
    for channel, region in enumerate(regions):
        # volumes need the calibration of the foreground; that of the lesion raises the whole background
        temperature = torch.as_tensor(item["volume_temperature"][channel])
        prob = temperature_scaled(torch.as_tensor(item["prob"][channel]), temperature)
        found = volume_estimate(prob.cpu().numpy(), np.asarray(item["pred"][channel].cpu()) > 0)
        if volumes_from == "samples":
            found |= sampled_volume(item["sample_volumes"][channel :: len(regions)])
        low, high = volume_interval(
            found["low"] * size.voxel, found["high"] * size.voxel, float(item["volume_margin"][channel])
        )
        values = {"expected": found["expected"] * size.voxel, "low": low, "high": high}
        row |= {size.column("", kind, region): value for kind, value in values.items()}
        row[f"{size.name}_from_{region}"] = volumes_from
        dice = float(item["expected_dice"][channel])
        row[f"expected_dice_{region}"] = found["dice"] if math.isnan(dice) else dice
        row[f"sample_dice_{region}"] = float(item["sample_dice"][channel])
    return row
