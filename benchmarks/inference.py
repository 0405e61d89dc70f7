"""Time and memory of inference on real volumes, part by part, with fresh weights: the cost does not depend on them.

Example:
    python benchmarks/inference.py --dataset_dir /path/to/BraTS2021_00000 --image_size 240
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
import yaml
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import hardware, markdown  # noqa: E402

PARTS = {  # methods timed, outer ones less their inner ones
    "read": ["monai.transforms.LoadImaged.__call__"],
    "preprocess": ["scripts.data.caching.UncachedDataset.__getitem__"],
    "sample": ["scripts.sampling.inferer.VolumeInferer.sample"],
    "fuse": ["scripts.sampling.inferer.VolumeInferer.predict"],
    "back to the grid": ["monai.transforms.Invertd.__call__"],
    "write": ["monai.transforms.SaveImaged.__call__", "scripts.report.tables.GradeTable.rows_of"],
}


def main() -> None:
    """Write a checkpoint of the configured network, run the bundle's inference on the folder, print one table row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--configs", nargs="+", default=[], help="overlays in configs/")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # the measured process: where to write the parts
    args, overrides = parser.parse_known_args()
    settings = {key.removeprefix("--"): yaml.safe_load(text) for key, text in zip(*[iter(overrides)] * 2, strict=True)}
    training, inference = (
        [str(ROOT / "configs" / name) for name in (base, *args.configs)] for base in ("train.yaml", "inference.yaml")
    )
    if args.inside:
        run_timed(inference, settings | {"dataset_dir": args.dataset_dir}, args.inside)
        return
    config = ConfigParser()
    config.read_config(training)
    config.update(settings)
    network, trained = (config.get_parsed_content(key) for key in ("network_def", "settings"))
    with tempfile.TemporaryDirectory() as folder:
        content = {"model": network.state_dict(), "settings": trained, "lineage": {"training": {}, "validation": {}}}
        torch.save(content, f"{folder}/model.pt")
        options = ["--ckpt_path", f"{folder}/model.pt", "--output_dir", folder, "--inside", f"{folder}/parts.json"]
        start = time.perf_counter()
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], *options]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        total = time.perf_counter() - start
        parts = json.loads(Path(folder, "parts.json").read_text())
        (mask,) = Path(folder).glob("*_seg.nii.gz")
        source = next(Path(args.dataset_dir).glob("*.nii*"))
        same = np.array_equal(nib.load(mask).affine, nib.load(source).affine)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    row = {"settings": " ".join([*args.configs, *overrides]) or "defaults", "affine equal": str(same)}
    row |= {name: round(parts[name], 1) for name in PARTS}
    row |= {"start and rest": round(total - sum(parts.values()), 1), "total (s)": round(total, 1)}
    print(hardware())
    print(markdown(pd.DataFrame([row | {"peak memory (GiB)": round(memory, 2)}])))


def run_timed(files: list[str], settings: dict, report: str) -> None:
    """Run the bundle with the methods of :data:`PARTS` timed, and write seconds by part."""
    import monai.bundle

    seconds: dict[str, float] = defaultdict(float)
    inner = [0.0]  # seconds of timed calls within each call on the stack

    def timed(part, method):
        def call(*args, **kwargs):
            start = time.perf_counter()
            inner.append(0.0)
            try:
                return method(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                seconds[part] += spent - inner.pop()
                inner[-1] += spent

        return call

    for part, names in PARTS.items():
        for name in names:
            module, owner, method = name.rsplit(".", 2)
            found = getattr(__import__(module, fromlist=[owner]), owner)
            setattr(found, method, timed(part, getattr(found, method)))
    monai.bundle.run(config_file=files, **settings)
    Path(report).write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
