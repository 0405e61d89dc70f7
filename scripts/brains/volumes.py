"""Folders of random brains, like those of BraTS."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np

from scripts.brains.brain import Brain, Randomisation
from scripts.brains.scan import Scan
from scripts.brains.tissues import MODALITIES
from scripts.config import atomic_path

WHITE_MATTER = 600  # brightness in the files


def make_brains(output_dir: str | Path, num_subjects: int, size: int, seed: int, randomisation: Randomisation) -> None:
    """Write subject folders like those of BraTS 2020 and ``name_mapping.csv``. The same seed gives the same files.

    Args:
        output_dir: folder of the data set.
        num_subjects: number of subjects.
        size: voxels of each side of a slice; thickness and number of the slices are random.
        seed: seed of all random numbers.
        randomisation: how random the brains are.
    """
    output_dir, grades = Path(output_dir), []
    for number in range(1, num_subjects + 1):
        name = f"BraTS20_Training_{number:03d}"
        rng = np.random.default_rng((seed, number))
        brain = Brain(rng, randomisation)
        scan = Scan(rng, brain, randomisation)
        image, label = scan.slices(scan.heights(), size)
        pixel = scan.field_of_view / size
        affine = np.diag([pixel, pixel, scan.thickness, 1.0])
        affine[:3, 3] = (pixel - scan.field_of_view) / 2, (pixel - scan.field_of_view) / 2, scan.low
        volumes = dict(zip(MODALITIES, WHITE_MATTER * image, strict=True)) | {"seg": label}
        for suffix, volume in volumes.items():
            with atomic_path(output_dir / name / f"{name}_{suffix}.nii.gz") as path:
                nib.save(nib.Nifti1Image(volume.numpy().round().astype(np.int16), affine), path)
        grades.append((brain.grade, name))
    with atomic_path(output_dir / "name_mapping.csv") as path, path.open("w", newline="") as file:
        csv.writer(file).writerows([("Grade", "BraTS_2020_subject_ID"), *grades])
