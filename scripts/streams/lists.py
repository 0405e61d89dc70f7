"""Lists of subjects: tables (CSV) and data lists in the style of the Medical Segmentation Decathlon (JSON)."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd
from monai.utils import ensure_tuple

from scripts.config import InputError, is_remote
from scripts.data.pictures import file_stem
from scripts.streams.storage import Store


def read_list(datalist_file: str, modalities: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Names of subjects, each with the names of its images. Whether these exist is not checked.

    Args:
        datalist_file: on a disk or in an object store. A table has the columns ``subject`` and the modalities. Of a
            data list, the list ``test`` is taken.
        modalities: columns of the table.

    Raises:
        InputError: if the list is damaged or empty, or a name is listed twice or cannot name a file.
    """
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
