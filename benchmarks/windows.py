"""Seams, Dice and seconds of masks that are sampled in windows, beside those of whole slices.

A seam is a jump of the probability where a window begins or ends. ``seam`` is the mean difference of two neighbouring
pixels there, divided by that of all other neighbours: 1 without seams. The weights are those of a training with
``slice_size``.

Example:
    python benchmarks/windows.py --configs train.yaml data_images.yaml small.yaml --dataset_dir /path/to/busi \
        --ckpt_path runs/windows/model.pt --slice_size 128 --image_size 64
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bundle import read_configs  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.report.metrics import mask_scores  # noqa: E402
from scripts.sampling import windows  # noqa: E402
from scripts.sampling.inferer import VolumeInferer  # noqa: E402
from scripts.training.weights import load_weights  # noqa: E402

WAYS = {"whole slices": None, "windows, overlap 0": 0.0, "windows, overlap 0.5 (default)": windows.OVERLAP}


def main() -> None:
    """Print one row per way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", required=True, help="files in configs/")
    args, keys = parser.parse_known_args()
    settings = {key.removeprefix("--"): yaml.safe_load(text) for key, text in zip(*[iter(keys)] * 2, strict=True)}
    config = read_configs([*args.configs, "evaluate.yaml"], settings)
    network = config.get_parsed_content("network").eval()
    load_weights(network, settings["ckpt_path"], {})
    items = list(config.get_parsed_content("validate::dataset"))
    print(hardware())
    print(markdown(pd.DataFrame([{"way": name, **judged(config, network, items, name)} for name in WAYS])))


def judged(config: ConfigParser, network: torch.nn.Module, items: list[dict], way: str) -> dict[str, float]:
    """Mean Dice, seam, and seconds per subject."""
    windows.OVERLAP = WAYS[way] or 0.0
    window = config["image_size"]
    inferer = VolumeInferer(window=window if WAYS[way] is not None else None)
    back, seconds, seams, scores = config.get_parsed_content("validate::postprocessing"), 0.0, [], []
    for item in items:
        start = time.perf_counter()
        found = {name: value[0] for name, value in inferer.predict(item["image"][None], network).items()}
        seconds += time.perf_counter() - start
        seams.append(seam(found["prob"].numpy(), window if WAYS[way] == 0 else window // 2))
        found = back(found | {"image": item["image"]})
        scores.append(mask_scores(found["pred"], item["label"], [1.0] * 3, config["regions"]))
    dice = pd.DataFrame(scores).filter(regex="^dice_").to_numpy().mean()
    return {"Dice": dice, "seam": np.nanmean(seams), "seconds per subject": seconds / len(items)}


def seam(prob: np.ndarray, step: int) -> float:
    """Mean jump at multiples of ``step`` against that elsewhere, of a probability ``[R, H, W, S]``; NaN if it is flat.

    With an overlap of 0.5, windows begin and end at multiples of half their side.
    """
    jumps, elsewhere = [], []
    for axis in (1, 2):
        difference = np.abs(np.diff(prob, axis=axis)).mean(axis=tuple({0, 1, 2, 3} - {axis}))
        edge = np.arange(1, prob.shape[axis]) % step == 0
        jumps.append(difference[edge].mean())
        elsewhere.append(difference[~edge].mean())
    return float(np.sum(jumps) / np.sum(elsewhere)) if np.sum(elsewhere) > 1e-9 else np.nan


if __name__ == "__main__":
    main()
