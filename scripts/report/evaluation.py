"""Evaluation: scores of each subject, and their summary with 95 % intervals."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from sklearn.metrics import brier_score_loss

from scripts.config import atomic_path
from scripts.data.grades import grade_names
from scripts.data.split import PATIENT_PATTERN, patient
from scripts.data.writing import write_csv
from scripts.networks.calibration import CALIBRATED_FOR
from scripts.report.annotators import METHODS, SCORES, annotator_scores
from scripts.report.intervals import with_intervals
from scripts.report.metrics import grade_losses, grading_scores, mask_scores, mean_of_defined
from scripts.report.plots import (
    plot_grade_calibration,
    plot_reliability,
    plot_risk_coverage,
    read_background,
    write_overlay,
)
from scripts.report.results import ResultsFile
from scripts.report.tables import estimates, grade_columns
from scripts.report.uncertainty import (
    calibration_bins,
    error_auroc,
    expected_calibration_error,
    nonconformity,
    region_of_interest,
    risk_coverage,
    size_unit,
    true_masks,
)
from scripts.sampling.report import Report

logger = logging.getLogger(__name__)


class SubjectReport(Report):
    """Report of an evaluation: one row and one overlay per subject, and a summary with 95 % intervals.

    Writes ``subjects.csv``, ``summary.json``, ``evaluation_results.json``, ``reliability.png``, ``risk_coverage.png``,
    ``grade_calibration.png`` (with grades) and ``overlays/<subject>_overlay.png``. Intervals are over patients.
    Calibration is measured over the foreground (voxels of the first modality that are not 0) and over the lesion
    (truth or prediction, dilated by 3 voxels). Error detection is measured over the foreground.

    Args:
        output_dir: folder of the files.
        regions: names of the region channels.
        grade_labels: class index of each grade; None for a task without grades.
        settings: settings that are saved in the summary with the scores.
        results: file of the mean scores, which may hold those of other models.
        patient_pattern: see :func:`scripts.data.split.patient`.
        seed: seed of the bootstrap.
    """

    def __init__(
        self,
        output_dir: str,
        regions: Sequence[str],
        grade_labels: Mapping[str, int] | None,
        settings: Mapping[str, Any],
        results: ResultsFile,
        patient_pattern: str = PATIENT_PATTERN,
        seed: int = 0,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.regions = list(regions)
        self.grades = grade_names(grade_labels) if grade_labels else []
        self.settings = dict(settings)
        self.results = results
        self.patient_pattern = patient_pattern
        self.seed = seed

    def rows_of(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        background = read_background(item)
        spacing = item["label"].pixdim.tolist()
        row = {"subject": item["subject"], "patient": patient(item["subject"], self.patient_pattern)}
        if self.grades:
            row |= {"grade": int(item["grade"]), **grade_columns(item, self.grades)}
            row |= grade_columns(item, self.grades, "prior")
        row |= mask_scores(item["pred"], item["label"], spacing, self.regions)
        size = size_unit(item)
        bins: dict[str, np.ndarray] = {}
        risks: dict[str, np.ndarray] = {}
        for channel, region in enumerate(self.regions):
            row[size.column("", "", region)] = float(item["pred"][channel].sum()) * size.voxel
            row[size.column("true", "", region)] = float(item["label"][channel].sum()) * size.voxel
            scores, of_region, risks[region] = self._uncertainty_of(item, channel, background != 0)
            row, bins = row | scores, bins | of_region
        row |= estimates(item, self.regions)
        for channel, region in enumerate(self.regions):
            low, high = (row[size.column("", name, region)] for name in ("low", "high"))
            volumes = true_masks(item, channel).sum(axis=(1, 2, 3)) * size.voxel
            outside = np.array([nonconformity(low, high, volume) for volume in volumes])
            row[f"covered_{region}"] = float((outside < 1e-6).mean()) if np.isfinite(low) else np.nan
        overlap = ", ".join(f"{region} {row[f'dice_{region}']:.2f}" for region in self.regions)
        title = f"{item['subject']}  Dice {overlap}"
        samples = item["samples"].unflatten(0, (-1, len(self.regions))) if "samples" in item else ()
        write_overlay(item, background, title, self.output_dir / "overlays", samples)
        return [row | {"bins": bins, "risks": risks}]

    def _uncertainty_of(
        self, item: Mapping[str, Any], channel: int, foreground: np.ndarray
    ) -> tuple[dict[str, float], dict[str, np.ndarray], np.ndarray]:
        """Scores of the uncertainty of a region, its calibration bins by their names, and its curve of the risk.

        Args:
            item: see :meth:`rows_of`.
            channel: of the region.
            foreground: voxels of the body ``[H, W, S]``.
        """
        region = self.regions[channel]
        prob, uncertainty = (np.asarray(item[key][channel].cpu()) for key in ("prob", "uncertainty"))
        pred, label = (np.asarray(item[key][channel].cpu()) > 0 for key in ("pred", "label"))
        lesion, wrong = region_of_interest(pred, label), (pred != label)[foreground]
        masks = {"foreground": foreground, "lesion": lesion}
        bins = {f"{region} {name}": calibration_bins(prob[mask], label[mask]) for name, mask in masks.items()}
        found = {f"ece_{name}": expected_calibration_error(bins[f"{region} {name}"][None]) for name in masks}
        risk = risk_coverage(uncertainty[foreground], wrong)
        found["brier"] = brier_score_loss(label[lesion], prob[lesion].clip(0, 1)) if lesion.any() else np.nan
        found["error_auroc"] = error_auroc(uncertainty[foreground], wrong)
        found["aurc"] = risk.mean()
        if "annotations" in item:
            scores, votes = annotator_scores(item, channel, prob, size_unit(item).voxel)
            found |= scores
            bins |= {f"{region} votes {name}": values for name, values in votes.items()}
        return {f"{name}_{region}": value for name, value in found.items()}, bins, risk

    def write(self, rows: list[dict[str, Any]]) -> None:
        bins, risks = (_stacked([row[name] for row in rows]) for name in ("bins", "risks"))
        table = pd.DataFrame(rows).drop(columns=["bins", "risks"])
        write_csv(table, self.output_dir / "subjects.csv")
        voxels = [f"{region} {name}" for region in self.regions for name in CALIBRATED_FOR]
        plot_reliability({name: bins[name] for name in voxels}, self.output_dir / "reliability.png")
        plot_risk_coverage(risks, self.output_dir / "risk_coverage.png")
        scores = summarise(table, self.regions, self.grades, bins, self.seed)
        summary = {"subjects": len(table), "patients": table["patient"].nunique(), "settings": self.settings, **scores}
        if summary["graded_subjects"]:
            plot_grade_calibration(
                graded_subjects(table, self.grades), self.grades, self.output_dir / "grade_calibration.png"
            )
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
    patients = table["patient"].to_numpy()
    masks = {
        region: {
            name: with_intervals(_centre(table[f"{name}_{region}"].to_numpy()), patients, seed)
            for name in ("dice", "iou", "hd95")
        }
        for region in regions
    }
    uncertainty = {
        region: with_intervals(_uncertainty_scores(table, region, bins), patients, seed) for region in regions
    }
    scores: dict[str, Any] = {"segmentation": masks, "uncertainty": uncertainty}
    if f"ged_samples_{regions[0]}" in table:
        scores["annotators"] = {
            region: with_intervals(_annotator_scores(table, region, bins), patients, seed) for region in regions
        }
    scores |= {"graded_subjects": 0, "grading": {}}
    if grades:
        graded = graded_subjects(table, grades)
        scores["graded_subjects"] = len(graded)
        scores["grading"] = with_intervals(grade_scores(graded, grades), graded["patient"].to_numpy(), seed)
    return scores


def graded_subjects(table: pd.DataFrame, grades: Sequence[str]) -> pd.DataFrame:
    """The subjects with a true and a predicted grade."""
    return table[table["grade"] >= 0].dropna(subset=[f"prob_{name}" for name in grades])


def grade_scores(table: pd.DataFrame, grades: Sequence[str]) -> Callable[[np.ndarray], dict[str, float]]:
    """Return a function that computes the grading scores of the graded subjects in the given rows.

    ``log_loss_of_prior`` is the log loss of the prior alone, without the image: a useful grade is below it.
    """
    truth = table["grade"].to_numpy(int)
    prob, prior = (table[[f"{kind}_{name}" for name in grades]].to_numpy(float) for kind in ("prob", "prior"))

    def scores(rows: np.ndarray) -> dict[str, float]:
        baseline = grade_losses(prior[rows], truth[rows])["log_loss"]
        found = grading_scores(truth[rows], prob[rows], grades) | grade_losses(prob[rows], truth[rows])
        return found | {"log_loss_of_prior": baseline}

    return scores


def _stacked(subjects: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of the subjects, stacked by name."""
    return {name: np.stack([arrays[name] for arrays in subjects]) for name in subjects[0]}


def _centre(values: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """Return a function that computes mean and median of the values in the given rows."""
    return lambda rows: {"mean": float(np.mean(values[rows])), "median": float(np.median(values[rows]))}


def _uncertainty_scores(
    table: pd.DataFrame, region: str, bins: Mapping[str, np.ndarray]
) -> Callable[[np.ndarray], dict[str, float]]:
    """Return a function that computes the uncertainty scores of the subjects in the given rows.

    ECE is computed over all voxels of these subjects; the other scores are means over subjects. ``volume_coverage`` is
    the share of true volumes inside their 90 % interval; it is undefined if the volumes were not calibrated.
    ``quality_rank`` is Spearman's rank correlation of expected and true Dice, ``quality_error`` their mean difference.
    """
    columns = {name.removesuffix(f"_{region}"): values.to_numpy() for name, values in table.items()}

    def scores(rows: np.ndarray) -> dict[str, float]:
        expected, dice = columns["expected_dice"][rows], columns["dice"][rows]
        varied = min(len(np.unique(expected)), len(np.unique(dice))) > 1
        means = {name: mean_of_defined(columns[name][rows]) for name in ("brier", "error_auroc", "aurc", "covered")}
        return {
            **{
                f"ece_{voxels}": expected_calibration_error(bins[f"{region} {voxels}"][rows])
                for voxels in CALIBRATED_FOR
            },
            "volume_coverage": means.pop("covered"),
            **means,
            "quality_rank": float(spearmanr(expected, dice).statistic) if varied else np.nan,
            "quality_error": float(np.abs(expected - dice).mean()),
        }

    return scores


def _annotator_scores(
    table: pd.DataFrame, region: str, bins: Mapping[str, np.ndarray]
) -> Callable[[np.ndarray], dict[str, float]]:
    """Return a function that computes the means of :func:`annotator_scores` of the subjects in the given rows.

    The ECE is computed over all voxels of these subjects. ``ged_gain`` is the distance of the level sets minus that of
    the samples of the same subject.
    """
    names = ["diversity_annotators", *(f"{score}_{method}" for score in SCORES for method in METHODS)]
    columns = {name: table[f"{name}_{region}"].to_numpy() for name in names}

    def scores(rows: np.ndarray) -> dict[str, float]:
        means = {name: mean_of_defined(values[rows]) for name, values in columns.items()}
        ece = {f"ece_{name}": expected_calibration_error(bins[f"{region} votes {name}"][rows]) for name in METHODS}
        return means | ece | {"ged_gain": means["ged_levels"] - means["ged_samples"]}

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
    for region, scores in summary.get("annotators", {}).items():
        rows += [(f"{region} {name}", cell) for name, cell in scores.items()]
    rows += list(summary["grading"].items())
    lines = [
        f"{summary['subjects']} subjects of {summary['patients']} patients, {summary['graded_subjects']} with a grade"
    ]
    if chosen := summary["settings"].get("chosen_by"):
        lines.append(f"{chosen} of them chose the weights or the calibration: these scores are too good")
    for name, cell in rows:
        value, low, high = ("undefined" if v is None else f"{v:.3f}" for v in cell.values())
        lines.append(f"{name:<24} {value:>9}   95 % interval {low} to {high}")
    return "\n".join(lines)
