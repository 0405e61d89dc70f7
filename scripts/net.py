"""The diffusion segmentation network with a grading head, and the function that builds a network from settings.

A checkpoint holds one dictionary of settings (:data:`SETTINGS`). :func:`build` makes the network from it, in training
and in inference alike. A new setting of the network is an argument of :class:`MedSegDiff` and a key in ``train.yaml``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.networks.base import Outputs, SegmentationNetwork
from scripts.networks.baselines import GradingDenseNet, GradingResNet, PlainUNet
from scripts.networks.conditioning import HIGHWAY, SELF, STOCHASTIC
from scripts.networks.grading import GradingHead
from scripts.networks.stochastic import StochasticUNet
from scripts.networks.unets import Denoiser, ImageUNet
from scripts.networks.variants import resolve_variant


class MedSegDiff(SegmentationNetwork):
    """Diffusion model of masks, conditioned on the image, that also grades.

    The denoiser sees the image and the noisy mask. With the conditioning ``highway``, a second U-Net sees only the
    image and computes the calibration map, a first segmentation, once per slice. The denoiser sees this map as well
    and corrects it at every step: with ``prediction_type: sample``, ``seg_logits`` is the calibration map plus the
    denoiser's output, which is zero in a fresh network. Training therefore starts like that of a plain U-Net, and the
    larger part of the computation is not repeated at every step. Without ``highway``, image and noisy mask are only
    concatenated.

    With ``stochastic``, a third U-Net computes a distribution of masks from the image (:class:`StochasticUNet`), and
    the calibration map is its marginal probability. The map of the second U-Net is then called the first mask. The
    denoiser also sees the decoded features of the third. The masks are trained to overlap with the truth, the map to be
    a probability. Therefore no gradient of the masks reaches the third U-Net.

    Args:
        diffusion: noise schedule and prediction type.
        in_channels: M, number of modalities.
        out_channels: R, number of target regions.
        num_grades: K, number of grades.
        variant: width, depth and conditioning by name, one of :data:`scripts.networks.variants.VARIANTS`.
        channels: channels of the denoiser's levels; overrides ``variant``. Attention is then in the middle block only.
        calib_channels: channels of the image-only U-Net's levels; overrides ``variant``. Default: twice ``channels``.
        conditioning: names of :data:`scripts.networks.conditioning.CONDITIONING`; overrides ``variant``.
        use_cls_head: grade from the denoiser's bottleneck.
        denoiser_stride: the denoiser works at 1 / ``denoiser_stride`` of the resolution where it corrects a calibration
            map. Without one, with the module ``stochastic``, and with another prediction type than the mask, it works
            at the full resolution.

    Raises:
        InputError: for an unknown variant or module, an unusable list of channels, a stride other than 1, 2, 4 and 8,
            or a stochastic network with another prediction type than the mask.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        in_channels: int = 4,
        out_channels: int = 1,
        num_grades: int = 2,
        variant: str = "S",
        channels: Sequence[int] | None = None,
        calib_channels: Sequence[int] | None = None,
        conditioning: Sequence[str] | None = None,
        use_cls_head: bool = True,
        denoiser_stride: int = 1,
    ) -> None:
        resolved = resolve_variant(variant, channels, calib_channels, conditioning)
        image_channels = resolved.calib_channels or () if HIGHWAY in resolved.conditioning else ()
        if type(denoiser_stride) is not int or denoiser_stride not in (1, 2, 4, 8):
            raise InputError(f"denoiser_stride={denoiser_stride!r} must be 1, 2, 4 or 8")
        corrects = bool(image_channels) and STOCHASTIC not in resolved.conditioning
        stride = denoiser_stride if corrects and diffusion.prediction_type == "sample" else 1
        divisor = max(stride * 2 ** (len(resolved.channels) - 1), 2 ** (len(image_channels) - 1))
        super().__init__(diffusion, in_channels, out_channels, num_grades, int(divisor))
        self.self_conditioning = SELF in resolved.conditioning
        self.has_calib_map = bool(image_channels)
        self.calibrator = ImageUNet(in_channels, out_channels, image_channels) if image_channels else None
        self.is_stochastic = STOCHASTIC in resolved.conditioning
        if self.is_stochastic and diffusion.prediction_type != "sample":
            raise InputError(f"conditioning 'stochastic' needs prediction_type=sample, not {diffusion.prediction_type}")
        width = resolved.channels[0] if self.is_stochastic else 0
        if self.calibrator is not None and self.is_stochastic:
            self.distribution = StochasticUNet(in_channels, out_channels, image_channels)
            self.project = nn.Conv2d(image_channels[0], width, kernel_size=1)
        masks = 1 + self.has_calib_map + self.self_conditioning
        seen = in_channels + masks * out_channels + width
        self.denoiser = Denoiser(seen, out_channels, resolved, image_channels, stride)
        self.cls_head = GradingHead(resolved.channels[-1], num_grades) if use_cls_head else None

    @property
    def noised_mask(self) -> str:  # type: ignore[override]
        """What training noises by default. Only the truth gives ``epsilon`` and ``v_prediction`` a bounded target."""
        if self.diffusion.prediction_type != "sample" or self.is_stochastic:
            return "truth"
        return "calibration" if self.has_calib_map else "prediction"

    def condition(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """See :meth:`SegmentationNetwork.condition`: the calibration map and what each module prepares."""
        super().condition(image)
        if self.calibrator is None:
            return {}
        first_mask, features, decoded = self.calibrator(image)
        prepared = self.denoiser.prepare(features, decoded)
        if not self.is_stochastic:
            return prepared | {"calib_map": first_mask}
        distribution, decoded = self.distribution(image)
        return prepared | distribution | {"first_mask": first_mask, "features": self.project(decoded.detach())}

    def forward(
        self,
        image: torch.Tensor,
        x_t: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        condition: dict[str, torch.Tensor] | None = None,
        estimate: torch.Tensor | None = None,
    ) -> Outputs | torch.Tensor:
        """See :meth:`SegmentationNetwork.forward`."""
        only_image = x_t is None
        if x_t is None:
            x_t = image.new_zeros(image.shape[0], self.out_channels, *image.shape[2:])
        steps = self.diffusion.num_train_timesteps
        if timesteps is None:
            timesteps = torch.full((image.shape[0],), steps - 1, device=image.device)
        if condition is None:
            condition = self.condition(image)
        calib_map = condition.get("calib_map")
        first_mask = condition.get("first_mask", calib_map)
        x = [image, x_t]
        if first_mask is not None:
            x.append(torch.tanh(first_mask / 2))
        if self.is_stochastic:
            x.append(condition["features"])
        if self.self_conditioning:
            x.append(torch.zeros_like(x_t) if estimate is None else estimate)
        output, features = self.denoiser(torch.cat(x, dim=1), timesteps * (1000 / steps), condition)
        if self.diffusion.prediction_type == "sample" and first_mask is not None:
            output = first_mask + output
        seg_logits = self.diffusion.to_logits(output, x_t, timesteps)
        if only_image:
            return seg_logits
        return seg_logits, self.cls_head(features) if self.cls_head is not None else None, calib_map


ARCHITECTURES: dict[str, type[SegmentationNetwork]] = {
    "MedSegDiff": MedSegDiff,
    "PlainUNet": PlainUNet,
    "GradingResNet": GradingResNet,
    "GradingDenseNet": GradingDenseNet,
}
DATA_SETTINGS = (
    "modalities",
    "modality_dropout",
    "regions",
    "region_labels",
    "background_label",
    "grade_labels",
    "image_size",
    "slice_size",
    "normalisation",
)
DERIVED = ("diffusion", "in_channels", "out_channels", "num_grades")
# names of the settings that give the weights their meaning; each is a public key of train.yaml
SETTINGS = (
    "architecture",
    *DATA_SETTINGS,
    *inspect.signature(GaussianDiffusion).parameters,
    *(name for name in inspect.signature(MedSegDiff).parameters if name not in DERIVED),
)


def build(settings: Mapping[str, Any]) -> SegmentationNetwork:
    """The network that ``settings`` describe; each argument of its class is the setting of the same name.

    Args:
        settings: values of :data:`SETTINGS`, plain data.

    Raises:
        InputError: for an unknown architecture or an unusable value.
    """
    name = settings["architecture"]
    if name not in ARCHITECTURES:
        raise InputError(f"architecture '{name}' is not one of {list(ARCHITECTURES)}")

    def arguments(target: type, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: values[key] for key in inspect.signature(target).parameters if key in values}

    derived = {
        "diffusion": GaussianDiffusion(**arguments(GaussianDiffusion, settings)),
        "in_channels": len(settings["modalities"]),
        "out_channels": len(settings["regions"]),
        "num_grades": max(settings["grade_labels"].values()) + 1,
    }
    return ARCHITECTURES[name](**arguments(ARCHITECTURES[name], {**settings, **derived}))
