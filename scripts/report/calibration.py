"""Temperature scaling: temperatures are fitted on validation subjects, saved in the checkpoint and used in sampling."""

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

from scripts.config import InputError, atomic_path
from scripts.distributed import gather_from_all
from scripts.report.overlays import read_background
from scripts.report.uncertainty import calibration_bins, expected_calibration_error, region_of_interest
from scripts.sampling.probability import CALIBRATED_FOR, MIN_PROBABILITY
from scripts.training.checkpoints import store_in_model

logger = logging.getLogger(__name__)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
MAX_VOXELS = 200_000  # per subject and region: bounds the memory and the weight of one subject


def to_classes(prob: np.ndarray) -> np.ndarray:
    """Class probabilities ``[n, 2]`` of foreground probabilities ``[n]``."""
    prob = prob.astype(np.float64)
    return np.stack([1 - prob, prob], axis=-1)


def scale(prob: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log(prob) / temperature) of class probabilities ``[n, K]`` (Guo et al., ICML 2017)."""
    return _log_softmax(prob, temperature).exp().numpy()


def _log_softmax(prob: np.ndarray, temperature: float) -> torch.Tensor:
    logits = torch.as_tensor(prob, dtype=torch.float64).clamp(min=MIN_PROBABILITY).log()
    return torch.log_softmax(logits / temperature, dim=-1)


def fit_temperature(prob: np.ndarray, truth: np.ndarray) -> float:
    """Temperature between 0.05 and 20 that minimises the log loss.

    Args:
        prob: class probabilities ``[n, K]``.
        truth: class indices ``[n]``.
    """
    target = torch.as_tensor(truth).long()

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.nll_loss(_log_softmax(prob, np.exp(log_temperature)), target))

    bounds = (np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def cross_fitted(probs: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each subject's probabilities, scaled by a temperature fitted on other subjects (five folds).

    The probabilities of a single subject are returned unchanged.
    """
    scaled = list(probs)
    if len(probs) > 1:
        for fit, held_out in KFold(min(5, len(probs))).split(scaled):
            temperature = fit_temperature(*(np.concatenate([values[i] for i in fit]) for values in (probs, truths)))
            for i in held_out:
                scaled[i] = scale(probs[i], temperature)
    return scaled


class TemperatureFit:
    """Evaluation handler that fits the temperatures of the masks (per region and set of voxels) and of the grade.

    There are two sets of voxels. ``foreground`` are the voxels of the first modality that are not 0. ``lesion`` are the
    voxels of truth or prediction, dilated (:func:`~scripts.report.uncertainty.region_of_interest`). The second set
    contains every missed voxel but little of the background, which is right and certain. Its temperature is therefore
    much higher, and valid only near the lesion.

    The temperatures are saved in the checkpoint. ``calibration.json`` holds the scores before, after, and cross-fitted.
    The cross-fitted scores are the ones to report: each subject is scaled by the temperature of other subjects.

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
        for name in (*CALIBRATED_FOR, "grade"):  # the fit needs probabilities that are not scaled
            engine.network.get_buffer(f"{name}_temperature").fill_(1)
        self.voxels: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        self.grades: list[tuple[list[float], int]] = []
        self.rng = np.random.default_rng(0)

    def iteration_completed(self, engine: SupervisedEvaluator) -> None:
        for item in engine.state.output:
            foreground = read_background(item) != 0
            for channel, region in enumerate(self.regions):
                prob, label = np.asarray(item["prob"][channel].cpu()), np.asarray(item["label"][channel].cpu()) > 0
                self._keep(region, "foreground", prob[foreground], label[foreground])
                lesion = region_of_interest(prob > 0.5, label)
                self._keep(region, "lesion", prob[lesion], label[lesion])
            if int(item["grade"]) >= 0 and "grade_prob" in item:
                self.grades.append((torch.as_tensor(item["grade_prob"]).tolist(), int(item["grade"])))

    def _keep(self, region: str, voxels: str, prob: np.ndarray, label: np.ndarray) -> None:
        if len(prob) > MAX_VOXELS:
            drawn = self.rng.choice(len(prob), MAX_VOXELS, replace=False)
            prob, label = prob[drawn], label[drawn]
        self.voxels[region, voxels].append((to_classes(prob), label))

    def completed(self, engine: SupervisedEvaluator) -> None:
        report: dict[str, Any] = {region: {} for region in self.regions}
        for region, voxels in itertools.product(self.regions, CALIBRATED_FOR):
            probs, truths = map(list, zip(*gather_from_all(self.voxels[region, voxels]), strict=True))
            if not any(truth.any() for truth in truths):
                raise InputError(
                    f"region '{region}' has no voxel in any true mask, so it cannot be calibrated; use more subjects"
                )
            report[region][voxels] = _fit(probs, truths, voxel_scores)
        grades = gather_from_all(self.grades)
        if len({grade for _, grade in grades}) > 1:
            probs, truths = (list(np.array(column)[:, None]) for column in zip(*grades, strict=True))
            report["grade"] = _fit(probs, truths, grade_scores)
        else:
            logger.warning("fewer than two grades are present: the temperature of the grade stays 1")
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
    """The temperature fitted on all subjects, and the scores before, after and cross-fitted."""
    prob, truth = np.concatenate(probs), np.concatenate(truths)
    temperature = fit_temperature(prob, truth)
    held_out = np.concatenate(cross_fitted(probs, truths))
    return {
        "subjects": len(probs),
        "temperature": temperature,
        "before": scores(prob, truth),
        "after": scores(scale(prob, temperature), truth),
        "cross_fitted": scores(held_out, truth),
    }


def voxel_scores(prob: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Expected calibration error and Brier score of voxels ``[n, 2]``."""
    ece = expected_calibration_error(calibration_bins(prob[:, 1], truth)[None])
    return {"ece": ece, "brier": float(brier_score_loss(truth, prob[:, 1]))}


def grade_scores(prob: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Brier score and log loss of subjects ``[n, K]``. There are too few subjects for a calibration error in bins."""
    one_hot = np.eye(prob.shape[1])[truth]
    brier = float(np.square(prob - one_hot).sum(axis=1).mean() / 2)  # equals scikit-learn's for two grades
    return {"brier": brier, "log_loss": float(log_loss(truth, prob, labels=list(range(prob.shape[1]))))}
