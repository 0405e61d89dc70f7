"""Sample masks of whole volumes, slice by slice, in batches of slices and samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer

from scripts.config import InputError
from scripts.diffusion import ddim_step, timestep_pairs
from scripts.net import MedSegDiff, PlainUNet, check_image_size
from scripts.transforms import entropy_bits


class VolumeInferer(Inferer):
    """DDIM sampling of every slice of a volume that shows brain.

    The image-only branch runs once per slice. Noise is drawn per slice from the seed, so that the same seed gives
    the same masks whatever the batch size and the machine's load.

    Args:
        num_inference_steps: network evaluations per sample.
        num_samples: samples per slice; the probability is their mean.
        sampling_batch_size: slices times samples in one batch, which bounds the memory.
        seed: seed of the starting noise.

    Raises:
        InputError: for a number below 1, or more samples than fit in a batch.
    """

    def __init__(
        self, num_inference_steps: int = 1, num_samples: int = 1, sampling_batch_size: int = 32, seed: int = 0
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_samples", num_samples),
            ("sampling_batch_size", sampling_batch_size),
        ):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if num_samples > sampling_batch_size:
            raise InputError(f"num_samples={num_samples} must not exceed sampling_batch_size={sampling_batch_size}")
        self.num_inference_steps = num_inference_steps
        self.num_samples = num_samples
        self.sampling_batch_size = sampling_batch_size
        self.seed = seed

    def __call__(self, inputs: torch.Tensor, network, *args, **kwargs) -> torch.Tensor:  # type: ignore[override]
        """Mask probability ``[B, R, H, W, S]`` of volumes ``[B, M, H, W, S]``; what MONAI Label calls."""
        return self.predict(inputs, network)["pred"]

    @torch.no_grad()
    def predict(self, inputs: torch.Tensor, network: MedSegDiff | PlainUNet) -> dict[str, torch.Tensor]:
        """Sample volumes ``[B, M, H, W, S]``.

        Returns:
            ``pred``: mean probability of the samples ``[B, R, H, W, S]``; ``uncertainty``: its predictive entropy in
            bits, same shape; both are 0 where a slice shows no brain. ``hgg_prob``: ``[B]``, NaN without a grading
            head.
        """
        results = [self._predict_volume(volume, network) for volume in torch.as_tensor(inputs)]
        pred = torch.stack([prob for prob, _ in results])
        hgg_prob = torch.stack([grade for _, grade in results])
        uncertainty = entropy_bits(pred)
        if isinstance(inputs, MetaTensor):  # so that MONAI can invert the spatial transforms
            pred, uncertainty = MetaTensor(pred, meta=inputs.meta), MetaTensor(uncertainty, meta=inputs.meta)
        return {"pred": pred, "uncertainty": uncertainty, "hgg_prob": hgg_prob}

    def _predict_volume(
        self, volume: torch.Tensor, network: MedSegDiff | PlainUNet
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Probability ``[R, H, W, S]`` and P(HGG) ``[]`` of one volume ``[M, H, W, S]``."""
        slices = volume.movedim(-1, 0)
        brain = torch.nonzero((slices != 0).flatten(1).any(dim=1)).flatten().tolist()
        chunk = self.sampling_batch_size // self.num_samples
        probs: dict[int, torch.Tensor] = {}
        grades: list[torch.Tensor] = []
        for start in range(0, len(brain), chunk):
            indices = brain[start : start + chunk]
            prob, grade = self.sample(slices[indices], network, indices)
            probs.update(zip(indices, prob, strict=True))
            grades.append(grade)
        if not probs:
            raise InputError("a volume has no brain: every voxel is 0")
        blank = torch.zeros_like(next(iter(probs.values())))
        pred = torch.stack([probs.get(i, blank) for i in range(len(slices))], dim=-1)
        area = torch.stack([(probs[i] > 0.5).sum() for i in brain])
        return pred, area_weighted_mean(torch.cat(grades), area)

    def sample(
        self, image: torch.Tensor, network: MedSegDiff | PlainUNet, indices: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over samples of the mask probability ``[b, R, H, W]`` and of P(HGG) ``[b]`` for slices ``[b, M, H, W]``.

        Args:
            image: slices.
            network: what to sample from.
            indices: number of each slice in its volume, which seeds its noise.
        """
        diffusion = network.diffusion
        calib_map = network.calibrate(image)
        if calib_map is not None:
            calib_map = calib_map.repeat_interleave(self.num_samples, dim=0)
        shape = (self.num_samples, network.out_channels, *image.shape[2:])
        x_t = torch.cat([self._noise(shape, index) for index in indices]).to(image)
        repeated = image.repeat_interleave(self.num_samples, dim=0)
        hgg = []
        for t, t_prev in timestep_pairs(diffusion.num_train_timesteps, self.num_inference_steps):
            timesteps = torch.full((len(repeated),), t, device=image.device)
            logits, cls_logits, _ = network(repeated, x_t, timesteps, calib_map)
            x_t = ddim_step(diffusion, x_t, diffusion.to_x0(logits.float()), t, t_prev)
            if cls_logits is not None:
                hgg.append(cls_logits.float().softmax(dim=1)[:, 1])
        # the last step returned x_0 in [-1, 1], which is twice the probability minus one
        prob = (x_t + 1) / 2
        grade = torch.stack(hgg).mean(dim=0) if hgg else prob.new_full((len(prob),), torch.nan)
        groups = (len(indices), self.num_samples)
        return prob.unflatten(0, groups).mean(dim=1), grade.unflatten(0, groups).mean(dim=1)

    def _noise(self, shape: tuple[int, ...], index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)  # a prime beyond any slice number
        return torch.randn(shape, generator=generator)


def check_sampling(network: MedSegDiff | PlainUNet, image_size: int, num_inference_steps: int) -> None:
    """Raise InputError, before any volume is read, for an image size or a number of steps that cannot be sampled."""
    check_image_size((image_size, image_size), network.divisor)
    timestep_pairs(network.diffusion.num_train_timesteps, num_inference_steps)


def area_weighted_mean(values: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Mean of ``values [n]`` weighted by predicted tumour ``area [n]``; the plain mean where no tumour is found."""
    weight = area.to(values) if area.sum() > 0 else torch.ones_like(values)
    return (values * weight).sum() / weight.sum()
