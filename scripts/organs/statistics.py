"""Volume and Hounsfield units of each structure, in TotalSegmentator's form and as a table, with a preview."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from monai.engines.workflow import Workflow

from scripts.config import atomic_path
from scripts.data.pictures import read_volume
from scripts.data.writing import write_csv
from scripts.distributed import gather_from_all
from scripts.organs.plots import plot_preview
from scripts.organs.structures import catalogue

NUM_LABELS = 118


class StatisticsTable:
    """Inference handler: ``<subject>_statistics.json``, ``<subject>_preview.png`` and one ``statistics.csv``.

    The JSON has ``volume`` (mm3) and ``intensity`` (mean HU) of every structure, 0 where it is absent, as
    TotalSegmentator writes it. The table has a row for each structure that was found.

    Args:
        output_dir: folder of the files.
        structures: names of the classes, for their probabilities.
    """

    def __init__(self, output_dir: str, structures: Sequence[str]) -> None:
        self.output_dir = Path(output_dir)
        self.structures = list(structures)

    def attach(self, engine: Workflow) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Workflow) -> None:
        self.rows: list[dict] = []

    def iteration_completed(self, engine: Workflow) -> None:
        for item in engine.state.output:
            self._describe(item)
        self._write(self.rows)  # the rows so far, in case the run is interrupted

    def completed(self, engine: Workflow) -> None:
        self._write(gather_from_all(self.rows))

    def _describe(self, item: Mapping[str, Any]) -> None:
        labels, affine = (
            torch.as_tensor(item["pred"])[0].cpu().numpy().astype(np.uint8),
            np.asarray(item["pred"].affine),
        )
        image = read_volume(item["pred"].meta["filename_or_obj"])
        found = structure_statistics(labels, image, affine)
        prob = dict(zip(self.structures, torch.as_tensor(item["structure_prob"]).tolist(), strict=True))
        for name, values in found.items():
            if values["volume_mm3"]:
                self.rows.append({"subject": item["subject"], "structure": name, "probability": prob[name], **values})
        form = {name: {"volume": v["volume_mm3"], "intensity": round(v["mean_hu"], 5)} for name, v in found.items()}
        with atomic_path(self.output_dir / f"{item['subject']}_statistics.json") as path:
            path.write_text(json.dumps(form, indent=4), encoding="utf-8")
        plot_preview(image, labels, affine, item["subject"], self.output_dir / f"{item['subject']}_preview.png")

    @idist.one_rank_only()
    def _write(self, rows: list[dict]) -> None:
        columns = ["subject", "structure", "volume_mm3", "mean_hu", "probability", "touches_border"]
        write_csv(pd.DataFrame(rows, columns=columns), self.output_dir / "statistics.csv")


def structure_statistics(labels: np.ndarray, image: np.ndarray, affine: np.ndarray) -> dict[str, dict[str, Any]]:
    """``volume_mm3``, ``mean_hu`` (0 if absent) and ``touches_border`` of all 117 structures, by name.

    Args:
        labels: numbers of the structures ``[H, W, S]``, uint8.
        image: the CT ``[H, W, S]`` in HU.
        affine: from voxels to mm.
    """
    flat = labels.ravel()
    counts = np.bincount(flat, minlength=NUM_LABELS)
    sums = np.bincount(flat, image.ravel().astype(np.float64), NUM_LABELS)
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
