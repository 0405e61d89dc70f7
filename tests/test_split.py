from __future__ import annotations

import pytest

from scripts.config import InputError
from scripts.data.split import check_pattern, patient, split


def cohort(counts=(40, 100, 10)):
    grades = [0] * counts[0] + [1] * counts[1] + [-1] * counts[2]
    return [{"subject": f"s{i:03d}", "grade": grade} for i, grade in enumerate(grades)]


def names(items):
    return {item["subject"] for item in items}


def test_folds_are_disjoint_complete_and_stratified():
    items = cohort()
    parts = [split(items, fold, 5, seed=0) for fold in range(5)]
    assert sorted(s for part in parts for s in names(part["test"])) == sorted(names(items))
    for part in parts:
        assert sum(len(subset) for subset in part.values()) == 150 == len(set().union(*map(names, part.values())))
        assert [len(part[name]) for name in ("training", "validation", "test")] == [108, 12, 30]
        assert [sum(item["grade"] == 0 for item in part[name]) for name in part] in ([29, 3, 8], [28, 4, 8])


def test_without_a_validation_share_the_test_subjects_choose():
    parts = split(cohort(), 1, 5, seed=0, validation_share=0)
    assert parts["validation"] == parts["test"] == split(cohort(), 1, 5, seed=0)["test"]
    assert len(parts["training"]) == 120


def test_without_folds_all_are_trained_on():
    parts = split(cohort(), 0, None, seed=0)
    assert [len(part) for part in parts.values()] == [135, 15, 0]
    parts = split(cohort(), 0, None, seed=0, validation_share=0)
    assert [len(part) for part in parts.values()] == [150, 0, 0]


def test_a_pattern_that_matches_some_names_is_refused():
    """In a common copy of DDTI only 223 of 526 names fitted, and patients were on both sides without a word."""
    names = ["1_1", "1_2", "100_1(1)", "100_1(2)"]
    with pytest.raises(InputError, match=r"matches 2 of 4 names, but not \['100_1\(1\)', '100_1\(2\)'\]"):
        check_pattern(names, r"(\d+)_\d+")
    check_pattern(names, r"(\d+)_.+")
    check_pattern(names, "(BraTS-.+)-.+")  # no name matches: every subject is a patient


def test_split_depends_on_the_seed_alone():
    items = cohort()
    for part in ("validation", "test"):
        first = names(split(items, 0, 5, seed=0)[part])
        assert first == names(split(items[::-1], 0, 5, seed=0)[part])
        assert first != names(split(items, 0, 5, seed=1)[part])


def test_split_is_the_same_in_every_scikit_learn():
    # scikit-learn's own shuffle gives different folds in 1.7 and 1.9
    assert names(split(cohort((3, 5, 2)), 0, 5, seed=0)["test"]) == {"s001", "s007"}


def test_time_points_of_one_patient_stay_together():
    items = [{"subject": f"BraTS-GLI-{i:05d}-{t}", "grade": i % 2} for i in range(20) for t in (100, 101)]
    for fold in range(4):
        part = split(items, fold, 4, seed=0)
        sides = [{patient(s) for s in names(part[side])} for side in ("training", "validation", "test")]
        assert len(set().union(*sides)) == sum(map(len, sides)) == 20


@pytest.mark.parametrize(
    ("fold", "num_folds", "message"), [(5, 5, "fold=5"), (0, 200, "cannot split"), (0, 1, "cannot")]
)
def test_impossible_splits(fold, num_folds, message):
    with pytest.raises(InputError, match=message):
        split(cohort(), fold, num_folds, seed=0)


@pytest.mark.parametrize("share", [-0.1, 0.6, True])
def test_impossible_validation_shares(share):
    with pytest.raises(InputError, match="validation_share"):
        split(cohort(), 0, 5, seed=0, validation_share=share)
    with pytest.raises(InputError, match="1 patient is left for training and validation"):
        split(cohort((1, 1, 0)), 0, 2, seed=0)
