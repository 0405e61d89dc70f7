"""Time and memory of inference on real volumes, with fresh weights: the cost does not depend on what was learnt.

Example:
    python benchmarks/inference.py --dataset_dir /path/to/BraTS2021_00000 --image_size 240
"""

from __future__ import annotations

import argparse
import ast
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Write a checkpoint of the configured network, run the bundle's inference on the folder, print one table row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", required=True)
    args, overrides = parser.parse_known_args()
    config = ConfigParser()
    config.read_config(str(ROOT / "configs" / "inference.yaml"))
    pairs = zip(overrides[::2], overrides[1::2], strict=True)
    config.update({key.removeprefix("--"): ast.literal_eval(value) for key, value in pairs})
    network = config.get_parsed_content("network_def")
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": network.state_dict()}, f"{folder}/model.pt")
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "monai.bundle",
            "run",
            "--config_file",
            "configs/inference.yaml",
        ]
        options = ["--dataset_dir", args.dataset_dir, "--ckpt_path", f"{folder}/model.pt", "--output_dir", folder]
        start = time.perf_counter()
        subprocess.run([*command, *options, *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        (mask,) = Path(folder).glob("*_seg.nii.gz")
        source = next(Path(args.dataset_dir).glob("*.nii*"))
        same = np.array_equal(nib.load(mask).affine, nib.load(source).affine)
        shape = nib.load(mask).shape
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    settings = " ".join(overrides) or "defaults"
    print("| settings | parameters | volume | affine equal | seconds | peak memory |\n|---|---|---|---|---|---|")
    print(f"| {settings} | {parameters:.1f} M | {shape} | {same} | {seconds:.0f} | {memory:.1f} GiB |")
    print(f"hardware: {os.cpu_count()} CPU cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")


if __name__ == "__main__":
    main()
