"""Report that fits the calibration to the subjects of an evaluation, and saves it in the checkpoint."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import brier_score_loss

from scripts.calibration.cross_fit import scored_fit
from scripts.calibration.fits import fit_expected_dice, fit_temperature, to_classes
from scripts.calibration.grades import GradeFit, Measured, calibrate_grades, fit_grades
from scripts.calibration.parts import HIGH, dice_curve, fit_high_threshold, parts_of
from scripts.calibration.volumes import COVERAGE, Volume, conformal_margin, held_share, volume_curve
from scripts.config import InputError, atomic_path
from scripts.data.grades import class_frequencies
from scripts.data.split import patient
from scripts.networks.base import SegmentationNetwork
from scripts.networks.calibration import (
    CALIBRATED_FOR,
    GRADE_FROM,
    VOLUMES_FROM,
    Calibration,
    expected_dice,
)
from scripts.report.metrics import grade_losses
from scripts.report.plots import read_background
from scripts.report.uncertainty import (
    calibration_bins,
    expected_calibration_error,
    region_of_interest,
    sampled_volume,
    size_unit,
    true_masks,
)
from scripts.sampling.inferer import VolumeInferer
from scripts.sampling.report import Report
from scripts.training.checkpoints import read_checkpoint, store_calibration

logger = logging.getLogger(__name__)

MAX_VOXELS = 200_000  # per subject and region: bounds the memory and the weight of one subject


class CalibrationFit(Report):
    """Report of an evaluation that fits the :class:`~scripts.networks.calibration.Calibration` of a checkpoint.

    There are two sets of voxels. ``foreground`` are the voxels of the first modality that are not 0. ``lesion`` are the
    voxels of truth or prediction, dilated (:func:`~scripts.report.uncertainty.region_of_interest`). The second set
    contains every missed voxel but little of the background, which is right and certain. Its temperature is therefore
    much higher, and valid only near the lesion. Of several annotators, each one's mask counts as a truth; for the
    expected Dice, only that of the majority does.

    The result is saved in the checkpoint, with the sampling settings. ``calibration.json`` holds the scores before,
    after, and cross-fitted: each subject is calibrated by a fit to other patients. The scores to report are those of
    the test subjects.

    Args:
        network: whose calibration is fitted. It is reset: the fit needs probabilities that are not calibrated.
        inferer: that samples it.
        ckpt_path: the checkpoint.
        output_dir: folder of ``calibration.json``.
        regions: names of the region channels.
        grade_labels: class index of each grade.
        patient_pattern: see :func:`scripts.data.split.patient`.
        items: subjects whose grades give the prior.
        lineage: the calibrated subjects, by data set; added to those that chose the weights.
        grade_from: what the grade is read from, one of :data:`~scripts.networks.calibration.GRADE_FROM`.
        measured: training subjects among those that are evaluated. Nothing is fitted to them but what measurements of
            the mask say of the grade, and only if the checkpoint was trained on them.

    Raises:
        InputError: for another ``grade_from``, or another ``fusion`` of the inferer than ``mean``.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        inferer: VolumeInferer,
        ckpt_path: str,
        output_dir: str,
        regions: Sequence[str],
        grade_labels: Mapping[str, int],
        patient_pattern: str,
        items: Sequence[Mapping[str, Any]],
        lineage: Mapping[str, Sequence[str]],
        grade_from: str = "head",
        measured: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if grade_from not in GRADE_FROM:
            raise InputError(f"grade_from '{grade_from}' is not one of {list(GRADE_FROM)}")
        if inferer.fusion != "mean":
            raise InputError(f"fusion={inferer.fusion}: the calibration is fitted to masks of fusion=mean")
        self.calibration = network.calibration
        self.calibration.reset()
        self.sampling = inferer.sampling
        self.grade_from = grade_from
        self.ckpt_path = ckpt_path
        self.output_dir = Path(output_dir)
        self.regions = list(regions)
        self.patient_pattern = patient_pattern
        self.prior = class_frequencies(items, grade_labels)
        self.lineage = dict(lineage)
        self.measured = {item["subject"] for item in measured}
        self.known = {name for dataset in lineage for name in _trained_on(ckpt_path, dataset)}

    def rows_of(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        if item["subject"] in self.measured:
            if "measurements" not in item or item["subject"] not in self.known:
                return []
            return [{"trained": (torch.as_tensor(item["measurements"]).tolist(), int(item["grade"]))}]
        row: dict[str, Any] = {"patient": patient(item["subject"], self.patient_pattern)}
        foreground = read_background(item) != 0
        names = enumerate(self.regions)
        row["regions"] = {name: self._region(item, index, foreground, row["patient"]) for index, name in names}
        if int(item["grade"]) >= 0 and "grade_prob" in item:
            found = [] if self.grade_from == "head" else torch.as_tensor(item["measurements"]).tolist()
            row["grade"] = ([*torch.as_tensor(item["grade_prob"]).tolist(), *found], int(item["grade"]))
        return [row]

    def _region(self, item: Mapping[str, Any], channel: int, foreground: np.ndarray, name: str) -> dict[str, Any]:
        """Voxels of both sets, volumes and parts of a region of an item."""
        prob, pred, majority = (np.asarray(item[key][channel].cpu()) for key in ("prob", "pred", "label"))
        seg_prob = np.asarray(item["seg_prob"][channel].cpu()) if "seg_prob" in item else prob
        truths = true_masks(item, channel)
        lesion = region_of_interest(pred > 0, np.any(truths, axis=0))
        sampled = {}
        if "sample_volumes" in item:
            sampled = sampled_volume(item["sample_volumes"][channel :: len(self.regions)])
        size, rng = size_unit(item).voxel, np.random.default_rng(0)
        bounds = {kind: value * size for kind, value in sampled.items()}
        return {
            "foreground": [_drawn(prob[foreground], label[foreground], rng) for label in truths],
            "lesion": [_drawn(prob[lesion], label[lesion], rng) for label in truths],
            "volumes": [Volume(volume_curve(prob) * size, bounds, float(mask.sum()) * size, name) for mask in truths],
            "parts": parts_of(pred > 0, majority > 0, seg_prob, prob),
        }

    def write(self, rows: list[dict[str, Any]]) -> None:
        judged = [row for row in rows if "patient" in row]
        new = self.calibration.like()
        report: dict[str, Any] = {region: {} for region in self.regions}
        for region, voxels in itertools.product(self.regions, CALIBRATED_FOR):
            found = [(*pair, row["patient"]) for row in judged for pair in row["regions"][region][voxels]]
            probs, truths, patients = map(list, zip(*found, strict=True))
            if not any(truth.any() for truth in truths):
                raise InputError(
                    f"region '{region}' has no voxel in any true mask, so it cannot be calibrated; use more subjects"
                )
            scores, (temperature,) = scored_fit(probs, truths, patients, fit_temperature, voxel_scores)
            new.get_buffer(f"{voxels}_temperature")[self.regions.index(region)] = temperature
            report[region][voxels] = {"temperature": temperature, **scores}
        self._fit_volumes(judged, new, report)
        self._fit_parts(judged, new, report)
        trained = [row["trained"] for row in rows if "trained" in row]
        if fitted := self._fit_grades([row for row in judged if "grade" in row], trained, new):
            report["grade"] = fitted
        new.sampling = self.sampling
        store_calibration(self.ckpt_path, new.state_dict(), self.lineage)
        with atomic_path(self.output_dir / "calibration.json") as path:
            path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        logger.info("\n" + json.dumps(report, indent=1))

    def _fit_volumes(self, judged: Sequence[Mapping[str, Any]], new: Calibration, report: dict[str, Any]) -> None:
        """Choose what the volume intervals are read from, and fit their margins.

        The choice is the source whose uncorrected intervals hold a share of the volumes that is nearest to 90 %.
        """
        volumes = {
            region: [volume for row in judged for volume in row["regions"][region]["volumes"]]
            for region in self.regions
        }
        patients = {region: [volume.patient for volume in found] for region, found in volumes.items()}
        sources = VOLUMES_FROM if all(volume.sampled for volume in volumes[self.regions[0]]) else VOLUMES_FROM[:1]
        scores = {
            (name, region): [volume.score(name, float(temperature)) for volume in volumes[region]]
            for name in sources
            for region, temperature in zip(self.regions, new.foreground_temperature, strict=True)
        }
        held = {(name, region): held_share(found, patients[region]) for (name, region), found in scores.items()}
        distance = {name: sum(abs(held[name, region] - COVERAGE) for region in self.regions) for name in sources}
        new.volumes_from = min(sources, key=distance.__getitem__)
        for channel, region in enumerate(self.regions):
            margin = conformal_margin(scores[new.volumes_from, region], patients[region])
            new.volume_margin[channel] = margin
            report[region]["volume_margin"] = None if math.isinf(margin) else margin
            report[region]["volumes_from"] = new.volumes_from
            report[region]["volume_coverage"] = {name: held[name, region] for name in sources}
            if math.isinf(margin):
                logger.warning(
                    f"{len(set(patients[region]))} patients are too few for intervals of the volume of '{region}': 9 "
                    "are needed. None will be given; raise validation_share"
                )

    def _fit_parts(self, judged: Sequence[Mapping[str, Any]], new: Calibration, report: dict[str, Any]) -> None:
        """Fit which parts of a mask are left out, and what Dice to expect of the others.

        The report holds the mean Dice with all parts and with those that are kept, and the mean difference of the
        expected Dice to the true one.
        """
        for channel, region in enumerate(self.regions):
            masks, patients = [row["regions"][region]["parts"] for row in judged], [row["patient"] for row in judged]
            curves = [dice_curve(parts) for parts in masks]
            scores, (position,) = scored_fit(
                curves,
                curves,
                patients,
                fit_high_threshold,
                lambda kept, _: {"dice": float(kept[:, 0].mean())},
                lambda kept, position: kept[:, [position]],
            )
            helps = scores["cross_fitted"]["dice"] > scores["before"]["dice"]  # also patients that it was not fitted to
            high = float(HIGH[position if helps else 0])
            new.high_threshold[channel] = high
            report[region]["parts"] = {"high_threshold": high} | scores | ({} if helps else {"after": scores["before"]})
            scores, numbers = scored_fit(
                [np.array([parts.confidence(high)]) for parts in masks],
                [np.array([parts.dice(high)]) for parts in masks],
                patients,
                fit_expected_dice,
                lambda expected, true: {"mean_error": float(np.abs(np.nan_to_num(expected) - true).mean())},
                lambda values, *numbers: expected_dice(torch.as_tensor(values), torch.tensor(numbers)).numpy(),
            )
            new.dice_fit[channel] = torch.tensor(numbers)
            named = zip(("bias", "slope", "of_empty"), numbers, strict=True)
            report[region]["expected_dice"] = {
                key: None if math.isinf(value) else value for key, value in named
            } | scores

    def _fit_grades(
        self, graded: Sequence[Mapping[str, Any]], trained: Sequence[tuple[list[float], int]], new: Calibration
    ) -> dict[str, Any]:
        """Fit the grades, write the result into ``new``, and return what is reported; empty without grades.

        Args:
            graded: rows of the subjects with a grade.
            trained: measurements and grade of training subjects.
            new: the calibration.
        """
        if len({row["grade"][1] for row in graded}) < 2:
            logger.warning("fewer than two grades are present: the grade is not calibrated")
            return {}
        probs, truths = (
            list(np.array(column)[:, None]) for column in zip(*(row["grade"] for row in graded), strict=True)
        )
        patients = [row["patient"] for row in graded]
        alpha = read_checkpoint(self.ckpt_path)["loss"]["cls_loss.class_weight"].double().numpy()
        prior_bias = -np.log(alpha / alpha.mean())
        count = len(self.prior)
        measured = Measured(*map(np.array, zip(*trained, strict=True))) if trained else None
        if self.grade_from != "head" and len({grade for _, grade in trained}) < 2:
            logger.warning(
                "no two training subjects of different grades could be measured: measurements of the mask count little "
                "for the grade. Calibrate with the data set and fold of the training"
            )
        if self.grade_from == "measurements":
            prior_bias = np.log(self.prior)

        def fit(rows: np.ndarray, truth: np.ndarray) -> tuple[GradeFit]:
            found = None if self.grade_from == "head" else rows[:, count:]
            use_head = self.grade_from != "measurements"
            fitted = fit_grades(
                rows[:, :count], truth, prior_bias, measurements=found, trained=measured, use_head=use_head
            )
            return (fitted,)

        def apply(rows: np.ndarray, fitted: GradeFit) -> np.ndarray:
            return calibrate_grades(rows[:, :count], rows[:, count:], fitted)

        scores, (found,) = scored_fit(
            probs, truths, patients, fit, lambda rows, truth: grade_losses(rows[:, :count], truth), apply
        )
        new.grade_temperature.fill_(found.temperature)
        new.grade_bias.copy_(torch.as_tensor(found.bias))
        new.grade_prior.copy_(torch.as_tensor(self.prior))
        if found.weight.size:
            for name in ("mean", "scale", "weight"):
                new.get_buffer(f"measurement_{name}").copy_(torch.as_tensor(getattr(found, name)))
        temperature = None if math.isinf(found.temperature) else found.temperature
        fitted = {"temperature": temperature, "bias": found.bias.tolist(), "prior": list(map(float, self.prior))}
        return {"grade_from": self.grade_from} | fitted | scores


def _drawn(prob: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities and truth of at most :data:`MAX_VOXELS` voxels."""
    if len(prob) > MAX_VOXELS:
        drawn = rng.choice(len(prob), MAX_VOXELS, replace=False)
        prob, label = prob[drawn], label[drawn]
    return to_classes(prob), label


def _trained_on(ckpt_path: str, dataset: str) -> list[str]:
    """Names of the subjects of a data set that the weights were trained on."""
    return read_checkpoint(ckpt_path)["lineage"]["training"].get(dataset, [])


def voxel_scores(prob: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Expected calibration error and Brier score of voxels ``[n, 2]``."""
    ece = expected_calibration_error(calibration_bins(prob[:, 1], truth)[None])
    return {"ece": ece, "brier": float(brier_score_loss(truth, prob[:, 1]))}
