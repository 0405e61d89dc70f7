"""Run the bundle from a benchmark as its users do, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]


def command(configs: Sequence[str], settings: Sequence[object]) -> list[str]:
    """Command that runs files of ``configs/`` with settings as on the command line."""
    files = str([f"configs/{name}" for name in configs])
    return [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", files, *map(str, settings)]


def options(keys: Mapping[str, object]) -> list[str]:
    """Keys and values as options of the command line."""
    return [part for key, value in keys.items() for part in (f"--{key}", "$None" if value is None else str(value))]


def read_configs(configs: Sequence[str], settings: Mapping[str, object]) -> ConfigParser:
    """The configuration of files of ``configs/`` with settings, to read parts of it here."""
    config = ConfigParser()
    config.read_config([str(ROOT / "configs" / name) for name in configs])
    config.update({**settings, "bundle_root": str(ROOT)})
    return config


def run_bundle(configs: Sequence[str], settings: Sequence[object], folder: Path = ROOT) -> None:
    """Run files of ``configs/`` in the folder of a bundle with settings; stop when it fails."""
    subprocess.run(command(configs, settings), cwd=folder, check=True)
