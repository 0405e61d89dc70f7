"""Slices that are larger than what the network sees: sampled in overlapping windows, which are blended."""

from __future__ import annotations

import torch
from monai.inferers import sliding_window_inference

from scripts.networks.base import SegmentationNetwork
from scripts.sampling.inferer import Noise, SampledSlices, VolumeInferer
from scripts.sampling.probability import area_weighted_mean

OVERLAP = 0.5  # share of a window that the next one covers


class WindowInferer(VolumeInferer):
    """Sample slices in square windows, by MONAI's sliding window with Gaussian weights.

    The noise is drawn for whole slices, so that overlapping windows see the same noise. The grade of a slice is the
    mean over its windows, weighted by predicted area.

    Args:
        window: side of a window (pixels); None samples whole slices.
        **settings: see :class:`VolumeInferer`.
    """

    def __init__(self, window: int | None = None, **settings) -> None:
        super().__init__(**settings)
        self.window = window

    def sample_with(self, image: torch.Tensor, network: SegmentationNetwork, draw: Noise) -> SampledSlices:
        """See :meth:`VolumeInferer.sample_with`."""
        if self.window is None or max(image.shape[2:]) <= self.window:
            return super().sample_with(image, network, draw)
        size = (self.window, self.window)
        drawn: list[torch.Tensor] = []  # noise of the whole slices, in the order in which a window asks for it

        def predict(windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
            corners = windows[:, -3:, 0, 0].long().tolist()
            calls = 0

            def crop(count: int) -> torch.Tensor:
                nonlocal calls
                if calls == len(drawn):
                    drawn.append(draw(count).unflatten(0, (len(image), count)))
                full, calls = drawn[calls], calls + 1
                return torch.cat([full[b, :, :, i : i + size[0], j : j + size[1]] for b, i, j in corners])

            found = super(WindowInferer, self).sample_with(windows[:, :-3].contiguous(), network, crop)
            maps = [found.samples.flatten(1, 2), found.mask]
            maps += [] if found.calib_prob is None else [found.calib_prob]
            if found.grade_prob is not None:
                maps.append(found.grade_prob[:, :, None, None].expand(-1, -1, *size))
            return tuple(part.float().clone() for part in maps)  # MONAI weights them in place

        maps = sliding_window_inference(
            torch.cat([image, _places(image)], dim=1),
            size,
            self.batch(self.window),
            predict,
            overlap=OVERLAP,
            mode="gaussian",
        )
        samples, mask, *further = maps
        calib = further.pop(0) if network.has_calib_map else None
        grade = torch.stack([_grade(*pair) for pair in zip(further[0], mask, strict=True)]) if further else None
        return SampledSlices(samples.unflatten(1, (-1, network.out_channels)), mask, calib, grade)


def _places(image: torch.Tensor) -> torch.Tensor:
    """Number of the slice, row and column of each pixel of ``[b, M, H, W]``, as channels ``[b, 3, H, W]``."""
    axes = [torch.arange(side, device=image.device) for side in (len(image), *image.shape[2:])]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=1).to(torch.float32)


def _grade(grades: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of a map of grades ``[K, H, W]`` over the mask ``[R, H, W]``; over all pixels if it is empty."""
    return area_weighted_mean(grades.flatten(1).T, (mask > 0.5).any(dim=0).flatten())
