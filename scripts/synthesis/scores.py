"""Scores of a contrast CT, the masks that they need, and the baselines that need no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.metrics import MultiScaleSSIMMetric
from monai.metrics.regression import compute_ssim_and_cs
from scipy.ndimage import binary_fill_holes
from tqdm import tqdm

from scripts.config import InputError, check_all
from scripts.data.pictures import read_volume
from scripts.data.subjects import Item, check_headers

AIR = -500  # HU; the body is brighter, but for its lungs
BIN = 10  # HU, of the lookup table
ENHANCED = 100  # HU, above the native CT
WINDOW, SMALLEST = 11, 176  # pixels: window of the SSIM; sides of slices that are large enough for MS-SSIM
CHUNK = 16  # slices at a time
SCORES = ("psnr", "mae", "ssim", "ms_ssim", "vessel_mae", "vessel_dice")


def body_mask(image: np.ndarray) -> np.ndarray:
    """The body ``[H, W, S]``, bool: what is brighter than air, with the holes of each slice filled."""
    return np.stack([binary_fill_holes(part > AIR) for part in np.moveaxis(image, -1, 0)], axis=-1)


def mask_file(contrast: str, label_suffix: str, name: str) -> Path:
    """Where the mask ``name`` of a contrast CT is: beside it, or in a folder of that name beside its folder.

    Args:
        contrast: ``<subject>_cta.nii.gz`` or, of pairs in two folders, ``CTA/<subject>.nii.gz``.
        label_suffix: ``cta``.
        name: ``vessels`` or ``lung``.
    """
    path = Path(contrast)
    found = re.fullmatch(rf"(.*[-_.])?{re.escape(label_suffix)}(\.nii(?:\.gz)?)", path.name, re.IGNORECASE)
    return path.with_name(f"{found[1] or ''}{name}{found[2]}") if found else path.parent.parent / name / path.name


def with_lungs(items: Sequence[Item], label_suffix: str) -> list[Item]:
    """The items with the files of their lung masks.

    Raises:
        InputError: naming each subject that has none, or one on another grid.
    """

    def add(item: Item) -> Item:
        file = mask_file(item["label"][0], label_suffix, "lung")
        if not file.is_file():
            raise InputError(f"subject '{item['subject']}': {file} is missing; it is needed if lung_weight is not 1")
        found = item | {"lung": [str(file)]}
        check_headers(found, ["ncct"])
        return found

    return check_all(items, add)


def scores(
    image: np.ndarray,
    truth: np.ndarray,
    native: np.ndarray,
    body: np.ndarray,
    vessels: np.ndarray | None,
    hu_range: Sequence[float],
) -> dict[str, float]:
    """Scores of a synthesised CT, by name.

    In the body: ``psnr`` (dB, over ``hu_range``), ``mae`` (HU), ``ssim`` (window of 11 px), and ``ms_ssim``, which is
    NaN if the body is smaller than 176 px. ``vessel_mae`` is the MAE in the vessels (HU), NaN without their mask.
    ``vessel_dice`` is the Dice of the voxels that are more than 100 HU above the native CT: vessels, and organs that
    take up contrast. It is NaN if the true CT has none.

    Args:
        image: the CT to score ``[H, W, S]`` (HU).
        truth: the contrast CT, likewise.
        native: the native CT, likewise.
        body: where it is scored.
        vessels: mask of the contrast vessels; None without.
        hu_range: lowest and highest HU; all CTs are clipped to them.
    """
    low, high = hu_range
    one, two, before = (part.astype(np.float32).clip(low, high) for part in (image, truth, native))
    error = (one - two)[body]
    found, true = ((part - before)[body] > ENHANCED for part in (one, two))
    return {
        # files hold whole HU, so an error is never smaller than that of rounding
        "psnr": float(10 * np.log10((high - low) ** 2 / max(np.square(error).mean(), 1 / 12))),
        "mae": float(np.abs(error).mean()),
        **_similarity(one - low, two - low, body, high - low),
        "vessel_mae": float(np.abs(one - two)[vessels].mean()) if vessels is not None and vessels.any() else np.nan,
        "vessel_dice": float(2 * (found & true).sum() / (found.sum() + true.sum())) if true.any() else np.nan,
    }


def _similarity(one: np.ndarray, two: np.ndarray, body: np.ndarray, span: float) -> dict[str, float]:
    """SSIM and MS-SSIM of slices, a few at a time: the mean over the body, whose size decides nothing."""
    if not body.any():
        return {"ssim": np.nan, "ms_ssim": np.nan}
    rows, columns = (slice(found.min(), found.max() + 1) for found in np.nonzero(body.any(axis=2)))
    one, two, inside = (np.moveaxis(part[rows, columns], -1, 0)[:, None] for part in (one * body, two * body, body))
    multiscale, edge = MultiScaleSSIMMetric(spatial_dims=2, data_range=span), WINDOW // 2
    ssim: list[np.ndarray] = []
    ms_ssim: list[np.ndarray] = []
    for start in range(0, len(one), CHUNK):
        first, second = (torch.from_numpy(part[start : start + CHUNK]) for part in (one, two))
        if min(one.shape[2:]) >= WINDOW:
            values, _ = compute_ssim_and_cs(
                first, second, spatial_dims=2, data_range=span, kernel_size=(WINDOW, WINDOW), kernel_sigma=(1.5, 1.5)
            )
            ssim.append(values.numpy()[inside[start : start + CHUNK, :, edge:-edge, edge:-edge]])
        if min(one.shape[2:]) >= SMALLEST:
            ms_ssim.append(torch.as_tensor(multiscale(first, second)).flatten().numpy())
    return {
        name: float(np.concatenate(found).mean()) if found else np.nan
        for name, found in {"ssim": ssim, "ms_ssim": ms_ssim}.items()
    }


def lookup_table(items: Sequence[Item], hu_range: Sequence[float]) -> np.ndarray:
    """Mean contrast HU of the voxels of each native HU, in steps of 10 HU from the lowest: the best pointwise map.

    Args:
        items: training subjects.
        hu_range: lowest and highest HU.
    """
    low, high = hu_range
    sums, counts = np.zeros((2, int((high - low) // BIN) + 1))
    for item in tqdm(items, "Counting HU", disable=None):
        native, contrast = (read_volume(item[key][0]).clip(low, high) for key in ("image", "label"))
        bins = ((native - low) // BIN).astype(int).ravel()
        sums += np.bincount(bins, contrast.ravel(), len(sums))
        counts += np.bincount(bins, minlength=len(counts))
    centres = low + BIN * (np.arange(len(sums)) + 0.5)
    return np.where(counts > 0, sums / np.maximum(counts, 1), centres)


def looked_up(image: np.ndarray, table: np.ndarray, hu_range: Sequence[float]) -> np.ndarray:
    """The contrast CT that the lookup table gives of a native one ``[H, W, S]``."""
    low, high = hu_range
    return table[((image.clip(low, high) - low) // BIN).astype(int)]
