"""Evaluation: scores of each subject, and their summary with 95 % intervals."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
from ignite.engine import Events
from monai.engines.workflow import Workflow
from scipy.stats import spearmanr
from sklearn.metrics import brier_score_loss

from scripts.config import atomic_path
from scripts.data.grades import grade_names
from scripts.distributed import gather_from_all
from scripts.report.intervals import with_intervals
from scripts.report.metrics import grading_scores, mask_scores, mean_of_defined
from scripts.report.overlays import read_background, write_overlay
from scripts.report.plots import plot_reliability, plot_risk_coverage
from scripts.report.results import ResultsFile
from scripts.report.tables import estimates, grade_columns, write_csv
from scripts.report.uncertainty import (
    calibration_bins,
    error_auroc,
    expected_calibration_error,
    region_of_interest,
    risk_coverage,
)
from scripts.sampling.probability import CALIBRATED_FOR

logger = logging.getLogger(__name__)


class SubjectReport:
    """Evaluation handler that writes one row and one overlay per subject, then a summary with 95 % intervals.

    Writes ``subjects.csv``, ``summary.json``, ``evaluation_results.json``, ``reliability.png``, ``risk_coverage.png``
    and ``overlays/<subject>_overlay.png``. Calibration is measured over the foreground (voxels of the first modality
    that are not 0) and over the lesion (truth or prediction, dilated by 3 voxels). Error detection is measured over
    the foreground.

    Args:
        output_dir: folder of the files.
        regions: names of the region channels.
        grade_labels: class index of each grade; None for a task without grades.
        settings: settings that are saved in the summary with the scores.
        results: file of the mean scores, which may hold those of other models.
        seed: seed of the bootstrap.
    """

    def __init__(
        self,
        output_dir: str,
        regions: Sequence[str],
        grade_labels: Mapping[str, int] | None,
        settings: Mapping[str, Any],
        results: ResultsFile,
        seed: int = 0,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.regions = list(regions)
        self.grades = grade_names(grade_labels) if grade_labels else []
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
        self.bins: list[dict[str, np.ndarray]] = []  # one dictionary per subject
        self.risks: list[dict[str, np.ndarray]] = []

    def iteration_completed(self, engine: Workflow) -> None:
        for item in engine.state.output:
            background = read_background(item)
            spacing = item["label"].pixdim.tolist()
            row = {"subject": item["subject"]}
            if self.grades:
                row |= {"grade": int(item["grade"]), **grade_columns(item, self.grades)}
            row |= mask_scores(item["pred"], item["label"], spacing, self.regions)
            voxel_volume = float(np.prod(spacing)) / 1000
            self.bins.append({})
            self.risks.append({})
            for channel, region in enumerate(self.regions):
                row[f"volume_ml_{region}"] = float(item["pred"][channel].sum()) * voxel_volume
                row[f"true_volume_ml_{region}"] = float(item["label"][channel].sum()) * voxel_volume
                self._score_uncertainty(item, channel, background != 0, row)
            row |= estimates(item, self.regions, voxel_volume)
            self.rows.append(row)
            title = f"{item['subject']}  Dice {row[f'dice_{self.regions[0]}']:.2f}"
            write_overlay(item, background, title, self.output_dir / "overlays")

    def _score_uncertainty(self, item: Mapping[str, Any], channel: int, foreground: np.ndarray, row: dict) -> None:
        region = self.regions[channel]
        prob, uncertainty = (np.asarray(item[key][channel].cpu()) for key in ("prob", "uncertainty"))
        pred, label = (np.asarray(item[key][channel].cpu()) > 0 for key in ("pred", "label"))
        lesion, wrong = region_of_interest(pred, label), (pred != label)[foreground]
        for voxels, mask in (("foreground", foreground), ("lesion", lesion)):
            bins = calibration_bins(prob[mask], label[mask])
            self.bins[-1][f"{region} {voxels}"] = bins
            row[f"ece_{voxels}_{region}"] = expected_calibration_error(bins[None])
        risk = risk_coverage(uncertainty[foreground], wrong)
        self.risks[-1][region] = risk
        row[f"brier_{region}"] = brier_score_loss(label[lesion], prob[lesion].clip(0, 1)) if lesion.any() else np.nan
        row[f"error_auroc_{region}"] = error_auroc(uncertainty[foreground], wrong)
        row[f"aurc_{region}"] = risk.mean()

    def completed(self, engine: Workflow) -> None:
        table, bins, risks = pd.DataFrame(gather_from_all(self.rows)), _stacked(self.bins), _stacked(self.risks)
        if idist.get_rank() == 0:
            self._write(table, bins, risks)

    def _write(self, table: pd.DataFrame, bins: dict[str, np.ndarray], risks: dict[str, np.ndarray]) -> None:
        write_csv(table, self.output_dir / "subjects.csv")
        plot_reliability(bins, self.output_dir / "reliability.png")
        plot_risk_coverage(risks, self.output_dir / "risk_coverage.png")
        scores = summarise(table, self.regions, self.grades, bins, self.seed)
        summary = {"subjects": len(table), "settings": self.settings, **scores}
        with atomic_path(self.output_dir / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        self.results.write(table, self.regions)
        logger.info("\n" + format_summary(summary))


def summarise(
    table: pd.DataFrame,
    regions: Sequence[str],
    grades: Sequence[str],
    bins: Mapping[str, np.ndarray],
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of masks and uncertainty per region, and of grades per subject, each with a 95 % interval.

    Args:
        table: one row per subject.
        regions: names of the regions.
        grades: names of the grades.
        bins: :func:`~scripts.report.uncertainty.calibration_bins` of the same subjects, ``[n, 3, 20]``, by region and
            set of voxels: ``WT foreground``, ``WT lesion``.
        seed: seed of the bootstrap.
    """
    masks = {
        region: {
            name: with_intervals(_centre, table[f"{name}_{region}"], seed=seed) for name in ("dice", "iou", "hd95")
        }
        for region in regions
    }
    columns = [f"prob_{name}" for name in grades]
    graded = table.reindex(columns=["grade", *columns]).dropna().query("grade >= 0")
    truth, prob = graded["grade"].to_numpy(int), graded[columns].to_numpy()
    grading = {}
    if grades:
        everyone = np.arange(len(graded))
        grading = with_intervals(lambda rows: grading_scores(truth[rows], prob[rows], grades), everyone, seed=seed)
    uncertainty = {
        region: with_intervals(_uncertainty_scores(table, region, bins), range(len(table)), seed=seed)
        for region in regions
    }
    return {"segmentation": masks, "uncertainty": uncertainty, "graded_subjects": len(graded), "grading": grading}


def _stacked(subjects: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of the subjects of all processes, stacked by name."""
    everyone = gather_from_all(subjects)
    return {name: np.stack([arrays[name] for arrays in everyone]) for name in everyone[0]}


def _centre(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "median": float(np.median(values))}


def _uncertainty_scores(
    table: pd.DataFrame, region: str, bins: Mapping[str, np.ndarray]
) -> Callable[[np.ndarray], dict[str, float]]:
    """Return a function that computes the uncertainty scores of the subjects in the given rows.

    ECE is computed over all voxels of these subjects; the other scores are means over subjects. ``volume_coverage`` is
    the share of true volumes inside their 90 % interval. ``quality_rank`` is Spearman's rank correlation of expected
    and true Dice.
    """
    columns = {name.removesuffix(f"_{region}"): values.to_numpy() for name, values in table.items()}
    true = columns["true_volume_ml"]
    inside = (columns["volume_low_ml"] <= true) & (true <= columns["volume_high_ml"])

    def scores(rows: np.ndarray) -> dict[str, float]:
        expected, dice = columns["expected_dice"][rows], columns["dice"][rows]
        varied = min(len(np.unique(expected)), len(np.unique(dice))) > 1
        means = {name: mean_of_defined(columns[name][rows]) for name in ("brier", "error_auroc", "aurc")}
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


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary as aligned text: each score with its 95 % interval."""
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
