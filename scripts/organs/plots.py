"""Pictures of structures: previews of label maps, and bars of scores."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from scripts.config import atomic_path
from scripts.organs.structures import catalogue

GREYS = (-160, 240)  # window of the CT, HU


def plot_preview(image: np.ndarray, labels: np.ndarray, affine: np.ndarray, title: str, file: Path) -> None:
    """Draw the axial and the coronal slice with the most structures, as radiologists see them, in mm.

    Args:
        image: CT ``[H, W, S]`` in HU.
        labels: numbers of the structures ``[H, W, S]``.
        affine: from voxels to mm.
        title: text above the pictures.
        file: PNG to write.
    """
    orientation = nib.io_orientation(affine)
    image, labels = (nib.apply_orientation(volume, orientation) for volume in (image, labels))
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(orientation[:, 0])]
    figure = Figure(figsize=(13, 6), layout="constrained")
    axial, coronal = figure.subplots(1, 2)
    for axes, axis, name, vertical in ((axial, 2, "axial", "front"), (coronal, 1, "coronal", "head")):
        index = _busiest(labels, axis)
        grey, painted = image.take(index, axis).T, _coloured(labels.take(index, axis).T)
        width, height = (
            spacing[other] * side for other, side in zip({0, 1, 2} - {axis}, grey.shape[::-1], strict=True)
        )
        # the patient's right is on the left of the picture
        for picture, options in ((grey, {"cmap": "gray", "vmin": GREYS[0], "vmax": GREYS[1]}), (painted, {})):
            axes.imshow(
                picture[:, ::-1], origin="lower", extent=(0, width, 0, height), interpolation="nearest", **options
            )
        axes.set(title=f"{name}, slice {index + 1}", xlabel="mm (R: the patient's right)", ylabel=f"mm, {vertical} up")
        axes.text(0.01, 0.98, "R", transform=axes.transAxes, color="white", va="top", weight="bold")
        axes.text(0.99, 0.98, "L", transform=axes.transAxes, color="white", va="top", ha="right", weight="bold")
    shown = [entry for entry in catalogue().values() if (labels == entry["number"]).any()]
    handles = [Patch(color="#" + bytes(entry["colour"]).hex(), label=entry["name"]) for entry in shown]
    if handles:
        columns = -(-len(handles) // 30)
        figure.legend(handles=handles, loc="outside right upper", ncols=columns, fontsize="x-small")
    figure.suptitle(f"{title}: {len(shown)} structures")
    FigureCanvasAgg(figure)  # needs no display and no global state of pyplot
    with atomic_path(file) as path:
        figure.savefig(path, dpi=90)


def _busiest(labels: np.ndarray, axis: int) -> int:
    """The slice along an axis with the most structures, and of those the one with the most voxels."""
    slices = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    keys = [(len(np.unique(part)), np.count_nonzero(part)) for part in slices]
    return max(range(len(keys)), key=keys.__getitem__)


def _coloured(labels: np.ndarray) -> np.ndarray:
    """Half transparent colours ``[H, W, 4]`` of a slice of numbers ``[H, W]``."""
    table = np.zeros((256, 4))
    for entry in catalogue().values():
        table[entry["number"]] = [*(np.array(entry["colour"]) / 255), 0.55]
    return table[labels.astype(np.uint8)]
