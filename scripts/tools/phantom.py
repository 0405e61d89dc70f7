"""Synthetic brains with graded tumours in BraTS folders, for trials and tests without patient data.

The method follows SynthSeg (Billot et al. 2023). The anatomy is a label map of tissues, warped at random. A table gives
the mean intensity of each tissue in each modality. Jitter, blur, a bias field and Rician noise are added.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

from scripts.brains.brain import Randomisation
from scripts.brains.volumes import make_brains
from scripts.config import atomic_path

# mean intensity of: background, CSF, grey matter, white matter, ventricle, oedema, core, enhancing rim
MEANS = {
    "t1": (0, 150, 420, 600, 130, 430, 330, 400),
    "t1ce": (0, 160, 440, 620, 140, 450, 340, 850),
    "t2": (0, 850, 520, 380, 900, 680, 780, 560),
    "flair": (0, 140, 520, 420, 130, 740, 560, 640),
}
OEDEMA, CORE, RIM = 5, 6, 7
SEGMENTATION = {OEDEMA: 2, CORE: 1, RIM: 4}  # BraTS: 1 necrotic core, 2 oedema, 4 enhancing tumour
HALO, SATELLITE = 8, 9  # with several annotators: what some count as oedema
WHITE_MATTER = 3
SHIFT = 0.3  # standard deviation of an annotator's outline (voxels)


def make_dataset(
    output_dir: str | Path,
    num_subjects: int = 80,
    shape: tuple[int, int, int] = (48, 48, 20),
    lgg_fraction: float = 0.4,
    seed: int = 0,
    annotators: int = 0,
) -> None:
    """Write subject folders like those of BraTS 2020 and ``name_mapping.csv``. The same seed gives the same files.

    With annotators, each lesion has a halo and a satellite, and there is a segmentation ``<subject>_seg_<number>`` of
    each annotator (:func:`make_annotations`) instead of the one.

    Args:
        output_dir: folder of the data set.
        num_subjects: number of subjects.
        shape: number of voxels ``(H, W, S)``; the field of view is always 240 x 240 x 155 mm.
        lgg_fraction: share of low-grade subjects.
        seed: seed of all random numbers.
        annotators: segmentations of each subject; 0 writes one that is certain.
    """
    output_dir = Path(output_dir)
    rng = np.random.default_rng(seed)
    grades = np.array(["HGG"] * num_subjects)
    grades[: round(lgg_fraction * num_subjects)] = "LGG"
    rng.shuffle(grades)
    names = [f"BraTS20_Training_{i + 1:03d}" for i in range(num_subjects)]
    spacing = np.array([240, 240, 155]) / shape
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])  # the axes of BraTS volumes are L, P, S
    for name, grade, subject_seed in zip(names, grades, rng.integers(2**31, size=num_subjects), strict=True):
        if annotators:
            images, segmentations = make_annotations(str(grade), shape, int(subject_seed), annotators)
            volumes = images | {f"seg_{i}": volume for i, volume in enumerate(segmentations, start=1)}
        else:
            images, segmentation = make_subject(str(grade), shape, int(subject_seed))
            volumes = images | {"seg": segmentation}
        for suffix, volume in volumes.items():
            with atomic_path(output_dir / name / f"{name}_{suffix}.nii.gz") as path:
                nib.save(nib.Nifti1Image(volume, affine), path)
    with atomic_path(output_dir / "name_mapping.csv") as path, path.open("w", newline="") as file:
        csv.writer(file).writerows([("Grade", "BraTS_2020_subject_ID"), *zip(grades, names, strict=True)])


def make_subject(grade: str, shape: tuple[int, int, int], seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One subject: ``{modality: int16 [H, W, S]}`` and the segmentation ``uint8 [H, W, S]``."""
    rng = np.random.default_rng(seed)
    tissue = _warp(_anatomy(grade, shape, rng), rng)
    images = {modality: _image(tissue, np.array(means, float), rng) for modality, means in MEANS.items()}
    segmentation = np.zeros(shape, np.uint8)
    for value, label in SEGMENTATION.items():
        segmentation[tissue == value] = label
    return images, segmentation


def make_annotations(
    grade: str, shape: tuple[int, int, int], seed: int, annotators: int
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """One subject, and the segmentation ``uint8 [H, W, S]`` of each annotator.

    The lesion has a halo, and a satellite elsewhere in the white matter. Each is counted as oedema with a probability
    of its own, which is uniform and shows in its brightness. The outline of an annotator is shifted by a normal
    distance. All annotators are drawn independently, so more of them are more draws of the same distribution.
    """
    rng = np.random.default_rng(seed)
    tissue = _warp(_anatomy(grade, shape, rng), rng)
    lesion = tissue >= OEDEMA
    depth = gaussian_filter(distance_transform_edt(lesion) - distance_transform_edt(~lesion), 0.7)
    white = tissue == WHITE_MATTER
    probability = {HALO: rng.uniform(), SATELLITE: rng.uniform()}
    centre = rng.choice(np.argwhere(white & (depth <= np.quantile(depth[white], 0.2))))  # far from the lesion
    distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - centre, axis=-1)
    tissue[white & (depth > -2.5)] = HALO
    tissue[white & (distance < rng.uniform(2.5, 3.5))] = SATELLITE
    images = {}
    for modality, means in MEANS.items():
        faint = [
            means[WHITE_MATTER] + (0.2 + 0.8 * p) * (means[OEDEMA] - means[WHITE_MATTER]) for p in probability.values()
        ]
        images[modality] = _image(tissue, np.array([*means, *faint], float), rng)
    segmentations = []
    for _ in range(annotators):
        counted = [value for value, p in probability.items() if rng.uniform() < p]
        segmentation = np.where(np.isin(tissue, counted), SEGMENTATION[OEDEMA], 0).astype(np.uint8)
        segmentation[(depth > rng.normal(0, SHIFT)) & (tissue > 1)] = SEGMENTATION[OEDEMA]
        for value in (CORE, RIM):
            segmentation[(tissue == value) & (segmentation > 0)] = SEGMENTATION[value]
        segmentations.append(segmentation)
    return images, segmentations


def _anatomy(grade: str, shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Label map of nested ellipsoids with a lesion in the white matter."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"), axis=-1)

    def distance(centre, radii) -> np.ndarray:
        return np.linalg.norm((grid - centre) / radii, axis=-1)

    head = distance(0.0, np.array([0.68, 0.85, 0.85]) * rng.uniform(0.92, 1.05, 3))
    tissue = np.select([head < 0.78, head < 0.92, head < 1.0], [3, 2, 1], default=0)
    for side in (-1, 1):
        ventricle = distance([0.13 * side, 0.05, 0.1], np.array([0.07, 0.3, 0.2]) * rng.uniform(0.7, 1.3))
        tissue[(ventricle < 1) & (tissue == 3)] = 4
    direction = rng.normal(size=3)
    centre = direction / np.linalg.norm(direction) * rng.uniform(0.2, 0.45) * np.array([0.68, 0.85, 0.7])
    radius = rng.uniform(0.22, 0.38)
    lesion = distance(centre, radius * rng.uniform(0.8, 1.25, 3)) + _smooth_noise(shape, 0.08, 0.15, rng)
    core, rim = _lesion_shape(grade, rng)
    inside = tissue > 1
    tissue[inside & (lesion < 1)] = OEDEMA
    tissue[inside & (lesion < core)] = CORE
    tissue[inside & (lesion < core) & (lesion > core - rim)] = RIM
    return tissue


def _lesion_shape(grade: str, rng: np.random.Generator) -> tuple[float, float]:
    """Radius of the core and thickness of its enhancing rim, relative to the lesion's radius. The grades overlap."""
    if grade == "HGG":
        return rng.normal(0.66, 0.08), max(rng.normal(0.24, 0.09), 0.0)
    return rng.normal(0.52, 0.1), max(rng.normal(0.04, 0.08), 0.0)


def _warp(tissue: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smooth elastic deformation of a label map, by nearest-neighbour interpolation."""
    shifts = [_smooth_noise(tissue.shape, 0.12, 0.02 * size, rng) for size in tissue.shape]
    grid = np.meshgrid(*(np.arange(size) for size in tissue.shape), indexing="ij")
    return map_coordinates(tissue, [axis + shift for axis, shift in zip(grid, shifts, strict=True)], order=0)


def _image(tissue: np.ndarray, means: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One modality: tissue means with jitter, texture, blur, bias field and Rician noise. It is 0 outside the head."""
    volume = (means * rng.normal(1, 0.06, len(means)))[tissue]
    volume = gaussian_filter(volume + rng.normal(0, 40, tissue.shape), 0.6)
    volume *= np.exp(_smooth_noise(tissue.shape, 0.25, 0.12, rng)) * rng.uniform(0.7, 1.4)
    noise = rng.normal(0, 25, (2, *tissue.shape))
    volume = np.hypot(volume + noise[0], noise[1])
    return np.where(tissue > 0, np.maximum(volume, 1), 0).round().astype(np.int16)


def _smooth_noise(shape: tuple[int, ...], smoothness: float, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian random field with standard deviation ``scale``; ``smoothness`` is relative to the size of the volume."""
    field = gaussian_filter(rng.normal(size=shape), [smoothness * size for size in shape], mode="wrap")
    return scale * field / field.std()


def main() -> None:
    """Command line: ``python -m scripts.tools.phantom --output_dir demo/data``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_subjects", type=int, default=80)
    parser.add_argument("--shape", type=int, nargs=3, default=(48, 48, 20))
    parser.add_argument("--lgg_fraction", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--annotators", type=int, default=0, help="segmentations of each subject that differ")
    parser.add_argument("--randomise", type=float, default=0.0, help="0 to 1; above 0: random brains (docs/data.md)")
    parser.add_argument("--size", type=int, default=128, help="voxels of each side of the slices of random brains")
    args = vars(parser.parse_args())
    strength, size = args.pop("randomise"), args.pop("size")
    if not 0 <= strength <= 1:
        parser.error(f"--randomise {strength:g} must lie between 0 and 1")
    if strength:
        if other := [
            name for name in ("shape", "lgg_fraction", "annotators") if args[name] != parser.get_default(name)
        ]:
            parser.error(f"--randomise does not go with {other}")
        randomisation = Randomisation.of_strength(strength)
        make_brains(args["output_dir"], args["num_subjects"], size, args["seed"], randomisation)
    else:
        make_dataset(**args | {"shape": tuple(args["shape"])})
    print(f"{args['num_subjects']} subjects written to {args['output_dir']}")


if __name__ == "__main__":
    main()
