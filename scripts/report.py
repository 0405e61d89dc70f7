"""What people look at: learning curves, overlays, and the tables of evaluation and inference."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from monai.engines.workflow import Workflow

from scripts.config import atomic_path
from scripts.metrics import grading_scores, mask_scores, with_intervals

logger = logging.getLogger(__name__)

PANELS = {
    "losses": ["L_seg", "L_calib", "L_cls", "L_total"],
    "Dice and IoU": ["dice", "iou"],
    "grading per subject": ["auc", "f1", "accuracy"],
    "sigma": ["sigma_seg", "sigma_cls"],
    "learning rate": ["learning_rate"],
    "gradient norm": ["grad_norm"],
}

SHARED = ("sigma_seg", "sigma_cls", "learning_rate")  # the same in both rows of an epoch


def plot_learning_curves(table: pd.DataFrame, file: str | Path) -> None:
    """Draw the epoch table: training solid, validation dashed with dots."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for colour, name in enumerate(names):
            for split, style in (("train", "-"), ("validation", ".--")):
                rows = table[(table["split"] == split) & table[name].notna()]
                if len(rows) and not (split == "validation" and name in SHARED):
                    label = f"{name} {split}" if len(names) > 1 else split
                    axes.plot(rows["epoch"], rows[name], style, color=f"C{colour}", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(fontsize="small")
    _save(figure, file)


def plot_overlay(
    image: np.ndarray, pred: np.ndarray, uncertainty: np.ndarray, label: np.ndarray | None, title: str, file: str | Path
) -> None:
    """Draw the axial slice with most tumour: image with contours (prediction red, truth green), and uncertainty.

    Args:
        image: one modality ``[H, W, S]``, axes towards right, anterior and superior.
        pred: binary mask ``[H, W, S]``.
        uncertainty: entropy in bits ``[H, W, S]``.
        label: true mask ``[H, W, S]``, where there is one.
        title: what stands above.
        file: PNG to write.
    """
    mask = pred if label is None or not label.any() else label
    index = int(mask.sum(axis=(0, 1)).argmax()) if mask.any() else mask.shape[-1] // 2
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    turn = partial(np.rot90, k=1)  # anterior up; the patient's left is on the right, as radiologists view it
    flip = slice(None, None, -1)
    for axes in (left, right):
        axes.imshow(turn(image[flip, :, index]), cmap="gray")
        axes.set_axis_off()
    shown = right.imshow(turn(uncertainty[flip, :, index]), cmap="magma", vmin=0, vmax=1, alpha=0.6)
    figure.colorbar(shown, ax=right, label="entropy (bits)")
    for volume, colour in ((pred, "red"), (label, "lime")):
        if volume is not None and volume[..., index].any():
            left.contour(turn(volume[flip, :, index]), levels=[0.5], colors=colour, linewidths=1)
    left.set_title(f"{title}, slice {index + 1}\nred: prediction" + ("" if label is None else ", green: truth"))
    right.set_title("uncertainty")
    _save(figure, file)


def _save(figure: Figure, file: str | Path) -> None:
    FigureCanvasAgg(figure)  # no display, and none of pyplot's global state
    with atomic_path(file) as path:
        figure.savefig(path, dpi=90)


class SubjectReport:
    """Evaluation: one row and one overlay per subject, then the summary with 95 % intervals.

    Writes ``subjects.csv``, ``summary.json`` and ``overlays/<subject>.png``.

    Args:
        output_dir: folder of the files.
        regions: names of the region channels.
        settings: written into the summary beside the scores.
        seed: seed of the bootstrap.
    """

    def __init__(self, output_dir: str, regions: Sequence[str], settings: Mapping[str, Any], seed: int = 0) -> None:
        self.output_dir = Path(output_dir)
        self.regions = list(regions)
        self.settings = dict(settings)
        self.seed = seed

    def attach(self, engine: Workflow) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Workflow) -> None:
        self.rows: list[dict] = []

    def iteration_completed(self, engine: Workflow) -> None:
        for item in engine.state.output:
            spacing = item["label"].pixdim.tolist()
            row = {"subject": item["subject"], "grade": int(item["grade"]), "hgg_prob": float(item["hgg_prob"])}
            row |= mask_scores(item["pred"], item["label"], spacing, self.regions)
            for channel, region in enumerate(self.regions):
                millilitre = float(np.prod(spacing)) / 1000
                row[f"volume_ml_{region}"] = float(item["pred"][channel].sum()) * millilitre
                row[f"true_volume_ml_{region}"] = float(item["label"][channel].sum()) * millilitre
            self.rows.append(row)
            title = f"{item['subject']}  Dice {row[f'dice_{self.regions[0]}']:.2f}"
            overlay(item, title, self.output_dir / "overlays")

    def completed(self, engine: Workflow) -> None:
        table = pd.DataFrame(self.rows)
        write_csv(table, self.output_dir / "subjects.csv")
        summary = {"subjects": len(table), "settings": self.settings, **summarise(table, self.regions, self.seed)}
        with atomic_path(self.output_dir / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        logger.info("\n" + format_summary(summary))


def summarise(table: pd.DataFrame, regions: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Mean and median of the mask scores per region, grading scores per subject, each with a 95 % interval."""
    masks = {
        region: {
            name: with_intervals(_centre, table[f"{name}_{region}"], seed=seed) for name in ("dice", "iou", "hd95")
        }
        for region in regions
    }
    graded = table[(table["grade"] >= 0) & table["hgg_prob"].notna()]
    grading = with_intervals(grading_scores, graded["grade"].to_numpy(), graded["hgg_prob"].to_numpy(), seed=seed)
    return {"segmentation": masks, "graded_subjects": len(graded), "grading": grading}


def _centre(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "median": float(np.median(values))}


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary as aligned text: value and 95 % interval."""
    rows = [
        (f"{region} {name} {kind}", cell)
        for region, scores in summary["segmentation"].items()
        for name, kinds in scores.items()
        for kind, cell in kinds.items()
    ] + list(summary["grading"].items())
    lines = [f"{summary['subjects']} subjects, {summary['graded_subjects']} with a grade"]
    for name, cell in rows:
        value, low, high = ("undefined" if v is None else f"{v:.3f}" for v in cell.values())
        lines.append(f"{name:<20} {value:>9}   95 % interval {low} to {high}")
    return "\n".join(lines)


class GradeTable:
    """Inference: ``grades.csv`` with P(HGG) and the predicted grade of each subject, and an overlay of its mask.

    Args:
        output_dir: folder of the files.
        grade_labels: class index of each grade's name.
    """

    def __init__(self, output_dir: str, grade_labels: Mapping[str, int]) -> None:
        self.output_dir = Path(output_dir)
        self.names = ["/".join(name for name, index in grade_labels.items() if index == i) for i in (0, 1)]

    def attach(self, engine: Workflow) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)

    def started(self, engine: Workflow) -> None:
        self.rows: list[dict] = []

    def iteration_completed(self, engine: Workflow) -> None:
        for item in engine.state.output:
            prob = float(item["hgg_prob"])
            graded = not np.isnan(prob)
            grade = self.names[int(prob >= 0.5)] if graded else ""
            self.rows.append({"subject": item["subject"], "hgg_prob": prob, "grade": grade})
            overlay(item, item["subject"] + (f"  P(HGG) {prob:.2f}" if graded else ""), self.output_dir)
        write_csv(pd.DataFrame(self.rows), self.output_dir / "grades.csv")


def overlay(item: Mapping[str, Any], title: str, folder: Path) -> None:
    """Write ``<folder>/<subject>_overlay.png`` from an evaluated item, all on the input's grid."""
    meta = item["pred"].meta
    background = nib.Nifti1Image.from_filename(meta["filename_or_obj"]).get_fdata(dtype=np.float32)
    flips = nib.io_orientation(np.asarray(item["pred"].affine))

    def canonical(volume: torch.Tensor | np.ndarray) -> np.ndarray:
        return nib.apply_orientation(np.asarray(volume), flips)

    file = folder / f"{item['subject']}_overlay.png"
    mask = canonical((item["pred"] > 0).any(dim=0).cpu())
    truth = canonical((item["label"] > 0).any(dim=0).cpu()) if "label" in item else None
    uncertainty = canonical(item["uncertainty"].amax(dim=0).cpu())
    plot_overlay(canonical(background), mask, uncertainty, truth, title, file)


def write_csv(table: pd.DataFrame, file: Path) -> None:
    """Write a table in one step, six significant digits."""
    with atomic_path(file) as path:
        table.to_csv(path, index=False, float_format="%.6g")
