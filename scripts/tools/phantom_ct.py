"""Made-up torso CTs with 24 structures, in folders as TotalSegmentator publishes them, for demos and tests.

Each subject has its own size, pose and shapes, a phase (native or arterial) and noise. The gallbladder is sometimes
absent. The vertebrae differ only in their level, and the structures of one side from those of the other only in place.

Example:
    python -m scripts.tools.phantom_ct --output_dir bundles/organs/demo/data --num_subjects 40
    python -m scripts.tools.phantom_ct --output_dir pairs --num_subjects 40 --pairs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter, zoom
from tqdm import tqdm

from scripts.config import atomic_path

SHAPE, SPACING = (64, 64, 48), (5.0, 5.0, 10.0)  # voxels, mm
NOISE = 12.0  # standard deviation, HU
BODY = (150.0, 112.0)  # radii of the body in x and y, mm
FAT = 14.0  # thickness below the skin, mm
SPLITS = {"train": 0.6, "val": 0.2, "test": 0.2}
NO_GALLBLADDER = 0.15  # share of the subjects

# Positions and radii in mm: x to the right, y to the front, z to the head, from the middle of the pelvic floor. What
# is painted later covers what was painted before.
ELLIPSOIDS = {
    "lung_right": ((78, -5, 385), (58, 78, 92)),
    "lung_left": ((-78, -5, 385), (56, 78, 92)),
    "heart": ((-22, 25, 362), (52, 44, 44)),
    "liver": ((58, 10, 270), (84, 76, 62)),
    "spleen": ((-92, -35, 268), (30, 36, 44)),
    "stomach": ((-55, 38, 262), (44, 34, 44)),
    "kidney_right": ((62, -45, 192), (25, 22, 50)),
    "kidney_left": ((-62, -45, 206), (25, 22, 50)),
    "gallbladder": ((48, 58, 228), (17, 17, 24)),
    "urinary_bladder": ((0, 22, 52), (36, 30, 28)),
    "hip_right": ((92, -18, 64), (30, 46, 52)),
    "hip_left": ((-92, -18, 64), (30, 46, 52)),
    "autochthon_right": ((36, -82, 240), (25, 18, 230)),
    "autochthon_left": ((-36, -82, 240), (25, 18, 230)),
}
TUBES = {  # centre in x and y, radius, lowest and highest z
    "inferior_vena_cava": ((20, -28), 13, (95, 325)),
    "aorta": ((-12, -30), 13, (115, 400)),
    "trachea": ((0, -5), 12, (425, 520)),
}
SPINE, VERTEBRA, DISC = ((0, -62), 22), 34.0, 6.0  # centre in x and y and radius; heights
LOWEST = 20.0  # vertebra, of which the fourth to the seventh have a name
LEVELS = {3: "vertebrae_L3", 4: "vertebrae_L2", 5: "vertebrae_L1", 6: "vertebrae_T12"}

# HU without and with contrast in the arteries
HU = {
    "air": (-1000, -1000), "fat": (-100, -100), "muscle": (55, 60), "bone": (320, 330), "disc": (80, 85),
    "lung": (-820, -810), "heart": (42, 190), "liver": (58, 75), "spleen": (48, 120), "stomach": (20, 25),
    "kidney": (32, 150), "gallbladder": (8, 8), "urinary_bladder": (5, 5), "hip": (380, 390), "vertebrae": (240, 250),
    "autochthon": (58, 64), "inferior_vena_cava": (40, 90), "aorta": (44, 330), "trachea": (-960, -960),
}  # fmt: skip


def main() -> None:
    """Write ``<output_dir>/s0001`` and so on, with ``meta.csv``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--num_subjects", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pairs", action="store_true", help="native and contrast CT of each subject, without structures"
    )
    parser.add_argument(
        "--misregistration", type=float, default=0.0, help="of pairs: deformation of the native CT (mm)"
    )
    args = parser.parse_args()
    names = [f"s{number:04d}" for number in range(1, args.num_subjects + 1)]
    if args.pairs:
        for index, name in enumerate(tqdm(names, "Drawing pairs", disable=None)):
            write_pair(args.output_dir / name, np.random.default_rng([args.seed, index]), args.misregistration)
        print(args.output_dir)
        return
    ends = np.cumsum(list(SPLITS.values())) * len(names)
    splits = [list(SPLITS)[int(np.searchsorted(ends, index, side="right"))] for index in range(len(names))]
    for index, name in enumerate(tqdm(names, "Drawing CTs", disable=None)):
        write_subject(args.output_dir / name, np.random.default_rng([args.seed, index]))
    with atomic_path(args.output_dir / "meta.csv") as path:
        pd.DataFrame({"image_id": names, "split": splits}).to_csv(path, sep=";", index=False)
    print(args.output_dir / "meta.csv")


def write_pair(folder: Path, rng: np.random.Generator, misregistration: float) -> None:
    """Write ``<subject>_ncct.nii.gz`` and ``_cta`` (int16, HU), and the masks ``_vessels`` and ``_lung``."""
    _write({folder / f"{folder.name}_{name}.nii.gz": v for name, v in make_pair(rng, misregistration).items()})


def write_subject(folder: Path, rng: np.random.Generator) -> None:
    """Write ``ct.nii.gz`` (int16, HU) and ``segmentations/<structure>.nii.gz``."""
    image, structures = make_subject(rng)
    volumes = {folder / "ct.nii.gz": image}
    volumes |= {folder / "segmentations" / f"{name}.nii.gz": mask.astype(np.uint8) for name, mask in structures.items()}
    _write(volumes)


def _write(volumes: Mapping[Path, np.ndarray]) -> None:
    for file, values in volumes.items():
        with atomic_path(file) as path:
            nib.save(nib.Nifti1Image(values, np.diag([*SPACING, 1.0])), path)


def make_subject(
    rng: np.random.Generator, shape: tuple[int, int, int] = SHAPE, spacing: tuple[float, float, float] = SPACING
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """CT ``[H, W, S]`` (int16, HU) in RAS, and the masks of its structures by name, bool; none of them overlap.

    Args:
        rng: of everything that differs between subjects.
        shape: in voxels.
        spacing: in mm.
    """
    tissue = _tissues(_posed(_grid(shape, spacing), rng), rng)
    image = _hounsfield(tissue, int(rng.random() < 0.5), rng, rng)
    named = [name for name in np.unique(tissue) if name not in HU or name in (*ELLIPSOIDS, *TUBES)]
    return image, {str(name): tissue == name for name in named}


def make_pair(
    rng: np.random.Generator,
    misregistration: float = 0.0,
    shape: tuple[int, int, int] = SHAPE,
    spacing: tuple[float, float, float] = SPACING,
) -> dict[str, np.ndarray]:
    """``ncct`` and ``cta`` ``[H, W, S]`` (int16, HU) in RAS, and masks of the CTA: ``vessels``, ``lung``.

    Args:
        rng: of everything that differs between subjects, and of the noise, which differs between the two.
        misregistration: standard deviation of a smooth deformation of the native CT against the other (mm).
        shape: in voxels.
        spacing: in mm.
    """
    points = _posed(_grid(shape, spacing), rng)
    again = deepcopy(rng)  # the same structures at other places
    cta, moved = _tissues(points, rng), points
    if misregistration:
        moved = points + _smooth(rng, misregistration, shape)
    ncct = _tissues(moved, again)
    same = deepcopy(rng)  # the same body in both, but other noise
    images = {"ncct": _hounsfield(ncct, 0, same, rng.spawn(1)[0]), "cta": _hounsfield(cta, 1, rng, rng)}
    masks = {"vessels": cta == "aorta", "lung": np.char.startswith(cta, "lung")}
    return images | {name: mask.astype(np.uint8) for name, mask in masks.items()}


def _tissues(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Name of the tissue at each position ``[3, H, W, S]``."""
    x, y = points[:2]
    radius = np.hypot(x / BODY[0], y / BODY[1])
    tissue = np.full(points.shape[1:], "air", dtype="<U24")
    tissue[radius < 1] = "fat"
    tissue[np.hypot(x / (BODY[0] - FAT), y / (BODY[1] - FAT)) < 1] = "muscle"
    for name, inside in _structures(points, rng).items():
        tissue[inside & (radius < 1)] = name
    return tissue


def _hounsfield(tissue: np.ndarray, phase: int, rng: np.random.Generator, noise: np.random.Generator) -> np.ndarray:
    """CT (int16, HU) of tissues, without (0) or with (1) contrast, blurred, with noise."""
    image = np.zeros(tissue.shape)
    for name in np.unique(tissue):
        key = next(key for key in HU if str(name).startswith(key))
        image[tissue == name] = HU[key][phase] + (rng.normal(0, 8) if name not in ("air", "fat") else 0)
    image = gaussian_filter(image, (0.5, 0.5, 0)) + noise.normal(0, NOISE, tissue.shape)
    return np.clip(image, -1024, 3000).round().astype(np.int16)


def _grid(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> np.ndarray:
    """Position of each voxel ``[3, H, W, S]`` in mm; x and y from the middle, z from the bottom."""
    axes = [(np.arange(side) - (side - 1) / 2) * step for side, step in zip(shape[:2], spacing[:2], strict=True)]
    return np.stack(np.meshgrid(*axes, np.arange(shape[2]) * spacing[2], indexing="ij"))


def _posed(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions in a body of another size, place and rotation, with a smooth deformation."""
    angle = np.deg2rad(rng.normal(0, 6))
    x, y, z = points - np.array([rng.normal(0, 12), rng.normal(0, 12), rng.uniform(-40, 20)])[:, None, None, None]
    turned = np.stack([np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x, z])
    smooth = _smooth(rng, 7, points.shape[1:])
    return turned / rng.uniform(0.88, 1.08, 3)[:, None, None, None] + smooth


def _smooth(rng: np.random.Generator, deviation: float, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth deformation ``[3, H, W, S]`` (mm)."""
    coarse = rng.normal(0, deviation, (3, 4, 4, 4))
    return np.stack([zoom(part, np.array(shape) / 4, order=3, mode="nearest", grid_mode=True) for part in coarse])


def _structures(points: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Masks in the order in which they are painted; ``bone`` and ``disc`` are the spine without a name."""
    x, y, z = points

    def jitter(values: tuple, deviation: float) -> np.ndarray:
        return np.array(values) + rng.normal(0, deviation, len(values))

    found: dict[str, np.ndarray] = {}
    for name, (centre, radii) in ELLIPSOIDS.items():
        centre_, radii_ = jitter(centre, 6), np.array(radii) * rng.uniform(0.85, 1.15, 3)
        distance = sum(((part - c) / r) ** 2 for part, c, r in zip(points, centre_, radii_, strict=True))
        inside = np.asarray(distance < 1)
        if name.startswith("lung"):
            found |= _lobes(name, inside, y, z, rng)
        elif name != "gallbladder" or rng.random() >= NO_GALLBLADDER:
            found[name] = inside
    for name, (axis, radius, (low, high)) in TUBES.items():
        cx, cy = jitter(axis, 3)
        found[name] = (np.hypot(x - cx, y - cy) < radius * rng.uniform(0.9, 1.1)) & (z > low) & (z < high)
    return found | _spine(x, y, z, lambda: rng.normal(0, 3))


def _lobes(name: str, inside: np.ndarray, y: np.ndarray, z: np.ndarray, rng: np.random.Generator) -> dict:
    """Lobes of a lung: the oblique fissure separates the lower lobe, and on the right the horizontal one the middle."""
    side, middle = name.removeprefix("lung_"), 385 + rng.normal(0, 6)
    lower = inside & (z - middle + y < 0)
    if side == "left":
        return {"lung_upper_lobe_left": inside & ~lower, "lung_lower_lobe_left": lower}
    upper = inside & ~lower & (z > middle + 5)
    return {
        "lung_upper_lobe_right": upper,
        "lung_middle_lobe_right": inside & ~lower & ~upper,
        "lung_lower_lobe_right": lower,
    }


def _spine(x: np.ndarray, y: np.ndarray, z: np.ndarray, shift: Callable[[], float]) -> dict[str, np.ndarray]:
    """Vertebrae and discs; four of the levels have a name."""
    (cx, cy), radius = SPINE
    column = np.hypot(x - cx - shift(), y - cy - shift()) < radius
    level, within = np.divmod(z - LOWEST - shift(), VERTEBRA + DISC)
    found = {"disc": column & (within >= VERTEBRA), "bone": column & (within < VERTEBRA)}
    return found | {name: column & (within < VERTEBRA) & (level == number) for number, name in LEVELS.items()}


if __name__ == "__main__":
    main()
