"""How benchmarks say what they measured, and on what."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pandas as pd
import torch


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table, three significant digits."""
    rows = [
        [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row] for row in table.to_numpy(object)
    ]
    lines = [list(table.columns), ["---"] * len(table.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def hardware() -> str:
    """One line that names processor, threads, accelerator and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.is_file()
        else []
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"hardware: {os.cpu_count()} x {names[0] if names else platform.processor()}, "
        f"{torch.get_num_threads()} threads, {gpu}; torch {torch.__version__}, Python {platform.python_version()}"
    )
