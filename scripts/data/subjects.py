"""Find subjects in folders and check their files by the headers; a data set's items."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from scripts.config import InputError, warn_some
from scripts.data.dicom import Series, find_series, series_item, share_study
from scripts.data.grades import GRADE_LABELS, UNKNOWN_GRADE, read_grades
from scripts.data.pictures import Grid, check_channels, file_stem, find_images, is_picture, read_grid

logger = logging.getLogger(__name__)

Item = dict  # {"subject": str, "image": [file per modality], "label": file (when there is one), "grade": int}


def load_subjects(
    dataset_dir: str,
    modalities: Sequence[str],
    *,
    label_suffix: str = "seg",
    image_dir: str | None = None,
    mask_dir: str | None = None,
    grade_csv: str | None = None,
    subject_column: str = "BraTS_2020_subject_ID",
    grade_column: str = "Grade",
    grade_labels: Mapping[str, int] = GRADE_LABELS,
) -> list[Item]:
    """Find every subject below ``dataset_dir``, check its headers and attach its grade.

    Args:
        dataset_dir: folder with one folder per subject (BraTS 2020, 2021, 2023 and the like).
        modalities: file suffixes, e.g. ``["t1", "t1ce", "t2", "flair"]``; their order is the channel order. Of
            ``image_dir``, the names of its channels.
        label_suffix: suffix of the segmentation file.
        image_dir: folder of images below ``dataset_dir``, each of which is a subject; None: one folder per subject.
        mask_dir: folder of their masks.
        grade_csv: table of grades; None takes ``<dataset_dir>/name_mapping.csv`` if it exists, else no grades.
        subject_column: column of the subject's folder name.
        grade_column: column of the grade.
        grade_labels: class index of each grade.

    Returns:
        One item per subject, sorted by name; ``grade`` is -1 where it is unknown.

    Raises:
        InputError: naming the folder, file, subject or column that is wrong.
    """
    items = find_subjects(dataset_dir, modalities, label_suffix=label_suffix, image_dir=image_dir, mask_dir=mask_dir)
    return attach_grades(items, dataset_dir, grade_csv, subject_column, grade_column, grade_labels)


def attach_grades(
    items: Sequence[Item],
    dataset_dir: str,
    grade_csv: str | None,
    subject_column: str,
    grade_column: str,
    grade_labels: Mapping[str, int],
) -> list[Item]:
    """Items with the ``grade`` that the table gives them; see :func:`load_subjects`."""
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
    image_dir: str | None = None,
    mask_dir: str | None = None,
    require_label: bool = True,
) -> list[Item]:
    """List the subject folders of ``dataset_dir``, or itself if it is one, or its images, with their headers checked.

    The DICOM series of a folder without NIfTI volumes are its modalities, where no label is asked for.

    Subjects without a segmentation are refused where ``require_label``, which training and evaluation need. See
    :func:`load_subjects`.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        raise InputError(f"dataset_dir '{dataset_dir}' is not a folder")
    if isinstance(modalities, str) or len(set(modalities)) != len(modalities) or not modalities:
        raise InputError(f"modalities={modalities!r} must be a list of distinct file suffixes, such as ['t1', 'flair']")
    if image_dir is None:
        return _find_folders(root, modalities, label_suffix, require_label)
    if require_label and mask_dir is None:
        raise InputError(f"image_dir='{image_dir}' needs mask_dir, the folder of the masks below dataset_dir")
    items = find_images(dataset_dir, image_dir, mask_dir if require_label else None)
    for item in items:
        check_headers(item, modalities)
    return items


def _find_folders(root: Path, modalities: Sequence[str], label_suffix: str, require_label: bool) -> list[Item]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    volumes, series = _contents(folders, require_label)
    empty = [folder.name for folder in folders if folder not in volumes and folder not in series]
    if not volumes and share_study(series.values()):
        series, empty = {root.resolve(): find_series(root.resolve())}, []
    elif not volumes and not series:
        volumes, series = _contents([root.resolve()], require_label)
    items = [
        _subject_item(folder.name, files, modalities, label_suffix, require_label) for folder, files in volumes.items()
    ]
    items += [series_item(folder, found, modalities) for folder, found in series.items()]
    for item in items:
        check_headers(item, modalities)
    if not items:
        there = [str(path.relative_to(root)) for path in islice(filter(Path.is_file, root.rglob("*")), 5)]
        raise InputError(
            f"no subject found in '{root}', but {there or 'no file at all'}: expected folders with files such as "
            f"<subject>/<subject>_{modalities[0]}.nii.gz{'' if require_label else ' or DICOM series'} (images in one "
            "folder: set 'image_dir')"
        )
    warn_some(f"folders of {root} hold no volume and are left out", empty)
    return sorted(items, key=lambda item: item["subject"])


def _contents(folders: Sequence[Path], require_label: bool) -> tuple[dict[Path, list[Path]], dict[Path, list[Series]]]:
    """NIfTI volumes by folder; of the folders without, DICOM series, which have no label."""
    volumes = {folder: files for folder in folders if (files := _volumes(folder))}
    others = [] if require_label else [folder for folder in folders if folder not in volumes]
    return volumes, {folder: found for folder in others if (found := find_series(folder))}


def subject_of(file: str, modalities: Sequence[str]) -> Item:
    """The subject that one file stands for: itself, when it holds all modalities, or with the others beside it.

    The files of a subject are named alike but for the modality: ``7_t1.nii.gz``, ``7_flair.nii.gz``. A folder
    stands for the DICOM series in it.

    Raises:
        InputError: naming the file that cannot be read, or whose modality or siblings cannot be told.
    """
    path, stem = Path(file), file_stem(file)
    own = next((m for m in modalities if with_suffix([path], m)), None)
    if file and path.is_dir():  # no name at all would be the current folder
        item = series_item(path, find_series(path), modalities)
    elif not path.is_file():
        raise InputError(f"'{file}' is not a file")
    elif own is None:
        item = {"subject": stem, "image": [str(path)]}
        if not is_picture(file) and (volumes := _read_header(stem, file).channels) != len(modalities):
            raise InputError(
                f"{path.name} holds {volumes} of {len(modalities)} modalities: give one 4D file of {list(modalities)}, "
                f"in this order, or one of several that are named alike but for them, such as "
                f"{stem}_{modalities[0]}.nii.gz"
            )
    else:
        common = stem[: -len(own)]
        beside = {file_stem(volume).lower(): str(volume) for volume in _volumes(path.parent)}
        wanted = [(common + modality).lower() for modality in modalities]
        if absent := [m for m, name in zip(modalities, wanted, strict=True) if name not in beside]:
            raise InputError(
                f"{path.name} has no file for {absent} beside it, named alike; add {common}{absent[0]}.nii.gz"
            )
        item = {"subject": common.rstrip("-_."), "image": [beside[name] for name in wanted]}
    check_headers(item, modalities)
    return item


def _volumes(folder: Path) -> list[Path]:
    names = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in names if re.search(r"\.nii(\.gz)?$", path.name, re.IGNORECASE))


def _subject_item(
    subject: str, volumes: list[Path], modalities: Sequence[str], label_suffix: str, require_label: bool
) -> Item:
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
    if not require_label:
        return item
    # BraTS20_Training_355 calls its segmentation W39_1998.09.19_Segm.nii
    labels = with_suffix(volumes, label_suffix) or with_suffix(volumes, f"{label_suffix}m")
    if len(labels) != 1:
        raise InputError(
            f"subject '{subject}': {'several segmentations' if labels else 'no segmentation'} "
            f"'*{label_suffix}.nii[.gz]' in {volumes[0].parent}"
        )
    return item | {"label": str(labels[0])}


def with_suffix(volumes: list[Path], suffix: str) -> list[Path]:
    pattern = re.compile(rf"(^|[-_.]){re.escape(suffix)}\.nii(\.gz)?$", re.IGNORECASE)
    return [path for path in volumes if pattern.search(path.name)]


def item_files(item: Item) -> list[str]:
    """All files of an item: one per modality, then the segmentation where there is one."""
    return [*item["image"], *([item["label"]] if "label" in item else [])]


def check_headers(item: Item, modalities: Sequence[str]) -> None:
    """Check that a subject has a channel for each modality, and that its files share one grid; only headers are read.

    Raises:
        InputError: naming the subject and the file that cannot be read, or whose channels, shape or affine differ.
    """
    files = item_files(item)
    reference, first = files[0], _read_header(item["subject"], files[0])
    for file in files:
        grid = _read_header(item["subject"], file)
        kind = "mask" if file == item.get("label") else "modality"
        volumes = len(modalities) if item["image"] == [file] else 1
        if not is_picture(file) and grid.channels != volumes:
            raise InputError(f"subject '{item['subject']}': {file} holds {grid.channels} volumes, expected {volumes}")
        if grid.shape != first.shape:
            raise InputError(
                f"subject '{item['subject']}': the {kind} {file} has shape {grid.shape}, but {reference} has "
                f"{first.shape}; resample them to one grid"
            )
        if not np.allclose(grid.affine, first.affine, atol=1e-2):
            raise InputError(
                f"subject '{item['subject']}': the {kind} {file} and {reference} have different affines; "
                "register or resample them to one grid"
            )
    if len(item["image"]) == 1:
        check_channels(item, modalities)


def _read_header(subject: str, file: str) -> Grid:
    try:
        return read_grid(file)
    except InputError as error:
        raise InputError(f"subject '{subject}': {error}") from error


def check_output_dir(output_dir: str, items: Sequence[Item], mask_dir: Path | None = None) -> None:
    """Raise InputError when a folder of subjects or masks would be written to, where a mask could replace the truth."""
    folder = Path(output_dir).resolve()
    for item in items:
        if Path(item["image"][0]).resolve().parent == folder:
            raise InputError(f"output_dir '{output_dir}' holds the volumes of '{item['subject']}'; choose another")
    if mask_dir and mask_dir.resolve() == folder:
        raise InputError(f"output_dir '{output_dir}' holds the masks; choose another")
