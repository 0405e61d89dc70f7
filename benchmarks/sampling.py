"""Dice, calibration and time of every sampler at every number of evaluations, for every prediction type.

One network per prediction type is trained where ``<output_dir>/<prediction_type>/last.pt`` does not exist yet, all with
the same settings; then each sampler judges the validation subjects with the same weights.

Example:
    python benchmarks/sampling.py --output_dir runs/sampling --num_eval_cases 4
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from monai.bundle import ConfigParser
from monai.metrics import compute_dice
from monai.transforms import Compose

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bundle import read_configs, run_bundle  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.data.writing import write_csv  # noqa: E402
from scripts.net import MedSegDiff  # noqa: E402
from scripts.report.uncertainty import calibration_bins, expected_calibration_error, region_of_interest  # noqa: E402
from scripts.sampling.inferer import VolumeInferer  # noqa: E402


def main() -> None:
    """Train what is missing, judge every combination, write ``sampling.csv`` and print it as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--configs", nargs="+", default=["train.yaml", "demo.yaml"], help="files in configs/")
    parser.add_argument("--dataset_dir", default=str(ROOT / "demo" / "data"))
    parser.add_argument("--prediction_types", nargs="+", default=["sample", "epsilon", "v_prediction"])
    parser.add_argument("--samplers", nargs="+", default=["ddpm", "ddim", "dpm_solver", "unipc"])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 10, 50, 1000])
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--num_eval_cases", type=int)
    args, overrides = parser.parse_known_args()
    rows = []
    for prediction_type in args.prediction_types:
        folder = args.output_dir / prediction_type
        settings = ["--dataset_dir", args.dataset_dir, "--prediction_type", prediction_type, *overrides]
        if not (folder / "last.pt").is_file():
            run_bundle(args.configs, [*settings, "--output_dir", folder, "--ckpt_dir", folder])
        config = configured(args, [*settings, "--ckpt_path", str(folder / "last.pt")])
        network, items = config.get_parsed_content("network"), list(config.get_parsed_content("validate::dataset"))
        for sampler in args.samplers:
            for steps in args.steps:
                inferer = VolumeInferer(steps, args.num_samples, sampler=sampler)
                scores = judge(inferer, network.eval(), items, config.get_parsed_content("validate::postprocessing"))
                rows.append({"prediction_type": prediction_type, "sampler": sampler, "evaluations": steps, **scores})
                print(rows[-1], flush=True)
                write_csv(pd.DataFrame(rows), args.output_dir / "sampling.csv")
    print(hardware())
    print(markdown(pd.DataFrame(rows)))


def configured(args: argparse.Namespace, settings: list[str]) -> ConfigParser:
    """The evaluation's configuration with the settings of the command line."""
    values = {
        key.removeprefix("--"): yaml.safe_load(text) for key, text in zip(settings[::2], settings[1::2], strict=True)
    }
    values |= {"num_eval_cases": args.num_eval_cases}
    return read_configs([*args.configs, "evaluate.yaml"], values)


def judge(inferer: VolumeInferer, network: MedSegDiff, items: list[dict], back_to_grid: Compose) -> dict[str, float]:
    """Mean Dice and ECE of the first region on the label's own grid, and seconds per slice that is not empty."""
    dice, bins, seconds, slices = [], [], 0.0, 0
    for item in items:
        image = item["image"][None]
        start = time.perf_counter()
        output = inferer.predict(image, network)
        seconds += time.perf_counter() - start
        slices += int((image != 0).any(dim=-2).any(dim=-2).any(dim=1).sum())
        volumes = {name: output[name][0] for name in ("pred", "prob", "uncertainty")}
        result = back_to_grid({"image": item["image"], **volumes})
        prob, pred, label = (torch.as_tensor(part)[:1] for part in (result["prob"], result["pred"], item["label"]))
        dice.append(float(compute_dice(pred[None], label[None], ignore_empty=False)))
        roi = region_of_interest(pred[0].numpy() > 0, label[0].numpy() > 0)
        bins.append(calibration_bins(prob[0].numpy()[roi], label[0].numpy()[roi]))
    ece = expected_calibration_error(np.stack(bins))
    return {"dice": float(np.mean(dice)), "ece": ece, "seconds_per_slice": seconds / slices}


if __name__ == "__main__":
    main()
