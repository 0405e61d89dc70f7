"""Pictures of structures: previews of label maps, and bars of scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from scripts.config import atomic_path
from scripts.organs.structures import catalogue

GREYS = (-160, 240)  # window of the CT, HU


def plot_preview(
    image: np.ndarray, labels: np.ndarray, affine: np.ndarray, title: str, file: Path, truth: np.ndarray | None = None
) -> None:
    """Draw the axial and the coronal slice with the most structures, as radiologists see them, in mm.

    Args:
        image: CT ``[H, W, S]`` in HU.
        labels: numbers of the structures ``[H, W, S]``.
        affine: from voxels to mm.
        title: text above the pictures.
        file: PNG to write.
        truth: true numbers ``[H, W, S]``, drawn in a second row; None without them.
    """
    orientation = nib.io_orientation(affine)
    image = nib.apply_orientation(image, orientation)
    rows = {"prediction": labels} if truth is None else {"prediction": labels, "truth": truth}
    turned = {name: nib.apply_orientation(volume, orientation) for name, volume in rows.items()}
    shown = turned["prediction" if truth is None else "truth"]
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(orientation[:, 0])]
    figure = Figure(figsize=(13, 6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for axes_of_row, (name, volume) in zip(grid, turned.items(), strict=True):
        for axes, axis, plane in zip(axes_of_row, (2, 1), ("axial, front up", "coronal, head up"), strict=True):
            index = _busiest(shown, axis)
            _draw_slice(axes, image.take(index, axis), volume.take(index, axis), np.delete(spacing, axis))
            axes.set_title(f"{name}, {plane}, slice {index + 1}")
    counts = {name: _counts(volume, 2).sum(axis=0) for name, volume in turned.items()}
    names = [entry for entry in catalogue().values() if any(count[entry["number"]] for count in counts.values())]
    handles = [Patch(color="#" + bytes(entry["colour"]).hex(), label=entry["name"]) for entry in names]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", ncols=-(-len(handles) // 40), fontsize="x-small")
    figure.suptitle(f"{title}: {np.count_nonzero(counts['prediction'][1:])} structures")
    _save(figure, file)


def _draw_slice(axes: Axes, image: np.ndarray, labels: np.ndarray, spacing: np.ndarray) -> None:
    """Draw a slice ``[right, up]`` with its structures; the patient's right is on the left of the picture."""
    extent = (0, spacing[0] * image.shape[0], 0, spacing[1] * image.shape[1])
    table = np.zeros((256, 4))
    for entry in catalogue().values():
        table[entry["number"]] = [*(np.array(entry["colour"]) / 255), 0.55]
    axes.imshow(image[::-1].T, origin="lower", extent=extent, cmap="gray", vmin=GREYS[0], vmax=GREYS[1])
    axes.imshow(table[labels[::-1].T.astype(np.uint8)], origin="lower", extent=extent, interpolation="nearest")
    axes.set(xlabel="mm", ylabel="mm")
    for x, side, text in ((0.01, "left", "R"), (0.99, "right", "L")):
        axes.text(x, 0.98, text, transform=axes.transAxes, color="white", va="top", ha=side, weight="bold")


def plot_structures(scores: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw the Dice of each structure with its 95 % interval, and that of the prior.

    Args:
        scores: by structure, ``dice`` and ``prior_dice`` as dictionaries of ``value``, ``low`` and ``high``.
        file: PNG to write.
    """
    names = [name for name, cells in scores.items() if cells["dice"]["value"] is not None]
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        dice, prior = scores[name]["dice"], scores[name]["prior_dice"]
        axes.barh(row, dice["value"], color="C0", label=None if row else "network, with its 95 % interval")
        if dice["low"] is not None:
            axes.plot([dice["low"], dice["high"]], [row, row], color="black", linewidth=1)
        axes.plot(prior["value"], row, "|", color="C1", markersize=8, label=None if row else "prior, without the image")
    axes.set(xlabel="Dice, mean over subjects", xlim=(0, 1), yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    if names:
        figure.legend(loc="outside upper center", ncols=2)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure)  # needs no display and no global state of pyplot
    with atomic_path(file) as path:
        figure.savefig(path, dpi=90)


def _busiest(labels: np.ndarray, axis: int) -> int:
    """The slice along an axis with the most structures, and of those the one with the most voxels."""
    counts = _counts(labels, axis)[:, 1:]
    keys = list(zip((counts > 0).sum(axis=1), counts.sum(axis=1), strict=True))
    return max(range(len(keys)), key=keys.__getitem__)


def _counts(labels: np.ndarray, axis: int) -> np.ndarray:
    """Voxels of each number in each slice along an axis ``[slices, 256]``."""
    return np.stack([np.bincount(part.ravel(), minlength=256) for part in np.moveaxis(labels, axis, 0)])
