"""The subjects of an inference in an object store."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from scripts.config import InputError, explain
from scripts.data.pictures import EXTENSION, by_stem
from scripts.data.subjects import EmptyFolder, Item, open_item
from scripts.streams.storage import Remote, Store


class RemoteSubjects:
    """What :class:`scripts.streams.subjects.Subjects` is for a folder, for an address such as ``s3://bucket/brains``.

    Args:
        dataset_dir, modalities, image_dir: see :func:`scripts.streams.subjects.list_subjects`.
        listed: names of subjects, each with its images; None looks into the store.

    Raises:
        InputError: if there is no subject, or the store cannot be used.
    """

    def __init__(
        self,
        dataset_dir: str,
        modalities: Sequence[str],
        image_dir: str | None = None,
        listed: Sequence[tuple[str, list[str]]] | None = None,
    ) -> None:
        self.store, self.modalities = Store(dataset_dir), list(modalities)
        self.sources = _find(self.store, image_dir) if listed is None else _listed(self.store, listed)
        self.names = [source.name for source in self.sources]

    def __len__(self) -> int:
        return len(self.sources)

    @contextlib.contextmanager
    def opened(self, source: Remote) -> Iterator[tuple[Item, dict[str, Any]]]:
        """The item of one of :attr:`sources`, whose files are here until the end of the block, and their states."""
        with self.store.fetched(source) as (folder, states):
            files = None if source.files is None else [str(folder / file) for file in source.files]
            try:
                item = folder if files is None else {"subject": source.name, "image": files}
                yield open_item(item, self.modalities), states
            except Exception as error:
                message = explain(error)
                if isinstance(error, EmptyFolder) or message is None:
                    raise
                # name the file where the user has it
                address = f"{self.store.url}/{source.folder}".rstrip("/")
                raise InputError(message.replace(str(folder), address)) from error

    def is_unchanged(self, file: str, state: Any) -> bool:
        """Whether an image still has a state of :meth:`opened`."""
        return self._states.get(file) == state

    @functools.cached_property
    def _states(self) -> dict[str, list[Any]]:
        """States of all files: a thousand in a request, where each file would take one."""
        return self.store.states()

    def check_output_dir(self, output_dir: str, mask_dir: str | None = None) -> None:
        """Raise InputError if ``output_dir`` holds objects of a subject, or masks."""
        url, root = output_dir.rstrip("/"), self.store.url
        if any(map(functools.partial(self._holds, url), self.sources)):
            raise InputError(f"output_dir '{output_dir}' holds volumes of the subjects; choose another folder")
        if mask_dir and url == f"{root}/{mask_dir}".rstrip("/"):
            raise InputError(f"output_dir '{output_dir}' holds the masks; choose another folder")

    def _holds(self, url: str, source: Remote) -> bool:
        """Whether an address lies in the folder of a subject, or is that of its images."""
        if source.files is None:
            return f"{url}/".startswith(f"{self.store.url}/{source.folder}/")
        return url == f"{self.store.url}/{PurePosixPath(source.folder, source.files[0]).parent}".removesuffix("/.")


def _listed(store: Store, listed: Sequence[tuple[str, list[str]]]) -> list[Remote]:
    """The subjects of a list."""
    if series := [name for name, files in listed if not all(map(EXTENSION.search, files))]:
        raise InputError(f"'{store.url}': {series[:5]} are no volumes or pictures; list DICOM series as folders")
    return [Remote(name, "", files) for name, files in listed]


def _find(store: Store, image_dir: str | None) -> list[Remote]:
    """The subjects in a store: files of ``image_dir``, or folders."""
    found = store.entries(image_dir or "")
    if not found:
        raise InputError(f"'{store.url}/{image_dir or ''}' is empty, or there is no such folder; check the address")
    if image_dir is not None:
        images = by_stem([name for name, is_folder in found.items() if not is_folder], f"'{store.url}/{image_dir}'")
        return [Remote(stem, image_dir.rstrip("/"), [name]) for stem, name in images.items()]
    folders = [name for name, is_folder in found.items() if is_folder and not name.startswith(".")]
    if not folders:
        raise InputError(
            f"'{store.url}' has no folder, but {list(found)[:5]}: expected one for each subject; if all "
            "images are in one folder, set 'image_dir'"
        )
    return [Remote(name, name) for name in folders]
