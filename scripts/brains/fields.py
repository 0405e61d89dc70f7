"""Smooth random functions of a place, and shapes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

EXTENT = 120.0  # half the side of the cube that a field covers, mm; it is mirrored outside


class SmoothField:
    """Random functions of a place, each with mean 0 and a standard deviation of about 0.7.

    Args:
        rng: draws them.
        length: values at twice this distance are independent (mm).
        count: number of functions.
    """

    def __init__(self, rng: np.random.Generator, length: float, count: int = 1) -> None:
        knots = max(4, round(4 * EXTENT / length) + 2)
        values = torch.from_numpy(rng.standard_normal((1, count, knots, knots, knots), dtype=np.float32))
        if knots > 8:  # the linear interpolation between independent knots has edges
            values = functional.avg_pool3d(functional.pad(values, (1,) * 6, mode="replicate"), 3, 1)
        self.values = (values - values.mean()) / values.std()

    def __call__(self, points: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        """Values ``[...]`` at points ``[..., 3]`` (mm), or ``[count, ...]`` of several functions.

        Args:
            points: places.
            where: ``[...]``, the values are 0 where it is false. Fewer places take less time.
        """
        if where is not None:
            found = points.new_zeros(self.values.shape[1], *where.shape)
            found[:, where] = self(points[where]).reshape(len(found), int(where.sum()))
            return found.squeeze(0)
        grid = (points / EXTENT).reshape(1, 1, 1, -1, 3)
        found = functional.grid_sample(self.values, grid, padding_mode="reflection", align_corners=True)
        return found.reshape(found.shape[1], *points.shape[:-1]).squeeze(0)


def length(vectors: torch.Tensor) -> torch.Tensor:
    """Length ``[...]`` of vectors ``[..., 3]``, several times faster than ``torch.linalg.vector_norm``."""
    x, y, z = vectors.unbind(-1)
    return (x * x + y * y + z * z).sqrt()


def radius(points: torch.Tensor, centre: npt.ArrayLike, semi_axes: npt.ArrayLike) -> torch.Tensor:
    """Distance ``[...]`` of points ``[..., 3]`` from the centre of an ellipsoid, 1 on its surface."""
    middle, scale = (torch.from_numpy(np.asarray(value, np.float32)) for value in (centre, semi_axes))
    return length((points - middle) / scale)
