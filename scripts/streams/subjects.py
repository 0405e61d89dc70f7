"""The subjects of an inference, which are listed at once, and opened when their turn comes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from scripts.config import InputError, is_remote
from scripts.data.dicom import find_series, is_dicom, share_study
from scripts.data.pictures import find_images
from scripts.data.subjects import (
    Item,
    check_folder,
    check_names,
    holds_volumes,
    item_files,
    no_subject,
    open_item,
    subject_folders,
)
from scripts.streams.lists import read_list
from scripts.streams.remote import RemoteSubjects
from scripts.streams.storage import Remote

OWN_DICOM = ("_seg.dcm", "_sr.dcm")  # ends of what inference writes
PROBED = 5  # folders of DICOM series that are read to see whether they are subjects, or series of one subject


def list_subjects(
    dataset_dir: str,
    modalities: Sequence[str],
    image_dir: str | None = None,
    datalist_file: str | None = None,
) -> Subjects | RemoteSubjects:
    """The subjects of an inference.

    Args:
        dataset_dir: folder with one folder per subject, which holds NIfTI volumes or DICOM series. On a disk, it may
            also be the folder of a single subject. It may be an address such as ``s3://bucket/brains``.
        modalities: file suffixes, e.g. ``["t1", "t1ce", "t2", "flair"]``; their order is the channel order. With
            ``image_dir``: names of the channels of each image.
        image_dir: folder in ``dataset_dir`` whose files are the subjects; None means one folder per subject.
        datalist_file: list of the subjects (:func:`scripts.streams.lists.read_list`), whose paths are relative to
            ``dataset_dir``; None looks into the folder.

    Raises:
        InputError: if there is no subject, or the list is damaged.
    """
    check_names(modalities)
    listed = None if datalist_file is None else read_list(datalist_file, modalities)
    kind = RemoteSubjects if is_remote(dataset_dir) else Subjects
    return kind(dataset_dir, modalities, image_dir, listed)


class Subjects(Sequence[Item]):
    """The subjects of a folder. Their names are listed at once; each is opened and checked when it is asked for.

    Args:
        dataset_dir, modalities, image_dir: see :func:`list_subjects`.
        listed: names of subjects, each with its images; None looks into the folder.

    Raises:
        InputError: if there is no subject. When a subject is asked for, naming it and its file
            (:func:`scripts.data.subjects.check_headers`), or, as EmptyFolder, the folder without a volume.
    """

    def __init__(
        self,
        dataset_dir: str,
        modalities: Sequence[str],
        image_dir: str | None = None,
        listed: Sequence[tuple[str, list[str]]] | None = None,
    ) -> None:
        self.root, self.modalities = check_folder(dataset_dir), list(modalities)
        self.sources: Sequence[Path | Item]  # what is known of each subject before it is opened
        if listed is not None:
            self.sources = [{"subject": n, "image": [str(self.root / file) for file in files]} for n, files in listed]
        elif image_dir is not None:
            self.sources = find_images(dataset_dir, image_dir, None)
        else:
            self.sources = _folders(self.root, self.modalities)
        self.names = [name_of(source) for source in self.sources]

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [open_item(source, self.modalities) for source in self.sources[index]]
        return open_item(self.sources[index], self.modalities)

    @contextlib.contextmanager
    def opened(self, source: Path | Item) -> Iterator[tuple[Item, dict[str, Any]]]:
        """The item of one of :attr:`sources`, and the states of its images, for :meth:`is_unchanged`."""
        item = open_item(source, self.modalities)
        files = item_files(item)  # of a series one image; its folder tells of others that come or go
        folders = sorted({str(Path(file).parent) for file in files if is_dicom(file)})
        yield item, {file: _state(file) for file in [*files, *folders]}

    def is_unchanged(self, file: str, state: Any) -> bool:
        """Whether an image still has a state of :meth:`opened`."""
        try:
            return _state(file) == state
        except OSError:
            return False

    def check_output_dir(self, output_dir: str, mask_dir: str | None = None) -> None:
        """Raise InputError if ``output_dir`` holds volumes or masks: a prediction could replace a true mask."""
        folder = Path(output_dir).resolve()
        places = {source if isinstance(source, Path) else Path(source["image"][0]).parent for source in self.sources}
        below = folder.is_dir() and folder.is_relative_to(self.root.resolve())
        series = below and any(map(is_dicom, (f for f in folder.iterdir() if not f.name.endswith(OWN_DICOM))))
        if series or (folder.is_dir() and any(place.is_dir() and place.samefile(folder) for place in places)):
            raise InputError(f"output_dir '{output_dir}' holds volumes of the subjects; choose another folder")
        if mask_dir and (self.root / mask_dir).resolve() == folder:
            raise InputError(f"output_dir '{output_dir}' holds the masks; choose another folder")


def name_of(source: Path | Item | Remote) -> str:
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


def _state(file: str) -> list[int]:
    """Size and time of the last change (ns)."""
    found = Path(file).stat()
    return [found.st_size, found.st_mtime_ns]
