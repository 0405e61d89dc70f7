"""Folders on a disk or in an object store, such as ``s3://bucket/brains``, which fsspec reads and writes.

The readers and writers of MONAI, nibabel, ITK and pydicom need files. Those of a subject are therefore copied into a
temporary folder while it is computed, and what is written is sent from a temporary folder.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fsspec import url_to_fs

from scripts.config import InputError, atomic_path, is_remote

BATCH = 1000  # objects that are read at once


class Disk:
    """A folder on a disk."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def read(self, name: str) -> bytes | None:
        """Content of a file; None if there is none."""
        try:
            return (self.folder / name).read_bytes()
        except OSError:
            return None

    def read_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """Contents of files in the order of their names; None where there is none."""
        return map(self.read, names)

    def write(self, name: str, text: str) -> None:
        """Write a file in one step."""
        with atomic_path(self.folder / name) as path:
            path.write_text(text, encoding="utf-8")


class Remote(NamedTuple):
    """A subject in an object store.

    Args:
        name: of the subject.
        folder: name of the folder of its files, relative to that of the data set.
        files: names of the images, relative to ``folder``; None means all files of the folder.
    """

    name: str
    folder: str
    files: list[str] | None = None


class Store:
    """A folder of an object store.

    Args:
        url: address, such as ``s3://bucket/brains``.

    Raises:
        InputError: here and from every method, if the store cannot be reached or refuses.
    """

    # no __dict__: MONAI's DataLoader would follow that of fsspec for ever
    __slots__ = ("fs", "path", "url")

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with self._named():  # without caches: workers live longer than a run
            self.fs, self.path = url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)

    def entries(self, folder: str = "") -> dict[str, bool]:
        """Names in a folder, sorted, and whether each is a folder; empty if there is no such folder."""
        path = f"{self.path}/{folder}".rstrip("/")
        with self._named():
            try:
                entries = self.fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        found = {entry["name"].rstrip("/"): entry["type"] == "directory" for entry in entries}
        found.pop(path, None)  # an empty object, which some programs put for a folder
        return {name[len(path) + 1 :]: found[name] for name in sorted(found)}

    def states(self, folder: str = "") -> dict[str, list[Any]]:
        """Size and ETag of all files below a folder, by their names relative to this one."""
        with self._named():
            found = self.fs.find(f"{self.path}/{folder}".rstrip("/"), detail=True)
        files = {name[len(self.path) + 1 :]: info for name, info in found.items()}
        return {name: _state(info) for name, info in files.items() if not name.endswith("/")}  # marks of folders

    def read(self, name: str) -> bytes | None:
        """Content of a file; None if there is none."""
        with self._named():
            try:
                return self.fs.cat_file(f"{self.path}/{name}")
            except FileNotFoundError:
                return None

    def read_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """Contents of files in the order of their names; None where there is none."""
        existing, waiting = self.entries(), iter(names)
        while batch := list(islice(waiting, BATCH)):
            found = [name for name in batch if name in existing]
            with tempfile.TemporaryDirectory(prefix="read_") as temporary:
                local = {name: Path(temporary, str(i)) for i, name in enumerate(found)}
                with self._named():  # at the same time; fs.cat would take some names for patterns
                    self.fs.get([f"{self.path}/{name}" for name in found], [str(file) for file in local.values()])
                contents = {name: file.read_bytes() for name, file in local.items()}
            yield from map(contents.get, batch)

    def write(self, name: str, text: str) -> None:
        """Write a file, which appears in one step."""
        with self._named():
            self.fs.pipe_file(f"{self.path}/{name}", text.encode())

    def check_writable(self) -> None:
        """Write and remove a small file, so that a missing right is not found after hours of work."""
        self.write(".writable", "")
        with self._named():
            self.fs.rm_file(f"{self.path}/.writable")

    def send(self, folder: Path) -> None:
        """Move all files of a folder of this machine to this one. Each appears in one step."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        with self._named():
            self.fs.put([str(f) for f in files], [f"{self.path}/{f.relative_to(folder).as_posix()}" for f in files])
        for file in files:
            file.unlink()

    @contextlib.contextmanager
    def fetched(self, source: Remote) -> Iterator[tuple[Path, dict[str, list[Any]]]]:
        """Copy the files of a subject into a temporary folder that has its name, until the end of the block.

        Returns:
            The folder, and the states of the files (:meth:`states`).

        Raises:
            InputError: if there is no such file, or a name leads out of the folder.
        """
        if source.files is None:
            states = self.states(source.folder)
        else:
            states = {str(PurePosixPath(source.folder, name)): [] for name in source.files}
        for name in states:
            if {"", ".", ".."} & set(name.split("/")):
                raise InputError(f"subject '{source.name}': '{self.url}/{name}' leads out of its folder; rename it")
        with tempfile.TemporaryDirectory(prefix="subject_") as temporary:
            folder = Path(temporary, source.name)
            folder.mkdir()
            local = [folder / PurePosixPath(name).relative_to(source.folder) for name in states]
            with self._named():
                if source.files is not None:
                    states = {name: _state(self.fs.info(f"{self.path}/{name}")) for name in states}
                self.fs.get([f"{self.path}/{name}" for name in states], [str(file) for file in local])
            yield folder, states

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Raise errors of the store as InputError, which names it."""
        try:
            yield
        except InputError:
            raise
        except ImportError as error:
            raise InputError(f"'{self.url}': {error}; for s3://, pip install -e '.[storage]'") from error
        except Exception as error:  # each store has classes of its own
            raise InputError(
                f"'{self.url}' cannot be used: {type(error).__name__}: {error}; check the address, the credentials "
                "and AWS_ENDPOINT_URL (docs/scale.md)"
            ) from error


class Output:
    """Where a run writes: a folder of this machine, or a temporary one whose files are moved to an object store."""

    def __init__(self, output_dir: str) -> None:
        self.store = Store(output_dir) if is_remote(output_dir) else None
        self.temporary = tempfile.TemporaryDirectory(prefix="output_") if self.store else None
        self.folder = Path(self.temporary.name if self.temporary else output_dir)

    def place(self, folder: str) -> Disk | Store:
        """A folder of the output, to read from and to write to."""
        return Store(f"{self.store.url}/{folder}") if self.store else Disk(self.folder / folder)

    def check_writable(self) -> None:
        """Raise InputError if nothing can be written to the store."""
        if self.store:
            self.store.check_writable()

    def send(self) -> None:
        """Move what was written to where it belongs."""
        if self.store:
            self.store.send(self.folder)


def _state(info: dict[str, Any]) -> list[Any]:
    return [info["size"], str(info.get("ETag") or info.get("mtime"))]
