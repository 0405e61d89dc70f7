"""Tables of the benchmarks, and the hardware that they ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pandas as pd
import torch


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table with three significant digits; missing values are empty."""
    return str(table.astype(object).where(table.notna(), None).to_markdown(index=False, floatfmt=".3g"))


def hardware() -> str:
    """One line that names processor, threads, accelerator and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.is_file()
        else []
    )
    gpu = "no GPU"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        gpu = f"{properties.name} with {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return (
        f"hardware: {os.cpu_count()} x {names[0] if names else platform.processor()}, "
        f"{torch.get_num_threads()} threads, {gpu}; torch {torch.__version__}, Python {platform.python_version()}"
    )
