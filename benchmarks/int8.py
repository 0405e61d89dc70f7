"""Seconds per slice of the network of structures in float32, bfloat16 and int8, and the size of the files.

Example:
    python benchmarks/int8.py --ckpt_path bundles/organs/models/model.pt --onnx_dir bundles/organs/models/onnx
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.networks.nets import BasicUNet

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.tools.onnx_files import INT8, OnnxImageNetwork  # noqa: E402
from scripts.training.checkpoints import read_checkpoint  # noqa: E402


def main() -> None:
    """Print one row per precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_path", required=True, type=Path)
    parser.add_argument("--onnx_dir", required=True, type=Path)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    checkpoint = read_checkpoint(str(args.ckpt_path))
    settings = checkpoint["settings"]
    channels, classes = len(settings["windows"]) * settings["num_slices"], len(settings["structures"]) + 1
    network = BasicUNet(2, channels, classes, features=settings["features"], norm="batch").eval()
    network.load_state_dict(checkpoint["model"])
    int8 = OnnxImageNetwork(str(args.onnx_dir / INT8))
    image = torch.rand(args.batch_size, channels, args.image_size, args.image_size)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint["model"].values())

    def bfloat16() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(image)

    ways = {"float32": lambda: network(image), "bfloat16": bfloat16, "int8": lambda: int8(image)}
    sizes = {"float32": weights, "bfloat16": weights, "int8": (args.onnx_dir / INT8).stat().st_size}
    seconds = measure(ways, args.repeats)
    print(hardware())
    rows = [
        {
            "precision": name,
            "MB": sizes[name] / 1e6,
            "ms per slice": 1000 * seconds[name] / args.batch_size,
            "of float32": seconds[name] / seconds["float32"],
        }
        for name in ways
    ]
    print(markdown(pd.DataFrame(rows)))


@torch.no_grad()
def measure(ways: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, float]:
    """Median seconds of each way; they take turns, so that other programs disturb all alike."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first round warms up
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[1:])) for name, values in found.items()}


if __name__ == "__main__":
    main()
