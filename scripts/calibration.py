"""Temperature scaling: fitted on validation subjects, stored in the checkpoint, applied when sampling."""

from __future__ import annotations

import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss
from sklearn.model_selection import KFold

from scripts.checkpoint import store_in_model
from scripts.config import InputError, atomic_path
from scripts.distributed import gathered
from scripts.report import read_background
from scripts.uncertainty import (
    CALIBRATED_FOR,
    MIN_PROBABILITY,
    calibration_bins,
    expected_calibration_error,
    region_of_interest,
    temperature_scaled,
)

logger = logging.getLogger(__name__)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
MAX_VOXELS = 200_000  # of one subject and region: bounds memory, and no subject outweighs many others


def fit_temperature(prob: np.ndarray, truth: np.ndarray) -> float:
    """Temperature of least log loss for probabilities ``[n]`` and binary truths ``[n]``, 0.05 to 20."""
    logits = torch.logit(torch.as_tensor(prob, dtype=torch.float64), eps=MIN_PROBABILITY)
    target = torch.as_tensor(truth, dtype=torch.float64)

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(torch.nn.functional.binary_cross_entropy_with_logits(scaled, target))

    bounds = (np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def cross_fitted(probs: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Probabilities of each subject under the temperature of the others, five folds; unchanged for a single subject."""
    scaled = list(probs)
    if len(probs) > 1:
        for fit, judge in KFold(min(5, len(probs))).split(scaled):
            temperature = fit_temperature(*(np.concatenate([part[i] for i in fit]) for part in (probs, truths)))
            for i in judge:
                scaled[i] = _scaled(probs[i], temperature)
    return scaled


def _scaled(prob: np.ndarray, temperature: float) -> np.ndarray:
    return temperature_scaled(torch.as_tensor(prob), torch.tensor(temperature)).numpy()


class TemperatureFit:
    """Handler of the evaluator that fits the temperatures of masks (per region and :data:`CALIBRATED_FOR`) and grade.

    ``brain``: all voxels of the brain. ``lesion``: those of truth and prediction, dilated
    (:func:`~scripts.uncertainty.region_of_interest`); what was missed is among them and the sure background is not, so
    that this temperature is far higher and holds there alone. Writes the temperatures into the checkpoint and
    ``calibration.json`` with the scores before, after, and cross-fitted: each subject under the temperature of the
    others, the honest figure.

    Args:
        ckpt_path: the checkpoint.
        output_dir: folder of ``calibration.json``.
        regions: names of the region channels.
    """

    def __init__(self, ckpt_path: str, output_dir: str, regions: Sequence[str]) -> None:
        self.ckpt_path = ckpt_path
        self.output_dir = Path(output_dir)
        self.regions = list(regions)

    def attach(self, engine: SupervisedEvaluator) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: SupervisedEvaluator) -> None:
        for name in (*CALIBRATED_FOR, "grade"):  # fitted to what the network says by itself
            engine.network.get_buffer(f"{name}_temperature").fill_(1)
        self.voxels: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        self.grades: list[tuple[float, int]] = []
        self.rng = np.random.default_rng(0)

    def iteration_completed(self, engine: SupervisedEvaluator) -> None:
        for item in engine.state.output:
            brain = read_background(item) != 0
            for channel, region in enumerate(self.regions):
                prob, label = np.asarray(item["prob"][channel].cpu()), np.asarray(item["label"][channel].cpu()) > 0
                self._keep(region, "brain", prob[brain], label[brain])
                lesion = region_of_interest(prob > 0.5, label)
                self._keep(region, "lesion", prob[lesion], label[lesion])
            if int(item["grade"]) >= 0 and not np.isnan(float(item["hgg_prob"])):
                self.grades.append((float(item["hgg_prob"]), int(item["grade"])))

    def _keep(self, region: str, voxels: str, prob: np.ndarray, label: np.ndarray) -> None:
        if len(prob) > MAX_VOXELS:
            drawn = self.rng.choice(len(prob), MAX_VOXELS, replace=False)
            prob, label = prob[drawn], label[drawn]
        self.voxels[region, voxels].append((prob, label))

    def completed(self, engine: SupervisedEvaluator) -> None:
        report: dict[str, Any] = {region: {} for region in self.regions}
        for region, voxels in itertools.product(self.regions, CALIBRATED_FOR):
            probs, truths = map(list, zip(*gathered(self.voxels[region, voxels]), strict=True))
            if not any(truth.any() for truth in truths):
                raise InputError(f"no voxel of {region} in any truth: there is nothing to calibrate")
            report[region][voxels] = _fit(probs, truths, voxel_scores)
        grades = gathered(self.grades)
        if len({grade for _, grade in grades}) == 2:
            probs, truths = (list(np.array(column)[:, None]) for column in zip(*grades, strict=True))
            report["grade"] = _fit(probs, truths, grade_scores)
        else:
            logger.warning("grades of one class or none: the temperature of the grade stays 1")
        if idist.get_rank() == 0:
            self._write(report)

    def _write(self, report: dict[str, Any]) -> None:
        buffers = {
            f"{voxels}_temperature": torch.tensor([report[region][voxels]["temperature"] for region in self.regions])
            for voxels in CALIBRATED_FOR
        }
        grade = report.get("grade", {"temperature": 1.0})
        store_in_model(self.ckpt_path, buffers | {"grade_temperature": torch.tensor(grade["temperature"])})
        with atomic_path(self.output_dir / "calibration.json") as path:
            path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        logger.info("\n" + json.dumps(report, indent=1))


def _fit(probs: list[np.ndarray], truths: list[np.ndarray], scores: Any) -> dict[str, Any]:
    """The temperature of all subjects together, and scores before, after and cross-fitted."""
    prob, truth = np.concatenate(probs), np.concatenate(truths)
    temperature = fit_temperature(prob, truth)
    held_out = np.concatenate(cross_fitted(probs, truths))
    return {
        "subjects": len(probs),
        "temperature": temperature,
        "before": scores(prob, truth),
        "after": scores(_scaled(prob, temperature), truth),
        "cross_fitted": scores(held_out, truth),
    }


def voxel_scores(prob: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Expected calibration error and Brier score of voxels ``[n]``."""
    ece = expected_calibration_error(calibration_bins(prob, truth)[None])
    return {"ece": ece, "brier": float(brier_score_loss(truth, prob))}


def grade_scores(prob: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Brier score and log loss of subjects ``[n]``; too few for bins."""
    return {"brier": float(brier_score_loss(truth, prob)), "log_loss": float(log_loss(truth, prob, labels=[0, 1]))}
