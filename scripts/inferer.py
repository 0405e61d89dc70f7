"""Sample masks of whole volumes, slice by slice, in batches of slices and samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer

from scripts.baselines import Baseline
from scripts.config import InputError
from scripts.diffusion import timestep_pairs
from scripts.ensemble import FUSIONS, fuse, pairwise_dice
from scripts.net import MedSegDiff, check_image_size
from scripts.onnx_network import OnnxNetwork
from scripts.samplers import make_sampler
from scripts.transforms import entropy_bits
from scripts.uncertainty import CALIBRATED_FOR, temperature_scaled

Network = MedSegDiff | Baseline | OnnxNetwork


class VolumeInferer(Inferer):
    """Sampling of every slice of a volume that shows brain.

    The image-only branch runs once per slice. Noise is drawn per slice from the seed, so that the same seed gives
    the same masks whatever the batch size and the machine's load.

    Args:
        num_inference_steps: network evaluations per sample; 0 gives the calibration map itself, without a grade.
        num_samples: samples per slice.
        sampling_batch_size: slices times samples in one batch, which bounds the memory.
        seed: seed of the noise.
        sampler: ``ddpm``, ``ddim``, ``dpm_solver`` or ``unipc``.
        eta: noise that DDIM adds, 0 to 1.
        start_timestep: start here from the noised calibration map (truncated diffusion, Guo et al., PD-DDPM, ISBI
            2023) instead of from pure noise at T - 1.
        fusion: how samples become one mask: ``mean``, ``majority`` or ``staple``.
        calibrated_for: the voxels whose temperature is applied, ``brain`` or ``lesion``.

    Raises:
        InputError: for a number below 1, more samples than fit in a batch, an unknown name.
    """

    def __init__(
        self,
        num_inference_steps: int = 1,
        num_samples: int = 1,
        sampling_batch_size: int = 32,
        seed: int = 0,
        sampler: str = "ddim",
        eta: float = 0.0,
        start_timestep: int | None = None,
        fusion: str = "mean",
        calibrated_for: str = "brain",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_inference_steps", num_inference_steps, 0),
            ("num_samples", num_samples, 1),
            ("sampling_batch_size", sampling_batch_size, 1),
        ):
            if value < least:
                raise InputError(f"{name}={value} must be at least {least}")
        if num_samples > sampling_batch_size:
            raise InputError(f"num_samples={num_samples} must not exceed sampling_batch_size={sampling_batch_size}")
        if fusion not in FUSIONS:
            raise InputError(f"fusion '{fusion}' is not one of {list(FUSIONS)}")
        if calibrated_for not in CALIBRATED_FOR:
            raise InputError(f"calibrated_for '{calibrated_for}' is not one of {list(CALIBRATED_FOR)}")
        self.num_inference_steps = num_inference_steps
        self.num_samples = num_samples
        self.sampling_batch_size = sampling_batch_size
        self.seed = seed
        self.sampler = make_sampler(sampler, eta)
        self.start_timestep = start_timestep
        self.fusion = fusion
        self.calibrated_for = calibrated_for

    def __call__(self, inputs: torch.Tensor, network, *args, **kwargs) -> torch.Tensor:  # type: ignore[override]
        """Mask probability ``[B, R, H, W, S]`` of volumes ``[B, M, H, W, S]``; what MONAI Label calls."""
        return self.predict(inputs, network)["pred"]

    @torch.no_grad()
    def predict(self, inputs: torch.Tensor, network: Network) -> dict[str, torch.Tensor]:
        """Sample volumes ``[B, M, H, W, S]``.

        Returns:
            ``prob``: mean probability ``[B, R, H, W, S]`` with the network's temperature. ``pred``: what the mask is
            cut from, the same or fused otherwise. ``uncertainty``: entropy of ``prob`` in bits. ``variance``: over
            samples, when there are several. All have the same shape and are 0 where a slice shows no brain.
            ``sample_dice``: agreement of the samples ``[B, R]``, NaN for one. ``to_brain``: temperature ``[B, R]`` that
            brings ``prob`` to the brain's. ``hgg_prob``: ``[B]``, with its temperature, NaN without a grading head.
        """
        results = [self._predict_volume(volume, network) for volume in torch.as_tensor(inputs)]
        output = {name: torch.stack([result[name] for result in results]) for name in results[0]}
        if isinstance(inputs, MetaTensor):  # so that MONAI can invert the spatial transforms
            for name in output.keys() & {"pred", "prob", "uncertainty", "variance"}:
                output[name] = MetaTensor(output[name], meta=inputs.meta)
        return output

    def _predict_volume(self, volume: torch.Tensor, network: Network) -> dict[str, torch.Tensor]:
        """Results of :meth:`predict` for one volume ``[M, H, W, S]``."""
        slices = volume.movedim(-1, 0)
        brain = torch.nonzero((slices != 0).flatten(1).any(dim=1)).flatten()
        if not len(brain):
            raise InputError("a volume has no brain: every voxel is 0")
        samples = volume.new_zeros(self.num_samples, network.out_channels, *volume.shape[1:], dtype=torch.float32)
        grades = []
        for indices in brain.split(self.sampling_batch_size // self.num_samples):
            prob, grade = self.sample(slices[indices], network, indices.tolist())
            samples[..., indices] = prob.movedim(0, -1)
            grades.append(grade)
        mean = samples.mean(dim=0)
        prob = torch.zeros_like(mean)
        temperature = network.get_buffer(f"{self.calibrated_for}_temperature")
        prob[..., brain] = temperature_scaled(mean[..., brain], temperature[:, None, None, None])
        area = (mean[..., brain] > 0.5).sum(dim=(0, 1, 2))
        hgg_prob = temperature_scaled(area_weighted_mean(torch.cat(grades), area), network.grade_temperature)
        result = {
            "pred": prob if self.fusion == "mean" else fuse(samples, self.fusion),
            "prob": prob,
            "uncertainty": entropy_bits(prob),
            "sample_dice": pairwise_dice(samples),
            "to_brain": network.brain_temperature / temperature,
            "hgg_prob": hgg_prob,
        }
        return result | ({"variance": samples.var(dim=0)} if self.num_samples > 1 else {})

    def sample(
        self, image: torch.Tensor, network: Network, indices: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask probability ``[b, N, R, H, W]`` of N samples, and mean P(HGG) ``[b]``, of slices ``[b, M, H, W]``.

        Args:
            image: slices.
            network: what to sample from.
            indices: number of each slice in its volume, which seeds its noise.
        """
        diffusion = network.diffusion
        if not self.num_inference_steps:
            prob = network.condition(image)["calib_map"].float().sigmoid()[:, None]
            return prob.repeat_interleave(self.num_samples, dim=1), prob.new_full((len(image),), torch.nan)
        pairs = timestep_pairs(diffusion.num_train_timesteps, self.num_inference_steps, self.start_timestep)
        # a prime beyond any slice number keeps seeds apart
        generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + index) for index in indices]
        shape = (self.num_samples, network.out_channels, *image.shape[2:])

        def draw() -> torch.Tensor:
            return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(image.device)

        condition = {
            name: part.repeat_interleave(self.num_samples, dim=0) for name, part in network.condition(image).items()
        }
        image = image.repeat_interleave(self.num_samples, dim=0)
        x_t, estimate, grades = draw(), None, []
        if self.start_timestep is not None:
            timesteps = torch.full((len(image),), self.start_timestep, device=image.device)
            x_t = diffusion.add_noise(torch.tanh(condition["calib_map"].float() / 2), x_t, timesteps)

        def denoise(x_t: torch.Tensor, t: int) -> torch.Tensor:
            nonlocal estimate
            timesteps = torch.full((len(image),), t, device=image.device)
            logits, cls_logits, _ = network(image, x_t.to(image.dtype), timesteps, condition, estimate)
            estimate = diffusion.to_x0(logits.float())
            if cls_logits is not None:
                grades.append(cls_logits.float().softmax(dim=1)[:, 1])
            return estimate

        x_0 = self.sampler(denoise, x_t, pairs, diffusion.alphas_cumprod, draw)
        grade = torch.stack(grades).mean(dim=0) if grades else x_0.new_full((len(x_0),), torch.nan)
        groups = (len(indices), self.num_samples)
        return ((x_0 + 1) / 2).unflatten(0, groups), grade.unflatten(0, groups).mean(dim=1)

    def check(self, network: Network, image_size: int) -> None:
        """Raise InputError, before any volume is read, for a size or trajectory that this network cannot sample."""
        check_image_size((image_size, image_size), network.divisor)
        if self.num_inference_steps:
            timestep_pairs(network.diffusion.num_train_timesteps, self.num_inference_steps, self.start_timestep)
        if not network.has_calib_map and (self.start_timestep is not None or not self.num_inference_steps):
            raise InputError(
                "start_timestep and num_inference_steps=0 need a calibration map: add 'highway' to conditioning"
            )


def area_weighted_mean(values: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Mean of ``values [n]`` weighted by predicted tumour ``area [n]``; the plain mean where no tumour is found."""
    weight = area.to(values) if area.sum() > 0 else torch.ones_like(values)
    return (values * weight).sum() / weight.sum()
