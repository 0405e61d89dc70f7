"""Weights of the structures in the loss: without them, small structures are never predicted."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from scripts.config import InputError, warn_some
from scripts.data.subjects import Item
from scripts.organs.structures import numbers


def class_weights(items: Sequence[Item], structures: Sequence[str]) -> torch.Tensor:
    """sqrt(median frequency / frequency) of background and K structures ``[1 + K]``, float32.

    The frequency is the share of the voxels of all label maps; the median is over the structures. A structure without
    a voxel has weight 1.

    Args:
        items: training subjects.
        structures: names, in the order of the classes.

    Raises:
        InputError: if no structure has a voxel.
    """
    counts = np.zeros(256, np.int64)
    for item in tqdm(items, "Counting voxels", disable=None):
        for file in item["label"]:
            labels = np.asanyarray(nib.Nifti1Image.from_filename(file).dataobj).astype(np.uint8)
            counts += np.bincount(labels.ravel(), minlength=256)
    own = counts[numbers(structures)]
    if not own.any():
        raise InputError(f"no training subject has a voxel of {list(structures[:5])}; correct 'structures'")
    warn_some("structures are in no training subject", [n for n, c in zip(structures, own, strict=True) if not c])
    every = np.array([counts.sum() - own.sum(), *own])
    weights = np.sqrt(np.median(own[own > 0]) / np.maximum(every, 1))
    return torch.tensor(np.where(every > 0, weights, 1.0), dtype=torch.float32)
