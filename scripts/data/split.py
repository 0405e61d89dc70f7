"""Split subjects into training, validation and test by patient."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from scripts.config import InputError

PATIENT_PATTERN = r"(BraTS-\w+-\d+)-\d+"  # BraTS 2023 names the time point last: BraTS-GLI-00005-101 and -100
SUBSETS = ("training", "validation", "test")


def patient(subject: str, pattern: str = PATIENT_PATTERN) -> str:
    """Patient of a subject: group 1 of ``pattern`` if it matches the whole name, otherwise the name itself.

    Raises:
        InputError: if ``pattern`` is not a regular expression with a group.
    """
    try:
        match = re.fullmatch(pattern, subject)
        return match.group(1) if match else subject
    except (re.error, IndexError) as error:
        raise InputError(f"patient_pattern='{pattern}' is not a regular expression with a group: {error}") from error


def check_pattern(subjects: Iterable[str], pattern: str) -> None:
    """Raise InputError if ``pattern`` matches some names but not others: their patients would be separated."""
    names = sorted(subjects)
    patient("", pattern)
    other = [name for name in names if not re.fullmatch(pattern, name)]
    if 0 < len(other) < len(names):
        raise InputError(
            f"patient_pattern='{pattern}' matches {len(names) - len(other)} of {len(names)} names, but not "
            f"{other[:3]}; change it so that it matches every name, or set it to '(.+)' if every subject is a patient"
        )


def split(
    items: Sequence[Mapping[str, Any]],
    fold: int,
    num_folds: int | None,
    seed: int,
    validation_share: float = 0.1,
    patient_pattern: str = PATIENT_PATTERN,
) -> dict[str, list]:
    """Seeded split by patient, stratified by grade where there is one, into ``training``, ``validation`` and ``test``.

    Fold ``fold`` of ``num_folds`` is for testing. Of the other subjects, a share of the patients is for validation,
    which chooses the weights and fits the calibration, and the rest for training.

    Args:
        items: subjects.
        fold: 0 to ``num_folds - 1``.
        num_folds: number of folds; None keeps no subject for testing.
        seed: of the split.
        validation_share: share of the remaining patients, at most 0.5, as one of ``round(1 / share)`` folds. With 0 the
            test subjects are the validation subjects, too.
        patient_pattern: see :func:`patient`.

    Raises:
        InputError: if there are too few patients, or a number is out of range.
    """
    if isinstance(validation_share, bool) or not 0 <= validation_share <= 0.5:
        raise InputError(f"validation_share={validation_share!r} must lie between 0 and 0.5")
    rest: list = list(items)
    test: list = []
    if num_folds is not None:
        rest, test = _fold(items, fold, num_folds, seed, patient_pattern)
    if not validation_share:
        return {"training": rest, "validation": test, "test": test}
    patients = {patient(item["subject"], patient_pattern) for item in rest}
    if len(patients) < 2:
        raise InputError(
            f"{len(patients)} patient is left for training and validation, which need two; add subjects, or set "
            "validation_share=0"
        )
    training, validation = _fold(rest, 0, min(round(1 / validation_share), len(patients)), seed, patient_pattern)
    return {"training": training, "validation": validation, "test": test}


def _fold(
    items: Sequence[Mapping[str, Any]], fold: int, num_folds: int, seed: int, patient_pattern: str
) -> tuple[list, list]:
    """The items outside and inside of one fold."""
    groups: list = [patient(item["subject"], patient_pattern) for item in items]
    if not 0 <= fold < num_folds:
        raise InputError(f"fold={fold} is not one of the folds 0 to {num_folds - 1} (num_folds={num_folds})")
    if len(set(groups)) < max(num_folds, 2) or num_folds < 2:
        raise InputError(
            f"num_folds={num_folds} cannot split {len(set(groups))} patients; set it to at least 2 and at most the "
            "number of patients, or to null to train on all (to evaluate all subjects, set subset=all)"
        )
    # shuffled here: for the same seed, scikit-learn's own shuffle differs between its releases
    order = np.random.default_rng(seed).permutation(len(set(groups)))
    shuffled = dict(zip(sorted(set(groups)), order, strict=True))
    groups = [shuffled[group] for group in groups]
    folds = StratifiedGroupKFold(n_splits=num_folds)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        try:
            indices = list(folds.split(items, [item.get("grade", -1) for item in items], groups))
        except ValueError:  # every grade has fewer subjects than folds: nothing to stratify
            indices = list(folds.split(items, [0] * len(items), groups))
    outside, inside = indices[fold]
    return [items[i] for i in outside], [items[i] for i in inside]
