"""Overlays of masks on the image, one picture per subject."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from scripts.data.pictures import read_volume
from scripts.report.plots import plot_overlay


def read_background(item: Mapping[str, Any]) -> np.ndarray:
    """First modality or channel of an evaluated item ``[H, W, S]``, as it is stored in its file."""
    return read_volume(item["pred"].meta["filename_or_obj"])


def write_overlay(item: Mapping[str, Any], background: np.ndarray, title: str, folder: Path) -> None:
    """Write ``<folder>/<subject>_overlay.png``.

    Args:
        item: an evaluated item with ``pred``, ``uncertainty`` and perhaps ``label``, all on the input's grid.
        background: image ``[H, W, S]`` on the same grid.
        title: text above the image.
        folder: where the picture is written.
    """
    orientation = nib.io_orientation(np.asarray(item["pred"].affine))

    def canonical(volume: torch.Tensor | np.ndarray) -> np.ndarray:
        return nib.apply_orientation(np.asarray(volume), orientation)

    file = folder / f"{item['subject']}_overlay.png"
    masks = np.stack([canonical(region.cpu()) > 0 for region in item["pred"]])
    truth = np.stack([canonical(region.cpu()) > 0 for region in item["label"]]) if "label" in item else None
    uncertainty = canonical(item["uncertainty"].amax(dim=0).cpu())
    plot_overlay(canonical(background), masks, uncertainty, truth, title, file)
