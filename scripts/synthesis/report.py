"""Evaluation of contrast CTs: the network, its generator, and two baselines, with intervals over patients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from scripts.config import atomic_path
from scripts.data.pictures import read_volume
from scripts.data.split import patient
from scripts.data.writing import write_csv
from scripts.report.intervals import with_intervals
from scripts.report.results import Results
from scripts.sampling.report import Report
from scripts.synthesis.plots import plot_projections
from scripts.synthesis.scores import SCORES, body_mask, looked_up, mask_file, scores

METHODS = ("identity", "lookup", "generator", "refined")


class SynthesisReport(Report):
    """Report of an evaluation: ``subjects.csv``, ``summary.json`` and ``overlays/<subject>_mip.png``.

    A row is a subject and a method: ``identity`` is the native CT, ``lookup`` the best map from native to contrast HU
    in the training subjects, ``generator`` and ``refined`` are the networks.

    Args:
        output_dir: folder of the files.
        table: result of :func:`scripts.synthesis.scores.lookup_table`.
        hu_range: lowest and highest HU.
        label_suffix: of the contrast CTs, beside which the masks of vessels are.
        patient_pattern: see :func:`scripts.data.split.patient`.
        seed: of the intervals.
        settings: plain data that are saved with the summary.
    """

    def __init__(
        self,
        output_dir: str,
        table: np.ndarray,
        hu_range: Sequence[float],
        label_suffix: str,
        patient_pattern: str,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.table = table
        self.hu_range = hu_range
        self.label_suffix = label_suffix
        self.patient_pattern = patient_pattern
        self.seed = seed
        self.settings = dict(settings or {})

    def rows_of(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        native = read_volume(item["pred"].meta["filename_or_obj"])
        pred, generator, truth = (torch.as_tensor(item[key])[0].cpu().numpy() for key in ("pred", "generator", "label"))
        volumes = {"identity": native, "lookup": looked_up(native, self.table, self.hu_range)}
        volumes |= {"generator": generator, "refined": pred}
        body, vessels = body_mask(native), vessel_mask(item["label"].meta["filename_or_obj"], self.label_suffix)
        file = self.output_dir / "overlays" / f"{item['subject']}_mip.png"
        affine = np.asarray(item["pred"].affine)
        plot_projections({"native": native, "synthetic": pred, "true": truth}, affine, item["subject"], file)
        subject = {"subject": item["subject"], "patient": patient(item["subject"], self.patient_pattern)}
        return [
            subject | {"method": name} | scores(volume, truth, native, body, vessels, self.hu_range)
            for name, volume in volumes.items()
        ]

    def write(self, rows: list[dict[str, Any]]) -> None:
        table = pd.DataFrame(rows)
        write_csv(table, self.output_dir / "subjects.csv")
        found = summary(table, self.seed)
        with atomic_path(self.output_dir / "summary.json") as path:
            path.write_text(json.dumps({"settings": self.settings, **found}, indent=1), encoding="utf-8")
        for method, cells in found["methods"].items():
            known = {name: cell["value"] for name, cell in cells.items() if cell["value"] is not None}
            print(f"{method:<10}" + "  ".join(f"{name} {value:.3f}" for name, value in known.items()))


def vessel_mask(contrast: str, label_suffix: str) -> np.ndarray | None:
    """The mask of vessels ``[H, W, S]`` of a contrast CT; None without one."""
    file = mask_file(contrast, label_suffix, "vessels")
    return read_volume(str(file)) > 0 if file.is_file() else None


def summary(table: pd.DataFrame, seed: int = 0) -> dict[str, Any]:
    """Mean scores of each method, and the differences of the refined CTs, with 95 % intervals over patients."""
    wide = table.pivot(index=["patient", "subject"], columns="method", values=list(SCORES))
    patients = wide.index.get_level_values("patient").to_numpy()

    def means(rows: np.ndarray) -> dict[str, float]:
        each = wide.iloc[rows].mean()
        values = {f"{method}/{score}": each[score, method] for method in METHODS for score in SCORES}
        differences = {
            f"refined - {method}/{score}": each[score, "refined"] - each[score, method]
            for method in METHODS[:-1]
            for score in SCORES
        }
        return values | differences

    found = with_intervals(means, patients, seed)
    names = {"methods": METHODS, "differences": [f"refined - {method}" for method in METHODS[:-1]]}
    return {"subjects": len(wide)} | {
        kind: {name: {score: found[f"{name}/{score}"] for score in SCORES} for name in of} for kind, of in names.items()
    }


def read_results(folder: Path, training: Mapping[str, Any]) -> Results:
    """Scores of an evaluation: those of the network, and of its discriminator; the parts are the PSNR of each method.

    Args:
        folder: of ``summary.json`` and ``subjects.csv``; the one above has the ``metrics.csv`` of the training.
        training: keys of the training, which make no difference here.
    """
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["methods"]
    table = pd.read_csv(folder / "subjects.csv")
    subjects = table.loc[table["method"] == "refined", ["subject", "psnr", "vessel_mae"]]
    numbers = {
        method: {name: np.nan if cell["value"] is None else cell["value"] for name, cell in cells.items()}
        for method, cells in found.items()
    }
    epochs = pd.read_csv(folder.parent / "metrics.csv")
    auc = epochs.loc[epochs["split"] == "validation", "d_auc"]
    scored = numbers["refined"] | {"d_auc": float(auc.iloc[-1]) if len(auc) else np.nan}
    return Results(scored, subjects, {method: cells["psnr"] for method, cells in numbers.items()})
