"""``report.html``: the results of an evaluation or an inference in one file that opens without a server."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.config import atomic_path
from scripts.data.grades import grade_names
from scripts.page.layers import layers_of
from scripts.page.origin import origin
from scripts.report.plots import read_background
from scripts.sampling.report import Report
from scripts.training.checkpoints import read_checkpoint

MAX_BYTES = 30_000_000  # of the page
MAX_SUBJECT_BYTES = 3_000_000  # of the pictures of a subject
MAX_PICTURED = 200  # subjects with pictures
PLOTS = {
    "reliability": "Reliability: observed frequency against predicted probability",
    "risk_coverage": "Risk and coverage: share of wrong voxels among the most certain ones",
    "grade_calibration": "Calibration of the grade",
}


class ReportPage(Report):
    """Writes ``report.html``: table, slices, curves, and how all of it was made.

    It comes after the report that writes the table. Nothing in the page is fetched from elsewhere. Up to 200 subjects
    have pictures; they are reduced until the page has at most 30 MB.

    Args:
        output_dir: folder of the page, the table and the plots.
        table: name of the table in it, with one row for each subject.
        num_subjects: of the run.
        regions: names of the region channels.
        grade_labels: class index of each grade.
        bundle_root: see :func:`scripts.page.origin.origin`.
        ckpt_path: likewise; the checkpoint also holds the learning curves.
        device: likewise.
        settings: likewise.
        to_regions: turns a label map ``pred`` of an item into region channels; None if ``pred`` has them.
    """

    def __init__(
        self,
        output_dir: str,
        table: str,
        num_subjects: int,
        regions: Sequence[str],
        grade_labels: Mapping[str, int],
        bundle_root: str,
        ckpt_path: str,
        device: Any,
        settings: Mapping[str, Any],
        to_regions: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.folder, self.table = Path(output_dir), table
        self.max_bytes = min(MAX_SUBJECT_BYTES, int(0.7 * MAX_BYTES / max(1, min(num_subjects, MAX_PICTURED))))
        self.regions, self.grades = list(regions), grade_names(grade_labels)
        self.history = _history(ckpt_path)
        self.origin = origin(bundle_root, ckpt_path, device, settings)
        self.to_regions = to_regions

    def rows_of(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        if item["order"] >= MAX_PICTURED:
            return []
        masks = {"mask": self._channels(item["pred"])}
        if "label" in item:
            masks["truth"] = self._channels(item["label"], split=False)
        if "samples" in item:
            masks["samples"] = self._samples(item["samples"])
        layers = layers_of(item, read_background(item), masks, int(self.max_bytes * 3 / 4))
        return [{"subject": item["subject"], "layers": layers}]

    def _channels(self, mask: Any, split: bool = True) -> list[np.ndarray]:
        """Binary masks ``[H, W, S]`` of the regions, of channels or of a label map."""
        if split and self.to_regions:
            mask = self.to_regions({"pred": mask})["pred"]
        return [np.asarray(channel.cpu()) > 0 for channel in mask]

    def _samples(self, samples: Any) -> list[np.ndarray]:
        """All regions of each sample together, ``[H, W, S]``; label maps ``[N, ...]`` or channels ``[N * R, ...]``."""
        step = 1 if self.to_regions else len(self.regions)
        return [np.asarray((samples[i : i + step].cpu() > 0).any(dim=0)) for i in range(0, len(samples), step)]

    def write(self, rows: list[dict[str, Any]]) -> None:
        table = pd.read_csv(self.folder / self.table, dtype={"subject": str, "patient": str})
        pictured = {row["subject"]: row["layers"] for row in rows[:MAX_PICTURED]}
        columns, values = summary_columns(table, self.regions, self.grades)
        subjects = [
            {"name": name, "cells": cells, "all": _filled(row), "layers": pictured.get(name)}
            for name, cells, row in zip(table["subject"], values, table.to_dict("records"), strict=True)
        ]
        own = Path(__file__).parent
        templates = Environment(loader=FileSystemLoader(own), autoescape=True, undefined=StrictUndefined)
        page = templates.get_template("page.html").render(
            title=f"{self.origin['bundle']}: {len(subjects)} subjects",
            data={"columns": columns, "regions": self.regions, "subjects": subjects, "history": self.history},
            scores=self._scores(),
            plots=self._plots(),
            origin=self.origin,
            css=(own / "page.css").read_text(encoding="utf-8"),
            script=(own / "page.js").read_text(encoding="utf-8"),
            pictured=len(pictured),
            total=len(subjects),
        )
        with atomic_path(self.folder / "report.html") as path:
            path.write_text(page, encoding="utf-8")

    def _scores(self) -> list[tuple[str, dict[str, float | None]]]:
        """Names of the scores of an evaluation, each with its value and interval; none after inference."""
        file = self.folder / "summary.json"
        if self.table != "subjects.csv" or not file.is_file():
            return []
        found: list[tuple[str, dict[str, float | None]]] = []

        def collect(name: str, node: Any) -> None:
            if isinstance(node, dict) and node.keys() == {"value", "low", "high"}:
                found.append((name, node))
            elif isinstance(node, dict):
                for key, part in node.items():
                    collect(f"{name} {key}".strip(), part)

        summary = json.loads(file.read_text(encoding="utf-8"))
        for part in ("segmentation", "uncertainty", "annotators", "grading"):
            collect("", summary.get(part))
        return found

    def _plots(self) -> list[tuple[str, str]]:
        """Title and data URL of each plot of this run."""
        files = {title: self.folder / f"{name}.png" for name, title in PLOTS.items() if self.table == "subjects.csv"}
        return [
            (title, f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}")
            for title, file in files.items()
            if file.is_file()
        ]


def _history(ckpt_path: str) -> list[dict[str, Any]]:
    """Rows of the epoch table of the training, which checkpoints since version 0.15 hold."""
    if not Path(ckpt_path).is_file():  # as with an ONNX export
        return []
    return [_filled(row) for row in read_checkpoint(ckpt_path).get("epoch_table", {}).get("rows", [])]


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without undefined values, which JSON does not have."""
    return {key: value for key, value in row.items() if value is not None and value == value and value != ""}


def summary_columns(
    table: pd.DataFrame, regions: Sequence[str], grades: Sequence[str]
) -> tuple[list[str], list[list[Any]]]:
    """Titles of the columns that the page shows, and their values; a volume is shown with its interval.

    Args:
        table: ``subjects.csv`` or ``grades.csv``.
        regions: names of the regions.
        grades: names of the grades.

    Returns:
        Titles, and one list of cells for each row. A cell is a number, a text, None, or a list of a value and the low
        and high end of its interval.
    """
    found: dict[str, list[Any]] = {}
    if "grade" in table and table["grade"].notna().any():
        is_index = pd.api.types.is_numeric_dtype(table["grade"])
        found["true grade" if is_index else "grade"] = [
            _grade(value, grades) if is_index else (None if value != value else value) for value in table["grade"]
        ]
    shown = {f"prob_{name}": f"P({name})" for name in grades}
    for region in regions:
        shown |= {f"dice_{region}": f"Dice {region}", f"hd95_{region}": f"HD95 {region} (mm)"}
        shown |= {f"expected_dice_{region}": f"expected Dice {region}"}
    found |= {
        title: _cells(table[name]) for name, title in shown.items() if name in table and table[name].notna().any()
    }
    for size, unit in (("volume", "ml"), ("area", "px")):
        for region in regions:
            names = [f"{size}_{kind}_{unit}_{region}" for kind in ("expected", "low", "high")]
            if set(names) <= set(table):
                triples = zip(*(_cells(table[name]) for name in names), strict=True)
                found[f"{size} {region} ({unit})"] = [list(triple) for triple in triples]
            if (name := f"true_{size}_{unit}_{region}") in table:
                found[f"true {size} {region} ({unit})"] = _cells(table[name])
    return list(found), [list(cells) for cells in zip(*found.values(), strict=True)] or [[] for _ in range(len(table))]


def _grade(index: float, grades: Sequence[str]) -> str | None:
    return grades[int(index)] if 0 <= index < len(grades) else None


def _cells(column: pd.Series) -> list[float | None]:
    return [None if value != value else float(value) for value in column]
