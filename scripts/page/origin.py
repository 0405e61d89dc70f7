"""How the results of a run were made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def origin(bundle_root: str, ckpt_path: str, device: Any, settings: Mapping[str, Any]) -> dict[str, str]:
    """Command, versions, digest of the weights, hardware and settings, as text.

    Args:
        bundle_root: folder of the bundle, whose name and version are given.
        ckpt_path: file of the weights.
        device: that computed.
        settings: of the run.
    """
    metadata = json.loads(Path(bundle_root, "configs", "metadata.json").read_text(encoding="utf-8"))
    libraries = ", ".join(f"{name} {version(name)}" for name in ("monai", "torch"))
    return {
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join([Path(sys.orig_argv[0]).name, *map(_quoted, sys.orig_argv[1:])]),
        "bundle": f"{metadata['name']} {metadata['version']}",
        "weights": f"{Path(ckpt_path).name}, SHA-256 {_digest(Path(ckpt_path))}",
        "libraries": f"Python {platform.python_version()}, {libraries}",
        "hardware": _hardware(torch.device(device)),
        **{name: str(value) for name, value in settings.items()},
    }


def _quoted(word: str) -> str:
    """A word of a command; lists of configurations hold single quotes, and are easier to read in double ones."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "unknown: there is no such file"


def _hardware(device: torch.device) -> str:
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    used = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{platform.machine()}, {threads}, computed on {used}"
