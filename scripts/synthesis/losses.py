"""Loss of synthetic slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.losses import JukeboxLoss, PerceptualLoss, SSIMLoss
from torch import nn

from scripts.config import InputError
from scripts.synthesis.registration import Registration

RANGE = 2.0  # of the values, which are in -1 to 1
WINDOW = 11  # of the SSIM, pixels


class SynthesisLoss(nn.Module):
    """L1 + SSIM at several resolutions, mean over them, and further losses, each of which a weight of 0 leaves out.

    :attr:`components` has the terms of the last call, with their weights.

    Args:
        resolutions: factors by which the slices are made smaller by average pooling; 1 is the full resolution.
        l1_weight: of the L1 loss.
        ssim_weight: of the SSIM loss.
        lung_weight: of the L1 loss in the lungs, against 1 elsewhere; a handler may change it
            (:meth:`set_lung_weight`).
        spectral_weight: of the distance of the magnitudes of the Fourier transforms (MONAI's JukeboxLoss).
        perceptual_weight: of MONAI's PerceptualLoss, whose weights the first use downloads.
        registration: warps the slices to the true ones first; None does not.
        smoothness_weight: of its displacements.

    Raises:
        InputError: for resolutions below 1, negative weights, or perceptual weights that cannot be loaded.
    """

    def __init__(
        self,
        resolutions: Sequence[int] = (1,),
        l1_weight: float = 1.0,
        ssim_weight: float = 1.0,
        lung_weight: float = 1.0,
        spectral_weight: float = 0.0,
        perceptual_weight: float = 0.0,
        registration: Registration | None = None,
        smoothness_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if not resolutions or any(not isinstance(factor, int) or factor < 1 for factor in resolutions):
            raise InputError(f"resolutions={resolutions!r} must be a list of whole numbers, 1 or more")
        self.resolutions = list(resolutions)
        self.weights = {"l1": l1_weight, "ssim": ssim_weight, "spectral": spectral_weight}
        self.weights |= {"perceptual": perceptual_weight, "smoothness": smoothness_weight}
        for name, value in (self.weights | {"lung": lung_weight}).items():
            if value < 0:
                raise InputError(f"{name}_weight={value} must be 0 or more")
        if not any(self.weights[name] for name in ("l1", "ssim", "spectral", "perceptual")):
            raise InputError("the loss has no term: set loss::l1_weight or loss::ssim_weight above 0")
        self.lung_weight = lung_weight
        self.ssim = SSIMLoss(spatial_dims=2, data_range=RANGE, win_size=WINDOW)
        self.spectral = JukeboxLoss(spatial_dims=2)
        self.perceptual = _perceptual_loss() if perceptual_weight else None
        self.registration = registration
        self.components: dict[str, torch.Tensor] = {}

    def set_lung_weight(self, value: float) -> None:
        """Change the weight of the lungs."""
        self.lung_weight = value

    def check(self, shape: Sequence[int]) -> None:
        """Raise InputError if slices ``[H, W]`` are smaller than the window of the SSIM at one of the resolutions."""
        smallest = min(shape) // max(self.resolutions)
        if self.weights["ssim"] and smallest < WINDOW:
            raise InputError(f"slices of {smallest} px are too small for the SSIM; remove the largest of 'resolutions'")

    def forward(self, pred: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of slices ``[B, 1, H, W]``.

        Args:
            pred: synthetic slices.
            targets: ``label``, the true slices, and perhaps ``lung``, a mask, likewise.
        """
        target = targets["label"].float()
        pred = pred.float()
        terms = {}
        if self.registration is not None:
            pred, terms["smoothness"] = self.registration(pred, target)
        weight = torch.ones_like(target)
        if "lung" in targets:
            weight = 1 + (self.lung_weight - 1) * (targets["lung"] > 0).float()
        terms |= self._at_resolutions(pred, target, weight)
        if self.weights["spectral"]:
            terms["spectral"] = self.spectral(pred, target)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(pred, target)
        terms = {name: self.weights[name] * term for name, term in terms.items() if self.weights[name]}
        self.components = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum()

    def _at_resolutions(
        self, pred: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """L1 and SSIM loss, mean over the resolutions; the L1 loss is a weighted mean of the pixels."""
        l1, ssim = [], []
        for factor in self.resolutions:
            one, two, each = (nn.functional.avg_pool2d(part, factor) for part in (pred, target, weight))
            l1.append(((one - two).abs() * each).sum() / each.sum())
            if self.weights["ssim"]:
                ssim.append(self.ssim(one, two))
        return {name: torch.stack(values).mean() for name, values in {"l1": l1, "ssim": ssim}.items() if values}


def _perceptual_loss() -> nn.Module:
    """MONAI's PerceptualLoss with LPIPS; its weights are downloaded, and need a package that is not required."""
    try:
        return PerceptualLoss(spatial_dims=2, network_type="squeeze").requires_grad_(False)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"perceptual_weight: its network cannot be loaded ({reason}). Install lpips and torchvision, and load its "
            "weights once where the internet can be reached, or leave perceptual_weight out"
        ) from error


def training_targets(
    batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``image [B, C, H, W]``, and the targets of the loss: ``label [B, 1, H, W]`` and perhaps ``lung``, likewise."""
    moved = {
        key: torch.as_tensor(batch[key]).to(device=device, non_blocking=non_blocking, **kwargs)
        for key in ("image", "label", "lung")
        if key in batch
    }
    return moved.pop("image"), moved


def training_values(output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Mean distances of the synthetic slices: ``residual_mag`` to the native, ``l1_vs_cta`` to the true ones."""
    image, pred, targets = output["image"], output["pred"].detach(), output["label"]
    native = image[:, image.shape[1] // 2, None]
    return {"residual_mag": (pred - native).abs().mean(), "l1_vs_cta": (pred - targets["label"]).abs().mean()}
