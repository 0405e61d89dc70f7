"""Find the subjects of a data set in its folders and check the headers of their files."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import nibabel as nib
import numpy as np

from scripts.config import InputError, check_all, warn_some
from scripts.data.dicom import find_series, series_item
from scripts.data.grades import GRADE_LABELS, UNKNOWN_GRADE, read_grades
from scripts.data.pictures import Grid, check_channels, file_stem, find_images, is_picture, read_grid

logger = logging.getLogger(__name__)

MAX_DISTANCE = 0.1  # between the same corner in two files of a subject, in voxels


class EmptyFolder(InputError):
    """A folder among those of the subjects holds no volume."""


Item = dict  # {"subject": str, "image": [file per modality], "label": [masks] (if any), "grade": int}


def load_subjects(
    dataset_dir: str,
    modalities: Sequence[str],
    *,
    label_suffix: str = "seg",
    mask_names: Sequence[str] = (),
    image_dir: str | None = None,
    mask_dir: str | None = None,
    grade_csv: str | None = None,
    subject_column: str = "BraTS_2020_subject_ID",
    grade_column: str = "Grade",
    grade_labels: Mapping[str, int] = GRADE_LABELS,
) -> list[Item]:
    """Find every subject below ``dataset_dir``, check the headers of its files and attach its grade.

    Args:
        dataset_dir: folder with one folder per subject (as in BraTS 2020, 2021 and 2023).
        modalities: file suffixes, e.g. ``["t1", "t1ce", "t2", "flair"]``; their order is the channel order. With
            ``image_dir``: names of the channels of each image.
        label_suffix: suffix of the segmentation file.
        mask_names: ends of the names of several masks, which all must exist: ``<subject>_seg_<name>.nii.gz``, or
            ``<image>_<name>.png`` in ``mask_dir``. They are annotators, or regions whose masks count votes.
        image_dir: folder in ``dataset_dir`` whose files are the subjects; None means one folder per subject.
        mask_dir: folder in ``dataset_dir`` with the masks of these files.
        grade_csv: table of grades; None takes ``<dataset_dir>/name_mapping.csv`` if it exists, else no grades.
        subject_column: column of the subject's folder name.
        grade_column: column of the grade.
        grade_labels: class index of each grade.

    Returns:
        One item per subject, sorted by name; ``grade`` is -1 where it is unknown.

    Raises:
        InputError: naming the invalid folder, file, subject or column.
    """
    items = find_subjects(
        dataset_dir,
        modalities,
        label_suffix=label_suffix,
        mask_names=mask_names,
        image_dir=image_dir,
        mask_dir=mask_dir,
    )
    return attach_grades(items, dataset_dir, grade_csv, subject_column, grade_column, grade_labels)


def attach_grades(
    items: Sequence[Item],
    dataset_dir: str,
    grade_csv: str | None,
    subject_column: str,
    grade_column: str,
    grade_labels: Mapping[str, int],
) -> list[Item]:
    """Items with their ``grade`` from the table; see :func:`load_subjects`."""
    csv = Path(grade_csv) if grade_csv else Path(dataset_dir) / "name_mapping.csv"
    if grade_csv is None and not csv.is_file():
        logger.warning(f"no {csv.name} in {dataset_dir}: no subject has a grade")
        return [item | {"grade": UNKNOWN_GRADE} for item in items]
    grades = read_grades(csv, subject_column, grade_column, grade_labels)
    subjects = {item["subject"] for item in items}
    warn_some(f"subjects in {csv.name} but not in {dataset_dir}", sorted(grades.keys() - subjects))
    warn_some(f"subjects not in {csv.name}; kept for segmentation, without a grade", sorted(subjects - grades.keys()))
    return [item | {"grade": grades.get(item["subject"], UNKNOWN_GRADE)} for item in items]


def find_subjects(
    dataset_dir: str,
    modalities: Sequence[str],
    *,
    label_suffix: str = "seg",
    mask_names: Sequence[str] = (),
    image_dir: str | None = None,
    mask_dir: str | None = None,
) -> list[Item]:
    """Find every labelled subject below ``dataset_dir`` and check the headers of its files; see :func:`load_subjects`.

    ``dataset_dir`` may also be the folder of a single subject.
    """
    root = check_folder(dataset_dir)
    check_names(modalities)
    if isinstance(mask_names, str) or len(set(mask_names)) != len(mask_names):
        raise InputError(f"the masks {mask_names!r} must be a list of distinct names, such as ['1', '2']")
    if image_dir is None:
        suffixes = [f"{label_suffix}_{name}" for name in mask_names] or [label_suffix]
        return _find_folders(root, modalities, suffixes)
    if mask_dir is None:
        raise InputError(f"image_dir='{image_dir}' needs mask_dir, the folder of the masks below dataset_dir")
    items = find_images(dataset_dir, image_dir, mask_dir, mask_names)
    return check_all(items, lambda item: check_headers(item, modalities))


def check_folder(dataset_dir: str) -> Path:
    """The folder of the data set, if it is one; otherwise an InputError."""
    root = Path(dataset_dir)
    if not root.is_dir():
        raise InputError(f"dataset_dir '{dataset_dir}' is not a folder")
    return root


def check_names(modalities: Sequence[str]) -> None:
    """Raise InputError unless the modalities are distinct names."""
    if isinstance(modalities, str) or len(set(modalities)) != len(modalities) or not modalities:
        raise InputError(f"modalities={modalities!r} must be a list of distinct file suffixes, such as ['t1', 'flair']")


def subject_folders(root: Path, modalities: Sequence[str]) -> list[Path]:
    """The folders below ``root``, sorted; none if ``root`` is the folder of a subject."""
    if with_suffix(_volumes(root), modalities[0]):
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _find_folders(root: Path, modalities: Sequence[str], label_suffixes: Sequence[str]) -> list[Item]:
    """Items of the folders below ``root``, or of ``root`` itself."""
    folders = subject_folders(root, modalities)
    volumes = {folder: files for folder in folders if (files := _volumes(folder))}
    empty = [folder.name for folder in folders if folder not in volumes]
    if not volumes and (files := _volumes(root.resolve())):
        volumes = {root.resolve(): files}
    if not volumes:
        raise no_subject(root, f"folders with files such as <subject>/<subject>_{modalities[0]}.nii.gz")

    def item_of(folder: Path) -> Item:
        return check_headers(_subject_item(folder.name, volumes[folder], modalities, label_suffixes), modalities)

    items = check_all(volumes, item_of)
    warn_some(f"folders of {root} hold no volume and are left out", empty)
    return sorted(items, key=lambda item: item["subject"])


def no_subject(root: Path, expected: str) -> InputError:
    """The error that ``root`` holds no subject, with the names of some of its files."""
    files = [str(path.relative_to(root)) for path in islice(filter(Path.is_file, root.rglob("*")), 5)]
    return InputError(
        f"no subject found in '{root}', which holds {files or 'no file'}: expected {expected}; if all images are in "
        "one folder, set 'image_dir'"
    )


def folder_item(folder: Path, modalities: Sequence[str]) -> Item:
    """Item of a subject's folder, which holds NIfTI volumes or DICOM series; without a label.

    Raises:
        EmptyFolder: if it holds neither.
        InputError: naming what is wrong with its files.
    """
    if volumes := _volumes(folder):
        item = _subject_item(folder.name, volumes, modalities, [])
    elif series := find_series(folder):
        item = series_item(folder, series, modalities)
    else:
        raise EmptyFolder(f"folder '{folder}' holds neither a NIfTI volume nor a DICOM series")
    return check_headers(item, modalities)


def open_item(source: Path | Item, modalities: Sequence[str]) -> Item:
    """Item of a subject's folder (:func:`folder_item`), or of images that are known, with their headers checked."""
    return folder_item(source, modalities) if isinstance(source, Path) else check_headers(source, modalities)


def subject_of(file: str, modalities: Sequence[str]) -> Item:
    """Item of the subject that a file or folder belongs to.

    A picture, or a 4D file with all modalities, is a subject itself. A file of one modality belongs to the subject
    whose other files lie in the same folder and differ only in the suffix: ``7_t1.nii.gz``, ``7_flair.nii.gz``. A file
    that has only the suffix as its name, such as ``s0001/ct.nii.gz``, belongs to the subject of its folder. A folder
    is that of a subject (:func:`folder_item`).

    Raises:
        InputError: if the file cannot be read, or has neither all modalities nor the files of the others beside it.
    """
    path, stem = Path(file), file_stem(file)
    suffix = next((m for m in modalities if with_suffix([path], m)), None)
    if file and path.is_dir():  # Path("") is the current folder
        return folder_item(path, modalities)
    if not path.is_file():
        raise InputError(f"'{file}' is not a file")
    elif suffix is None:
        item = {"subject": stem, "image": [str(path)]}
        if not is_picture(file) and (channels := _read_header(stem, file).channels) != len(modalities):
            raise InputError(
                f"{path.name} holds {channels} of {len(modalities)} modalities: give one 4D file with "
                f"{list(modalities)} in this order, or one file per modality, such as {stem}_{modalities[0]}.nii.gz"
            )
    else:
        prefix = stem[: -len(suffix)]
        in_folder = {file_stem(volume).lower(): str(volume) for volume in _volumes(path.parent)}
        expected = [(prefix + modality).lower() for modality in modalities]
        if absent := [m for m, name in zip(modalities, expected, strict=True) if name not in in_folder]:
            raise InputError(f"{path.name} has no file for {absent} beside it; add {prefix}{absent[0]}.nii.gz")
        subject = prefix.rstrip("-_.") or path.absolute().parent.name
        item = {"subject": subject, "image": [in_folder[name] for name in expected]}
    return check_headers(item, modalities)


def holds_volumes(folder: Path) -> bool:
    """Whether a NIfTI volume lies in the folder."""
    return bool(_volumes(folder))


def _volumes(folder: Path) -> list[Path]:
    names = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in names if re.search(r"\.nii(\.gz)?$", path.name, re.IGNORECASE))


def _subject_item(subject: str, volumes: list[Path], modalities: Sequence[str], label_suffixes: Sequence[str]) -> Item:
    images = []
    for modality in modalities:
        found = with_suffix(volumes, modality)
        if len(found) != 1:
            names = [path.name for path in found or volumes]
            raise InputError(
                f"subject '{subject}': {'several files' if found else 'no file'} for modality '{modality}' among "
                f"{names} in {volumes[0].parent}; add it, remove the folder, or set 'modalities'"
            )
        images.append(str(found[0]))
    item = {"subject": subject, "image": images}
    labels = []
    for suffix in label_suffixes:
        # BraTS20_Training_355 calls its segmentation W39_1998.09.19_Segm.nii
        found = with_suffix(volumes, suffix) or with_suffix(volumes, f"{suffix}m")
        if len(found) != 1:
            raise InputError(
                f"subject '{subject}': {'several segmentations' if found else 'no segmentation'} "
                f"'*{suffix}.nii[.gz]' in {volumes[0].parent}; there must be exactly one"
            )
        labels.append(str(found[0]))
    return item | ({"label": labels} if labels else {})


def with_suffix(volumes: list[Path], suffix: str) -> list[Path]:
    """The NIfTI files whose name ends in the suffix of a modality or segmentation, in upper or lower case."""
    pattern = re.compile(rf"(^|[-_.]){re.escape(suffix)}\.nii(\.gz)?$", re.IGNORECASE)
    return [path for path in volumes if pattern.search(path.name)]


def item_files(item: Item) -> list[str]:
    """All files of an item: the images, then those of the segmentation, and of the lungs, if there are any."""
    return [*item["image"], *item.get("label", []), *item.get("lung", [])]


def check_headers(item: Item, modalities: Sequence[str]) -> Item:
    """Check that a subject has a channel for each modality and that its files share one grid. Only headers are read.

    Affines may differ by a tenth of a voxel at the corners of the grid, as rounding does.

    Returns:
        The item itself.

    Raises:
        InputError: naming the subject and the file that cannot be read, or whose channels, shape or affine differ.
    """
    files = item_files(item)
    reference, first = files[0], _read_header(item["subject"], files[0])
    for file in files:
        grid = _read_header(item["subject"], file)
        kind = "modality" if file in item["image"] else "mask"
        channels = len(modalities) if item["image"] == [file] else 1
        if not is_picture(file) and grid.channels != channels:
            raise InputError(
                f"subject '{item['subject']}': {file} holds {grid.channels} volumes, expected {channels}; correct the "
                "file, or set 'modalities'"
            )
        if grid.shape != first.shape:
            raise InputError(
                f"subject '{item['subject']}': the {kind} {file} has shape {grid.shape}, but {reference} has "
                f"{first.shape}; resample them to one grid"
            )
        distance = _largest_distance(grid, first)
        if not distance <= MAX_DISTANCE * min(nib.affines.voxel_sizes(first.affine)):
            raise InputError(
                f"subject '{item['subject']}': the {kind} {file} and {reference} have different affines: a corner is "
                f"{distance:.2f} mm off; register or resample them to one grid"
            )
    if len(item["image"]) == 1:
        check_channels(item, modalities)
    return item


def _largest_distance(grid: Grid, other: Grid) -> float:
    """Largest distance (mm) between the same corners of two grids of one shape."""
    corners = np.array(list(itertools.product(*[(0, side - 1) for side in grid.shape])))
    shift = nib.affines.apply_affine(grid.affine, corners) - nib.affines.apply_affine(other.affine, corners)
    return float(np.linalg.norm(shift, axis=1).max())


def _read_header(subject: str, file: str) -> Grid:
    try:
        return read_grid(file)
    except InputError as error:
        raise InputError(f"subject '{subject}': {error}") from error
