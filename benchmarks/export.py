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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bundle import parsed, read_configs  # noqa: E402
from benchmarks.network import timed  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.net import MedSegDiff  # noqa: E402
from scripts.sampling.inferer import VolumeInferer  # noqa: E402
from scripts.tools.onnx_network import OnnxNetwork, export_onnx  # noqa: E402
from scripts.training.autocast import has_bfloat16  # noqa: E402

CASES = {  # overlay in configs/: samples and steps
    None: [(1, 1)],
    "small.yaml": [(1, 1), (5, 2)],
}


def main() -> None:
    """Print one table row per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slices", type=int, default=155, help="of the subject, all with brain")
    args, overrides = parser.parse_known_args()
    print(hardware())
    rows = [row for overlay in CASES for row in measure(overlay, parsed(overrides), args.slices, args.repeats)]
    print(markdown(pd.DataFrame(rows)))


def measure(overlay: str | None, settings: dict[str, object], slices: int, repeats: int) -> Iterator[dict]:
    """A row for each case: seconds of PyTorch in float32 and bfloat16 and of onnxruntime."""
    config = read_configs(["train.yaml", *([overlay] if overlay else [])], settings)
    network = config.get_parsed_content("network_def").eval()
    size, trained = (config.get_parsed_content(key) for key in ("image_size", "settings"))
    volume = torch.randn(1, len(trained["modalities"]), size, size, slices)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(network, folder, trained)
        exported = OnnxNetwork(folder)
    for num_samples, num_inference_steps in CASES[overlay]:
        seconds = sampled(VolumeInferer(num_inference_steps, num_samples), volume, network, exported, repeats)
        yield {
            "settings": overlay or "defaults",
            "size": size,
            "samples x steps": f"{num_samples} x {num_inference_steps}",
            "PyTorch (s)": seconds["PyTorch"].min(),
            "onnxruntime (s)": seconds["onnxruntime"].min(),
            "ratio": np.median(seconds["onnxruntime"] / seconds["PyTorch"]),
            "PyTorch, bfloat16 (s)": seconds["bfloat16"].min() if "bfloat16" in seconds else None,
        }


def sampled(
    inferer: VolumeInferer, volume: torch.Tensor, network: MedSegDiff, exported: OnnxNetwork, repeats: int
) -> dict[str, np.ndarray]:
    """Seconds of sampling a volume ``[1, M, H, W, S]``, in turns."""

    def bfloat16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            inferer.predict(volume, network)

    calls = {
        "PyTorch": lambda: inferer.predict(volume, network),
        "onnxruntime": lambda: inferer.predict(volume, exported),
    } | ({"bfloat16": bfloat16} if has_bfloat16() else {})
    return timed(calls, repeats)


if __name__ == "__main__":
    main()
