"""Segment the structures of whole volumes, a few slices at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from torch import nn

from scripts.config import InputError
from scripts.organs.transforms import check_windows, to_windows

CHUNK = 2**26  # values of the logits that are computed at a time, which bounds the memory


class LabelMapInferer(Inferer):
    """Label maps of volumes. A subclass implements ``_segment``.

    Args:
        windows: lowest and highest HU of each channel.

    Raises:
        InputError: for invalid windows.
    """

    def __init__(self, windows: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.windows = check_windows(windows)

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args, **kwargs) -> torch.Tensor:  # type: ignore[override]
        """Classes ``[B, 1, H, W, S]`` of volumes ``[B, 1, H, W, S]`` in HU; MONAI Label calls this."""
        return self.predict(inputs, network)["pred"]

    @torch.no_grad()
    def predict(self, inputs: torch.Tensor, network: nn.Module) -> dict[str, torch.Tensor]:
        """Segment volumes ``[B, 1, H, W, S]`` in HU: ``pred``, the class of each voxel (uint8, 0 is background)."""
        found = self._segment(torch.as_tensor(inputs), network)
        if isinstance(inputs, MetaTensor):  # so that MONAI can invert the spatial transforms
            found["pred"] = MetaTensor(found["pred"], meta=inputs.meta)
        return found

    def _segment(self, inputs: torch.Tensor, network: nn.Module) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class StructureInferer(LabelMapInferer):
    """Label maps of volumes by MONAI's sliding window in the plane of the slices.

    The logits of all structures of a CT take tens of gigabytes, so only those of a few slices exist at a time. Beside
    ``pred``, :meth:`predict` returns ``structure_prob [B, K]``, the mean probability of the voxels of each structure,
    NaN where there is none.

    Args:
        windows: lowest and highest HU of each channel.
        num_slices: a slice and its neighbours, which are channels; 1, 3 or 5.
        roi_size: both sides of the sliding window, as in training (pixels).
        overlap: share of a window that the next one overlaps.
        sw_batch_size: windows in a batch.

    Raises:
        InputError: for an even number of slices, or invalid windows, overlap or batch size.
    """

    def __init__(
        self,
        windows: Sequence[Sequence[float]],
        num_slices: int = 1,
        roi_size: int = 256,
        overlap: float = 0.25,
        sw_batch_size: int = 4,
    ) -> None:
        super().__init__(windows)
        if num_slices not in (1, 3, 5):
            raise InputError(f"num_slices={num_slices!r} must be 1, 3 or 5")
        check_sliding(overlap, sw_batch_size)
        self.num_slices = num_slices
        self.slide = SlidingWindowInferer((roi_size, roi_size), sw_batch_size, overlap, mode="gaussian")

    def _segment(self, inputs: torch.Tensor, network: nn.Module) -> dict[str, torch.Tensor]:
        results = [self._segment_volume(volume[0], network) for volume in inputs]
        pred, prob = (torch.stack(part) for part in zip(*results, strict=True))
        return {"pred": pred, "structure_prob": prob}

    def _segment_volume(self, volume: torch.Tensor, network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes ``[1, H, W, S]`` and probabilities ``[K]`` of a volume ``[H, W, S]``."""
        depth, classes = volume.shape[-1], torch.zeros(volume.shape, dtype=torch.uint8, device=volume.device)
        # the neighbours of the first and the last slice are these slices themselves
        reach = torch.arange(self.num_slices, device=volume.device) - self.num_slices // 2
        start, sums, counts, step = 0, torch.zeros(0), torch.zeros(0), 1
        while start < depth:
            slices = torch.arange(start, min(start + step, depth), device=volume.device)
            neighbours = (slices[:, None] + reach).clamp(0, depth - 1)
            image = volume[..., neighbours].permute(2, 3, 0, 1).float()
            logits = torch.as_tensor(self.slide(to_windows(image, self.windows), network))
            prob, winner = logits.float().softmax(dim=1).max(dim=1)
            classes[..., slices] = winner.to(torch.uint8).movedim(0, -1)
            if not start:  # only now is the number of classes known
                sums, counts = (torch.zeros(logits.shape[1], dtype=torch.float64) for _ in range(2))
            sums += torch.bincount(winner.flatten(), prob.flatten().double(), len(sums)).cpu()
            counts += torch.bincount(winner.flatten(), minlength=len(sums)).cpu()
            start, step = start + len(slices), max(1, CHUNK // logits[0].numel())
        return classes[None], (sums / counts)[1:].float()


def check_sliding(overlap: float, sw_batch_size: int) -> None:
    """Raise InputError for an overlap or a batch size that a sliding window cannot have."""
    if not isinstance(overlap, (int, float)) or not 0 <= overlap < 1:
        raise InputError(f"overlap={overlap!r} must be a number from 0 to below 1")
    if not isinstance(sw_batch_size, int) or sw_batch_size < 1:
        raise InputError(f"sw_batch_size={sw_batch_size!r} must be a whole number, 1 or more")


class PatchInferer(LabelMapInferer):
    """Label maps of volumes by MONAI's sliding window in three dimensions, for networks that take patches.

    The logits of all structures exist at once: a volume of 512 x 512 x 300 voxels needs 35 GB for 118 classes.

    Args:
        windows: lowest and highest HU of each channel.
        roi_size: of the patches, as in training (voxels).
        overlap: share of a patch that the next one overlaps.

    Raises:
        InputError: for invalid windows.
    """

    def __init__(self, windows: Sequence[Sequence[float]], roi_size: Sequence[int], overlap: float = 0.25) -> None:
        super().__init__(windows)
        self.slide = SlidingWindowInferer(roi_size, 1, overlap, mode="gaussian")

    def _segment(self, inputs: torch.Tensor, network: nn.Module) -> dict[str, torch.Tensor]:
        logits = torch.as_tensor(self.slide(to_windows(inputs.float(), self.windows), network))
        return {"pred": logits.argmax(dim=1, keepdim=True).to(torch.uint8)}
