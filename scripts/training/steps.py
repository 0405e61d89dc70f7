"""Training step: draw timesteps and noise, add the noise to a mask, and denoise it."""

from __future__ import annotations

from typing import Any

import torch
from monai.engines import PrepareBatch
from torch.nn.parallel import DistributedDataParallel

from scripts.config import InputError
from scripts.networks.base import SegmentationNetwork
from scripts.networks.baselines import Baseline
from scripts.networks.stochastic import DISTRIBUTION, RANK, draw_logits
from scripts.training.autocast import AutocastInferer

NOISED_MASKS = ("truth", "prediction", "calibration")
NUM_DRAWS = 10  # masks that are drawn per slice, for their likelihood


class DrawNoise(PrepareBatch):
    """Draw uniform timesteps and normal noise for a batch.

    Args:
        num_train_timesteps: T; timesteps are 0 to T - 1.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps

    def __call__(  # type: ignore[override]
        self,
        batchdata: dict[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple, dict[str, torch.Tensor]]:
        """Return ``image [B, M, H, W]``, the targets of the loss, and the arguments of :class:`DenoisingInferer`."""
        image, label, grade, empty = (
            torch.as_tensor(batchdata[key]).to(device=device, non_blocking=non_blocking, **kwargs)
            for key in ("image", "label", "grade", "empty")
        )
        timesteps = torch.randint(self.num_train_timesteps, (len(image),)).to(image.device)
        targets = {"label": label, "grade": grade, "empty": empty, "timesteps": timesteps}
        targets["subject"] = batchdata["subject"]
        return image, targets, (), {"label": label, "noise": torch.randn_like(label), "timesteps": timesteps}


class DenoisingInferer(AutocastInferer):
    """Forward pass of training: add noise to a mask and denoise it.

    The noise can be added to one of three masks. ``truth`` is the usual choice, but the network then learns to trust a
    mask that it never gets in sampling. ``prediction`` is the network's own prediction from pure noise (recycling, Fu
    et al., MELBA 2023), which needs one more evaluation per step. ``calibration`` is the calibration map, which is
    computed anyway. The last two are used without gradients.

    A stochastic network learns its mask from pure noise at T - 1 in every slice. In a random half of the slices, it
    also learns its samples, from the true mask that is noised twice. Its default is ``truth``.

    A network with self-conditioning (Chen et al. 2023, Analog Bits) gets its own estimate of x_0 from the same x_t in a
    random half of the slices, and 0 in the others.

    Args:
        noised_mask: one of :data:`NOISED_MASKS`; None takes the default of the network.
        amp: see :class:`~scripts.training.autocast.AutocastInferer`.
        amp_dtype: likewise.

    Raises:
        InputError: for an unknown ``noised_mask`` or ``amp_dtype``.
    """

    def __init__(self, noised_mask: str | None = None, amp: bool = False, amp_dtype: str = "bfloat16") -> None:
        super().__init__(amp, amp_dtype)
        if noised_mask not in (None, *NOISED_MASKS):
            raise InputError(f"noised_mask '{noised_mask}' is not one of {list(NOISED_MASKS)}")
        self.noised_mask = noised_mask

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: SegmentationNetwork | DistributedDataParallel,
        label: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> tuple:
        """Outputs of the network for ``inputs [B, M, H, W]``, ``label, noise [B, R, H, W]`` and ``timesteps [B]``.

        A stochastic network adds logits: drawn masks ``[B, N, R, H, W]``, the first mask ``[B, R, H, W]``, two samples
        ``[2 b, R, H, W]`` of b slices, and the true masks of those slices ``[b, R, H, W]``.
        """
        with torch.autocast(inputs.device.type, self.amp_dtype, enabled=self.amp):
            model = _unwrapped(network)
            condition = model.condition(inputs)
            x_0 = self._mask_to_noise(inputs, model, condition, label)
            if not model.is_stochastic:
                return _denoise(inputs, network, condition, x_0, noise, timesteps)
            count, device = len(inputs), inputs.device
            common = torch.randn(count, NUM_DRAWS, RANK, device=device)
            draws = draw_logits(condition, common, torch.randn(count, NUM_DRAWS, *label.shape[1:], device=device))
            half = torch.nonzero(torch.rand(count, device=device) < 0.5).flatten()
            rows = torch.cat([torch.arange(count, device=device), half, half])
            outputs = _denoise(
                inputs[rows],
                network,
                {name: part[rows] for name, part in condition.items() if name not in DISTRIBUTION},
                x_0[rows],
                torch.cat([noise, torch.randn_like(noise[half]), torch.randn_like(noise[half])]),
                torch.cat([_last(model, inputs), timesteps[half], timesteps[half]]),
            )
            first = (None if output is None else output[:count] for output in outputs)
            return *first, draws, condition["first_mask"], outputs[0][count:], label[half]

    def _mask_to_noise(
        self, inputs: torch.Tensor, model: Any, condition: dict[str, torch.Tensor], label: torch.Tensor
    ) -> torch.Tensor:
        """x_0 ``[B, R, H, W]``: the truth, or a prediction without gradients."""
        noised_mask = self.noised_mask or model.noised_mask
        if noised_mask == "truth" or isinstance(model, Baseline):
            return 2 * label - 1
        if noised_mask == "calibration":
            return torch.tanh(condition["calib_map"].detach().float() / 2)
        return _estimate(inputs, model, condition, torch.randn_like(label), _last(model, inputs))

    def check(self, network: SegmentationNetwork) -> None:
        """Raise InputError if the network has no calibration map to add noise to. Called before volumes are read."""
        if self.noised_mask == "calibration" and not network.has_calib_map:
            raise InputError(
                "noised_mask='calibration' needs 'highway' in conditioning; add it, or set noised_mask=null"
            )


def _unwrapped(network: torch.nn.Module) -> Any:
    return network.module if isinstance(network, DistributedDataParallel) else network


def _last(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """T - 1 for each slice ``[B]``."""
    return torch.full((len(inputs),), model.diffusion.num_train_timesteps - 1, device=inputs.device)


def _denoise(
    inputs: torch.Tensor,
    network: torch.nn.Module,
    condition: dict[str, torch.Tensor],
    x_0: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> tuple:
    """Outputs of the network for masks x_0 with noise."""
    model = _unwrapped(network)
    x_t = model.diffusion.add_noise(x_0, noise, timesteps)
    estimate = None
    if model.self_conditioning:
        half = torch.rand(len(inputs), 1, 1, 1, device=inputs.device) < 0.5
        estimate = _estimate(inputs, model, condition, x_t, timesteps) * half
    return network(inputs, x_t, timesteps, condition, estimate)


@torch.no_grad()
def _estimate(
    inputs: torch.Tensor, model: Any, condition: dict[str, torch.Tensor], x_t: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The model's x_0, without gradients."""
    return model.diffusion.to_x0(model(inputs, x_t, timesteps, condition)[0].float())
