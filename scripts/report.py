"""The tables of evaluation and inference."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from monai.engines.workflow import Workflow
from scipy.stats import spearmanr
from sklearn.metrics import brier_score_loss

from scripts.config import atomic_path
from scripts.distributed import gathered
from scripts.images import read_volume
from scripts.metrics import grading_scores, mask_scores, with_intervals
from scripts.plots import plot_overlay, plot_reliability, plot_risk_coverage
from scripts.results import ResultsFile
from scripts.uncertainty import (
    CALIBRATED_FOR,
    calibration_bins,
    error_auroc,
    expected_calibration_error,
    region_of_interest,
    risk_coverage,
    temperature_scaled,
    volume_estimate,
)

logger = logging.getLogger(__name__)


class SubjectReport:
    """Evaluation: one row and one overlay per subject, then the summary with 95 % intervals.

    Writes ``subjects.csv``, ``summary.json``, ``evaluation_results.json``, ``reliability.png``,
    ``risk_coverage.png`` and ``overlays/<subject>.png``. Calibration is over the brain (the voxels of the first
    modality that are not 0) and over the lesion (truth and prediction, dilated by 3 voxels); whether uncertainty ranks
    errors, over the brain.

    Args:
        output_dir: folder of the files.
        regions: names of the region channels.
        settings: written into the summary beside the scores.
        results: file of the means, beside those of other models.
        seed: seed of the bootstrap.
    """

    def __init__(
        self,
        output_dir: str,
        regions: Sequence[str],
        settings: Mapping[str, Any],
        results: ResultsFile,
        seed: int = 0,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.regions = list(regions)
        self.settings = dict(settings)
        self.results = results
        self.seed = seed

    def attach(self, engine: Workflow) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Workflow) -> None:
        self.rows: list[dict] = []
        self.bins: list[dict[str, np.ndarray]] = []  # one of each a subject
        self.risks: list[dict[str, np.ndarray]] = []

    def iteration_completed(self, engine: Workflow) -> None:
        for item in engine.state.output:
            background = read_background(item)
            spacing = item["label"].pixdim.tolist()
            row = {"subject": item["subject"], "grade": int(item["grade"]), "hgg_prob": float(item["hgg_prob"])}
            row |= mask_scores(item["pred"], item["label"], spacing, self.regions)
            voxel_volume = float(np.prod(spacing)) / 1000
            self.bins.append({})
            self.risks.append({})
            for channel, region in enumerate(self.regions):
                row[f"volume_ml_{region}"] = float(item["pred"][channel].sum()) * voxel_volume
                row[f"true_volume_ml_{region}"] = float(item["label"][channel].sum()) * voxel_volume
                self._judge_uncertainty(item, channel, background != 0, row)
            row |= estimates(item, self.regions, voxel_volume)
            self.rows.append(row)
            title = f"{item['subject']}  Dice {row[f'dice_{self.regions[0]}']:.2f}"
            overlay(item, background, title, self.output_dir / "overlays")

    def _judge_uncertainty(self, item: Mapping[str, Any], channel: int, brain: np.ndarray, row: dict) -> None:
        region = self.regions[channel]
        prob, uncertainty = (np.asarray(item[key][channel].cpu()) for key in ("prob", "uncertainty"))
        pred, label = (np.asarray(item[key][channel].cpu()) > 0 for key in ("pred", "label"))
        roi, wrong = region_of_interest(pred, label), (pred != label)[brain]
        for voxels, chosen in (("brain", brain), ("lesion", roi)):
            bins = calibration_bins(prob[chosen], label[chosen])
            self.bins[-1][f"{region} {voxels}"] = bins
            row[f"ece_{voxels}_{region}"] = expected_calibration_error(bins[None])
        risk = risk_coverage(uncertainty[brain], wrong)
        self.risks[-1][region] = risk
        row[f"brier_{region}"] = brier_score_loss(label[roi], prob[roi].clip(0, 1)) if roi.any() else np.nan
        row[f"error_auroc_{region}"] = error_auroc(uncertainty[brain], wrong)
        row[f"aurc_{region}"] = risk.mean()

    def completed(self, engine: Workflow) -> None:
        table, bins, risks = pd.DataFrame(gathered(self.rows)), _stacked(self.bins), _stacked(self.risks)
        if idist.get_rank() == 0:
            self._write(table, bins, risks)

    def _write(self, table: pd.DataFrame, bins: dict[str, np.ndarray], risks: dict[str, np.ndarray]) -> None:
        write_csv(table, self.output_dir / "subjects.csv")
        plot_reliability(bins, self.output_dir / "reliability.png")
        plot_risk_coverage(risks, self.output_dir / "risk_coverage.png")
        summary = {"subjects": len(table), "settings": self.settings, **summarise(table, self.regions, bins, self.seed)}
        with atomic_path(self.output_dir / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        self.results.write(table, self.regions)
        logger.info("\n" + format_summary(summary))


def summarise(
    table: pd.DataFrame, regions: Sequence[str], bins: Mapping[str, np.ndarray], seed: int = 0
) -> dict[str, Any]:
    """Scores of masks and uncertainty per region, and of grades per subject, each with a 95 % interval.

    Args:
        table: one row per subject.
        regions: names of the regions.
        bins: by region and voxels, as ``WT brain`` and ``WT lesion``, the
            :func:`~scripts.uncertainty.calibration_bins` of the same subjects, ``[n, 3, 20]``.
        seed: seed of the bootstrap.
    """
    masks = {
        region: {
            name: with_intervals(_centre, table[f"{name}_{region}"], seed=seed) for name in ("dice", "iou", "hd95")
        }
        for region in regions
    }
    graded = table[(table["grade"] >= 0) & table["hgg_prob"].notna()]
    grading = with_intervals(grading_scores, graded["grade"].to_numpy(), graded["hgg_prob"].to_numpy(), seed=seed)
    uncertainty = {
        region: with_intervals(_uncertainty_scores(table, region, bins), range(len(table)), seed=seed)
        for region in regions
    }
    return {"segmentation": masks, "uncertainty": uncertainty, "graded_subjects": len(graded), "grading": grading}


def _stacked(subjects: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of all processes' subjects, stacked per name."""
    everyone = gathered(subjects)
    return {name: np.stack([arrays[name] for arrays in everyone]) for name in everyone[0]}


def _centre(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "median": float(np.median(values))}


def _uncertainty_scores(
    table: pd.DataFrame, region: str, bins: Mapping[str, np.ndarray]
) -> Callable[[np.ndarray], dict[str, float]]:
    """Scores of the subjects with the given row numbers: ECE of all their voxels, means of the rest.

    ``volume_coverage`` is the share of true volumes within their 90 % interval, ``quality_rank`` Spearman's rank
    correlation of expected and true Dice.
    """
    columns = {name.removesuffix(f"_{region}"): values.to_numpy() for name, values in table.items()}
    true = columns["true_volume_ml"]
    inside = (columns["volume_low_ml"] <= true) & (true <= columns["volume_high_ml"])

    def scores(rows: np.ndarray) -> dict[str, float]:
        expected, dice = columns["expected_dice"][rows], columns["dice"][rows]
        varied = min(len(np.unique(expected)), len(np.unique(dice))) > 1
        means = {name: _mean(columns[name][rows]) for name in ("brier", "error_auroc", "aurc")}
        return {
            **{
                f"ece_{voxels}": expected_calibration_error(bins[f"{region} {voxels}"][rows])
                for voxels in CALIBRATED_FOR
            },
            **means,
            "volume_coverage": float(inside[rows].mean()),
            "quality_rank": float(spearmanr(expected, dice).statistic) if varied else np.nan,
        }

    return scores


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary as aligned text: value and 95 % interval."""
    rows = [
        (f"{region} {name} {kind}", cell)
        for region, scores in summary["segmentation"].items()
        for name, kinds in scores.items()
        for kind, cell in kinds.items()
    ]
    for region, scores in summary["uncertainty"].items():
        rows += [(f"{region} {name}", cell) for name, cell in scores.items()]
    rows += list(summary["grading"].items())
    lines = [f"{summary['subjects']} subjects, {summary['graded_subjects']} with a grade"]
    for name, cell in rows:
        value, low, high = ("undefined" if v is None else f"{v:.3f}" for v in cell.values())
        lines.append(f"{name:<20} {value:>9}   95 % interval {low} to {high}")
    return "\n".join(lines)


class GradeTable:
    """Inference: ``grades.csv`` with each subject's P(HGG), grade, volumes and quality, and an overlay of its mask.

    Args:
        output_dir: folder of the files.
        grade_labels: class index of each grade's name.
        regions: names of the region channels.
        to_regions: turns the label map ``pred`` of an item back into the channels of its regions.
    """

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
        self.grade_labels = dict(grade_labels)

    def attach(self, engine: Workflow) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Workflow) -> None:
        self.rows: list[dict] = []

    def completed(self, engine: Workflow) -> None:
        self._write(gathered(self.rows))

    def iteration_completed(self, engine: Workflow) -> None:
        for item in engine.state.output:
            row = grade_row(item, self.regions, self.grade_labels)
            self.rows.append(row)
            title = item["subject"] + (f"  P(HGG) {row['hgg_prob']:.2f}" if row["grade"] else "")
            overlay(self.to_regions(item), read_background(item), title, self.output_dir)
        self._write(self.rows)  # what is done so far

    @idist.one_rank_only()
    def _write(self, rows: list[dict]) -> None:
        write_csv(pd.DataFrame(rows), self.output_dir / "grades.csv")


def grade_row(item: Mapping[str, Any], regions: Sequence[str], grade_labels: Mapping[str, int]) -> dict[str, Any]:
    """Row of ``grades.csv`` of an inferred item, whose volumes lie on the input's grid: P(HGG), grade, estimates."""
    prob = float(item["hgg_prob"])
    names = ["/".join(name for name, index in grade_labels.items() if index == i) for i in (0, 1)]
    row = {"subject": item["subject"], "hgg_prob": prob, "grade": "" if np.isnan(prob) else names[int(prob >= 0.5)]}
    return row | estimates(item, regions, float(item["prob"].pixdim.prod()) / 1000)


def estimates(item: Mapping[str, Any], regions: Sequence[str], voxel_volume: float) -> dict[str, float]:
    """What is known of each region without the truth: volumes, expected Dice, agreement of the samples.

    Args:
        item: an evaluated item.
        regions: names of its channels.
        voxel_volume: of one voxel (ml).
    """
    row: dict[str, float] = {}
    for channel, region in enumerate(regions):
        # the lesion's temperature raises the background above the levels that volumes are read at
        prob = temperature_scaled(torch.as_tensor(item["prob"][channel]), torch.as_tensor(item["to_brain"][channel]))
        known = volume_estimate(prob.cpu().numpy(), voxel_volume)
        known["sample_dice"] = float(item["sample_dice"][channel])
        row |= {f"{name}_{region}": value for name, value in known.items()}
    return row


def read_background(item: Mapping[str, Any]) -> np.ndarray:
    """First modality or channel of an evaluated item, ``[H, W, S]`` as it is in the file."""
    return read_volume(item["pred"].meta["filename_or_obj"])


def overlay(item: Mapping[str, Any], background: np.ndarray, title: str, folder: Path) -> None:
    """Write ``<folder>/<subject>_overlay.png`` from an evaluated item, all on the input's grid."""
    flips = nib.io_orientation(np.asarray(item["pred"].affine))

    def canonical(volume: torch.Tensor | np.ndarray) -> np.ndarray:
        return nib.apply_orientation(np.asarray(volume), flips)

    file = folder / f"{item['subject']}_overlay.png"
    masks = np.stack([canonical(region.cpu()) > 0 for region in item["pred"]])
    truth = np.stack([canonical(region.cpu()) > 0 for region in item["label"]]) if "label" in item else None
    uncertainty = canonical(item["uncertainty"].amax(dim=0).cpu())
    plot_overlay(canonical(background), masks, uncertainty, truth, title, file)


def write_csv(table: pd.DataFrame, file: Path) -> None:
    """Write a table in one step, six significant digits."""
    with atomic_path(file) as path:
        table.to_csv(path, index=False, float_format="%.6g")
