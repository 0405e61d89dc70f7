"""Values of a whole subject that are computed from its masks: confidence, measurements and grade."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scripts.networks.calibration import Calibration
from scripts.networks.measurements import measure


def mask_confidence(prob: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean probability ``[R]`` of the voxels inside each mask; NaN for an empty mask.

    Args:
        prob: probability ``[R, H, W, S]``.
        mask: of the same shape, bool.
    """
    return (prob * mask).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1)


def measurements_of(volume: torch.Tensor, mask: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
    """Measurements ``[F]`` (:func:`~scripts.networks.measurements.measure`) on the device of the mask.

    Args:
        volume: z-scored image ``[M, H, W, S]``.
        mask: ``[R, H, W, S]``, bool.
        spacing: of the three axes, in mm.
    """
    return torch.from_numpy(measure(volume.float().cpu().numpy(), mask.cpu().numpy(), spacing)).float().to(mask.device)


def subject_grade(
    head: torch.Tensor, measurements: torch.Tensor | None, calibration: Calibration, prior: Sequence[float] | None
) -> dict[str, torch.Tensor]:
    """``grade_prob`` and ``grade_prior [K]``; with measurements also these and ``grade_reasons [K, 1 + F]``.

    Args:
        head: grade probabilities of the head ``[K]``.
        measurements: of the mask ``[F]``; None without.
        calibration: that of the network.
        prior: frequencies of the grades among the subjects; None takes those of the calibration.
    """
    result = {}
    if measurements is not None:
        result = {"measurements": measurements, "grade_reasons": calibration.contributions(head, measurements)}
    result["grade_prob"] = calibration.calibrated_grades(head, prior, measurements)
    result["grade_prior"] = torch.tensor(prior or calibration.grade_prior.tolist())
    return result
