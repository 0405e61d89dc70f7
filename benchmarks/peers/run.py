"""This bundle beside what a user would take instead: the same split, slices, minutes and judge.

Every arm of ``arms.yaml`` is trained for the same number of minutes with every fold and seed. So is nnU-Net, if
``--nnunet`` gives the Python of its environment (``make peers-env``). The last weights are judged. All seeds have the
same split. The same command continues an interrupted bench. Keys of ``train.yaml`` can follow, such as
``--num_folds 3``; they hold for every arm.

Example:
    python benchmarks/peers/run.py --dataset_dir /path/to/busi --configs train.yaml data_images.yaml small.yaml \
        --minutes 7 --folds 0 1 2 --seeds 0 --output_dir runs/peers/busi --num_folds 3 --amp True \
        --nnunet .venv-peers/bin/python
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.bundle_arm import BundleArm  # noqa: E402
from benchmarks.peers.nnunet import NnUNetArm  # noqa: E402
from benchmarks.peers.table import compare  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402


def main() -> None:
    """Run what is not finished, then write ``table.csv`` and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", required=True, help="files in configs/ with which every arm starts")
    parser.add_argument("--dataset_dir", required=True, type=Path)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--minutes", required=True, type=float, help="of training, for each arm")
    parser.add_argument("--folds", nargs="+", type=int, default=[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the weights, batches and noise")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument(
        "--arms_file", type=Path, default=Path(__file__).with_name("arms.yaml"), help="where they are listed"
    )
    parser.add_argument("--training_patients", type=int, help="of each fold, drawn by the seed; not for nnU-Net")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--nnunet", type=Path, help="Python of nnU-Net's environment")
    args, keys = parser.parse_known_args()
    settings = {key.removeprefix("--"): yaml.safe_load(text) for key, text in zip(*[iter(keys)] * 2, strict=True)}
    settings["dataset_dir"] = str(args.dataset_dir.resolve())
    output_dir = args.output_dir.resolve()
    check_unchanged(
        output_dir / "bench.json",
        settings | {"configs": args.configs, "minutes": args.minutes, "training_patients": args.training_patients},
    )
    arms = make_arms(args, settings, output_dir)
    folders: dict[str, dict[int, list[Path]]] = {name: {} for name in arms}  # of each arm and seed
    for seed in args.seeds:
        for fold in args.folds:
            for name, arm in arms.items():
                folder = output_dir / name.replace(" ", "_") / f"seed{seed}_fold{fold}"
                folders[name].setdefault(seed, []).append(folder)
                if isinstance(arm, BundleArm):
                    check_unchanged(folder.parent / "arm.json", {"configs": arm.configs} | arm.settings)
                if not (folder / "cost.json").is_file():
                    print(f"{name}, seed {seed}, fold {fold}: {folder}", flush=True)
                    arm.run(folder, fold, seed)
    table = compare(folders)
    table.to_csv(output_dir / "table.csv", index=False)
    print(hardware())
    print(markdown(table))


def check_unchanged(file: Path, settings: dict[str, Any]) -> None:
    """Write the settings of the bench or of an arm. Stop if the file has others: the runs would be mixed."""
    if file.is_file() and (others := json.loads(file.read_text())) != settings:
        raise SystemExit(f"{file} has the settings {others}, now they are {settings}: give another --output_dir")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))


def make_arms(args: argparse.Namespace, settings: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """The arms by name."""
    found: dict[str, Any] = {}
    for name, own in yaml.safe_load(args.arms_file.read_text(encoding="utf-8")).items():
        configs = [*args.configs, *own.pop("configs", ())]
        probe = output_dir / "probes" / name
        found[name] = BundleArm(configs, settings | own, args.minutes, args.threads, probe, args.training_patients)
    if args.nnunet and args.training_patients:
        raise SystemExit("--training_patients is not for nnU-Net: leave --nnunet out")
    if args.nnunet:
        python = args.nnunet.absolute()  # not resolved: a link would lead out of the environment
        found["nnU-Net"] = NnUNetArm(args.configs, settings, args.minutes, args.threads, python)
    if args.arms and (unknown := set(args.arms) - set(found)):
        raise SystemExit(f"{sorted(unknown)} are not among the arms {list(found)}")
    return {name: arm for name, arm in found.items() if not args.arms or name in args.arms}


if __name__ == "__main__":
    main()
