"""Does registration in training help if the pairs do not fit exactly? Three generators, scored on pairs that fit.

The native CTs of the training pairs are deformed by about 3 % of the width of the CT. The test pairs are those of the
same made-up subjects without the deformation.

Example:
    python benchmarks/registration.py --output_dir runs/registration --max_epochs 10 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bundle import run_bundle  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402

BUNDLE = ROOT / "bundles" / "synthesis"
ARMS = {
    "as they are": [],
    "registration": ["--registration", "True"],
    "registration with attention": ["--registration", "True", "--registration_attention", "True"],
}
FILES = ["train.yaml", "demo.yaml", "stage0_generator.yaml"]
SCORES = ("psnr", "ssim", "vessel_mae")


def main() -> None:
    """Draw the pairs, train and evaluate each arm with each seed, and print the mean scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--max_epochs", type=int, default=10)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_subjects", type=int, default=40)
    parser.add_argument("--misregistration", type=float, default=10.0, help="mm; the CT is 320 mm wide")
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    data = {"warped": folder / "warped", "aligned": folder / "aligned"}
    for name, path in data.items():
        draw(path, args.num_subjects, args.misregistration if name == "warped" else 0.0)
    rows = []
    for seed in args.seeds:
        for arm, options in ARMS.items():
            out = folder / f"{arm.replace(' ', '_')}_{seed}"
            common = [*options, "--seed", str(seed), "--ckpt_dir", str(out), "--max_epochs", str(args.max_epochs)]
            if not (out / "evaluate" / "summary.json").is_file():
                run_bundle(FILES, ["--dataset_dir", str(data["warped"]), "--output_dir", str(out), *common], BUNDLE)
                where = ["--dataset_dir", str(data["aligned"]), "--output_dir", str(out / "evaluate")]
                run_bundle([*FILES, "evaluate.yaml"], [*where, *common], BUNDLE)
            found = json.loads((out / "evaluate" / "summary.json").read_text())["methods"]
            rows.append({"arm": arm, "seed": seed} | {name: found["refined"][name]["value"] for name in SCORES})
    table = pd.DataFrame(rows)
    print(hardware())
    print(markdown(table))
    print("\n" + markdown(table.drop(columns="seed").groupby("arm", sort=False).mean().reset_index()))


def draw(folder: Path, subjects: int, misregistration: float) -> None:
    """Made-up pairs, unless they are there."""
    if not folder.is_dir():
        command = [sys.executable, "-m", "scripts.tools.phantom_ct", "--output_dir", str(folder), "--pairs"]
        command += ["--num_subjects", str(subjects), "--misregistration", str(misregistration)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
