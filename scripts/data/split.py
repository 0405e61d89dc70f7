"""Split subjects into training and validation by patient."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from scripts.config import InputError

PATIENT_PATTERN = r"(BraTS-\w+-\d+)-\d+"  # BraTS 2023 names the time point last: BraTS-GLI-00005-101 and -100


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


def split(
    items: Sequence[Mapping[str, Any]], fold: int, num_folds: int, seed: int, patient_pattern: str = PATIENT_PATTERN
) -> dict[str, list]:
    """Seeded split by patient, stratified by grade where there is one.

    Fold ``fold`` is for validation, the other folds for training.

    Raises:
        InputError: if there are fewer patients than folds, or ``fold`` is out of range.
    """
    groups: list = [patient(item["subject"], patient_pattern) for item in items]
    if not 0 <= fold < num_folds:
        raise InputError(f"fold={fold} is not one of the folds 0 to {num_folds - 1} (num_folds={num_folds})")
    if len(set(groups)) < max(num_folds, 2) or num_folds < 2:
        raise InputError(
            f"num_folds={num_folds} cannot split {len(set(groups))} patients; set it to at least 2 and at most the "
            "number of patients (to evaluate all subjects, set subset=all)"
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
    train, validation = indices[fold]
    return {"training": [items[i] for i in train], "validation": [items[i] for i in validation]}
