"""Guards around a bundle run: errors for people, refused keys, the saved configuration, atomic files."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import ignite.distributed as idist
import torch
import yaml
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

logger = logging.getLogger(__name__)

BUNDLE_ROOT = Path(__file__).resolve().parents[1]


# errors of torch that come from outside: a part of their message, and what they mean
SIGNS = {
    "exited unexpectedly": "a process that loads data was killed, often for want of memory: lower num_workers or give "
    "cache_dir, and go on with configs/resume.yaml",
    "Connection closed by peer": "another process of this run died; its own message says why. Go on with "
    "configs/resume.yaml",
    "No module named 'mlflow'": "MLflow is not installed: pip install -e '.[tracking]'",
    "CUDA out of memory": "the GPU's memory is full: lower batch_size and raise accumulation_steps as much, or "
    "(in evaluation and inference) lower sampling_batch_size",
}


class InputError(ValueError):
    """Something a user gave is wrong; the message says what, where and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to do."""


def start_run(*bases: str) -> None:
    """First expression of every ``run`` list: short messages for our own errors, then the check of the keys.

    Args:
        bases: file names in ``configs/`` whose top-level keys are the known ones.

    Raises:
        InputError: for a top-level key that no base declares (MONAI would accept it silently), or a value of
            another kind than its default.
    """
    sys.excepthook = _report_own_error
    config = running_parser().get()
    check_keys(config, *bases)
    check_values(config, *bases)


def check_keys(config: dict, *bases: str) -> None:
    """Refuse top-level keys of ``config`` that no ``configs/<base>`` declares.

    Raises:
        InputError: naming each unknown key and the nearest known one.
    """
    known = {key for base in bases for key in ConfigParser.load_config_file(str(BUNDLE_ROOT / "configs" / base))}
    tracking = {*DEFAULT_MLFLOW_SETTINGS["configs"], ConfigParser.meta_key}  # type: ignore[misc]  # added by MONAI itself
    unknown = [key for key in config if key not in known | tracking]
    if unknown:
        hints = []
        for key in unknown:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hints.append(f"'{key}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
        raise InputError(f"unknown configuration key {', '.join(hints)}; the known keys stand in configs/{bases[0]}")


def check_values(config: dict, *bases: str) -> None:
    """Refuse values of another kind than their default in the last of ``bases``, and a device that is not there.

    A whole number whose default is at least 1 must be so too, others must not be negative. Defaults that are null or
    an expression say nothing about their kind.

    Raises:
        InputError: naming the key, its value and what it should be.
    """
    defaults = ConfigParser.load_config_files([str(BUNDLE_ROOT / "configs" / base) for base in bases])
    for key, default in defaults.items():
        value = config.get(key)
        if key not in config or isinstance(default, str) or default is None or str(value).startswith(("$", "@")):
            continue
        if isinstance(default, (bool, list, dict)):
            fits, wanted = isinstance(value, type(default)), type(default).__name__
        elif isinstance(default, int):
            least = 0 if key == "num_inference_steps" else min(default, 1)  # 0 is the calibration map
            wanted = f"whole number, {least} or more"
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        else:
            wanted, fits = "number, 0 or more", isinstance(value, (int, float)) and value >= 0
        if not fits:
            raise InputError(f"{key}={value!r} must be a {wanted}, such as {default!r}")
    strength = config.get("augmentation", 0)
    if isinstance(strength, (int, float)) and strength > 1:
        raise InputError(f"augmentation={strength} must lie between 0 and 1")
    device = str(config.get("device", ""))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device='{device}': no GPU can be used here; leave the key out, or set device=cpu")


@idist.one_rank_only()
def save_config(file: str) -> None:
    """Write the merged configuration of the running bundle to ``file``; it can be run again."""
    config = {k: v for k, v in running_parser().get().items() if k != ConfigParser.meta_key}
    with atomic_path(file) as path:
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds, and vanishes when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])  # writers choose their format by it
    handle, name = tempfile.mkstemp(prefix=".partial_", suffix=suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # mkstemp makes files that only the owner can read
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def warn_some(what: str, names: Sequence[str]) -> None:
    """Warn of what some are, with their number and the first names; of nothing where there are none."""
    if names:
        logger.warning(f"{len(names)} {what}: {list(names[:5])}{' ...' if len(names) > 5 else ''}")


def running_parser() -> ConfigParser:
    """The parser whose expression is being evaluated: MONAI hands a configuration no way to see itself."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigParser):
            return owner
        frame = frame.f_back
    raise RuntimeError("no bundle is running: this function is meant for the 'run' list of a configuration")


def _report_own_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """``sys.excepthook`` that prints our errors alone: MONAI wraps them in pages of 'failed to instantiate'."""
    message = explain(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"\nerror: {message}", file=sys.stderr)


def explain(error: BaseException) -> str | None:
    """What an error, or the one behind it, means to a user; None for those that only a developer can read."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (InputError, TrainingError)):
            return str(cause)
        for sign, meaning in SIGNS.items():
            if sign in str(cause):
                return meaning
        cause = cause.__cause__ or cause.__context__
    return None
