"""Run a command of an arm and measure it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.bundle import ROOT
from scripts.config import atomic_path


class Usage(NamedTuple):
    """What a command took."""

    minutes: float
    gib: float  # peak memory


def run(command: Sequence[str], log: Path, threads: int, **variables: str) -> Usage:
    """Run a command in the root of the bundle; stop with the end of its log if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"OMP_NUM_THREADS": str(threads)} | variables
    start = time.perf_counter()
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{log}\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:]))
    return Usage((time.perf_counter() - start) / 60, used.ru_maxrss / 2**20)


def write_cost(folder: Path, minutes: float, epochs: int, training: Usage, judging: Usage, subjects: int) -> None:
    """Write ``cost.json``, which says that the run is finished."""
    cost = {"minutes": minutes, "epochs": epochs, "gib": training.gib, "seconds": 60 * judging.minutes / subjects}
    with atomic_path(folder / "cost.json") as path:
        path.write_text(json.dumps(cost, indent=1), encoding="utf-8")
