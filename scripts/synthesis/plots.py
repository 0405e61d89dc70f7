"""Pictures of contrast CTs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scripts.config import atomic_path

GREYS = (-100, 450)  # window of the pictures, HU
WIDTH = 5  # of a picture, inches
SIDES = {"coronal": "RL", "sagittal": "AP"}  # of the patient, at the left and the right of a picture


def plot_projections(volumes: Mapping[str, np.ndarray], affine: np.ndarray, title: str, file: Path) -> None:
    """Draw the brightest voxel along front to back, and along right to left, of each CT, in mm.

    Args:
        volumes: CTs ``[H, W, S]`` (HU) by name.
        affine: from voxels to mm.
        title: text above the pictures.
        file: PNG to write.
    """
    orientation = nib.io_orientation(affine)
    order = np.argsort(orientation[:, 0])
    spacing = nib.affines.voxel_sizes(affine)[order]
    size = np.array(next(iter(volumes.values())).shape)[order] * spacing
    rows = float(np.clip(WIDTH * size[2] / size[0], 2, 8))  # inches
    figure = Figure(figsize=(WIDTH * len(volumes), 2 * (rows + 0.5)), layout="constrained")
    grid = figure.subplots(2, len(volumes), squeeze=False)
    for column, (name, volume) in zip(grid.T, volumes.items(), strict=True):
        turned = nib.apply_orientation(volume, orientation)
        # as radiologists see them: the patient's right on the left, the front on the left
        planes = {"coronal": (turned.max(axis=1)[::-1], spacing[0]), "sagittal": (turned.max(axis=0)[::-1], spacing[1])}
        for axes, (plane, (picture, width)) in zip(column, planes.items(), strict=True):
            extent = (0, width * picture.shape[0], 0, spacing[2] * picture.shape[1])
            axes.imshow(picture.T, origin="lower", extent=extent, cmap="gray", vmin=GREYS[0], vmax=GREYS[1])
            axes.set(xlabel="mm", ylabel="mm", title=f"{name}, {plane}")
            for x, side, text in zip((0.02, 0.98), ("left", "right"), SIDES[plane], strict=True):
                axes.text(x, 0.98, text, transform=axes.transAxes, color="white", va="top", ha=side, weight="bold")
    figure.suptitle(f"{title}: brightest voxels, {GREYS[0]} to {GREYS[1]} HU. Synthetic CTs are not for diagnosis")
    FigureCanvasAgg(figure)  # needs no display and no global state of pyplot
    with atomic_path(file) as path:
        figure.savefig(path, dpi=80)
