"""What an inference has finished, so that it can be interrupted, started again and shared by several machines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.config import BUNDLE_ROOT, atomic_path
from scripts.data.dicom import is_dicom
from scripts.data.subjects import Item, item_files

# keys that decide where and how fast an inference runs, not what it finds
FREE = ("imports", "run", "bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "ckpt_path", "onnx_dir",
    "datalist_file", "scheduler", "displayable_configs", "label_app")  # fmt: skip


def origin_of(config: Mapping[str, Any], weights: Sequence[str]) -> str:
    """Digest of everything that decides what a run finds in a subject: weights, settings and code.

    Args:
        config: the running configuration.
        weights: files of weights, and folders of exports; some may not exist.
    """
    digest = hashlib.sha256()
    settings = {key: value for key, value in config.items() if key not in FREE}
    digest.update(json.dumps(settings, default=str, sort_keys=True).encode())
    code = sorted((BUNDLE_ROOT / "scripts").rglob("*.py"))
    for path in [*map(Path, weights), *code]:
        for file in [path] if path.is_file() else sorted(filter(Path.is_file, path.glob("*"))):
            digest.update(file.read_bytes())
    return digest.hexdigest()


class Manifest:
    """Records of the finished subjects of an inference: ``<output_dir>/manifest/<subject>.json``.

    A record is written in one step, after all other files of its subject. It holds the origin of the results
    (:func:`origin_of`), size and time of the images, or of a folder of DICOM images, and the rows of the reports.

    Args:
        output_dir: of the inference.
        origin: of its results.
    """

    def __init__(self, output_dir: str, origin: str) -> None:
        self.folder, self.origin = Path(output_dir) / "manifest", origin

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def has(self, name: str) -> bool:
        """Whether a subject is finished: by the same weights, settings and code, with the same images."""
        record = _read(self._file(name))
        return record is not None and record["origin"] == self.origin and _unchanged(record["images"])

    def write(self, item: Item, rows: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Add the record of an item: the rows of each report."""
        files = item_files(item)  # of a series one image; its folder tells of others that come or go
        files += sorted({str(Path(file).parent) for file in files if is_dicom(file)})
        images = {file: _state(file) for file in files}
        record = {"origin": self.origin, "images": images, "rows": rows}
        with atomic_path(self._file(item["subject"])) as path:
            path.write_text(json.dumps(record, default=lambda number: number.item()), encoding="utf-8")

    def records(self, names: Sequence[str]) -> Records:
        """The records of the finished subjects among ``names``."""
        read = (_read(self._file(name)) for name in names)
        rows = [record["rows"] for record in read if record and record["origin"] == self.origin]
        digest = hashlib.sha256(json.dumps([self.origin, rows]).encode()).hexdigest()
        return Records(self.folder / ".written", digest, rows)


class Records(NamedTuple):
    """Rows of each report, subject by subject, and whether the reports were written of them."""

    mark: Path
    digest: str
    rows: list[list[list[dict[str, Any]]]]

    def are_written(self) -> bool:
        """Whether the reports are those of these records, so that nothing needs to be written."""
        return self.mark.is_file() and self.mark.read_text(encoding="utf-8") == self.digest

    def set_written(self) -> None:
        """Remember that the reports were written of these records."""
        with atomic_path(self.mark) as path:
            path.write_text(self.digest, encoding="utf-8")


def _read(file: Path) -> dict[str, Any] | None:
    """Content of a record; None if there is none, or it is damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    types = {"origin": str, "images": dict, "rows": list}
    valid = isinstance(record, dict) and {key: type(value) for key, value in record.items()} == types
    return record if valid else None


def _unchanged(images: Mapping[str, Any]) -> bool:
    try:
        return all(_state(file) == state for file, state in images.items())
    except OSError:
        return False


def _state(file: str) -> list[int]:
    """Size and time of the last change (ns)."""
    found = Path(file).stat()
    return [found.st_size, found.st_mtime_ns]
