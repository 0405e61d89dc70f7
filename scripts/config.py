"""Checks of a bundle run: short error messages, unknown keys, the saved configuration, atomic writes."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from pydoc import locate
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import ignite.distributed as idist
import torch
import yaml
from monai.bundle import ConfigComponent, ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

logger = logging.getLogger(__name__)

BUNDLE_ROOT = Path(__file__).resolve().parents[1]  # of the main bundle; the others are in its folder bundles/
# the metadata, and what `--tracking mlflow` adds
ADDED_BY_MONAI = {*DEFAULT_MLFLOW_SETTINGS["configs"], ConfigParser.meta_key} - {"output_dir"}  # type: ignore[misc]

# errors of other libraries: a part of their message, and what it means to the user
KNOWN_ERRORS = {
    "exited unexpectedly": "a data-loading process was killed, usually because memory ran out. Lower num_workers or "
    "set cache_dir, then continue with configs/resume.yaml",
    "Connection closed by peer": "another process of this run died; its own message gives the reason. Continue with "
    "configs/resume.yaml",
    "No module named 'mlflow'": "MLflow is not installed: pip install -e '.[tracking]'",
    "No space left on device": "the disk is full: free some space, then start the same command again; a training "
    "continues with configs/resume.yaml",
    "CUDA out of memory": "the GPU is out of memory. In training steps, lower batch_size and raise "
    "train::trainer::accumulation_steps. In validation and evaluation, lower validate::inferer::sampling_batch_size; "
    "in inference, inferer::sampling_batch_size. num_samples must not exceed it, so lower that, too, if need be",
    "CUDA error: out of memory": "the GPU has no memory left to start with: another program uses it (nvidia-smi). End "
    "that program, or set device=cpu",
}
# keys of folders, and why they may not be addresses in an object store
PLACES = {
    "dataset_dir": "the headers of all volumes are read first, and then each volume many times; copy the data set",
    "output_dir": "its files are appended to and read again; copy them to the store afterwards",
    "ckpt_dir": "weights are read from a file",
    "cache_dir": "the files of the cache are mapped into memory",
}
REMOTE = ("dataset_dir", "output_dir")  # inference reads and writes them subject by subject
# keys that may differ when training is resumed: they decide where and how fast it runs, not what is learned
FREE_ON_RESUME = (
    "imports", "run", "bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "ckpt_path", "cache_dir", "device",
    "num_workers", "distributed", "resume", "dataset_name", "datalist_file", "grade_csv",
    "train::compile", "validate::inferer::sampling_batch_size",
)  # fmt: skip


NULLABLE = ("num_folds",)  # keys that may be null although their default is not
MAX_REASONS = 20  # listed in one message


class InputError(ValueError):
    """The user's input is wrong. The message says what, where, and what to do."""


class TrainingError(RuntimeError):
    """Training cannot continue. The message says where it stopped and what to do."""


def bundle_root(name: str) -> str:
    """Folder of a further bundle, which has ``configs/`` and ``models/``.

    It is ``bundles/<name>`` of the repository, wherever the command runs. A released bundle is its own root.
    """
    folder = BUNDLE_ROOT / "bundles" / name
    return str(folder if folder.is_dir() else BUNDLE_ROOT)


def is_remote(place: object) -> bool:
    """Whether a place is an address in an object store, such as ``s3://bucket/brains``, and no path of a disk."""
    return isinstance(place, str) and "://" in place


def start_run(*bases: str) -> ConfigParser:
    """Check the keys and values of the running configuration; from now on our own errors print as one line.

    Args:
        bases: files in ``configs/`` of the running bundle that declare the known top-level keys.

    Returns:
        The parser of the running configuration.

    Raises:
        InputError: for a top-level key that no base declares (MONAI accepts it silently), or a value of the wrong
            type.
    """
    sys.excepthook = _report_own_error
    parser = running_parser()
    configs = Path(parser.get_parsed_content("bundle_root"), "configs")
    if not configs.is_dir():
        raise InputError(f"bundle_root '{configs.parent}' has no folder configs/; leave the key out")
    files = [configs / base for base in bases]
    check_keys(parser.get(), *files)
    check_addresses(parser, configs)
    check_values(parser.get(), *files)
    check_places(parser, remote=REMOTE if bases[0] == "inference.yaml" else ())
    return parser


def check_places(parser: ConfigParser, remote: Sequence[str] = ()) -> None:
    """Replace ``file://`` addresses of folders by paths, and refuse other addresses.

    Args:
        parser: the running configuration.
        remote: keys that may be an address such as ``s3://bucket/brains``.

    Raises:
        InputError: for any other key that is one, with the reason.
    """
    for key, reason in PLACES.items():
        place = parser.get_parsed_content(key) if key in parser.get() else None
        if isinstance(place, str) and place.startswith("file://"):
            parser[key] = _path_of(key, place)
        elif is_remote(place) and key not in remote:
            raise InputError(f"{key}='{place}' must be a folder on a disk: {reason} (docs/scale.md)")


@functools.lru_cache
def read_config(file: Path) -> dict[str, Any]:
    """Content of a configuration file (YAML)."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there
    return yaml.load(file.read_text(encoding="utf-8"), loader)


def check_keys(config: dict, *bases: Path) -> None:
    """Refuse top-level keys of ``config`` that none of the files ``bases`` declares.

    Raises:
        InputError: naming each unknown key and the nearest known one.
    """
    known = {key for base in bases for key in read_config(base)}
    unknown = [key for key in config if key not in known | ADDED_BY_MONAI]
    if unknown:
        hints = ", ".join(_with_hint(key, known) for key in unknown)
        raise InputError(f"unknown configuration key {hints}; configs/{bases[0].name} has the known keys")


def check_addresses(parser: ConfigParser, configs: Path) -> None:
    """Refuse keys that nothing reads, below the top level: ``--train::compil true``, ``--loss::lambda_focl 1``.

    Args:
        parser: the running configuration.
        configs: folder of the configuration files of the running bundle.

    Raises:
        InputError: naming the address, the component that has no such argument, and the nearest known name.
    """
    known: dict[str, set[str]] = {"train": set(), "validate": set()}
    for file in sorted(configs.glob("*.yaml")):
        for key, value in read_config(file).items():
            group, _, rest = key.partition("::")
            if group in known:
                known[group] |= {rest.split("::")[0]} if rest else set(value)
    for group, names in known.items():
        for key in parser.get().get(group, {}):
            if key not in names:
                raise InputError(f"unknown configuration key {_with_hint(f'{group}::{key}', names)}")
    for address, component in _components(parser.get()):
        target = locate(ConfigComponent(component, locator=parser.locator).resolve_module_name())
        try:
            parameters = inspect.signature(target).parameters  # type: ignore[arg-type]
        except (TypeError, ValueError):  # some built-in functions have no signature
            continue
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue
        for key in component:
            if not key.startswith("_") and key not in parameters:
                name = component["_target_"].rsplit(".", 1)[-1]
                raise InputError(f"{address}: {name} has no argument {_with_hint(key, set(parameters))}")


def _components(node: Any, address: str = "") -> Iterator[tuple[str, dict]]:
    """Components of a configuration, with their addresses."""
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        yield address, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _components(value, f"{address}::{key}" if address else str(key))


def _with_hint(key: str, known: Iterable[str]) -> str:
    """The key and, if there is one, the most similar known name."""
    near = difflib.get_close_matches(key.split("::")[-1], known, n=1, cutoff=0.5)
    return f"'{key}'" + (f" (did you mean '{near[0]}'?)" if near else "")


def check_values(config: dict, *bases: Path) -> None:
    """Refuse values whose type differs from that of their default, and a device that does not exist.

    The defaults are those of ``bases``; the last file wins. An integer at the top level must be at least 1 if its
    default is, and must not be negative otherwise. Defaults that are null, an expression or a component are not
    checked.

    Raises:
        InputError: naming the key, its value and what it should be.
    """
    defaults = {key: value for base in bases for key, value in read_config(base).items()}
    for key, default in defaults.items():
        nullable = key in NULLABLE and config.get(key, default) is None
        if key in config and not isinstance(default, str) and default is not None and not nullable:
            _check_value(key, config[key], default)
    given = dict(_flatten(config))
    for address, default in _flatten(defaults):
        if "::" in address and isinstance(default, (bool, int, float)) and address in given:
            _check_value(address, given[address], default)
    device = str(config.get("device", ""))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device='{device}': no GPU is available here; leave the key out, or set device=cpu")


def _check_value(key: str, value: Any, default: Any) -> None:
    nested = "::" in key
    if str(value).startswith(("$", "@")) or (isinstance(default, dict) and "_target_" in default):
        return
    if isinstance(default, (bool, list, dict)):
        valid, expected = isinstance(value, type(default)), type(default).__name__
    elif nested or isinstance(default, float):
        expected = "number, 0 or more" if not nested else "number"
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and (nested or value >= 0)
    else:
        minimum = 0 if key == "num_inference_steps" else min(default, 1)  # 0 gives the calibration map
        expected = f"whole number, {minimum} or more"
        valid = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    if not valid:
        raise InputError(f"{key}={value!r} must be a {expected}, such as {default!r}")


@idist.one_rank_only()
def save_config(file: str) -> None:
    """Write the merged configuration of the running bundle to ``file``. The file can be run again."""
    config = {k: v for k, v in running_parser().get().items() if k != ConfigParser.meta_key}
    with atomic_path(file) as path:
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def resumable_config() -> dict[str, Any]:
    """What must not change when training is resumed: the running configuration as plain data, ``{"a::b": value}``.

    Top-level values that are expressions are replaced by their result where that is plain data, such as ``amp``.
    """
    parser = running_parser()
    config = {key: value for key, value in parser.get().items() if key not in ADDED_BY_MONAI}
    for key, value in config.items():
        if isinstance(value, str) and value.startswith(("$", "@")) and key not in FREE_ON_RESUME:
            result = parser.get_parsed_content(key)
            config[key] = result if isinstance(result, (bool, int, float, str, list, dict)) else value
    config = json.loads(json.dumps(config, default=str))
    for group in ("train", "validate"):  # `--tracking mlflow` adds to both
        handlers = config[group]["handlers"]
        config[group]["handlers"] = [handler for handler in handlers if "MLFlowHandler" not in str(handler)]
    kept = {
        key: value
        for key, value in _flatten(config)
        if not any(key == free or key.startswith(f"{free}::") for free in FREE_ON_RESUME)
    }
    return kept | {"number of processes": idist.get_world_size()}  # it multiplies the batch size


def _flatten(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    nested = isinstance(node, list) and any(isinstance(value, (dict, list)) for value in node)
    items = node.items() if isinstance(node, dict) else enumerate(node) if nested else ()
    if not items:
        yield path, node
    for key, value in items:
        yield from _flatten(value, f"{path}::{key}" if path else str(key))


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. It replaces ``path`` if the block succeeds and is removed if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])  # writers choose the format by it
    partial = path.parent / f".partial_{uuid.uuid4().hex}{suffix}"
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # with the permissions that umask leaves
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left of the files that they were writing in a folder and its folders."""
    for file in folder.rglob(".partial_*"):
        file.unlink(missing_ok=True)


def check_all(items: Iterable[Any], check: Callable[[Any], Any]) -> list[Any]:
    """Results of ``check`` for all items. If it refuses some of them, raise one InputError with all reasons."""
    results, reasons = [], []
    for item in items:
        try:
            results.append(check(item))
        except InputError as error:
            reasons.append(str(error))
    refuse_all(reasons)
    return results


def refuse_all(reasons: Sequence[str]) -> None:
    """Raise one InputError that lists the first 20 reasons; return if there is none."""
    if len(reasons) == 1:
        raise InputError(reasons[0])
    if reasons:
        rest = [f"... and {len(reasons) - MAX_REASONS} more"] if len(reasons) > MAX_REASONS else []
        raise InputError("\n- ".join([f"{len(reasons)} errors in the data:", *reasons[:MAX_REASONS], *rest]))


def warn_some(what: str, names: Sequence[str]) -> None:
    """Log the warning "<number> <what>: <first names>"; log nothing if ``names`` is empty."""
    if names:
        logger.warning(f"{len(names)} {what}: {list(names[:5])}{' ...' if len(names) > 5 else ''}")


def check_plain(value: Any, where: str) -> Any:
    """Return data that comes from outside, if nothing in it would be parsed when it reached a configuration.

    Args:
        value: strings, numbers, lists and dictionaries.
        where: where it comes from, for the message.

    Raises:
        InputError: for text that MONAI's parser would evaluate (``$``), look up (``@``) or read from a file (``%``).
    """
    if isinstance(value, str) and value.lstrip("+").startswith(("$", "@", "%")):
        raise InputError(f"{where}: text that starts with '$', '@' or '%' is refused: {value[:80]!r}")
    nested = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    if isinstance(nested, (list, tuple)):
        for item in nested:
            check_plain(item, where)
    return value


def running_parser() -> ConfigParser:
    """The parser of the running configuration, found on the call stack: MONAI offers no other way to get it."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigParser):
            return owner
        frame = frame.f_back
    raise RuntimeError("no bundle is running: call this function from a configuration")


def _path_of(key: str, address: str) -> str:
    """Path of a ``file://`` address."""
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InputError(f"{key}='{address}' must have a whole path, such as file:///data/brains")
    return unquote(parts.path)


def _report_own_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """``sys.excepthook`` that prints only our own message: MONAI adds pages of 'failed to instantiate'."""
    message = explain(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"\nerror: {message}", file=sys.stderr)


def explain(error: BaseException) -> str | None:
    """Message for the user of an error or of one of its causes; None if it needs a developer."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (InputError, TrainingError)):
            return str(cause)
        for text, meaning in KNOWN_ERRORS.items():
            if text in str(cause):
                return meaning
        cause = cause.__cause__ or cause.__context__
    return None
