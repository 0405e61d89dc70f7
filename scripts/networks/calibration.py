"""What is fitted to validation patients after training, and is saved with the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

VOLUMES_FROM = ("levels", "samples")  # what the volume intervals are read from
CALIBRATED_FOR = ("foreground", "lesion")  # the voxels on which a temperature of the masks is fitted
GRADE_FROM = ("head", "measurements", "both")  # what the grade is read from
MAX_SCORE = 3.0  # of a standardised measurement: beyond, a linear model would be far too sure
MIN_CONFIDENCE = 1e-3  # of a mask, and 1 minus its maximum: bounds the logit
MIN_PROBABILITY = 1e-8  # with a larger bound, a high temperature would turn the background into foreground volume


class Calibration(nn.Module):
    """Temperatures, thresholds of masks' parts, weights of measurements, prior of the grades, margin of the volumes.

    Until ``calibrate.yaml`` fits it, it changes nothing: temperatures are 1, the margin is infinite. A fit is valid
    only for the weights and the sampling settings that it was made with. Training therefore resets it, and
    :class:`~scripts.sampling.inferer.VolumeInferer` applies it only with the same settings.

    Args:
        num_regions: R.
        num_grades: K.
        num_measurements: F, see :mod:`scripts.networks.measurements`.

    Attributes:
        foreground_temperature: of the mask probabilities ``[R]``, fitted to the image's non-zero voxels.
        lesion_temperature: the same, fitted to voxels near the lesion ``[R]``.
        high_threshold: probability that each connected part of a mask must reach somewhere ``[R]``; 0.5 before the fit.
        grade_temperature: of the grade probabilities of the head; infinite if the grade does not use them.
        measurement_mean: of the validation and training subjects ``[F]``; so is ``measurement_scale``, the standard
            deviation.
        measurement_weight: of the standardised measurements in the logits of the grades ``[K, F]``; 0 before the fit.
        grade_bias: added to the logits of the grades ``[K]`` (Platt scaling with intercept, for any number of grades).
        grade_prior: frequencies of the grades that the probabilities assume ``[K]``. They are equal before the fit,
            because the loss is weighted by inverse frequency.
        dice_fit: numbers of :func:`expected_dice` for each region ``[R, 3]``; infinite without a fit.
        volume_margin: widens the volume interval ``[R]``, in cube roots of ml (or of pixels); infinite without a fit.
        sampling: sampling settings of the fit; empty before the fit.
        volumes_from: one of :data:`VOLUMES_FROM`: the level sets of the probability, or the samples.
    """

    foreground_temperature: torch.Tensor
    lesion_temperature: torch.Tensor
    high_threshold: torch.Tensor
    grade_temperature: torch.Tensor
    grade_bias: torch.Tensor
    grade_prior: torch.Tensor
    dice_fit: torch.Tensor
    volume_margin: torch.Tensor
    measurement_mean: torch.Tensor
    measurement_scale: torch.Tensor
    measurement_weight: torch.Tensor

    def __init__(self, num_regions: int, num_grades: int, num_measurements: int) -> None:
        super().__init__()
        self.register_buffer("foreground_temperature", torch.ones(num_regions))
        self.register_buffer("lesion_temperature", torch.ones(num_regions))
        self.register_buffer("high_threshold", torch.full((num_regions,), 0.5))
        self.register_buffer("grade_temperature", torch.tensor(1.0))
        self.register_buffer("grade_bias", torch.zeros(num_grades))
        self.register_buffer("grade_prior", torch.full((num_grades,), 1 / num_grades))
        self.register_buffer("dice_fit", torch.full((num_regions, 3), math.inf))
        self.register_buffer("volume_margin", torch.full((num_regions,), math.inf))
        self.register_buffer("measurement_mean", torch.zeros(num_measurements))
        self.register_buffer("measurement_scale", torch.ones(num_measurements))
        self.register_buffer("measurement_weight", torch.zeros(num_grades, num_measurements))
        self.sampling: dict[str, Any] = {}
        self.volumes_from = VOLUMES_FROM[0]

    def get_extra_state(self) -> torch.Tensor:
        """What is no number, as JSON in 256 bytes: MONAI copies only tensors, and only those of the same shape."""
        state = self.sampling if self.volumes_from == "levels" else self.sampling | {"volumes_from": self.volumes_from}
        return torch.tensor(list(json.dumps(state).ljust(256).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Undo :meth:`get_extra_state`. Raises ValueError for any other text."""
        sampling = json.loads(bytes(state.tolist()))
        if not isinstance(sampling, dict):
            raise ValueError(f"the calibration holds {sampling!r}, not sampling settings")
        volumes_from = sampling.pop("volumes_from", VOLUMES_FROM[0])
        if volumes_from not in VOLUMES_FROM:
            raise ValueError(f"the calibration's volumes_from {volumes_from!r} is not one of {list(VOLUMES_FROM)}")
        self.sampling, self.volumes_from = sampling, volumes_from

    def reset(self) -> None:
        """Return to the state before a fit."""
        self.load_state_dict(self.like().state_dict())

    def like(self) -> Calibration:
        """A new calibration of the same sizes and on the same device, before a fit."""
        sizes = (self.volume_margin, self.grade_prior, self.measurement_mean)
        return type(self)(*map(len, sizes)).to(self.grade_prior.device)

    @property
    def measures(self) -> bool:
        """Whether the grade depends on measurements."""
        return bool(self.measurement_weight.any())

    def contributions(self, prob: torch.Tensor, measurements: torch.Tensor) -> torch.Tensor:
        """What the head and each measurement add to the logits of the grades ``[K, 1 + F]``, the head first.

        They are relative to an average subject: 0 for a measurement that has the mean of the fit, or is NaN.

        Args:
            prob: grade probabilities of the head ``[K]``.
            measurements: ``[F]``.
        """
        head = prob.double().clamp(min=MIN_PROBABILITY).log() / self.grade_temperature
        scores = standardised(measurements, self.measurement_mean, self.measurement_scale)
        return torch.cat([(head - head.mean())[:, None], self.measurement_weight * scores], dim=1)

    def calibrated_grades(
        self, prob: torch.Tensor, prior: Sequence[float] | None = None, measurements: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Calibrated grade probabilities ``[..., K]``, under another prior if given.

        softmax(log(prob) / temperature + bias), plus the :meth:`contributions` of the measurements if there are some.
        Another prior multiplies each probability by the ratio of the priors (Saerens et al., Neural Computation 2002).
        """
        logits = prob.double().clamp(min=MIN_PROBABILITY).log() / self.grade_temperature + self.grade_bias
        if measurements is not None:
            logits = logits + self.contributions(prob, measurements)[:, 1:].sum(dim=1)
        if prior is not None:
            logits = logits + (torch.as_tensor(prior).to(logits) / self.grade_prior).log()
        return torch.softmax(logits, dim=-1).to(prob)


def expected_dice(confidence: torch.Tensor, fit: torch.Tensor) -> torch.Tensor:
    """Dice that masks of a confidence had in the fit: sigmoid(bias + slope * logit(confidence)).

    Args:
        confidence: mean probability inside each mask ``[R]``; NaN for an empty mask.
        fit: bias, slope, and the Dice of an empty mask, ``[3]`` or for each region ``[R, 3]``. Where they are infinite,
            the result is NaN.
    """
    bias, slope, empty = torch.where(fit.isinf(), torch.nan, fit).unbind(dim=-1)
    dice = torch.sigmoid(bias + slope * torch.logit(confidence, eps=MIN_CONFIDENCE))
    return torch.where(confidence.isnan(), empty, dice)


def standardised(measurements: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Measurements ``[..., F]`` in standard deviations from the mean, at most 3; 0 for NaN."""
    return ((measurements - mean) / scale).nan_to_num().clamp(-MAX_SCORE, MAX_SCORE).double()
