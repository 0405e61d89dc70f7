"""Sample masks of whole volumes, slice by slice, in batches of slices and samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer

from scripts.config import InputError
from scripts.diffusion.samplers import Draw, Pairs, make_sampler
from scripts.diffusion.schedule import timestep_pairs
from scripts.networks.base import SegmentationNetwork
from scripts.networks.calibration import CALIBRATED_FOR, VOLUMES_FROM, Calibration, expected_dice
from scripts.networks.stochastic import DISTRIBUTION, draw_logits, spread_noise
from scripts.sampling.ensemble import FUSIONS, fuse, pairwise_dice
from scripts.sampling.parts import without_unsure_parts
from scripts.sampling.probability import area_weighted_mean, entropy_bits, temperature_scaled
from scripts.sampling.subject import mask_confidence, measurements_of, subject_grade
from scripts.sampling.windows import Noise, SampledSlices, sample_in_windows

logger = logging.getLogger(__name__)

START = 0.5  # share of the diffusion steps: less noise keeps what is wrong with the draw, more forgets the draw
MAPS = {"pred", "prob", "uncertainty", "variance", "calib_prob", "seg_prob", "samples"}  # results that are volumes
BATCH_PIXELS = 128**2  # of a slice, up to which sampling_batch_size is used in full


class VolumeInferer(Inferer):
    """Sample every slice of a volume that has a non-zero voxel.

    The image-only branch runs once per slice. The noise of a slice depends only on the seed and the slice's number, so
    that the batch size does not change the masks.

    The mask and the grade of a stochastic network come from one evaluation from pure noise at T - 1. Several samples
    are computed beside it and show what the mask may also be: each starts from a drawn mask that is noised to
    ``start_timestep``. The factors get the same noise in all slices of a sample: what an annotator counts in one slice
    is then counted in the next.

    Args:
        num_inference_steps: network evaluations per sample; 0 returns the calibration map itself, without a grade. The
            samples of a stochastic network are then the drawn masks.
        num_samples: samples per slice.
        sampling_batch_size: slices times samples in one batch, up to 128 px; larger slices make smaller batches. Bounds
            the memory.
        seed: seed of the noise.
        sampler: ``ddpm``, ``ddim``, ``dpm_solver`` or ``unipc``.
        eta: noise that DDIM adds, 0 to 1.
        start_timestep: start at this timestep from the noised calibration map (truncated diffusion, Guo et al.,
            PD-DDPM, ISBI 2023) instead of from pure noise at T - 1. Several samples of a stochastic network start from
            noised draws instead, by default at :data:`START` T.
        fusion: how samples become one mask: ``mean``, ``majority`` or ``staple``. The mask of a stochastic network
            does not come from its samples, so it takes only ``mean``.
        calibrated_for: the voxels whose temperature is applied, ``foreground`` (not 0 in the image) or ``lesion``.
        grade_prior: frequency of each grade among the subjects; None takes those that the network was calibrated with.
        keep_samples: return the samples even if no volume is read from them.
        keep_measurements: return the measurements of the mask even if the grade does not depend on them.
        window: side of the windows (pixels) in which larger slices are sampled; None samples whole slices.

    Raises:
        InputError: for a number below 1, more samples than fit in a batch, an unknown name, or a prior that is no list
            of positive numbers with the sum 1.
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
        calibrated_for: str = "foreground",
        grade_prior: Sequence[float] | None = None,
        keep_samples: bool = False,
        keep_measurements: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, minimum in (
            ("num_inference_steps", num_inference_steps, 0),
            ("num_samples", num_samples, 1),
            ("sampling_batch_size", sampling_batch_size, 1),
        ):
            if not isinstance(value, int) or value < minimum:
                raise InputError(f"{name}={value!r} must be a whole number, {minimum} or more")
        if num_samples > sampling_batch_size:
            raise InputError(f"num_samples={num_samples} must not exceed sampling_batch_size={sampling_batch_size}")
        if fusion not in FUSIONS:
            raise InputError(f"fusion '{fusion}' is not one of {list(FUSIONS)}")
        if calibrated_for not in CALIBRATED_FOR:
            raise InputError(f"calibrated_for '{calibrated_for}' is not one of {list(CALIBRATED_FOR)}")
        if grade_prior is not None:
            _check_prior(grade_prior)
        self.num_inference_steps = num_inference_steps
        self.num_samples = num_samples
        self.sampling_batch_size = sampling_batch_size
        self.seed = seed
        self.sampler = make_sampler(sampler, eta)
        self.start_timestep = start_timestep
        self.fusion = fusion
        self.calibrated_for = calibrated_for
        self.grade_prior = grade_prior
        self.keep_samples = keep_samples
        self.keep_measurements = keep_measurements
        self.window = window
        # what the probabilities depend on, and so does their calibration
        self.sampling: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "num_samples": num_samples,
            "sampler": sampler,
            "eta": eta,
            "start_timestep": start_timestep,
        }
        self.warned = False

    def __call__(self, inputs: torch.Tensor, network, *args, **kwargs) -> torch.Tensor:  # type: ignore[override]
        """Mask probability ``[B, R, H, W, S]`` of volumes ``[B, M, H, W, S]``; MONAI Label calls this."""
        return self.predict(inputs, network)["pred"]

    @torch.no_grad()
    def predict(self, inputs: torch.Tensor, network: SegmentationNetwork) -> dict[str, torch.Tensor]:
        """Sample volumes ``[B, M, H, W, S]``.

        Returns:
            Maps ``[B, R, H, W, S]``, which are 0 in empty slices: ``pred``, the fused samples or the mask of a
            stochastic network, to be thresholded at 0.5, without the parts that the calibration leaves out; ``prob``,
            the mean of the samples after temperature scaling, or that of the calibration map in a stochastic network,
            which also has ``seg_prob``, that of its mask; ``uncertainty``, the entropy of ``prob`` in bits;
            ``variance`` over the samples, if there are several; ``calib_prob``, the calibration map as a probability,
            if there is one and it is not ``prob``;
            ``samples [B, N * R, H, W, S]``, sample by sample, if they are needed. Values: ``sample_dice [B, R]``, the
            mean Dice of pairs of samples, NaN for one sample; ``volume_temperature [B, R]``, which scales ``prob`` to
            the calibration of the foreground;
            ``volume_margin [B, R]`` and ``volumes_from [B]``, a position in ``VOLUMES_FROM``, see
            :class:`~scripts.networks.calibration.Calibration`; ``confidence [B, R]``, the mean probability inside the
            mask before temperature scaling, NaN for an empty one, and ``expected_dice [B, R]``, the Dice that the
            calibration expects of it, NaN without a calibration; ``grade_prob [B, K]``, calibrated, and
            ``grade_prior [B, K]``, the prior that it assumes; both are absent without grading. If they are needed:
            ``measurements [B, F]`` of the mask (:func:`~scripts.networks.measurements.measure`), and ``grade_reasons
            [B, K, 1 + F]``, what head and measurements add to the logits.
        """
        spacings = _spacings(inputs)
        results = [
            self._predict_volume(volume, network, spacing)
            for volume, spacing in zip(torch.as_tensor(inputs), spacings, strict=True)
        ]
        output = {name: torch.stack([result[name] for result in results]) for name in results[0]}
        if isinstance(inputs, MetaTensor):  # so that MONAI can invert the spatial transforms
            for name in output.keys() & MAPS:
                output[name] = MetaTensor(output[name], meta=inputs.meta)
        return output

    def _predict_volume(
        self, volume: torch.Tensor, network: SegmentationNetwork, spacing: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """Results of :meth:`predict` for one volume ``[M, H, W, S]`` with a spacing in mm."""
        slices = volume.movedim(-1, 0)
        filled = torch.nonzero((slices != 0).flatten(1).any(dim=1)).flatten()
        if not len(filled):
            raise InputError("a volume is empty: every voxel is 0")
        samples = volume.new_zeros(self.num_samples, network.out_channels, *volume.shape[1:], dtype=torch.float32)
        mask = torch.zeros_like(samples[0])
        calib_prob = torch.zeros_like(mask) if network.has_calib_map else None
        grades = []
        for indices in filled.split(self.batch(max(slices.shape[2:]))):
            found = self.sample(slices[indices], network, indices.tolist())
            samples[..., indices] = found.samples.movedim(0, -1)
            mask[..., indices] = found.mask.movedim(0, -1)
            if calib_prob is not None and found.calib_prob is not None:
                calib_prob[..., indices] = found.calib_prob.movedim(0, -1)
            grades += [] if found.grade_prob is None else [found.grade_prob]
        raw = calib_prob if calib_prob is not None and network.is_stochastic else mask
        prob = torch.zeros_like(raw)
        calibration = self.calibration_of(network)
        temperature = calibration.get_buffer(f"{self.calibrated_for}_temperature")
        prob[..., filled] = temperature_scaled(raw[..., filled], temperature[:, None, None, None])
        pred = (prob if raw is mask else mask) if self.fusion == "mean" else fuse(samples, self.fusion)
        if of_fit := self._masks_of_fit(calibration):
            pred = without_unsure_parts(pred, mask, calibration.high_threshold)
        confidence = mask_confidence(raw, pred > 0.5)
        result = {
            "pred": pred,
            "prob": prob,
            "uncertainty": entropy_bits(prob),
            "sample_dice": pairwise_dice(samples),
            "confidence": confidence,
            "expected_dice": expected_dice(confidence, calibration.dice_fit if of_fit else calibration.like().dice_fit),
            "volume_temperature": calibration.foreground_temperature / temperature,
            "volume_margin": calibration.volume_margin,
            "volumes_from": torch.tensor(VOLUMES_FROM.index(calibration.volumes_from)),
        }
        if grades:
            area = (mask[..., filled] > 0.5).sum(dim=(0, 1, 2))
            head = area_weighted_mean(torch.cat(grades), area)
            measured = None
            if self.keep_measurements or calibration.measures:
                measured = measurements_of(volume, mask > 0.5, spacing)
            result |= subject_grade(head, measured, calibration, self.grade_prior)
        result |= {"variance": samples.var(dim=0)} if self.num_samples > 1 else {}
        if calib_prob is not None:
            result |= {"calib_prob": calib_prob} if raw is mask else {"seg_prob": mask}
        needed = self.keep_samples or calibration.volumes_from == "samples"
        return result | ({"samples": samples.flatten(0, 1)} if needed else {})

    def _masks_of_fit(self, calibration: Calibration) -> bool:
        """Whether masks are made as those that their parts' thresholds and the expected Dice were fitted to."""
        denoised = bool(calibration.sampling.get("num_inference_steps", self.num_inference_steps))
        return self.fusion == "mean" and denoised == bool(self.num_inference_steps)

    def calibration_of(self, network: SegmentationNetwork) -> Calibration:
        """The network's calibration, or one without effect if it was fitted with other sampling settings.

        In a stochastic network only volumes that come from samples depend on them, and the expected Dice on whether
        the mask is denoised.
        """
        fitted = network.calibration
        independent = network.is_stochastic and fitted.volumes_from == "levels"
        if independent or fitted.sampling in ({}, self.sampling):
            return fitted
        if not self.warned:
            logger.warning(
                f"the calibration is not applied, because it was fitted with {fitted.sampling}, not with "
                f"{self.sampling}; run configs/calibrate.yaml with these values"
            )
            self.warned = True
        return fitted.like()

    def sample(self, image: torch.Tensor, network: SegmentationNetwork, indices: Sequence[int]) -> SampledSlices:
        """Sample slices.

        Args:
            image: slices ``[b, M, H, W]``.
            network: network to sample from.
            indices: number of each slice in its volume, which seeds its noise.
        """
        # the factor is a prime larger than any slice number, so that no two seeds coincide
        generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + index) for index in indices]

        def draw(count: int) -> torch.Tensor:
            shape = (count, network.out_channels, *image.shape[2:])
            noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
            return noise.to(image.device)

        sample = partial(self.sample_with, network)
        if self.window is None or max(image.shape[2:]) <= self.window:
            return sample(image, draw)
        return sample_in_windows(sample, image, draw, self.window, self.batch(self.window))

    def batch(self, side: int) -> int:
        """Number of square slices of a side (pixels) that are sampled together."""
        return max(1, int(min(1.0, BATCH_PIXELS / side**2) * self.sampling_batch_size) // self.num_samples)

    def sample_with(self, network: SegmentationNetwork, image: torch.Tensor, draw: Noise) -> SampledSlices:
        """Sample slices ``[b, M, H, W]``; ``draw(count)`` gives new noise ``[b * count, R, H, W]``, slice by slice."""
        prepared, count = network.condition(image), self.num_samples
        calib = prepared["calib_map"].float().sigmoid() if network.has_calib_map else None
        if network.is_stochastic:
            return self._sample_stochastic(image, network, prepared, draw)
        if not self.num_inference_steps:
            assert calib is not None  # see check
            return SampledSlices(calib[:, None].repeat_interleave(count, dim=1), calib, calib, None)
        x_t = draw(count)
        if self.start_timestep is not None:
            logits = prepared["calib_map"].repeat_interleave(count, dim=0)
            x_t = _noised(network, logits, x_t, self.start_timestep)
        samples, grade = self._denoise(image, network, prepared, x_t, self._pairs(network), partial(draw, count))
        return SampledSlices(samples, samples.mean(dim=1), calib, grade)

    def _sample_stochastic(
        self,
        image: torch.Tensor,
        network: SegmentationNetwork,
        prepared: dict[str, torch.Tensor],
        draw: Noise,
    ) -> SampledSlices:
        """Mask and grade from pure noise, and further samples from drawn masks; see :meth:`sample`."""
        calib = prepared["calib_map"].float().sigmoid()
        condition = {name: part for name, part in prepared.items() if name not in DISTRIBUTION}
        mask, grade, count = calib, None, self.num_samples
        if self.num_inference_steps:
            last = timestep_pairs(network.diffusion.num_train_timesteps, 1)
            samples, grade = self._denoise(image, network, condition, draw(1), last, partial(draw, 1))
            mask = samples[:, 0]
        if count == 1:
            return SampledSlices(mask[:, None], mask, calib, grade)
        x_t, own = draw(count), draw(count).unflatten(0, (len(image), count))
        common = spread_noise(count, self.seed).to(image.device).expand(len(image), -1, -1)
        draws = draw_logits(prepared, common, own)
        if not self.num_inference_steps:
            return SampledSlices((draws > 0).float(), mask, calib, grade)
        pairs = self._pairs(network)
        x_t = _noised(network, draws.flatten(0, 1), x_t, pairs[0][0])
        samples, _ = self._denoise(image, network, condition, x_t, pairs, partial(draw, count))
        return SampledSlices(samples, mask, calib, grade)

    def _denoise(
        self,
        image: torch.Tensor,
        network: SegmentationNetwork,
        condition: dict[str, torch.Tensor],
        x_t: torch.Tensor,
        pairs: Pairs,
        draw: Draw,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Probability ``[b, N, R, H, W]`` and grades ``[b, K]`` of noisy masks ``x_t [b * N, R, H, W]``."""
        groups = (len(image), len(x_t) // len(image))
        image, *parts = (part.repeat_interleave(groups[1], dim=0) for part in (image, *condition.values()))
        condition = dict(zip(condition, parts, strict=True))
        estimate, grades = None, []

        def denoise(x_t: torch.Tensor, t: int) -> torch.Tensor:
            nonlocal estimate
            timesteps = torch.full((len(image),), t, device=image.device)
            logits, cls_logits, _ = network(image, x_t.to(image.dtype), timesteps, condition, estimate)
            estimate = network.diffusion.to_x0(logits.float())
            if cls_logits is not None:
                grades.append(cls_logits.float().softmax(dim=1))
            return estimate

        x_0 = self.sampler(denoise, x_t, pairs, network.diffusion.alphas_cumprod, draw)
        grade = torch.stack(grades).mean(dim=0).unflatten(0, groups).mean(dim=1) if grades else None
        return ((x_0 + 1) / 2).unflatten(0, groups), grade

    def _pairs(self, network: SegmentationNetwork) -> Pairs:
        """The timesteps of the samples."""
        return timestep_pairs(network.diffusion.num_train_timesteps, self.num_inference_steps, self._start(network))

    def _start(self, network: SegmentationNetwork) -> int | None:
        """First timestep of the samples; None means T - 1 with pure noise."""
        if network.is_stochastic and self.start_timestep is None:
            return round(START * network.diffusion.num_train_timesteps)
        return self.start_timestep

    def check(self, network: SegmentationNetwork, image_size: int) -> None:
        """Raise InputError, before any volume is read, for a size or number of steps that the network cannot sample."""
        network.check_image_size((image_size, image_size))
        if self.grade_prior is not None and len(self.grade_prior) != len(network.calibration.grade_prior):
            raise InputError(f"grade_prior={self.grade_prior} must have one number for each grade of the network")
        if network.is_stochastic and self.fusion != "mean":
            raise InputError(f"fusion={self.fusion}: a stochastic network has a mask of its own; set fusion=mean")
        if network.is_stochastic and self.num_samples == 1 and self.num_inference_steps > 1:
            raise InputError(
                f"num_inference_steps={self.num_inference_steps} is for the samples of a stochastic network: set "
                "num_samples, or num_inference_steps=1. Its mask takes one evaluation"
            )
        if self.num_inference_steps:
            self._pairs(network)
        if not network.has_calib_map and (self.start_timestep is not None or not self.num_inference_steps):
            raise InputError(
                "start_timestep and num_inference_steps=0 need a calibration map: add 'highway' to conditioning"
            )


def _spacings(inputs: torch.Tensor) -> list[list[float]]:
    """Spacing of the axes of each volume of a batch, in mm; 1 without metadata."""
    if not isinstance(inputs, MetaTensor):
        return [[1.0] * 3] * len(inputs)
    affines = torch.as_tensor(inputs.affine).expand(len(inputs), 4, 4)
    return affines[:, :3, :3].norm(dim=1).tolist()


def _check_prior(prior: Sequence[float]) -> None:
    numbers = isinstance(prior, (list, tuple)) and all(isinstance(value, (int, float)) for value in prior)
    if not numbers or min(prior, default=0) <= 0 or abs(sum(prior) - 1) > 1e-3:
        raise InputError(f"grade_prior={prior!r} must list positive numbers with the sum 1, one per grade")


def _noised(network: SegmentationNetwork, logits: torch.Tensor, noise: torch.Tensor, start: int) -> torch.Tensor:
    """Masks ``[B, R, H, W]`` of these logits with noise of the first timestep."""
    timesteps = torch.full((len(logits),), start, device=logits.device)
    return network.diffusion.add_noise(torch.tanh(logits.float() / 2), noise, timesteps)
