"""Time and peak memory of resizing slices, by MONAI's anti-aliasing and by that of torch, each in a fresh process.

Example:
    python benchmarks/resize.py
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from monai.data import MetaTensor
from monai.transforms import Resized

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.data.transforms import ResizeSlicesd  # noqa: E402

CASES = (  # who resizes, shape, pixels
    ("MONAI", (4, 240, 240, 155), 64),
    ("torch", (4, 240, 240, 155), 32),
    ("torch", (4, 240, 240, 155), 64),
    ("torch", (4, 240, 240, 155), 256),
    ("torch", (3, 2056, 2124, 1), 128),
)


def main() -> None:
    """Print one row per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # the measured process
    args = parser.parse_args()
    if args.case is not None:
        print(*measure(*CASES[args.case]))
        return
    rows = []
    for index, (who, shape, size) in enumerate(CASES):
        command = [sys.executable, "-W", "ignore", __file__, "--case", str(index)]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        seconds, before, peak = map(float, words[-3:])
        rows.append({"by": who, "shape": shape, "px": size, "seconds": seconds, "GB before": before, "GB peak": peak})
    print(hardware())
    print(markdown(pd.DataFrame(rows)))


def measure(who: str, shape: tuple[int, ...], size: int) -> tuple[float, float, float]:
    """Seconds, and the peak memory of the process (GB) before and after."""
    image = MetaTensor(torch.rand(shape))
    if who == "torch":
        transform = ResizeSlicesd("image", size)
    else:
        transform = Resized("image", (size, size, -1), mode="trilinear", anti_aliasing=True)
    before, start = peak(), time.perf_counter()
    transform({"image": image})
    return time.perf_counter() - start, before, peak()


def peak() -> float:
    """Largest resident size so far (GB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
