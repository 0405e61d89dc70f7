"""The subjects of a run: data lists as in the Medical Segmentation Decathlon, and the subjects of an inference."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import nibabel as nib
from monai.utils import ensure_tuple

from scripts.config import InputError, atomic_path, check_all
from scripts.data.grades import GRADE_LABELS, UNKNOWN_GRADE, grade_names
from scripts.data.pictures import read_grid
from scripts.data.split import PATIENT_PATTERN, SUBSETS, check_pattern, patient, split
from scripts.data.subjects import (
    Item,
    check_headers,
    with_suffix,
)

OWN_DICOM = ("_seg.dcm", "_sr.dcm")  # ends of what inference writes
PROBED = 5  # folders of DICOM series that are read to see whether they are subjects, or series of one subject


def make_datalist(
    items: Sequence[Item] | None,
    *,
    datalist_file: str | None,
    dataset_dir: str,
    fold: int,
    num_folds: int | None,
    seed: int,
    validation_share: float = 0.1,
    subset: str | None = None,
    num_eval_cases: int | None = None,
    modalities: Sequence[str],
    image_dir: str | None = None,
    patient_pattern: str = PATIENT_PATTERN,
    grade_labels: Mapping[str, int] = GRADE_LABELS,
) -> dict[str, list[Item]]:
    """Training, validation and test items, read from ``datalist_file`` or made by :func:`scripts.data.split.split`.

    Args:
        items: subjects found by :func:`scripts.data.subjects.load_subjects`; not used with ``datalist_file``.
        datalist_file: JSON file written by an earlier run; it may have been edited. None splits ``items``.
        dataset_dir: folder to which relative paths in ``datalist_file`` refer.
        fold: fold used for testing.
        num_folds: number of folds; 5 gives the usual 80/20 split, None tests nothing.
        seed: seed of the split.
        validation_share: share of the other subjects that is used for validation.
        subset: for an evaluation, the subjects to score: ``test``, ``validation``, ``training`` or ``all``. The result
            then has the list ``judged``. ``all`` needs no split.
        num_eval_cases: largest number of judged subjects; None keeps all.
        modalities: file suffixes of the channels, in channel order; with ``image_dir``, names of the channels.
        image_dir: as in :func:`scripts.data.subjects.load_subjects`.
        patient_pattern: regular expression for :func:`scripts.data.split.patient`.
        grade_labels: class index of each grade; ``datalist_file`` must not have other indices.

    Raises:
        InputError: for an invalid ``datalist_file``, ``subset`` or ``num_eval_cases``, a pattern that matches only some
            names, an empty list, or a patient that is in two of the lists.
    """
    if subset not in (None, *SUBSETS, "all"):
        raise InputError(f"subset='{subset}' is not one of {[*SUBSETS, 'all']}")
    if num_eval_cases is not None and (not isinstance(num_eval_cases, int) or num_eval_cases < 1):
        raise InputError(f"num_eval_cases={num_eval_cases!r} must be a whole number, 1 or more")
    check_pattern([item["subject"] for item in items or []], patient_pattern)
    if datalist_file:
        subsets = read_datalist(datalist_file, dataset_dir, modalities, image_dir, grade_labels)
        check_separate(subsets, patient_pattern, f"datalist_file '{datalist_file}'")
    elif subset == "all":
        subsets = {"training": [], "validation": [], "test": list(items or [])}
    else:
        subsets = split(items or [], fold, num_folds, seed, validation_share, patient_pattern)
    if subset is None and not subsets["training"]:
        raise InputError("there is no subject to train on; check datalist_file, fold and num_folds")
    if subset is not None:
        subsets["judged"] = _judged(subsets, subset)[:num_eval_cases]
    return subsets


def _judged(subsets: Mapping[str, list[Item]], subset: str) -> list[Item]:
    """The items of a subset, or of all, each once."""
    if subset == "all":
        by_name = {item["subject"]: item for items in subsets.values() for item in items}
        return [by_name[name] for name in sorted(by_name)]
    if not subsets[subset]:
        raise InputError(
            f"subset '{subset}' has no subject, because of num_folds=null or validation_share=0; set subset to another "
            "of the subsets, or to 'all'"
        )
    return subsets[subset]


def check_separate(subsets: Mapping[str, Sequence[Item]], patient_pattern: str, source: str) -> None:
    """Raise InputError if a patient is in two of the lists. Only validation and test may be one and the same list."""
    pairs = [("training", "validation"), ("training", "test")]
    if subsets["validation"] != subsets["test"]:
        pairs.append(("validation", "test"))
    for first, second in pairs:
        one, other = ({patient(item["subject"], patient_pattern) for item in subsets[name]} for name in (first, second))
        if shared := sorted(one & other):
            raise InputError(
                f"{source}: patients both in {first} and in {second}: {shared[:5]}; list all subjects of a patient in "
                "one of them"
            )


@idist.one_rank_only()
def write_datalist(subsets: Mapping[str, Sequence[Item]], file: str, dataset_dir: str) -> None:
    """Write the lists ``training``, ``validation`` and ``test`` as JSON, with paths relative to ``dataset_dir``."""
    root = Path(dataset_dir).resolve()

    def relative(value):
        if isinstance(value, list):
            return [relative(entry) for entry in value]
        path = Path(value).resolve()
        return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)

    content = {
        name: [{k: relative(v) if k in ("image", "label") else v for k, v in item.items()} for item in items]
        for name, items in subsets.items()
    }
    with atomic_path(file) as path:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_datalist(
    file: str,
    dataset_dir: str,
    modalities: Sequence[str],
    image_dir: str | None = None,
    grade_labels: Mapping[str, int] = GRADE_LABELS,
) -> dict[str, list[Item]]:
    """Read a file written by :func:`write_datalist` and check the files, the grid and the grade of each subject.

    In a file without the list ``test``, as other programs write it, the validation subjects are the test subjects.

    Raises:
        InputError: if the file is not a data list, or naming the subject that is invalid.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        content.setdefault("test", content["validation"])
        subsets = {
            name: [
                item
                | {"image": [str(Path(dataset_dir) / file) for file in item["image"]]}
                | {"label": [str(Path(dataset_dir) / file) for file in ensure_tuple(item["label"])]}
                | {"subject": str(item["subject"]), "grade": int(item.get("grade", UNKNOWN_GRADE))}
                for item in content[name]
            ]
            for name in SUBSETS
        }
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"datalist_file '{file}' is not a data list of this bundle ({error!r}); give a datalist.json of a training"
        ) from error
    valid_grades = [UNKNOWN_GRADE, *range(len(grade_names(grade_labels)))]

    def check(item: Item) -> None:
        images = item["image"]
        suffixes_match = all(with_suffix([Path(i)], m) for i, m in zip(images, modalities, strict=False))
        images_match = len(images) == 1 if image_dir else len(images) == len(modalities) and suffixes_match
        if not images_match or item["grade"] not in valid_grades:
            raise InputError(
                f"datalist_file '{file}': subject '{item['subject']}' must have an image for each of "
                f"{list(modalities)}, in this order, and a grade from {valid_grades} (-1: unknown)"
            )
        check_headers(item, modalities)

    check_all(itertools.chain(*subsets.values()), check)
    return subsets


def describe(
    subsets: Mapping[str, Sequence[Item]],
    patient_pattern: str = PATIENT_PATTERN,
    alpha: Sequence[float] = (),
    grade_labels: Mapping[str, int] | None = None,
) -> str:
    """Summary for the log: numbers of subjects, patients, slices and grades per subset, and the class weights.

    Args:
        subsets: items by the name of their subset.
        patient_pattern: see :func:`scripts.data.split.patient`.
        alpha: class weights.
        grade_labels: class index of each grade; None for a network that does not grade.
    """
    names = grade_names(grade_labels) if grade_labels else []
    lines = []
    for name, items in subsets.items():
        counts = Counter(item.get("grade", UNKNOWN_GRADE) for item in items)
        patients = len({patient(item["subject"], patient_pattern) for item in items})
        slices = sum(_num_slices(item["image"][0]) for item in items)
        graded = [f"n_{grade}={counts[index]}" for index, grade in enumerate(names)]
        graded += [f"ungraded={counts[UNKNOWN_GRADE]}"] if names else []
        lines.append(" ".join([f"{name:<11} subjects={len(items)} patients={patients} slices={slices}", *graded]))
    weights = [f"alpha_{grade}={value:.4f}" for grade, value in zip(names, alpha, strict=True)] if names else []
    return "\n".join([*lines, *([" ".join(weights)] if weights else [])])


def _num_slices(file: str) -> int:
    grid = read_grid(file)
    return grid.shape[list(nib.io_orientation(grid.affine)[:, 0]).index(2)]
