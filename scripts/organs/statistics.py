"""Volume and Hounsfield units of each structure, in TotalSegmentator's form and as a table, with a preview."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from scripts.config import atomic_path
from scripts.data.pictures import read_volume
from scripts.data.writing import write_csv
from scripts.organs.plots import plot_preview
from scripts.organs.structures import catalogue
from scripts.sampling.report import Report

NUM_LABELS = 118


class StatisticsTable(Report):
    """Report of an inference: ``<subject>_statistics.json``, ``<subject>_preview.png`` and one ``statistics.csv``.

    The JSON has ``volume`` (mm3) and ``intensity`` (mean HU) of every structure, 0 where it is absent, as
    TotalSegmentator writes it. The table has a row for each structure that was found.

    Args:
        output_dir: folder of the files.
        structures: names of the classes, for their probabilities.
    """

    def __init__(self, output_dir: str, structures: Sequence[str]) -> None:
        self.output_dir = Path(output_dir)
        self.structures = list(structures)

    def answer(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The rows of an item, which MONAI Label sends to its client: ``{"structures": [...]}``."""
        return {"structures": self._rows(item, _statistics(item, _image(item)))}

    def rows_of(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        image = _image(item)
        found = _statistics(item, image)
        form = {name: {"volume": v["volume_mm3"], "intensity": round(v["mean_hu"], 5)} for name, v in found.items()}
        with atomic_path(self.output_dir / f"{item['subject']}_statistics.json") as path:
            path.write_text(json.dumps(form, indent=4), encoding="utf-8")
        file = self.output_dir / f"{item['subject']}_preview.png"
        plot_preview(image, _labels(item), np.asarray(item["pred"].affine), item["subject"], file)
        return self._rows(item, found)

    def _rows(self, item: Mapping[str, Any], found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        prob = dict(zip(self.structures, torch.as_tensor(item["structure_prob"]).tolist(), strict=True))
        return [
            {"subject": item["subject"], "structure": name, "probability": prob[name], **values}
            for name, values in found.items()
            if values["volume_mm3"]
        ]

    def write(self, rows: list[dict]) -> None:
        columns = ["subject", "structure", "volume_mm3", "mean_hu", "probability", "touches_border"]
        write_csv(pd.DataFrame(rows, columns=columns), self.output_dir / "statistics.csv")


def _labels(item: Mapping[str, Any]) -> np.ndarray:
    return torch.as_tensor(item["pred"])[0].cpu().numpy().astype(np.uint8)


def _image(item: Mapping[str, Any]) -> np.ndarray:
    return read_volume(item["pred"].meta["filename_or_obj"])


def _statistics(item: Mapping[str, Any], image: np.ndarray) -> dict[str, dict[str, Any]]:
    return structure_statistics(_labels(item), image, np.asarray(item["pred"].affine))


def structure_statistics(labels: np.ndarray, image: np.ndarray, affine: np.ndarray) -> dict[str, dict[str, Any]]:
    """``volume_mm3``, ``mean_hu`` (0 if absent) and ``touches_border`` of all 117 structures, by name.

    Args:
        labels: numbers of the structures ``[H, W, S]``, uint8.
        image: the CT ``[H, W, S]`` in HU.
        affine: from voxels to mm.
    """
    counts, sums = np.zeros(NUM_LABELS), np.zeros(NUM_LABELS)
    for numbers, values in zip(np.moveaxis(labels, -1, 0), np.moveaxis(image, -1, 0), strict=True):  # saves memory
        counts += np.bincount(numbers.ravel(), minlength=NUM_LABELS)
        sums += np.bincount(numbers.ravel(), values.ravel(), NUM_LABELS)
    faces = [labels.take(side, axis) for axis in range(3) for side in (0, -1)]
    border = {int(number) for face in faces for number in np.unique(face)}
    voxel = float(np.prod(nib.affines.voxel_sizes(affine)))
    return {
        name: {
            "volume_mm3": float(counts[entry["number"]] * voxel),
            "mean_hu": float(sums[entry["number"]] / max(counts[entry["number"]], 1)),
            "touches_border": entry["number"] in border,
        }
        for name, entry in catalogue().items()
    }
