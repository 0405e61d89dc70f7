"""One label map per subject instead of 117 masks: ``python -m scripts.organs.merge_structures --dataset_dir data``.

Reads folders as TotalSegmentator publishes them: ``s0001/ct.nii.gz``, ``s0001/segmentations/<structure>.nii.gz`` and
``meta.csv``, whose columns are separated by ``;``. Writes ``s0001/labels.nii.gz`` and ``datalist.json``, the split of
the column ``split``. Subjects that have a label map are left as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm import tqdm

from scripts.config import InputError, atomic_path, check_all, refuse_all, warn_some
from scripts.data.datalist import check_separate, write_datalist
from scripts.data.subjects import find_subjects
from scripts.organs.structures import LABEL_SUFFIX, catalogue, chosen

SPLITS = {"train": "training", "val": "validation", "test": "test"}  # of meta.csv, and of a data list
SUBJECT_IS_PATIENT = "(.+)"


def main() -> None:
    """Merge, and print how many voxels had several structures."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--dataset_dir", required=True, type=Path)
    dataset_dir = parser.parse_args().dataset_dir
    try:
        overlaps = merge(dataset_dir)
    except InputError as error:
        parser.exit(1, f"error: {error}\n")
    for subject, count in overlaps.items():
        print(f"{subject}: {count} voxels were in several masks; the structure with the higher number has them")
    print(dataset_dir / "datalist.json")


def merge(dataset_dir: Path) -> dict[str, int]:
    """Write the label maps and the data list; the number of voxels in several masks, by subject, where there are any.

    Raises:
        InputError: naming the folder, table, subject or mask that cannot be used.
    """
    splits = read_splits(dataset_dir / "meta.csv")
    folders = {path.parent.name: path.parent for path in sorted(dataset_dir.glob("*/ct.nii.gz"))}
    if absent := sorted(folders.keys() - splits.keys()):
        raise InputError(f"{len(absent)} subjects are not in {dataset_dir / 'meta.csv'}, such as {absent[:3]}")
    warn_some(f"subjects of meta.csv are not in {dataset_dir}", sorted(splits.keys() - folders.keys()))
    if not folders:
        raise InputError(f"no subject found in '{dataset_dir}': expected folders such as s0001 with a ct.nii.gz")
    missing = [folder for folder in folders.values() if not (folder / f"{LABEL_SUFFIX}.nii.gz").is_file()]
    counts = check_all(tqdm(missing, "Merging masks", disable=None), merge_subject)
    items = find_subjects(str(dataset_dir), ["ct"], label_suffix=LABEL_SUFFIX)
    lists = {name: [item for item in items if splits[item["subject"]] == split] for split, name in SPLITS.items()}
    check_separate(lists, SUBJECT_IS_PATIENT, str(dataset_dir / "meta.csv"))
    write_datalist(lists, str(dataset_dir / "datalist.json"), str(dataset_dir))
    return {folder.name: count for folder, count in zip(missing, counts, strict=True) if count}


def read_splits(file: Path) -> Mapping[str, str]:
    """``train``, ``val`` or ``test`` of each subject (``image_id``) of a ``meta.csv``."""
    try:
        table = pd.read_csv(file, sep=";", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if absent := [column for column in ("image_id", "split") if column not in table]:
        raise InputError(f"{file} has no column {absent}, only {list(table)}; columns are separated by ';'")
    unknown = table[~table["split"].isin(SPLITS)]
    refuse_all(
        [
            f"{file}: the split '{row.split}' of '{row.image_id}' is not one of {list(SPLITS)}"
            for row in unknown.itertuples()
        ]
    )
    if repeated := sorted(table["image_id"][table["image_id"].duplicated()]):
        raise InputError(f"{file} has several rows for {repeated[:3]}; a subject belongs to one split")
    return dict(zip(table["image_id"], table["split"], strict=True))


def merge_subject(folder: Path) -> int:
    """Write ``labels.nii.gz`` of one subject; the number of voxels that are in several masks."""
    image = _load(folder.name, folder / "ct.nii.gz")
    files = {path.name.removesuffix(".nii.gz"): path for path in sorted((folder / "segmentations").glob("*.nii.gz"))}
    if not files:
        raise InputError(f"subject '{folder.name}': no mask in {folder / 'segmentations'}")
    try:
        names = chosen(list(files))
    except InputError as error:
        raise InputError(f"subject '{folder.name}': {error}") from error
    labels, overlap = np.zeros(image.shape, np.uint8), 0
    for name in names:
        mask = _read_mask(folder.name, files[name], image)
        overlap += int(np.count_nonzero(labels[mask]))
        labels[mask] = catalogue()[name]["number"]
    with atomic_path(folder / f"{LABEL_SUFFIX}.nii.gz") as path:
        nib.save(nib.Nifti1Image(labels, image.affine, dtype=np.uint8), path)
    return overlap


def _load(subject: str, file: Path) -> nib.Nifti1Image:
    try:
        return nib.Nifti1Image.from_filename(file)
    except Exception as error:
        raise InputError(f"subject '{subject}': cannot read {file}: {error}") from error


def _read_mask(subject: str, file: Path, image: nib.Nifti1Image) -> np.ndarray:
    """A mask as bool, on the grid of the image."""
    volume = _load(subject, file)
    if volume.shape != image.shape or not np.allclose(volume.affine, image.affine, atol=1e-2):
        raise InputError(f"subject '{subject}': {file} and ct.nii.gz are not on the same grid; resample the mask")
    try:
        values = np.asanyarray(volume.dataobj)
    except (OSError, EOFError, ValueError) as error:  # a truncated file
        raise InputError(f"subject '{subject}': cannot read {file}: {error}") from error
    mask = values == 1
    if np.count_nonzero(values) != np.count_nonzero(mask):
        raise InputError(f"subject '{subject}': {file} has values other than 0 and 1")
    return mask


if __name__ == "__main__":
    main()
