"""DICOM series as volumes: found in a subject's folder, checked by their headers, read by MONAI's ITK reader.

A series goes by the name of one of its files, as any other volume does; the rest are those of the same
SeriesInstanceUID in the same folder.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import itk
import numpy as np
from monai.data import ITKReader
from monai.data.utils import orientation_ras_lps
from monai.utils import ensure_tuple

from scripts.config import InputError, warn_some

SERIES_UID, STUDY_UID, DESCRIPTION = "0020|000e", "0020|000d", "0008|103e"
# (0002,0002), the class of a CT, MR or PET image: of a damaged one ITK says no more than of a file that holds no image
IMAGE_CLASS = re.compile(rb"\x02\x00\x02\x00UI..1\.2\.840\.10008\.5\.1\.4\.1\.1\.(2|4|128)\x00", re.DOTALL)
SAME_ORIENTATION = 1e-3  # of direction cosines
SAME_POSITION = 0.01  # mm
UNEVEN = 0.05  # of the distance between slices; scanners round positions


class Slice(NamedTuple):
    """Header of one image, in DICOM's axes (to the left, back and head): column n of ``direction`` is axis n."""

    file: str
    series: str
    study: str
    description: str
    size: tuple[int, ...]
    spacing: np.ndarray
    direction: np.ndarray
    origin: np.ndarray


Series = list[Slice]


def is_dicom(file: str | Path) -> bool:
    """Whether the file begins as DICOM does, whatever its name."""
    try:
        with Path(file).open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(folder: Path) -> list[Series]:
    """All series below a folder, each as its images in one folder, in no order of space."""
    series: dict[tuple[Path, str], Series] = {}
    for file in _files(folder):
        if image := _read_slice(file):
            series.setdefault((file.parent, image.series), []).append(image)
    return list(series.values())


def _files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _read_slice(file: Path) -> Slice | None:
    return _read_header(str(file), file.stat().st_mtime_ns) if is_dicom(file) else None


@functools.lru_cache(maxsize=8192)
def _read_header(file: str, changed: int) -> Slice | None:
    """Header of a DICOM image, None where the file is something else, as a directory or a report."""
    reader = itk.GDCMImageIO.New(FileName=file)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        with Path(file).open("rb") as stream:
            if IMAGE_CLASS.search(stream.read(1024)):
                raise InputError(f"cannot read the DICOM image {file}: damaged, or of an unknown coding") from error
        return None
    tags = reader.GetMetaDataDictionary()
    series, study, description = (
        tags[key].strip() if tags.HasKey(key) else "" for key in (SERIES_UID, STUDY_UID, DESCRIPTION)
    )
    axes = range(3)
    spacing, origin = (np.array([get(axis) for axis in axes]) for get in (reader.GetSpacing, reader.GetOrigin))
    direction = np.transpose([reader.GetDirection(axis) for axis in axes])
    size = tuple(reader.GetDimensions(axis) for axis in axes)
    return Slice(file, series, study, description, size, spacing, direction, origin)


def share_study(folders: Collection[Sequence[Series]]) -> bool:
    """Whether any two folders hold series of one study, so that they are parts of one subject."""
    studies = [study for found in folders for study in {image.study for series in found for image in series}]
    return len(studies) > len(set(studies))


def series_item(folder: Path, series: Sequence[Series], modalities: Sequence[str]) -> dict[str, Any]:
    """Item of a subject's folder: for each modality the name of one file of its series.

    A series is of the modality that the name of its sub-folder ends in, or else its description; the only series there
    is, of the only modality.

    Raises:
        InputError: naming the modality that has no series, or several.
    """
    images = []
    for modality in modalities:
        found = _of_modality(folder, series, modality) or (series if len(series) == len(modalities) == 1 else [])
        if len(found) != 1:
            raise InputError(
                f"subject '{folder.name}': {'several' if found else 'no'} DICOM series for modality '{modality}' among "
                f"{[describe(s) for s in found or series]} in {folder}; let the name of the folder of one of them end "
                f"in _{modality}, or set 'modalities'"
            )
        images.append(found[0][0].file)
    known = {Path(image.file) for one in series for image in one}
    others = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    warn_some(f"files of {folder} are no DICOM images and are left out", [f for f in others if folder / f not in known])
    return {"subject": folder.name, "image": images}


def _of_modality(folder: Path, series: Sequence[Series], modality: str) -> list[Series]:
    ending = re.compile(rf"(^|[-_. ]){re.escape(modality)}$", re.IGNORECASE)

    def placed(one: Series) -> bool:
        return any(ending.search(part) for part in Path(one[0].file).relative_to(folder).parent.parts)

    named = [one for one in series if placed(one)]
    return named or [one for one in series if ending.search(one[0].description)]


def describe(series: Series) -> str:
    """A series for people: its folder, description and size."""
    return f"{Path(series[0].file).parent.name}: '{series[0].description}' ({len(series)} images)"


def ordered_series(file: str) -> Series:
    """All images of the series of ``file``, along their normal.

    Raises:
        InputError: naming the series and the position, where they are not the evenly spaced slices of one volume.
    """
    images = [image for path in _files(Path(file).parent) if (image := _read_slice(path))]
    named = [image for image in images if image.file == str(Path(file))]
    if not named:
        raise InputError(f"cannot read the DICOM image {file}")
    series = [image for image in images if image.series == named[0].series]
    return _in_order([image for image in series if Path(image.file).parent == Path(file).parent])


def _in_order(series: Series) -> Series:
    where, first = f"DICOM series {describe(series)} in {Path(series[0].file).parent}", series[0]
    for image in series:
        if image.size[2] > 1:
            raise InputError(f"{where}: {image.file} holds {image.size[2]} frames; export it as one file a slice")
        if image.size != first.size or not np.allclose(image.spacing[:2], first.spacing[:2], atol=SAME_ORIENTATION):
            raise InputError(
                f"{where}: {image.file} and {first.file} have different sizes; remove what does not belong"
            )
        if not np.allclose(image.direction, first.direction, atol=SAME_ORIENTATION):
            raise InputError(f"{where}: {image.file} and {first.file} have different orientations; remove one kind")
    normal = first.direction[:, 2]
    series = sorted(series, key=lambda image: float(image.origin @ normal))
    _check_positions(where, series, normal)
    return series


def _check_positions(where: str, series: Series, normal: np.ndarray) -> None:
    """Raise InputError unless slices follow one another at even distances along the normal, and straight."""
    origins = np.array([image.origin for image in series])
    positions = origins @ normal
    steps = np.diff(positions)
    usual = float(np.median(steps)) if len(steps) else 0.0
    for image, position, step in zip(series[1:], positions, steps, strict=False):
        if step < SAME_POSITION:
            raise InputError(f"{where}: several images at {position:.2f} mm, {image.file} and others; keep one of each")
    for position, step in zip(positions, steps, strict=False):
        if abs(step - usual) > UNEVEN * usual:
            raise InputError(
                f"{where}: slices lie {usual:.2f} mm apart, but after {position:.2f} mm the next is at "
                f"{position + step:.2f} mm; a file is missing, or too many are there"
            )
    aside = origins - origins[0] - np.outer(positions - positions[0], normal)
    if np.abs(aside).max() > series[0].spacing[:2].min() / 2:
        raise InputError(f"{where}: slices lie up to {np.abs(aside).max():.2f} mm aside (tilted); resample the series")


def series_grid(file: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape ``(H, W, S)`` of a series and its affine in the axes of NIfTI (right, front, head), by headers alone."""
    series = ordered_series(file)
    first, last = series[0], series[-1]
    spacing = first.spacing.copy()
    if len(series) > 1:
        spacing[2] = np.linalg.norm(last.origin - first.origin) / (len(series) - 1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = first.direction * spacing, first.origin
    return (*first.size[:2], len(series)), orientation_ras_lps(affine)


def read_series(file: str) -> Any:
    """The series of ``file`` as an ITK image of float32; each slice may have a scale of its own."""
    return itk.imread([image.file for image in ordered_series(file)], itk.F)


class SeriesReader(ITKReader):
    """MONAI's ITK reader for series by one of their files; its own reads folders, and there the first series alone."""

    def verify_suffix(self, filename: Any) -> bool:
        return all(is_dicom(name) for name in ensure_tuple(filename))

    def read(self, data: Any, **kwargs: Any) -> Any:
        images = [read_series(name) for name in ensure_tuple(data)]
        for image in images[1:]:
            image.CopyInformation(images[0])  # headers were compared; MONAI refuses rounding of the last digit
        return images if len(images) > 1 else images[0]
