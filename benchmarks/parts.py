"""What a threshold for the largest probability of each part of a mask leaves out: true parts, or false ones?

Samples the masks once, without the threshold of the checkpoint, and scores them at each threshold.

Example:
    python benchmarks/parts.py --configs train.yaml weights.yaml --region WT --ckpt_path models/model.pt \
        --dataset_dir /path/to/brains --subset all
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bundle import read_configs  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.calibration.parts import Parts, parts_of  # noqa: E402
from scripts.training.weights import load_weights  # noqa: E402

SMALL = 1.0  # ml


def main() -> None:
    """Print one row per threshold. Keys of ``train.yaml`` and ``evaluate.yaml`` can follow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", required=True, help="files in configs/")
    parser.add_argument("--region", required=True)
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.5, 0.99, 0.999, 0.9999, 0.99999])
    args, keys = parser.parse_known_args()
    settings = {key.removeprefix("--"): yaml.safe_load(text) for key, text in zip(*[iter(keys)] * 2, strict=True)}
    masks = sampled([*args.configs, "evaluate.yaml"], settings, args.region)
    print(hardware())
    print(markdown(pd.DataFrame([scores(masks, threshold) for threshold in args.thresholds])))


def sampled(configs: list[str], settings: dict, region: str) -> list[tuple[Parts, float]]:
    """Parts of each subject's mask of a region, and the volume of a voxel (ml)."""
    config = read_configs(configs, settings)
    network = config.get_parsed_content("network").eval()
    load_weights(network, settings["ckpt_path"], {})
    network.calibration.reset()
    channel = config.get_parsed_content("regions").index(region)
    inferer, back = (config.get_parsed_content(f"validate::{name}") for name in ("inferer", "postprocessing"))
    masks = []
    for item in config.get_parsed_content("validate::dataset"):
        found = {name: value[0] for name, value in inferer.predict(item["image"][None], network).items()}
        found = back(found | {"image": item["image"]})
        arrays = [np.asarray(part[channel]) for part in (found["pred"], item["label"])]
        probs = [np.asarray(found[name][channel]) for name in ("seg_prob" if "seg_prob" in found else "prob", "prob")]
        voxel_ml = float(np.prod(found["pred"].pixdim.tolist())) / 1000
        masks.append((parts_of(*(array > 0 for array in arrays), *probs), voxel_ml))
    return masks


def scores(masks: list[tuple[Parts, float]], threshold: float) -> dict[str, float]:
    """Mean Dice of subjects with a truth, false volumes, and the share of the others whose false volume is small."""
    full = [parts.dice(threshold) for parts, _ in masks if parts.true_size]
    false = [
        (parts.true_size, parts.size[(parts.peak >= threshold) & (parts.shared == 0)].sum() * ml) for parts, ml in masks
    ]
    empty = [volume for size, volume in false if not size]
    return {
        "parts kept": f"p >= {threshold:g}",
        "mean Dice": float(np.mean(full)) if full else np.nan,
        "parts without a true voxel (ml)": np.mean([volume for size, volume in false if size]),
        f"empty subjects below {SMALL:g} ml": float(np.mean(np.array(empty) < SMALL)) if empty else np.nan,
    }


if __name__ == "__main__":
    main()
