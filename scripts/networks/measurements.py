"""Size, shape and intensity of a mask, from which a grade can be read beside what the head says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import binary_dilation, generate_binary_structure, label

RIM = 3  # voxels around the mask
SHAPES = ("present", "size", "extent x", "extent y", "extent z", "roundness", "elongation", "flatness", "parts")
INTENSITIES = ("mean", "deviation", "contrast")


def num_measurements(num_regions: int, num_modalities: int) -> int:
    """F, the number of measurements of a subject."""
    return num_regions * (len(SHAPES) + num_modalities * len(INTENSITIES))


def measurement_names(regions: Sequence[str], modalities: Sequence[str]) -> list[str]:
    """Names of the measurements ``[F]``, in the order of :func:`measure`."""
    intensities = [f"{modality} {name}" for modality in modalities for name in INTENSITIES]
    return [f"{region} {name}" for region in regions for name in (*SHAPES, *intensities)]


def measure(image: np.ndarray, masks: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Measurements ``[F]`` of a subject; what an empty mask does not have is NaN.

    By region: whether it is ``present``; logarithms of its ``size``, its ``extent`` along each axis, its ``elongation``
    and ``flatness`` (ratios of principal axes) and its number of ``parts``, and its ``roundness`` (surface of the ball
    of equal volume, divided by its own), all of ITK's LabelImageToShapeLabelMapFilter. A ratio of two sizes is a
    difference of logarithms, which a linear model can use. By modality: ``mean`` and standard ``deviation`` of the
    z-scores inside, and ``contrast``, the mean inside minus that in a rim of 3 voxels.

    Args:
        image: z-scored volume ``[M, H, W, S]``.
        masks: of each region, bool ``[R, H, W, S]``.
        spacing: of the three axes, in mm. A picture (S = 1) is measured as a square of side 1, without the third axis.
    """
    return np.concatenate([[*_shape(mask, spacing), *_intensities(image, mask)] for mask in masks])


def _shape(mask: np.ndarray, spacing: Sequence[float]) -> list[float]:
    """Values of :data:`SHAPES` of one mask ``[H, W, S]``."""
    if not mask.any():
        return [0.0, *[np.nan] * (len(SHAPES) - 1)]
    import itk  # imported here because it takes seconds

    picture = mask.shape[-1] == 1
    if picture:
        mask, spacing = mask[..., 0], [1 / side for side in mask.shape[:2]]
    binary = itk.image_from_array(np.ascontiguousarray(mask.T, np.uint8))
    binary.SetSpacing([float(length) for length in spacing])
    shapes = itk.LabelImageToShapeLabelMapFilter.New(binary)
    shapes.Update()
    found = shapes.GetOutput().GetNthLabelObject(0)
    extents = [count * length for count, length in zip(found.GetBoundingBox().GetSize(), spacing, strict=True)]
    ratios = [found.GetElongation(), 0 if picture else found.GetFlatness()]
    elongation, flatness = (np.log(ratio) if 0 < ratio < np.inf else np.nan for ratio in ratios)  # of a line: undefined
    extents = [*np.log(extents), *[np.nan] * picture]
    size, parts = np.log(found.GetPhysicalSize()), np.log(label(mask)[1])
    return [1.0, size, *extents, found.GetRoundness(), elongation, flatness, parts]


def _intensities(image: np.ndarray, mask: np.ndarray) -> list[float]:
    """Values of :data:`INTENSITIES` of each modality of one mask ``[H, W, S]``."""
    cross = generate_binary_structure(3, 1)
    if mask.shape[-1] == 1:
        cross = cross & (np.arange(3) == 1)
    rim = binary_dilation(mask, cross, iterations=RIM) & ~mask
    if not mask.any() or not rim.any():
        return [np.nan] * (len(image) * len(INTENSITIES))
    found: list[float] = []
    for channel in image:
        inside, outside = channel[mask], channel[rim]
        values = inside.mean(), inside.std(), inside.mean() - outside.mean()
        found += map(float, values) if channel.any() else [np.nan] * len(INTENSITIES)  # the modality is absent
    return found
