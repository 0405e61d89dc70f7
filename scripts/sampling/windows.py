"""Slices that are larger than what the network sees: sampled in overlapping windows, which are blended."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from monai.inferers import sliding_window_inference

from scripts.sampling.probability import area_weighted_mean

OVERLAP = 0.5  # share of a window that the next one covers
Noise = Callable[[int], torch.Tensor]


class SampledSlices(NamedTuple):
    """Samples of b slices, N of each; what does not exist is None."""

    samples: torch.Tensor  # [b, N, R, H, W], probability
    mask: torch.Tensor  # [b, R, H, W], probability
    calib_prob: torch.Tensor | None  # [b, R, H, W], the calibration map as a probability
    grade_prob: torch.Tensor | None  # [b, K], mean over samples and steps


def sample_in_windows(
    sample: Callable[[torch.Tensor, Noise], SampledSlices], image: torch.Tensor, draw: Noise, window: int, batch: int
) -> SampledSlices:
    """Sample slices in square windows, by MONAI's sliding window with Gaussian weights.

    The noise is drawn for whole slices, so that overlapping windows see the same noise. Windows in which every voxel is
    0 are not sampled: their probability is 0. The grade of a slice is the mean over its windows, weighted by predicted
    area.

    Args:
        sample: samples of windows ``[n, M, h, w]`` with the noise that its second argument draws.
        image: slices ``[b, M, H, W]``.
        draw: ``draw(count)`` gives new noise ``[b * count, R, H, W]``, slice by slice.
        window: side of a window (pixels).
        batch: number of windows that are sampled together.
    """
    drawn: list[torch.Tensor] = []  # noise of the whole slices, in the order in which a window asks for it
    shapes: list[torch.Size] = []  # [N, R], and K if there is a grade

    def predict(windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        filled = (windows[:, :-3] != 0).flatten(1).any(dim=1)
        run = filled if filled.any() else torch.arange(len(windows), device=windows.device) == 0
        corners = windows[run, -3:, 0, 0].long().tolist()
        calls = 0

        def crop(count: int) -> torch.Tensor:
            nonlocal calls
            if calls == len(drawn):
                drawn.append(draw(count).unflatten(0, (len(image), count)))
            full, calls = drawn[calls], calls + 1
            return torch.cat([full[b, :, :, i : i + window, j : j + window] for b, i, j in corners])

        found = sample(windows[run, :-3].contiguous(), crop)
        shapes[:] = [found.samples.shape[1:3]]
        maps = [found.samples.flatten(1, 2), found.mask]
        maps += [] if found.calib_prob is None else [found.calib_prob]
        if found.grade_prob is not None:
            shapes.append(found.grade_prob.shape[1:])
            maps.append(found.grade_prob[:, :, None, None].expand(-1, -1, window, window))
        results = [part.new_zeros(len(windows), *part.shape[1:], dtype=torch.float32) for part in maps]
        for result, part in zip(results, maps, strict=True):
            result[run] = part.float() * filled[run].view(-1, 1, 1, 1)
        return tuple(results)

    placed = torch.cat([image, _places(image)], dim=1)
    samples, mask, *further = sliding_window_inference(
        placed, (window, window), batch, predict, overlap=OVERLAP, mode="gaussian"
    )
    grade = further.pop() if len(shapes) > 1 else None
    if grade is not None:
        grade = torch.stack([_grade(*pair) for pair in zip(grade, mask, strict=True)])
    return SampledSlices(samples.unflatten(1, shapes[0]), mask, further[0] if further else None, grade)


def _places(image: torch.Tensor) -> torch.Tensor:
    """Number of the slice, row and column of each pixel of ``[b, M, H, W]``, as channels ``[b, 3, H, W]``."""
    axes = [torch.arange(side, device=image.device) for side in (len(image), *image.shape[2:])]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=1).to(torch.float32)


def _grade(grades: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of a map of grades ``[K, H, W]`` over the mask ``[R, H, W]``; over all pixels if it is empty."""
    mean = area_weighted_mean(grades.flatten(1).T, (mask > 0.5).any(dim=0).flatten())
    return mean / mean.sum()  # windows that were not sampled have none
