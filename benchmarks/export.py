"""Seconds of sampling one subject, PyTorch against the same network through onnxruntime, in turns in one run.

Reading and writing are the same for both and left out. Fresh weights: the cost does not depend on them. Seconds are
the fastest of the repeats, ratios the median of the turns'.

Example:
    python benchmarks/export.py --repeats 3
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.network import timed  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.sampling.inferer import VolumeInferer  # noqa: E402
from scripts.tools.onnx_network import OnnxNetwork, export_onnx  # noqa: E402
from scripts.training.autocast import has_bfloat16  # noqa: E402

CASES = [  # files in configs/, samples, steps
    (["train.yaml"], 1, 1),
    (["train.yaml", "small.yaml"], 1, 1),
    (["train.yaml", "small.yaml"], 5, 2),
]


def main() -> None:
    """Print one table row per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slices", type=int, default=155, help="of the subject, all with brain")
    args = parser.parse_args()
    print(hardware())
    print(markdown(pd.DataFrame([measure(*case, args.slices, args.repeats) for case in CASES])))


def measure(files: list[str], num_samples: int, num_inference_steps: int, slices: int, repeats: int) -> dict:
    """One row: seconds of PyTorch in float32 and bfloat16 and of onnxruntime."""
    config = ConfigParser()
    config.read_config([str(ROOT / "configs" / name) for name in files])
    network = config.get_parsed_content("network_def").eval()
    size, settings = (config.get_parsed_content(key) for key in ("image_size", "settings"))
    volume = torch.randn(1, len(settings["modalities"]), size, size, slices)
    inferer = VolumeInferer(num_inference_steps, num_samples)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(network, folder, settings)
        exported = OnnxNetwork(folder)

    def bfloat16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            inferer.predict(volume, network)

    calls = {
        "PyTorch": lambda: inferer.predict(volume, network),
        "onnxruntime": lambda: inferer.predict(volume, exported),
    } | ({"bfloat16": bfloat16} if has_bfloat16() else {})
    seconds = timed(calls, repeats)
    return {
        "settings": " ".join(files[1:]) or "defaults",
        "size": size,
        "samples x steps": f"{num_samples} x {num_inference_steps}",
        "PyTorch (s)": seconds["PyTorch"].min(),
        "onnxruntime (s)": seconds["onnxruntime"].min(),
        "ratio": np.median(seconds["onnxruntime"] / seconds["PyTorch"]),
        "PyTorch, bfloat16 (s)": seconds["bfloat16"].min() if "bfloat16" in seconds else None,
    }


if __name__ == "__main__":
    main()
