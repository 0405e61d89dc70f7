"""What an inference has finished, so that it can be interrupted, started again and shared by several machines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.config import BUNDLE_ROOT
from scripts.streams.storage import Disk, Store

WRITTEN = ".written"  # digest of the records of which the reports were written

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
    (:func:`origin_of`), the states of the images, and the rows of the reports.

    Args:
        folder: of the records.
        origin: of the results.
    """

    def __init__(self, folder: Disk | Store, origin: str) -> None:
        self.folder, self.origin = folder, origin

    def _read(self, names: Sequence[str]) -> Iterator[dict[str, Any] | None]:
        """Records of this origin in the order of their names; None where there is none, or it is damaged."""
        for content in self.folder.read_all([f"{name}.json" for name in names]):
            record = _parsed(content)
            yield record if record is not None and record["origin"] == self.origin else None

    def finished(self, names: Sequence[str], is_unchanged: Callable[[str, Any], bool]) -> set[str]:
        """The subjects that are finished: by the same weights, settings and code, with the same images.

        Args:
            names: of the subjects.
            is_unchanged: whether an image still has the state of its record.
        """
        return {
            name
            for name, record in zip(names, self._read(names), strict=True)
            if record and all(is_unchanged(file, state) for file, state in record["images"].items())
        }

    def write(self, name: str, images: Mapping[str, Any], rows: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Add the record of a subject: the states of its images, and the rows of each report."""
        record = {"origin": self.origin, "images": images, "rows": rows}
        self.folder.write(f"{name}.json", json.dumps(record, default=lambda number: number.item()))

    def records(self, names: Sequence[str]) -> Records:
        """The records of the finished subjects among ``names``."""
        rows = [record["rows"] for record in self._read(names) if record]
        digest = hashlib.sha256(json.dumps([self.origin, rows]).encode()).hexdigest()
        return Records(self.folder, digest, rows)


class Records(NamedTuple):
    """Rows of each report, subject by subject, and whether the reports were written of them."""

    folder: Disk | Store
    digest: str
    rows: list[list[list[dict[str, Any]]]]

    def are_written(self) -> bool:
        """Whether the reports are those of these records, so that nothing needs to be written."""
        return self.folder.read(WRITTEN) == self.digest.encode()

    def set_written(self) -> None:
        """Remember that the reports were written of these records."""
        self.folder.write(WRITTEN, self.digest)


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    """Content of a record; None if it is damaged."""
    try:
        record = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    types = {"origin": str, "images": dict, "rows": list}
    valid = isinstance(record, dict) and {key: type(value) for key, value in record.items()} == types
    return record if valid else None
