"""Slices per second: a volume read for every slice, the cache being filled, and the cache on disk and in memory.

Writes BraTS-2021-sized phantoms (240 x 240 x 155) where they are absent.

Example:
    python benchmarks/data.py --output_dir runs/data --num_subjects 4
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.data.subjects import item_files  # noqa: E402
from scripts.tools.phantom import make_dataset  # noqa: E402


def main() -> None:
    """Measure all four and print slices per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--num_subjects", type=int, default=4)
    parser.add_argument("--shape", nargs=3, type=int, default=[240, 240, 155], help="voxels of the phantoms")
    parser.add_argument("--image_size", type=int, default=128)
    args = parser.parse_args()
    slices = args.shape[2]
    data = args.output_dir / "data"
    if not data.is_dir():
        make_dataset(data, args.num_subjects, shape=tuple(args.shape))
    items = configured(data, args.image_size).get_parsed_content("datalist")["judged"]
    rng = np.random.default_rng(0)

    def read_all(_: int) -> None:
        """What the public loader does: all five volumes, for one slice of each."""
        item = items[rng.integers(len(items))]
        index = rng.integers(slices)
        for file in item_files(item):
            nib.load(file).get_fdata()[..., index]

    rows = [rate("five volumes read per slice", read_all, 10)]
    for name, cache_dir in (("on disk", str(args.output_dir / "cache")), ("in memory", None)):
        start = time.perf_counter()
        config = configured(data, args.image_size, cache_dir=cache_dir)
        dataset = config.get_parsed_content("train::dataset")
        seconds = time.perf_counter() - start
        # an epoch's worth of slices of every volume has to pay for the filling
        rows.append({"way": f"cold cache {name}, every slice once", "slices per second": slices * len(items) / seconds})
        rows.append(rate(f"warm cache {name}", lambda _, d=dataset: d[rng.integers(len(d))], 2000))
    table = pd.DataFrame(rows)
    table["times faster"] = table["slices per second"] / table["slices per second"][0]
    print(hardware())
    print(markdown(table))


def configured(data: Path, image_size: int, **settings) -> ConfigParser:
    """The training configuration in which every subject trains and is cached."""
    config = ConfigParser()
    config.read_config(str(ROOT / "configs" / "train.yaml"))
    config.update({"dataset_dir": str(data), "image_size": image_size, "datalist::subset": "all", **settings})
    config.update({"train::dataset::data": "$@datalist['judged']"})
    return config


def rate(name: str, draw: Callable[[int], object], count: int) -> dict:
    """Slices per second of ``count`` draws."""
    start = time.perf_counter()
    for i in range(count):
        draw(i)
    return {"way": name, "slices per second": count / (time.perf_counter() - start)}


if __name__ == "__main__":
    main()
