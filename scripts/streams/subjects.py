"""The subjects of an inference, which are listed at once, and opened when their turn comes."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, overload

import pandas as pd
from monai.utils import ensure_tuple

from scripts.config import InputError, explain, is_remote
from scripts.data.dicom import find_series, is_dicom, share_study
from scripts.data.pictures import EXTENSION, by_stem, file_stem, find_images
from scripts.data.subjects import (
    EmptyFolder,
    Item,
    check_folder,
    check_headers,
    check_names,
    folder_item,
    holds_volumes,
    item_files,
    no_subject,
    subject_folders,
)
from scripts.streams.storage import Remote, Store

OWN_DICOM = ("_seg.dcm", "_sr.dcm")  # ends of what inference writes
PROBED = 5  # folders of DICOM series that are read to see whether they are subjects, or series of one subject
Source = Path | Item | Remote  # what is known of a subject before it is opened


class Subjects(Sequence[Item]):
    """The subjects of an inference. Their names are listed at once; each is opened and checked when it is asked for.

    Args:
        dataset_dir: folder with one folder per subject, which holds NIfTI volumes or DICOM series. On a disk, it may
            also be the folder of a single subject. It may be an address such as ``s3://bucket/brains``.
        modalities: file suffixes, e.g. ``["t1", "t1ce", "t2", "flair"]``; their order is the channel order. With
            ``image_dir``: names of the channels of each image.
        image_dir: folder in ``dataset_dir`` whose files are the subjects; None means one folder per subject.
        datalist_file: list of the subjects, whose paths are relative to ``dataset_dir``; None looks into the folder.
            A table (CSV) has the columns ``subject`` and the modalities. Of a data list in the style of the Medical
            Segmentation Decathlon (JSON), the list ``test`` is taken.

    Raises:
        InputError: if there is no subject, or the list is damaged. When a subject is asked for, naming it and its file
            (:func:`scripts.data.subjects.check_headers`), or, as EmptyFolder, the folder without a volume.
    """

    def __init__(
        self,
        dataset_dir: str,
        modalities: Sequence[str],
        image_dir: str | None = None,
        datalist_file: str | None = None,
    ) -> None:
        check_names(modalities)
        self.dataset_dir, self.modalities = dataset_dir, list(modalities)
        listed = None if datalist_file is None else _listed(datalist_file, self.modalities)
        self.store = Store(dataset_dir) if is_remote(dataset_dir) else None
        self.sources: Sequence[Source]
        if self.store is not None:
            self.sources = _remote(self.store, image_dir, listed)
        elif listed is not None:
            root = check_folder(dataset_dir)
            self.sources = [{"subject": name, "image": [str(root / file) for file in files]} for name, files in listed]
        elif image_dir is not None:
            self.sources = find_images(dataset_dir, image_dir, None)
        else:
            self.sources = _folders(check_folder(dataset_dir), self.modalities)
        self.names = [name_of(source) for source in self.sources]

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._open(source) for source in self.sources[index]]
        return self._open(self.sources[index])

    def _open(self, source: Source) -> Item:
        """The item of files on a disk, with its headers checked."""
        if isinstance(source, Path):
            return folder_item(source, self.modalities)
        if isinstance(source, Remote):
            raise TypeError(f"'{source.name}' has no file here; use Subjects.opened")
        return check_headers(source, self.modalities)

    @contextlib.contextmanager
    def opened(self, source: Source) -> Iterator[tuple[Item, dict[str, Any]]]:
        """The item of one of :attr:`sources`, whose files are here until the end of the block.

        Returns:
            The item, and the states of its images, for :meth:`is_unchanged`.
        """
        if not isinstance(source, Remote):
            item = self._open(source)
            yield item, _states(item)
            return
        assert self.store is not None
        with self.store.fetched(source) as (folder, states):
            try:
                if source.files is None:
                    item = folder_item(folder, self.modalities)
                else:
                    images = [str(folder / file) for file in source.files]
                    item = check_headers({"subject": source.name, "image": images}, self.modalities)
                yield item, states
            except Exception as error:  # name the file where the user has it
                message = explain(error)
                if isinstance(error, EmptyFolder) or message is None or str(folder) not in message:
                    raise
                address = f"{self.store.url}/{source.folder}".rstrip("/")
                raise InputError(message.replace(str(folder), address)) from error

    def is_unchanged(self, file: str, state: Any) -> bool:
        """Whether an image still has a state of :meth:`opened`."""
        if self.store is not None:
            return self._stored.get(file) == state
        try:
            return _state(file) == state
        except OSError:
            return False

    @functools.cached_property
    def _stored(self) -> dict[str, list[Any]]:
        """States of all files of the store: a thousand in a request, where each file would take one."""
        assert self.store is not None
        return self.store.states()

    def check_output_dir(self, output_dir: str, mask_dir: str | None = None) -> None:
        """Raise InputError if ``output_dir`` holds volumes or masks: a prediction could replace a true mask."""
        if is_remote(output_dir) != (self.store is not None):
            return
        if self.store is not None:
            folder, masks = output_dir.rstrip("/"), f"{self.store.url}/{mask_dir}".rstrip("/")
            holds_volumes = self._holds_objects(folder)
        else:
            folder, masks = str(Path(output_dir).resolve()), str(Path(self.dataset_dir, mask_dir or "").resolve())
            holds_volumes = self._holds_volumes(Path(folder))
        if holds_volumes:
            raise InputError(f"output_dir '{output_dir}' holds volumes of the subjects; choose another folder")
        if mask_dir and folder == masks:
            raise InputError(f"output_dir '{output_dir}' holds the masks; choose another folder")

    def _holds_objects(self, url: str) -> bool:
        """Whether an address lies in the folder of a subject of the store."""
        assert self.store is not None
        folders = {source.folder for source in self.sources if isinstance(source, Remote)}
        return any(f"{url}/".startswith(f"{self.store.url}/{folder}".rstrip("/") + "/") for folder in folders)

    def _holds_volumes(self, folder: Path) -> bool:
        """Whether a folder on this disk is among those of the subjects."""
        local = [source for source in self.sources if not isinstance(source, Remote)]
        places = {source if isinstance(source, Path) else Path(source["image"][0]).parent for source in local}
        below = folder.is_dir() and folder.is_relative_to(Path(self.dataset_dir).resolve())
        series = below and any(map(is_dicom, (f for f in folder.iterdir() if not f.name.endswith(OWN_DICOM))))
        return series or (folder.is_dir() and any(place.is_dir() and place.samefile(folder) for place in places))


def name_of(source: Source) -> str:
    """The name of a subject that may not be opened yet."""
    return source["subject"] if isinstance(source, dict) else source.name


def _folders(root: Path, modalities: Sequence[str]) -> list[Path]:
    """The folders of the subjects below ``root``, or ``root`` itself if it is the folder of a subject.

    A folder with series is that of a subject, unless the first such folders share a study: they are then its series.
    """
    folders = subject_folders(root, modalities)
    first = list(itertools.islice(filter(_is_filled, folders), PROBED))
    if first and (any(map(holds_volumes, first)) or not share_study([find_series(folder) for folder in first])):
        return folders
    if not _is_filled(root):
        expected = f"folders with files such as <subject>/<subject>_{modalities[0]}.nii.gz or DICOM series"
        raise no_subject(root, expected)
    return [root.resolve()]


def _is_filled(folder: Path) -> bool:
    return holds_volumes(folder) or bool(find_series(folder))


def _remote(store: Store, image_dir: str | None, listed: Sequence[tuple[str, list[str]]] | None) -> list[Remote]:
    """The subjects of an object store, of which none is opened."""
    if listed is not None:
        if series := [name for name, files in listed if not all(map(EXTENSION.search, files))]:
            raise InputError(f"'{store.url}': {series[:5]} are no volumes or pictures; list DICOM series as folders")
        return [Remote(name, "", files) for name, files in listed]
    found = store.entries(image_dir or "")
    if image_dir is not None:
        images = by_stem([name for name, is_folder in found.items() if not is_folder], f"'{store.url}/{image_dir}'")
        return [Remote(stem, image_dir.rstrip("/"), [name]) for stem, name in images.items()]
    folders = [name for name, is_folder in found.items() if is_folder and not name.startswith(".")]
    if not folders:
        raise InputError(
            f"'{store.url}' has no folder, but {list(found)[:5] or 'nothing'}: expected one for each subject; if all "
            "images are in one folder, set 'image_dir'"
        )
    return [Remote(name, name) for name in folders]


def _listed(datalist_file: str, modalities: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Subjects of a table or data list, each with its images, of which only the names are checked; see Subjects."""
    try:
        content = _read(datalist_file)
        if datalist_file.lower().endswith(".csv"):
            table = pd.read_csv(io.BytesIO(content), dtype=str, usecols=["subject", *modalities], keep_default_na=False)
            found = [(row["subject"], [row[m] for m in modalities]) for row in table.to_dict("records")]
        else:
            entries = [entry if isinstance(entry, dict) else {"image": entry} for entry in json.loads(content)["test"]]
            images = [[str(PurePosixPath(image)) for image in ensure_tuple(entry["image"])] for entry in entries]
            found = [
                (str(entry.get("subject", file_stem(files[0]))), files)
                for entry, files in zip(entries, images, strict=True)
            ]
    except (OSError, AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"datalist_file '{datalist_file}' is no list of subjects ({error!r}); give a CSV with the columns subject "
            f"and {list(modalities)}, or a JSON data list with the list 'test'"
        ) from error
    names = [name for name, _ in found]
    if wrong := [name for name in names if not name or name.startswith(".") or Path(name).name != name]:
        raise InputError(f"datalist_file '{datalist_file}': {wrong[:5]} are no names of files")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"datalist_file '{datalist_file}': the subjects {twice[:5]} are listed twice")
    if not found:
        raise InputError(f"datalist_file '{datalist_file}' lists no subject to infer")
    return found


def _read(file: str) -> bytes:
    """Content of a file on a disk or in an object store."""
    if not is_remote(file):
        return Path(file).read_bytes()
    folder, _, name = file.rpartition("/")
    content = Store(folder).read(name)
    if content is None:
        raise FileNotFoundError(file)
    return content


def _states(item: Item) -> dict[str, list[int]]:
    """States of the images of an item, and of the folders of DICOM images."""
    files = item_files(item)  # of a series one image; its folder tells of others that come or go
    return {file: _state(file) for file in [*files, *sorted({str(Path(f).parent) for f in files if is_dicom(f)})]}


def _state(file: str) -> list[int]:
    """Size and time of the last change (ns)."""
    found = Path(file).stat()
    return [found.st_size, found.st_mtime_ns]
