"""Run the bundle from a benchmark as its users do, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]


def command(configs: Sequence[str], settings: Sequence[object], processes: int = 0) -> list[str]:
    """Command that runs files of ``configs/`` with settings as on the command line; ``processes`` are torchrun's."""
    files = str([f"configs/{name}" for name in configs])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    run = ["-m", "monai.bundle", "run", "--config_file", files, *map(str, settings)]
    return [sys.executable, "-W", "ignore", *launcher, *run]


def options(keys: Mapping[str, object]) -> list[str]:
    """Keys and values as options of the command line."""
    return [part for key, value in keys.items() for part in (f"--{key}", "$None" if value is None else str(value))]


def parsed(words: Sequence[str]) -> dict[str, object]:
    """Keys and values of the options of a command line."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return {key.removeprefix("--"): yaml.safe_load(text) for key, text in pairs}


def read_configs(configs: Sequence[str], settings: Mapping[str, object]) -> ConfigParser:
    """The configuration of files of ``configs/`` with settings, to read parts of it here."""
    config = ConfigParser()
    config.read_config([str(ROOT / "configs" / name) for name in configs])
    config.update({**settings, "bundle_root": str(ROOT)})
    return config


def finish(words: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command without its output. If it fails, RuntimeError has its own message in the first line."""
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        own = re.search(r"^(?:\[rank\d+\]: ?)?error: (.*)", done.stderr, re.MULTILINE)
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{own[1] if own else lines[-1]}\n{done.stderr}")


def run_bundle(configs: Sequence[str], settings: Sequence[object], folder: Path = ROOT) -> None:
    """Run files of ``configs/`` in the folder of a bundle with settings; stop when it fails."""
    subprocess.run(command(configs, settings), cwd=folder, check=True)
