"""Is each part of the random brains worth it? Short trainings without one of them, judged on patients.

Trains ``weights.yaml`` with all parts at 1, a plain U-Net on the same brains, and once for each part of
``scripts.brains.brain.Randomisation`` with that part at 0. Then it evaluates all of them on the subjects of a folder.
The same command continues an interrupted run. Keys of ``train.yaml`` can follow; they hold for trainings and
evaluations.

Example:
    python benchmarks/randomisation.py --brains runs/weights/brains --dataset_dir /path/to/tcga_lgg --epochs 20 \
        --judged "{modalities: [t1, t1ce, flair], subject_column: subject_ID, grade_labels: {G2: 0, G3: 1}}" \
        --output_dir runs/randomisation
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bundle import options, run_bundle  # noqa: E402
from benchmarks.peers.table import cell_text, read  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.brains.brain import Randomisation  # noqa: E402
from scripts.report.intervals import with_intervals  # noqa: E402

STRENGTHS = "train::random_transforms::0::randomisation"  # those that are not named are 1
FULL, CONFIGS = "all parts", ["train.yaml", "weights.yaml"]
PARTS = [field.name for field in fields(Randomisation)]
# of each arm: further configuration files, and keys of the training
ARMS: dict[str, tuple[list[str], dict[str, object]]] = {
    FULL: ([], {STRENGTHS: {}}),
    "plain U-Net": (["baseline_unet.yaml"], {STRENGTHS: {}}),
    **{f"without {part}": ([], {STRENGTHS: {part: 0}}) for part in PARTS},
}


def main() -> None:
    """Train and evaluate what is missing, then write ``table.csv`` and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--brains", required=True, type=Path, help="random brains (scripts.tools.phantom)")
    parser.add_argument("--dataset_dir", required=True, type=Path, help="subjects that judge")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=20, help="of each training")
    parser.add_argument("--region", default="WT", help="whose Dice is compared")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these; default: all")
    parser.add_argument("--judged", type=yaml.safe_load, default={}, help="keys of the evaluations, as {key: value}")
    args, keys = parser.parse_known_args()
    folders = {arm: args.output_dir.resolve() / arm.replace(" ", "_") for arm in args.arms}
    for arm, folder in folders.items():
        train(folder, arm, args.brains.resolve(), args.epochs, keys)
        judge(folder, arm, args.dataset_dir.resolve(), [*options(args.judged), *keys])
    table = compare({arm: read([folder / "judged"]) for arm, folder in folders.items()}, f"dice_{args.region}")
    table.to_csv(args.output_dir / "table.csv", index=False)
    print(hardware())
    print(markdown(table))


def train(folder: Path, arm: str, brains: Path, epochs: int, settings: list[str]) -> None:
    """Train an arm, or continue."""
    configs, own = ARMS[arm]
    keys = {"dataset_dir": brains, "output_dir": folder, "ckpt_dir": folder, "max_epochs": epochs} | own
    run_bundle([*CONFIGS, *configs, "resume.yaml"], [*options(keys), *settings])


def judge(folder: Path, arm: str, dataset_dir: Path, settings: list[str]) -> None:
    """Evaluate the weights of an arm on subjects, unless that is done."""
    if not (folder / "judged" / "subjects.csv").is_file():
        own = {"dataset_dir": dataset_dir, "ckpt_dir": folder, "output_dir": folder / "judged", "subset": "all"}
        run_bundle([*CONFIGS, *ARMS[arm][0], "evaluate.yaml"], [*options(own), *settings])


def compare(tables: dict[str, pd.DataFrame], column: str) -> pd.DataFrame:
    """Mean and median of a score in the table of each arm, and the mean difference to the first arm, with intervals."""
    first = next(iter(tables))

    def statistic(rows: np.ndarray) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        for arm, table in tables.items():
            scores = table[column].to_numpy()[rows]
            found[arm, "mean Dice"], found[arm, "median"] = scores.mean(), float(np.median(scores))
            if arm != first:
                found[arm, f"minus {first}"] = scores.mean() - tables[first][column].to_numpy()[rows].mean()
        return found

    result = pd.DataFrame(index=list(tables)).rename_axis("arm")
    for (arm, name), cell in with_intervals(statistic, tables[first]["patient"]).items():
        result.loc[arm, name] = cell_text(cell)
    return result.fillna("-").reset_index()


if __name__ == "__main__":
    main()
