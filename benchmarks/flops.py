"""GFLOP of one finished slice, beside the published cost of the official network.

The official MedSegDiff-V2 costs 61.4 GFLOP per evaluation at 64 px and 521.5 at 256 px, and takes 1000 evaluations for
each of 5 samples by default.

Example:
    python benchmarks/flops.py --variant S --num_samples 5
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from monai.bundle import ConfigParser
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bundle import parsed  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402

OFFICIAL = {64: 61.4, 256: 521.5}  # GFLOP per evaluation
OFFICIAL_EVALUATIONS = 5 * 1000


def main() -> None:
    """Count with torch's counter, at 64, 128 and 256 px."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="train.yaml", help="file in configs/")
    args, overrides = parser.parse_known_args()
    config = ConfigParser()
    config.read_config(str(ROOT / "configs" / args.config))
    config.update(parsed(overrides))
    print(hardware())
    print(markdown(slices(config)))


def slices(config: ConfigParser, sizes: Sequence[int] = (64, 128, 256)) -> pd.DataFrame:
    """GFLOP of a slice of each size (pixels) with the configured network and sampling."""
    network, device = config.get_parsed_content("network").eval(), config.get_parsed_content("device")
    samples = config.get_parsed_content("num_samples")
    evaluations = config.get_parsed_content("num_inference_steps") * samples
    evaluations += network.is_stochastic and samples > 1  # its mask
    modalities = len(config.get_parsed_content("modalities"))
    rows = []
    for size in sizes:
        image = torch.zeros(1, modalities, size, size, device=device)
        x_t = torch.zeros(1, network.out_channels, size, size, device=device)
        timesteps, condition = torch.zeros(1, dtype=torch.long, device=device), network.condition(image)
        branch = count(lambda image=image: network.condition(image))
        denoiser = count(lambda: network(image, x_t, timesteps, condition))  # noqa: B023
        total = branch + evaluations * denoiser
        official = OFFICIAL[size] * OFFICIAL_EVALUATIONS if size in OFFICIAL else float("nan")
        row = {"size": size, "image branch": branch, "denoiser": denoiser, "evaluations": evaluations, "slice": total}
        rows.append(row | {"official slice": official, "times less": official / total})
    return pd.DataFrame(rows).astype({"size": object, "evaluations": object})


@torch.no_grad()
def count(call) -> float:
    """GFLOP of a call; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    main()
