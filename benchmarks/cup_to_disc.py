"""Glaucoma by the vertical cup-to-disc ratio of predicted masks of the optic disc and cup: AUC over all folds.

Each fold's masks are written by inference with its weights; only the subjects that the fold judged are used.

Example:
    python benchmarks/cup_to_disc.py --labels data/labels.csv --judged runs/fold*/evaluate --masks runs/fold*/masks
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.data.pictures import read_picture  # noqa: E402
from scripts.report.intervals import with_intervals  # noqa: E402


def main() -> None:
    """Print the AUC with its 95 % interval over pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", required=True, type=Path, help="CSV with the columns image and label")
    parser.add_argument("--judged", required=True, nargs="+", type=Path, help="output_dir of each fold's evaluation")
    parser.add_argument("--masks", required=True, nargs="+", type=Path, help="output_dir of each fold's inference")
    parser.add_argument("--glaucoma", default="glaucoma", help="label of the patients")
    args = parser.parse_args()
    labels = pd.read_csv(args.labels, dtype=str).set_index("image")["label"]
    rows = []
    for judged, masks in zip(args.judged, args.masks, strict=True):
        for name in pd.read_csv(judged / "subjects.csv", dtype={"subject": str})["subject"]:
            mask = read_picture(masks / f"{name}_seg.png")[0, ..., 0].T
            rows.append({"ratio": height(mask == 255) / max(height(mask > 0), 1), "ill": labels[name] == args.glaucoma})
    table = pd.DataFrame(rows)

    def auc(chosen: np.ndarray) -> dict[str, float]:
        ill = table["ill"].to_numpy()[chosen]
        return {"auc": roc_auc_score(ill, table["ratio"].to_numpy()[chosen]) if 0 < ill.sum() < len(ill) else np.nan}

    found = with_intervals(auc, np.arange(len(table)))["auc"]
    print(f"{len(table)} pictures: AUC {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})")


def height(mask: np.ndarray) -> int:
    """Number of rows between the first and the last that the mask ``[H, W]`` touches; 0 if it is empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    return int(rows[-1] - rows[0] + 1) if len(rows) else 0


if __name__ == "__main__":
    main()
