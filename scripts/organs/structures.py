"""The structures of TotalSegmentator v2: names, numbers, groups and SNOMED codes, from ``configs/structures.json``."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.config import InputError, bundle_root

LABEL_SUFFIX = "labels"  # of the label map of a subject


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Each structure by its name, in the order of their numbers.

    A structure has ``number`` (its value in every label map that is read or written), ``name``, ``group`` (``organs``,
    ``vertebrae``, ``cardiac``, ``muscles`` or ``ribs``), ``colour`` and SNOMED codes as ``[value, meaning]``:
    ``category``, ``type`` and perhaps ``modifier`` (the side), ``region`` and ``region_modifier``.
    """
    file = Path(bundle_root("organs"), "configs", "structures.json")
    return {entry["name"]: entry for entry in json.loads(file.read_text(encoding="utf-8"))}


def chosen(names: Sequence[str] | None, known: Sequence[str] | None = None) -> list[str]:
    """Names of structures, in the order of their numbers.

    Args:
        names: structures, or groups that stand for all their structures; None stands for all known ones.
        known: the structures that may be chosen; None allows all of the catalogue.

    Raises:
        InputError: for a name that is neither, with the nearest known one, or an empty choice.
    """
    structures = catalogue()
    known = [name for name in structures if known is None or name in known]
    if names is None:
        return known
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not names:
        raise InputError(f"{names!r} must be a list of structures or of their groups, such as ['organs', 'heart']")
    groups = {structures[name]["group"] for name in known}
    for name in names:
        if name not in groups and name not in known:
            near = difflib.get_close_matches(name, [*known, *groups], n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the known ones are {', '.join(known)}"
            raise InputError(f"unknown structure '{name}'; {hint}")
    return [name for name in known if name in names or structures[name]["group"] in names]


def numbers(names: Sequence[str]) -> list[int]:
    """The values of structures in label maps."""
    return [catalogue()[name]["number"] for name in names]
