"""Volume of masks in slices where the truth is empty: what a network sees that is not there.

Reads the masks that inference wrote, and the truth of a folder like that of BraTS.

Example:
    python benchmarks/false_volume.py --dataset_dir runs/brains --masks runs/masks
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import markdown  # noqa: E402
from scripts.report.intervals import with_intervals  # noqa: E402


def main() -> None:
    """Print how large the false volumes are, for subjects without a tumour and for the empty slices of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", required=True, type=Path, help="<subject>/<subject>_seg.nii.gz")
    parser.add_argument("--masks", required=True, type=Path, help="output_dir of inference: <subject>_seg.nii.gz")
    parser.add_argument("--limit", type=float, default=1.0, help="ml; below it a false volume counts as small")
    args = parser.parse_args()
    files = sorted(args.masks.glob("*_seg.nii.gz"))
    if not files:
        raise SystemExit(f"{args.masks} has no <subject>_seg.nii.gz")
    found = [false_volume(args.dataset_dir / file.name.removesuffix("_seg.nii.gz") / file.name, file) for file in files]
    table = pd.DataFrame(found, columns=["empty", "ml"])
    for name, rows in (("subjects without a tumour", table["empty"]), ("empty slices of the others", ~table["empty"])):
        if rows.any():
            print(f"\n{name}: {rows.sum()} subjects")
            print(markdown(summary(table.loc[rows, "ml"].to_numpy(), args.limit)))


def false_volume(truth: Path, mask: Path) -> tuple[bool, float]:
    """Whether the truth ``[H, W, S]`` is empty, and the volume (ml) of the mask in the slices where it is."""
    known, found = nib.load(truth), nib.load(mask)
    label, seen = np.asarray(known.dataobj) > 0, np.asarray(found.dataobj) > 0
    if label.shape != seen.shape:
        raise SystemExit(f"{mask} has the shape {seen.shape}, {truth} has {label.shape}")
    slices = ~label.any(axis=(0, 1))
    voxel_ml = abs(np.linalg.det(known.affine[:3, :3])) / 1000
    return not label.any(), float(seen[..., slices].sum() * voxel_ml)


def summary(volumes: np.ndarray, limit: float) -> pd.DataFrame:
    """Mean and median of volumes (ml), and the share below the limit, with 95 % intervals over subjects."""

    def scores(rows: np.ndarray) -> dict[str, float]:
        chosen = volumes[rows]
        return {
            "mean (ml)": chosen.mean(),
            "median (ml)": float(np.median(chosen)),
            f"share below {limit:g} ml": (chosen < limit).mean(),
        }

    found = with_intervals(scores, np.arange(len(volumes)))
    return pd.DataFrame([{"false volume": name, **cell} for name, cell in found.items()])


if __name__ == "__main__":
    main()
