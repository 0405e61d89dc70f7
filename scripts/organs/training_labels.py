"""What the label maps of the training subjects say: weights of the structures in the loss, and a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from scripts.config import InputError, warn_some
from scripts.data.subjects import Item
from scripts.organs.structures import numbers

PRIOR_SIZE = 64  # of the prior, along each axis; the field of view of every subject is stretched to it


def class_weights(items: Sequence[Item], structures: Sequence[str]) -> torch.Tensor:
    """sqrt(median frequency / frequency) of background and K structures ``[1 + K]``, float32.

    Without weights, small structures are never predicted. The frequency is the share of the voxels of all label maps;
    the median is over the structures. A structure without a voxel has weight 1.

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


def majority_prior(items: Sequence[Item], structures: Sequence[str]) -> np.ndarray:
    """The baseline without an image: the most frequent number of each place ``[64, 64, 64]``, uint8.

    Its axes run towards right, front and head.

    Args:
        items: training subjects.
        structures: names; the others count as background.
    """
    values = np.array([0, *numbers(structures)], np.uint8)
    votes = np.zeros((PRIOR_SIZE, PRIOR_SIZE, PRIOR_SIZE, len(values)), np.uint16)
    for item in tqdm(items, "Counting the prior", disable=None):
        image = nib.as_closest_canonical(nib.Nifti1Image.from_filename(item["label"][0]))
        labels = resized(np.asanyarray(image.dataobj).astype(np.uint8), (PRIOR_SIZE, PRIOR_SIZE, PRIOR_SIZE))
        for index, value in enumerate(values):
            votes[..., index] += (labels == value) if index else ~np.isin(labels, values[1:])
    return values[votes.argmax(axis=-1)]


def resized(labels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Nearest neighbours of a label map on a grid of another shape with the same field of view."""
    places = [((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(labels.shape, shape, strict=True)]
    return labels[np.ix_(*places)]


def prior_of(prior: np.ndarray, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """The prior on the grid of a subject."""
    orientation = nib.io_orientation(affine)
    turned = nib.apply_orientation(
        prior, nib.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), orientation)
    )
    return resized(turned, shape)
