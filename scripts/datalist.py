"""Decathlon-style data lists: the training and validation subjects of a run, written and read again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import nibabel as nib

from scripts.config import InputError, atomic_path
from scripts.grades import UNKNOWN_GRADE
from scripts.images import read_grid
from scripts.split import PATIENT_PATTERN, patient, split
from scripts.subjects import Item, check_headers, with_suffix


def make_datalist(
    items: Sequence[Item] | None,
    *,
    datalist_file: str | None,
    dataset_dir: str,
    fold: int,
    num_folds: int,
    seed: int,
    subset: str = "validation",
    num_eval_cases: int | None = None,
    modalities: Sequence[str],
    image_dir: str | None = None,
    patient_pattern: str = PATIENT_PATTERN,
) -> dict[str, list[Item]]:
    """Training and validation items: from ``datalist_file`` if given, else by :func:`scripts.split.split`.

    Args:
        items: subjects found by :func:`scripts.subjects.load_subjects`.
        datalist_file: Decathlon-style JSON written by an earlier run, perhaps edited.
        dataset_dir: folder that relative paths of ``datalist_file`` start from.
        fold: which fold validates.
        num_folds: number of folds; 5 gives the usual 80/20.
        seed: seed of the split.
        subset: ``validation``, or ``all`` to judge every subject found.
        num_eval_cases: judge only so many subjects of the subset.
        modalities: file suffixes that the files of ``datalist_file`` must have, or of ``image_dir`` the channels.
        image_dir: as in :func:`scripts.subjects.load_subjects`.
        patient_pattern: regular expression for :func:`scripts.split.patient`.

    Raises:
        InputError: for an unusable ``datalist_file``, ``subset`` or ``num_eval_cases``, or a patient on both sides.
    """
    if subset not in ("validation", "all"):
        raise InputError(f"subset='{subset}' must be 'validation' or 'all'")
    if num_eval_cases is not None and (not isinstance(num_eval_cases, int) or num_eval_cases < 1):
        raise InputError(f"num_eval_cases={num_eval_cases!r} must be a whole number, 1 or more")
    if datalist_file:
        parts = read_datalist(datalist_file, dataset_dir, modalities, image_dir)
    elif subset == "all":
        parts = {"training": [], "validation": list(items or [])}
    else:
        parts = split(items or [], fold, num_folds, seed, patient_pattern)
    training, validation = ({patient(i["subject"], patient_pattern) for i in part} for part in parts.values())
    if both := sorted(training & validation):
        raise InputError(f"{datalist_file}: patients on both sides of the split: {both[:5]}")
    if subset == "all":
        parts["validation"] = sorted(parts["training"] + parts["validation"], key=lambda item: item["subject"])
    parts["validation"] = parts["validation"][:num_eval_cases]
    return parts


@idist.one_rank_only()
def write_datalist(parts: Mapping[str, Sequence[Item]], file: str, dataset_dir: str) -> None:
    """Write ``{"training": [...], "validation": [...]}`` with paths relative to ``dataset_dir``."""
    root = Path(dataset_dir).resolve()

    def relative(value):
        if isinstance(value, list):
            return [relative(entry) for entry in value]
        path = Path(value).resolve()
        return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)

    content = {
        part: [{k: relative(v) if k in ("image", "label") else v for k, v in item.items()} for item in items]
        for part, items in parts.items()
    }
    with atomic_path(file) as path:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_datalist(
    file: str, dataset_dir: str, modalities: Sequence[str], image_dir: str | None = None
) -> dict[str, list[Item]]:
    """Read a JSON written by :func:`write_datalist`; its files must be of ``modalities`` and share one grid."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        parts = {
            part: [
                item
                | {"image": [str(Path(dataset_dir) / name) for name in item["image"]]}
                | {"label": str(Path(dataset_dir) / item["label"])}
                | {"subject": str(item["subject"]), "grade": int(item.get("grade", UNKNOWN_GRADE))}
                for item in content[part]
            ]
            for part in ("training", "validation")
        }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"datalist_file '{file}' is not a data list of this bundle: {error!r}") from error
    for item in parts["training"] + parts["validation"]:
        suffixes = [bool(with_suffix([Path(i)], m)) for i, m in zip(item["image"], modalities, strict=False)]
        fits = len(item["image"]) == 1 if image_dir else len(item["image"]) == len(modalities) and all(suffixes)
        if not fits or item["grade"] not in (UNKNOWN_GRADE, 0, 1):
            raise InputError(
                f"datalist_file '{file}': subject '{item['subject']}' must have an image for each of "
                f"{list(modalities)}, in this order, and grade 0, 1 or -1"
            )
        check_headers(item, modalities)
    return parts


def describe(parts: Mapping[str, Sequence[Item]], alpha: Sequence[float]) -> str:
    """Start-up summary: subjects, slices, n_LGG, n_HGG of each part, and alpha."""
    lines = []
    for part, items in parts.items():
        counts = Counter(item["grade"] for item in items)
        slices = sum(_num_slices(item["image"][0]) for item in items)
        lines.append(
            f"{part:<11} subjects={len(items)} slices={slices} "
            f"n_LGG={counts[0]} n_HGG={counts[1]} ungraded={counts[UNKNOWN_GRADE]}"
        )
    return "\n".join([*lines, f"alpha_LGG={alpha[0]:.4f} alpha_HGG={alpha[1]:.4f}"])


def _num_slices(file: str) -> int:
    grid = read_grid(file)
    return grid.shape[list(nib.io_orientation(grid.affine)[:, 0]).index(2)]
