"""Grades of subjects from a table, and the class weights that balance them. There may be any number of grades."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.utils.class_weight import compute_class_weight

from scripts.config import InputError

logger = logging.getLogger(__name__)

GRADE_LABELS = {"LGG": 0, "HGG": 1}
UNKNOWN_GRADE = -1


def grade_names(grade_labels: Mapping[str, int]) -> list[str]:
    """Name of each class. Grades with the same class index are joined by ``/``.

    Args:
        grade_labels: class index of each grade, such as ``{"G2": 0, "G3": 1, "G4": 2}``.

    Raises:
        InputError: unless there are at least two indices, which are 0, 1, ... without a gap.
    """
    indices = sorted(set(grade_labels.values()))
    if indices != list(range(max(len(indices), 2))):
        raise InputError(
            f"grade_labels={dict(grade_labels)} must map the grades to two or more classes 0, 1, ... without a gap"
        )
    return ["/".join(str(name) for name, index in grade_labels.items() if index == i) for i in indices]


def read_grades(csv: Path, subject_column: str, grade_column: str, grade_labels: Mapping[str, int]) -> dict[str, int]:
    """Read ``{subject: class index}`` from a CSV file with columns in any order. The index of a blank grade is -1.

    Raises:
        InputError: naming the file and the missing column, the duplicate subject or the unknown grade.
    """
    grade_names(grade_labels)
    if not csv.is_file():
        raise InputError(f"grade_csv '{csv}' does not exist; correct the path, or leave the key null")
    try:
        table = pd.read_csv(csv, dtype=str)
    except ValueError as error:  # empty, not UTF-8, or not a table
        raise InputError(f"grade_csv '{csv}' cannot be read as a table: {error}") from error
    table.columns = table.columns.str.strip()
    for key, column in (("subject_column", subject_column), ("grade_column", grade_column)):
        if column not in table:
            raise InputError(f"{csv} has no column '{column}' (it has {list(table.columns)}); set '{key}'")
    table = table[[subject_column, grade_column]].apply(lambda column: column.str.strip())
    table = table.dropna(subset=[subject_column])
    duplicates = table[subject_column][table[subject_column].duplicated()].unique().tolist()
    if duplicates:
        raise InputError(f"{csv} lists subjects more than once: {duplicates[:5]}; keep one row per subject")
    indices = {str(name): index for name, index in grade_labels.items()}
    unknown = table[~table[grade_column].isin([*indices, "", np.nan])]
    if len(unknown):
        subject, grade = unknown.iloc[0]
        raise InputError(
            f"{csv}: subject '{subject}' has grade '{grade}', not one of {list(indices)}; correct the table, or set "
            "'grade_labels'"
        )
    classes = table[grade_column].map(indices).fillna(UNKNOWN_GRADE).astype(int)
    return dict(zip(table[subject_column], classes, strict=True))


def class_weights(items: Sequence[Mapping], grade_labels: Mapping[str, int]) -> list[float]:
    """Class weights alpha of the grading loss: n / (K n_c) for K grades, with n subjects, n_c of them of grade c.

    Subjects without a grade are not counted. A grade without subjects gets weight 1, is not counted in K and is named
    in a warning.

    Args:
        items: training subjects with their ``grade``.
        grade_labels: class index of each grade.
    """
    names = grade_names(grade_labels)
    grades = [item["grade"] for item in items if item["grade"] != UNKNOWN_GRADE]
    present = np.unique(grades).astype(int)
    absent = [name for index, name in enumerate(names) if index not in present]
    if absent:
        logger.warning(f"no training subject has the grade {', '.join(absent)}: alpha is 1 and its AUC is undefined")
    weights = np.ones(len(names))
    if len(present):
        weights[present] = compute_class_weight("balanced", classes=present, y=grades)
    return weights.tolist()


def class_frequencies(items: Sequence[Mapping], grade_labels: Mapping[str, int]) -> np.ndarray:
    """Share of each grade among the graded subjects ``[K]``.

    Each grade counts once more than it occurs (Laplace), so that no share is 0.
    """
    grades = np.array([item["grade"] for item in items if item["grade"] != UNKNOWN_GRADE], dtype=int)
    counts = np.bincount(grades, minlength=len(grade_names(grade_labels))) + 1.0
    return counts / counts.sum()


def check_alpha(alpha: Sequence[float], grade_labels: Mapping[str, int]) -> None:
    """Raise InputError unless ``alpha`` holds one positive number per grade."""
    names = grade_names(grade_labels)
    numbers = isinstance(alpha, Sequence) and all(isinstance(value, (int, float)) and value > 0 for value in alpha)
    if not numbers or len(alpha) != len(names):
        raise InputError(f"alpha={alpha!r} must list one positive number per grade: {names}")
