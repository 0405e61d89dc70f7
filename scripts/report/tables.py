"""Rows of the tables of subjects, and ``grades.csv`` of inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch

from scripts.data.grades import grade_names
from scripts.data.writing import write_csv
from scripts.networks.calibration import VOLUMES_FROM
from scripts.report.plots import read_background, write_overlay
from scripts.report.uncertainty import sampled_volume, size_unit, volume_estimate, volume_interval
from scripts.sampling.probability import temperature_scaled
from scripts.sampling.rows import RowsHandler


class GradeTable(RowsHandler):
    """Inference handler: ``grades.csv`` and one overlay per subject.

    A row holds the probability of each grade, the likeliest grade, and volumes and quality of each region.

    Args:
        output_dir: folder of the files.
        grade_labels: class index of each grade.
        regions: names of the region channels.
        to_regions: turns the label map ``pred`` of an item back into region channels.
    """

    write_each = True

    def __init__(
        self,
        output_dir: str,
        grade_labels: Mapping[str, int],
        regions: Sequence[str],
        to_regions: Callable[[Mapping[str, Any]], dict[str, Any]],
    ) -> None:
        self.output_dir = Path(output_dir)
        self.regions = list(regions)
        self.to_regions = to_regions
        self.grades = grade_names(grade_labels)

    def answer(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The row of an item, which MONAI Label sends to its client."""
        return grade_row(self.to_regions(item), self.regions, self.grades)

    def rows_of(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = self.to_regions(item)
        row = grade_row(found, self.regions, self.grades)
        grade = row["grade"]
        title = item["subject"] + (f"  {grade}: {row[f'prob_{grade}']:.2f}" if grade else "")
        samples = [self.to_regions({"pred": mask[None]})["pred"] for mask in item.get("samples", ())]
        write_overlay(found, read_background(item), title, self.output_dir, samples)
        return [row]

    @idist.one_rank_only()
    def write(self, rows: list[dict]) -> None:
        write_csv(pd.DataFrame(rows), self.output_dir / "grades.csv")


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
    return {"subject": item["subject"], **prob, "grade": grade, **prior, **estimates(item, regions)}


def grade_columns(item: Mapping[str, Any], grades: Sequence[str], kind: str = "prob") -> dict[str, float]:
    """Probability of each grade (``prob_<grade>``), or the prior that it assumes; NaN without grading."""
    values = torch.as_tensor(item.get(f"grade_{kind}", [float("nan")] * len(grades))).tolist()
    return {f"{kind}_{name}": value for name, value in zip(grades, values, strict=True)}


def estimates(item: Mapping[str, Any], regions: Sequence[str]) -> dict[str, Any]:
    """What is known of each region without the truth: volumes, expected Dice, agreement of the samples.

    The calibration decides whether the volumes are those of level sets of the probability or those of the samples.

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
        row[f"expected_dice_{region}"] = found["dice"]
        row[f"sample_dice_{region}"] = float(item["sample_dice"][channel])
    return row
