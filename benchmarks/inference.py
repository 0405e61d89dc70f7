"""Time and memory of inference on real volumes, part by part, with fresh weights: the cost does not depend on them.

Example:
    python benchmarks/inference.py --dataset_dir /path/to/BraTS2021_00000 --image_size 240
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bundle import finish, options, parsed, read_configs  # noqa: E402
from benchmarks.device import peak_memory, start_memory, synchronize  # noqa: E402
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
    """Print one table row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--configs", nargs="+", default=[], help="overlays in configs/")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # the measured process: where to write the parts
    args, overrides = parser.parse_known_args()
    settings = parsed(overrides)
    if args.inside:
        files = [str(ROOT / "configs" / name) for name in ("inference.yaml", *args.configs)]
        run_timed(files, settings | {"dataset_dir": args.dataset_dir}, args.inside)
        return
    row = {"settings": " ".join([*args.configs, *overrides]) or "defaults"}
    print(hardware())
    print(markdown(pd.DataFrame([row | measure(args.dataset_dir, args.configs, settings)])))


def measure(
    dataset_dir: str,
    configs: Sequence[str],
    settings: Mapping[str, object],
    sampling: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Seconds of each part, and memory in GiB, of the bundle's inference in a process of its own.

    Args:
        dataset_dir: folder of one subject.
        configs: overlays in ``configs/``.
        settings: of the network, whose fresh weights are written as a checkpoint, and of the inference.
        sampling: further settings of the inference alone.
    """
    config = read_configs(["train.yaml", *configs], settings)
    network, trained = (config.get_parsed_content(key) for key in ("network_def", "settings"))
    with tempfile.TemporaryDirectory() as folder:
        content = {"model": network.state_dict(), "settings": trained, "lineage": {"training": {}, "validation": {}}}
        torch.save(content, f"{folder}/model.pt")
        words = ["--dataset_dir", dataset_dir, *(["--configs", *configs] if configs else [])]
        words += [*options({**settings, **(sampling or {})}), "--ckpt_path", f"{folder}/model.pt"]
        words += ["--output_dir", folder, "--inside", f"{folder}/parts.json"]
        start = time.perf_counter()
        finish([sys.executable, "-W", "ignore", __file__, *words])
        total = time.perf_counter() - start
        found = json.loads(Path(folder, "parts.json").read_text())
        (mask,) = Path(folder).glob("*_seg.nii.gz")
        source = next(Path(dataset_dir).glob("*.nii*"))
        same = np.array_equal(nib.load(mask).affine, nib.load(source).affine)
    memory, parts = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, found["seconds"]
    row = {"affine equal": str(same)} | {name: round(parts[name], 1) for name in PARTS}
    row |= {"start and rest": round(total - sum(parts.values()), 1), "total (s)": round(total, 1)}
    return row | {"peak memory (GiB)": round(memory, 2), "GPU memory (GiB)": found["gpu"]}


def run_timed(files: list[str], settings: dict, report: str) -> None:
    """Run the bundle with the methods of :data:`PARTS` timed, and write seconds by part and memory."""
    import monai.bundle

    seconds: dict[str, float] = defaultdict(float)
    inner = [0.0]  # seconds of timed calls within each call on the stack

    def timed(part, method):
        def call(*args, **kwargs):
            start = time.perf_counter()
            inner.append(0.0)
            try:
                result = method(*args, **kwargs)
                synchronize()
                return result
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
    start_memory()
    monai.bundle.run(config_file=files, **settings)
    Path(report).write_text(json.dumps({"seconds": seconds, "gpu": peak_memory()}))


if __name__ == "__main__":
    main()
