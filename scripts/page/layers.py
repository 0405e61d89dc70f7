"""Pictures of a subject for the report: all slices of a volume side by side in one small picture."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

SIDES = (32, 256)  # smallest and largest longer side of a slice, pixels
BITS = 8  # masks in one picture: one for each bit of its grey value
QUALITY = 55  # of the grey pictures, of 100


def layers_of(
    item: Mapping[str, Any], background: np.ndarray, masks: Mapping[str, Sequence[np.ndarray]], max_bytes: int
) -> dict[str, Any]:
    """Pictures of all slices of an item as data URLs, in the radiological convention, and how to cut them.

    Slices are reduced until all pictures together are below ``max_bytes``, or 32 pixels wide.

    Args:
        item: an evaluated item with ``pred``, whose grid is that of all volumes, and ``uncertainty [R, H, W, S]``.
        background: image ``[H, W, S]``.
        masks: by name, masks ``[H, W, S]`` of which the first eight are kept, such as one for each region; of the first
            name is the largest mask.
        max_bytes: of the pictures before they are text.

    Returns:
        ``slices``, ``columns``, ``width`` and ``height`` (pixels of a slice), ``aspect`` (width by height, in mm), the
        number of the slice with the largest mask, ``first``, and ``pictures`` by name: ``image`` and ``uncertainty``
        (grey value 255 is 1 bit), and one for each name of ``masks``, whose grey values have a bit for each mask.
    """
    affine = np.asarray(item["pred"].affine)
    orientation = nib.io_orientation(affine)

    def upright(volume: Any) -> torch.Tensor:
        """Slices ``[S, rows, columns]``: anterior up, the patient's left on the right."""
        canonical = nib.apply_orientation(np.asarray(volume), orientation)
        return torch.from_numpy(np.moveaxis(np.rot90(canonical[::-1], k=1), -1, 0).copy())

    grey = {"image": upright(_windowed(background)), "uncertainty": upright(item["uncertainty"].amax(dim=0).cpu())}
    flat = {name: upright(_bits(volumes[:BITS])) for name, volumes in masks.items()}
    spacing = nib.affines.voxel_sizes(affine @ nib.orientations.inv_ornt_aff(orientation, background.shape))
    count, rows, columns = grey["image"].shape
    areas = (next(iter(flat.values())) != 0).sum(dim=(1, 2))
    side = min(SIDES[1], max(rows, columns))
    while True:
        shrink = side / max(rows, columns)
        size = max(1, round(rows * shrink)), max(1, round(columns * shrink))
        pictures = {name: _picture(_averaged(slices, size) * 255, QUALITY) for name, slices in grey.items()}
        pictures |= {name: _picture(_nearest(slices, size), None) for name, slices in flat.items()}
        total = sum(map(len, pictures.values()))
        if total <= max_bytes or side <= SIDES[0]:
            break
        side = max(SIDES[0], int(side * max(0.5, 0.95 * math.sqrt(max_bytes / total))))
    urls = {name: f"data:image/webp;base64,{base64.b64encode(data).decode()}" for name, data in pictures.items()}
    return {
        "slices": count,
        "columns": _mosaic_columns(count),
        "height": size[0],
        "width": size[1],
        "aspect": float(columns * spacing[0] / (rows * spacing[1])),
        "first": int(areas.argmax()) if areas.any() else count // 2,
        "pictures": urls,
    }


def _windowed(image: np.ndarray) -> np.ndarray:
    """Image with values from 0 to 1: up to the 99.5 % quantile of the voxels that are not 0."""
    some = image[::2, ::2, ::2] if image.size > 10**6 else image
    filled = some[some != 0]
    low, high = np.quantile(filled, [0.005, 0.995]) if filled.size else (0, 1)
    low = min(low, 0)
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def _bits(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Masks ``[H, W, S]`` as the bits of one array (uint8)."""
    return np.packbits(np.stack(masks), axis=0, bitorder="little")[0]


def _averaged(slices: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return functional.adaptive_avg_pool2d(slices[:, None], size)[:, 0] if slices.shape[1:] != size else slices


def _nearest(slices: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    rows, columns = (
        ((torch.arange(new) + 0.5) * old / new).long() for new, old in zip(size, slices.shape[1:], strict=True)
    )
    return slices[:, rows][:, :, columns]


def _mosaic_columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _picture(slices: torch.Tensor, quality: int | None) -> bytes:
    """Slices ``[S, h, w]``, 0 to 255, row by row in one WebP picture; lossless without a quality."""
    count, height, width = slices.shape
    columns = _mosaic_columns(count)
    rows = math.ceil(count / columns)
    canvas = torch.zeros(rows * columns, height, width, dtype=torch.uint8)
    canvas[:count] = slices.round().byte() if slices.is_floating_point() else slices
    mosaic = canvas.reshape(rows, columns, height, width).permute(0, 2, 1, 3).reshape(rows * height, columns * width)
    stream = io.BytesIO()
    options: dict[str, Any] = {"lossless": True, "exact": True} if quality is None else {"quality": quality}
    Image.fromarray(mosaic.numpy()).convert("RGB").save(stream, "WEBP", method=2, **options)
    return stream.getvalue()
