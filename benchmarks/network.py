"""What the variants cost, and what each conditioning module adds to a denoising step.

Parameters and FLOP are counted (FFTs are not: torch's counter knows none), times are measured in turns, so that a busy
machine slows all alike. Seconds are the fastest of the repeats, percentages the median of the turns' ratios.

Example:
    python benchmarks/network.py --repeats 10
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.device import synchronize  # noqa: E402
from benchmarks.flops import count  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.diffusion.schedule import GaussianDiffusion  # noqa: E402
from scripts.net import MedSegDiff  # noqa: E402
from scripts.networks.conditioning import MODULES  # noqa: E402
from scripts.networks.variants import VARIANTS  # noqa: E402
from scripts.training.losses import MultiTaskLoss  # noqa: E402

CONDITIONING = {
    "concatenation": [],
    "highway (default)": ["highway"],
    **{f"highway, {name}": ["highway", name] for name in MODULES},
    "all": ["highway", *MODULES],
}
MODALITIES = 4
BATCH = {"train": 4, "infer": 16}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--image_size", type=int, default=128, help="of the table of modules")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    print(hardware())
    print(markdown(variants(args.variants, args.repeats)))
    print(markdown(modules(args.repeats, args.image_size)))


def variants(names: Sequence[str], repeats: int) -> pd.DataFrame:
    """Per variant: millions of parameters, GFLOP of a slice with one evaluation, seconds of a training step."""
    rows = []
    for name in names:
        network = MedSegDiff(GaussianDiffusion(), MODALITIES, variant=name).eval()
        row = {
            "variant": name,
            "parameters (M)": millions(network),
            "of them highway (M)": millions(network.calibrator),
        }
        for size in (64, 256):
            image = torch.zeros(1, MODALITIES, size, size)
            row[f"GFLOP at {size} px"] = count(lambda: network(image))  # noqa: B023
        rows.append(row)
    seconds = {name: training_step(name, repeats) for name in names}  # one at a time: the large ones fill memory
    return pd.DataFrame(rows).assign(**{f"step of {BATCH['train']} slices at 64 px (s)": seconds.values()})


def training_step(variant: str, repeats: int) -> float:
    """Seconds of the fastest forward, backward and optimiser step."""
    network = MedSegDiff(GaussianDiffusion(), MODALITIES, variant=variant)
    loss, optimizer = MultiTaskLoss(network.diffusion), torch.optim.AdamW(network.parameters())
    shape = (BATCH["train"], 1, 64, 64)
    image, label, t = torch.randn(BATCH["train"], MODALITIES, 64, 64), torch.rand(shape).round(), torch.full((4,), 500)
    targets = {"label": label, "grade": torch.tensor([0, 1, 0, 1]), "timesteps": t}

    def step() -> None:
        optimizer.zero_grad()
        loss(network(image, torch.randn(shape), t), targets).backward()
        optimizer.step()

    return float(timed({"step": step}, repeats)["step"].min())


@torch.no_grad()
def modules(repeats: int, size: int) -> pd.DataFrame:
    """Per set of modules: milliseconds a slice, once and per evaluation, and the latter against the default."""
    image, x_t = torch.randn(BATCH["infer"], MODALITIES, size, size), torch.randn(BATCH["infer"], 1, size, size)
    t = torch.full((BATCH["infer"],), 500)
    networks = {
        name: MedSegDiff(GaussianDiffusion(), MODALITIES, conditioning=c).eval() for name, c in CONDITIONING.items()
    }
    conditions = {name: network.condition(image) for name, network in networks.items()}
    once = timed({name: lambda n=n: n.condition(image) for name, n in networks.items()}, repeats)
    step = timed({name: lambda n=n, c=conditions[name]: n(image, x_t, t, c) for name, n in networks.items()}, repeats)
    return pd.DataFrame(
        {
            "conditioning": name,
            "parameters (M)": millions(networks[name]),
            "once per slice (ms)": 1000 * once[name].min() / BATCH["infer"],
            "per evaluation (ms)": 1000 * step[name].min() / BATCH["infer"],
            "more per evaluation (%)": 100 * np.median(step[name] / step["highway (default)"] - 1),
        }
        for name in networks
    )


def timed(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each call, ``[repeats]``; the calls take turns, after a turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def millions(network: torch.nn.Module) -> float:
    """Parameters, in millions."""
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


if __name__ == "__main__":
    main()
