"""Does joint training harm segmentation? Joint, staged, segmentation and grading alone, with equal optimiser steps.

Every arm sees the same slices for ``--max_epochs`` epochs; the stages share them 2 : 1 : 1. The last weights are
judged, so that no arm is chosen by the validation subjects. Finished runs are kept, interrupted ones are resumed.

Example:
    python benchmarks/tasks.py --output_dir runs/tasks --seeds 0 1 2 --max_epochs 12
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bundle import run_bundle  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.report import write_csv  # noqa: E402

ARMS = ("joint", "staged", "segmentation", "grading")
STAGES = ("stage1_segmentation", "stage2_grading", "stage3_joint")


def main() -> None:
    """Train and judge what is missing, write ``tasks.csv`` and print mean and standard deviation over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--configs", nargs="+", default=["train.yaml", "demo.yaml"], help="files in configs/")
    parser.add_argument("--dataset_dir", default=str(ROOT / "demo" / "data"))
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max_epochs", type=int, default=12)
    args, overrides = parser.parse_known_args()
    rows = []
    for seed in args.seeds:
        for arm in args.arms:
            folder = (args.output_dir / f"{arm}_{seed}").resolve()
            settings = ["--dataset_dir", args.dataset_dir, "--seed", seed, *overrides]
            if not (folder / "evaluate" / "summary.json").is_file():
                train(arm, args.configs, folder, args.max_epochs, settings)
                judged = ["--ckpt_path", last(arm, folder) / "last.pt", "--output_dir", folder / "evaluate"]
                run_bundle([*args.configs, "evaluate.yaml"], [*settings, *judged])
            rows.append({"arm": arm, "seed": seed, **scores(arm, folder)})
            print(rows[-1], flush=True)
            write_csv(pd.DataFrame(rows), args.output_dir / f"{'_'.join(args.arms)}.csv")
    table = pd.DataFrame(rows)
    print(hardware())
    print(markdown(table))
    print(markdown(table.drop(columns="seed").groupby("arm", sort=False).agg(["mean", "std"]).pipe(flat).reset_index()))


def train(arm: str, configs: list[str], folder: Path, max_epochs: int, settings: list) -> None:
    """Train one arm into ``folder``."""
    if arm == "staged":
        quarter = max_epochs // 4
        for stage, epochs in zip(STAGES, (max_epochs - 2 * quarter, quarter, quarter), strict=True):
            planned = ["--max_epochs", epochs, "--val_interval", epochs, "--stages_dir", folder]
            run_bundle([*configs, f"{stage}.yaml", "resume.yaml"], [*settings, *planned, "--gradient_cosine", "True"])
        return
    tasks = ["segmentation", "grading"] if arm == "joint" else [arm]
    planned = ["--max_epochs", max_epochs, "--val_interval", max_epochs, "--output_dir", folder, "--ckpt_dir", folder]
    run_bundle([*configs, "resume.yaml"], [*settings, *planned, "--tasks", tasks, "--gradient_cosine", "True"])


def last(arm: str, folder: Path) -> Path:
    """Folder of an arm's final weights and epoch table."""
    return folder / "stage3_joint" if arm == "staged" else folder


def scores(arm: str, folder: Path) -> dict[str, float]:
    """Dice and AUC of the held-out subjects, and the gradients' cosine in each third of the (last) training."""
    summary = json.loads((folder / "evaluate" / "summary.json").read_text())
    (masks,) = summary["segmentation"].values()
    epochs = pd.read_csv(last(arm, folder) / "metrics.csv").query("split == 'train'")["gradient_cosine"].to_numpy()
    learns_both = arm in ("joint", "staged")
    cosines = {f"cosine_{i}": np.mean(p) if learns_both else np.nan for i, p in enumerate(np.array_split(epochs, 3), 1)}
    auc, accuracy = (summary["grading"][name]["value"] for name in ("auc", "accuracy"))
    dice = masks["dice"]["mean"]["value"] if arm != "grading" else np.nan  # its masks were never trained
    return {"dice": dice, "auc": auc if arm != "segmentation" else np.nan, "accuracy": accuracy, **cosines}


def flat(table: pd.DataFrame) -> pd.DataFrame:
    """Join the two levels of the column names."""
    return table.set_axis(["_".join(names) for names in table.columns], axis="columns")


if __name__ == "__main__":
    main()
