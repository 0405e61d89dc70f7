"""Run the bundle from a benchmark as its users do, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_bundle(configs: list[str], settings: list[str], folder: Path = ROOT) -> None:
    """Run files of ``configs/`` in the folder of a bundle with settings as on the command line; stop when it fails."""
    files = str([f"configs/{name}" for name in configs])
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", files]
    subprocess.run([*command, *map(str, settings)], cwd=folder, check=True)
