from __future__ import annotations

import pytest

from scripts.config import InputError
from scripts.data.split import patient, split


def cohort(counts=(40, 100, 10)):
    grades = [0] * counts[0] + [1] * counts[1] + [-1] * counts[2]
    return [{"subject": f"s{i:03d}", "grade": grade} for i, grade in enumerate(grades)]


def names(items):
    return {item["subject"] for item in items}


def test_folds_are_disjoint_complete_and_stratified():
    items = cohort()
    parts = [split(items, fold, 5, seed=0) for fold in range(5)]
    assert sorted(s for part in parts for s in names(part["validation"])) == sorted(names(items))
    for part in parts:
        assert not names(part["training"]) & names(part["validation"])
        assert len(part["validation"]) == 30
        assert sum(item["grade"] == 0 for item in part["validation"]) == 8


def test_split_depends_on_the_seed_alone():
    items = cohort()
    first = names(split(items, 0, 5, seed=0)["validation"])
    assert first == names(split(items[::-1], 0, 5, seed=0)["validation"])
    assert first != names(split(items, 0, 5, seed=1)["validation"])


def test_split_is_the_same_in_every_scikit_learn():
    # scikit-learn's own shuffle gives different folds in 1.7 and 1.9
    validation = split(cohort((3, 5, 2)), 0, 5, seed=0)["validation"]
    assert names(validation) == {"s001", "s007"}


def test_time_points_of_one_patient_stay_together():
    items = [{"subject": f"BraTS-GLI-{i:05d}-{t}", "grade": i % 2} for i in range(20) for t in (100, 101)]
    for fold in range(4):
        part = split(items, fold, 4, seed=0)
        sides = [{patient(s) for s in names(part[side])} for side in ("training", "validation")]
        assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("fold", "num_folds", "message"), [(5, 5, "fold=5"), (0, 200, "cannot split"), (0, 1, "cannot")]
)
def test_impossible_splits(fold, num_folds, message):
    with pytest.raises(InputError, match=message):
        split(cohort(), fold, num_folds, seed=0)
