"""Temperature scaling: fitted on validation subjects, stored in the checkpoint, applied when sampling."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss
from sklearn.model_selection import KFold

from scripts.checkpoint import store_temperatures
from scripts.config import InputError, atomic_path
from scripts.uncertainty import calibration_bins, expected_calibration_error, region_of_interest

logger = logging.getLogger(__name__)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
MAX_VOXELS = 200_000  # of one subject and region: bounds memory, and no subject outweighs many others


def temperature_scaled(prob: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """sigmoid(logit(prob) / temperature) (Guo et al., ICML 2017); what is above one half stays there."""
    return torch.where(temperature == 1, prob, torch.sigmoid(torch.logit(prob, eps=1e-6) / temperature))


def fit_temperature(prob: np.ndarray, truth: np.ndarray) -> float:
    """Temperature of least log loss for probabilities ``[n]`` and binary truths ``[n]``, 0.05 to 20."""
    logits, target = torch.logit(torch.as_tensor(prob, dtype=torch.float32), eps=1e-6), torch.as_tensor(truth).float()

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
    """Handler of the evaluator that fits the temperatures of masks (one per region) and of the grade.

    Mask voxels are those of truth and prediction, dilated (:func:`~scripts.uncertainty.region_of_interest`). Writes
    both temperatures into the checkpoint and ``calibration.json`` with the scores before, after, and cross-fitted:
    each subject under the temperature of the others, the honest figure.

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
        for name in ("temperature", "grade_temperature"):
            engine.network.get_buffer(name).fill_(1)  # they are fitted to what the network says by itself
        self.voxels: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in self.regions]
        self.grades: list[tuple[float, int]] = []
        self.rng = np.random.default_rng(0)

    def iteration_completed(self, engine: SupervisedEvaluator) -> None:
        for item in engine.state.output:
            prob, label = np.asarray(item["prob"].cpu()), np.asarray(item["label"].cpu()) > 0
            for channel, kept in enumerate(self.voxels):
                roi = np.flatnonzero(region_of_interest(prob[channel] > 0.5, label[channel]))
                if len(roi) > MAX_VOXELS:
                    roi = self.rng.choice(roi, MAX_VOXELS, replace=False)
                kept.append((prob[channel].ravel()[roi], label[channel].ravel()[roi]))
            if int(item["grade"]) >= 0 and not np.isnan(float(item["hgg_prob"])):
                self.grades.append((float(item["hgg_prob"]), int(item["grade"])))

    def completed(self, engine: SupervisedEvaluator) -> None:
        report: dict[str, Any] = {"subjects": len(self.voxels[0])}
        temperature = []
        for region, kept in zip(self.regions, self.voxels, strict=True):
            probs, truths = map(list, zip(*kept, strict=True))
            if not sum(map(len, probs)):
                raise InputError(f"no voxel of {region} in truth or prediction: there is nothing to calibrate")
            report[region], fitted = _fit(probs, truths, voxel_scores)
            temperature.append(fitted)
        grade_temperature = 1.0
        if len({grade for _, grade in self.grades}) == 2:
            probs, truths = (list(np.array(column)[:, None]) for column in zip(*self.grades, strict=True))
            report["grade"], grade_temperature = _fit(probs, truths, grade_scores)
        else:
            logger.warning("grades of one class or none: the temperature of the grade stays 1")
        store_temperatures(self.ckpt_path, temperature, grade_temperature)
        with atomic_path(self.output_dir / "calibration.json") as path:
            path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        logger.info("\n" + json.dumps(report, indent=1))


def _fit(probs: list[np.ndarray], truths: list[np.ndarray], scores: Any) -> tuple[dict[str, Any], float]:
    """Scores before, after and cross-fitted, and the temperature of all subjects together."""
    prob, truth = np.concatenate(probs), np.concatenate(truths)
    temperature = fit_temperature(prob, truth)
    held_out = np.concatenate(cross_fitted(probs, truths))
    report = {
        "temperature": temperature,
        "before": scores(prob, truth),
        "after": scores(_scaled(prob, temperature), truth),
        "cross_fitted": scores(held_out, truth),
    }
    return report, temperature


def voxel_scores(prob: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Expected calibration error and Brier score of voxels ``[n]``."""
    ece = expected_calibration_error(calibration_bins(prob, truth)[None])
    return {"ece": ece, "brier": float(brier_score_loss(truth, prob))}


def grade_scores(prob: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Brier score and log loss of subjects ``[n]``; too few for bins."""
    return {"brier": float(brier_score_loss(truth, prob)), "log_loss": float(log_loss(truth, prob, labels=[0, 1]))}
