"""Grades of subjects from a table, and the class weights that their imbalance asks for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scripts.config import InputError

logger = logging.getLogger(__name__)

GRADE_LABELS = {"LGG": 0, "HGG": 1}
UNKNOWN_GRADE = -1


def read_grades(csv: Path, subject_column: str, grade_column: str, grade_labels: Mapping[str, int]) -> dict[str, int]:
    """Read ``{subject: class index}`` from a CSV with any column order; blank grades are -1.

    Raises:
        InputError: naming the file and the missing column, duplicate subject or unknown grade.
    """
    if not set(grade_labels.values()) <= {0, 1}:
        raise InputError(f"grade_labels={dict(grade_labels)} must map each grade to 0 (LGG) or 1 (HGG)")
    if not csv.is_file():
        raise InputError(f"grade_csv '{csv}' does not exist")
    try:
        table = pd.read_csv(csv, dtype=str)
    except ValueError as error:  # empty, not UTF-8, not a table
        raise InputError(f"grade_csv '{csv}' cannot be read as a table: {error}") from error
    table.columns = table.columns.str.strip()
    for key, column in (("subject_column", subject_column), ("grade_column", grade_column)):
        if column not in table:
            raise InputError(f"{csv} has no column '{column}' (it has {list(table.columns)}); set '{key}'")
    table = table[[subject_column, grade_column]].apply(lambda column: column.str.strip())
    table = table.dropna(subset=[subject_column])
    twice = table[subject_column][table[subject_column].duplicated()].unique().tolist()
    if twice:
        raise InputError(f"{csv} lists subjects more than once: {twice[:5]}")
    unknown = table[~table[grade_column].isin([*grade_labels, "", np.nan])]
    if len(unknown):
        subject, grade = unknown.iloc[0]
        raise InputError(f"{csv}: subject '{subject}' has grade '{grade}', not one of {list(grade_labels)}")
    classes = table[grade_column].map(dict(grade_labels)).fillna(UNKNOWN_GRADE).astype(int)
    return dict(zip(table[subject_column], classes, strict=True))


def class_weights(items: Sequence[Mapping], alpha: Sequence[float] | None = None) -> list[float]:
    """Class weights of the grading loss, n / (2 n_c) over the graded subjects, or ``alpha`` as given.

    With one class, or none, every weight is 1 and a warning says so.

    Raises:
        InputError: when ``alpha`` is not two positive numbers.
    """
    if alpha is not None:
        if not isinstance(alpha, Sequence) or len(alpha) != 2 or not all(value > 0 for value in alpha):
            raise InputError(f"alpha={alpha!r} must be two positive numbers: [alpha_LGG, alpha_HGG]")
        return [float(value) for value in alpha]
    counts = Counter(item["grade"] for item in items)
    if not (counts[0] and counts[1]):
        logger.warning(f"grades of one class only (n_LGG={counts[0]}, n_HGG={counts[1]}): alpha is 1, AUC undefined")
        return [1.0, 1.0]
    return [(counts[0] + counts[1]) / (2 * counts[grade]) for grade in (0, 1)]
