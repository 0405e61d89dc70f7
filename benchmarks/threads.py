"""How fast training steps run on an idle and on a busy machine, by the number and the waiting policy of the threads.

OpenMP's threads spin while they wait. Beside another busy process they then take the cores from the threads that they
wait for. Each case runs in a process of its own, because OpenMP reads its environment once.

Example:
    python benchmarks/threads.py --seconds 10
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import hardware, markdown  # noqa: E402

CORES = os.cpu_count() or 1
CASES = {
    f"{CORES} threads that spin": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "ACTIVE"},
    f"{CORES} threads, OpenMP's default": {"OMP_NUM_THREADS": str(CORES)},
    f"{CORES} threads that sleep (PASSIVE)": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = "while True: pass"


def main() -> None:
    """Print training steps per second of the demo's network, idle and beside one busy process per load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="length of each measurement")
    parser.add_argument("--loads", type=int, nargs="+", default=[0, 1, CORES], help="numbers of other busy processes")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the measured process
    args = parser.parse_args()
    if args.inside:
        print(steps_per_second(args.seconds))
        return
    rows = []
    for name, variables in CASES.items():
        row: dict = {"threads": name}
        for load in args.loads:
            others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(load)]
            try:
                environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
                command = [sys.executable, __file__, "--inside", "--seconds", str(args.seconds)]
                done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
            finally:
                for other in others:
                    other.kill()
                    other.wait()
            row[f"steps/s beside {load} busy processes"] = float(done.stdout.split()[-1])
        rows.append(row)
    print(hardware())
    print(markdown(pd.DataFrame(rows)))


def steps_per_second(seconds: float) -> float:
    """Training steps of the demo's network on synthetic slices, after three that do not count."""
    import torch
    from monai.bundle import ConfigParser

    config = ConfigParser()
    config.read_config([str(ROOT / "configs" / name) for name in ("train.yaml", "demo.yaml")])
    config.update({"alpha": [1.0, 1.0], "device": "cpu"})
    network, loss, optimizer, inferer, prepare, batch_size, size = (
        config.get_parsed_content(key)
        for key in (
            *("network", "loss", "optimizer", "train::inferer", "train::trainer::prepare_batch"),
            *("batch_size", "image_size"),
        )
    )
    batch = {
        "image": torch.randn(batch_size, 4, size, size),
        "label": torch.rand(batch_size, 1, size, size).round(),
        "grade": torch.arange(batch_size) % 2,
        "empty": torch.zeros(batch_size, dtype=torch.bool),
        "subject": ["s"] * batch_size,
    }
    steps, start = -3, time.perf_counter()
    while steps < 3 or time.perf_counter() - start < seconds:
        if steps == 0:
            start = time.perf_counter()
        image, targets, _, arguments = prepare(batch)
        optimizer.zero_grad()
        loss(inferer(image, network, **arguments), targets).backward()
        optimizer.step()
        steps += 1
    return steps / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
