from __future__ import annotations

import json

import numpy as np
import pytest

from conftest import MODALITIES
from scripts.config import InputError
from scripts.data import datalist, subjects
from test_split import cohort

GRADES = {"LGG": 0, "HGG": 1}


def test_slices_are_counted_from_foot_to_head(tmp_path, make_subject_folder, volumes):
    affine = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float)  # the axes are A, S, R
    make_subject_folder(tmp_path, "s1", volumes, affine=affine)
    assert "slices=8" in datalist.describe(
        {"all": subjects.load_subjects(str(tmp_path), MODALITIES)}, alpha=[1, 1], grade_labels=GRADES
    )


def test_datalist_can_be_edited_and_passed_back(tmp_path, make_subject_folder, volumes):
    for i in range(6):
        make_subject_folder(tmp_path, f"s{i}", volumes)
    items = subjects.load_subjects(str(tmp_path), MODALITIES)
    options = {"dataset_dir": str(tmp_path), "fold": 0, "num_folds": 3, "seed": 0, "modalities": MODALITIES}
    parts = datalist.make_datalist(items, datalist_file=None, **options)
    file = tmp_path / "datalist.json"
    datalist.write_datalist(parts, str(file), str(tmp_path))
    assert datalist.make_datalist(None, datalist_file=str(file), **options) == parts
    content = json.loads(file.read_text())
    assert not content["training"][0]["label"][0].startswith("/")
    content["test"].append(content["training"].pop())
    file.write_text(json.dumps(content))
    assert len(datalist.make_datalist(None, datalist_file=str(file), **options)["test"]) == 3
    for first, second in (("training", "validation"), ("training", "test"), ("validation", "test")):
        clash = content | {second: content[second] + content[first][:1]}
        file.write_text(json.dumps(clash))
        with pytest.raises(InputError, match=f"both in {first} and in {second}"):
            datalist.make_datalist(None, datalist_file=str(file), **options)
    with pytest.raises(InputError, match="image for each of"):
        datalist.make_datalist(None, datalist_file=str(file), **options | {"modalities": MODALITIES[::-1]})
    del content["test"]  # as other programs write it: the validation subjects are judged
    file.write_text(json.dumps(content))
    judged = datalist.make_datalist(None, datalist_file=str(file), subset="test", **options)["judged"]
    assert [item["subject"] for item in judged] == [item["subject"] for item in content["validation"]]
    file.write_text("{}")
    with pytest.raises(InputError, match="not a data list"):
        datalist.make_datalist(None, datalist_file=str(file), **options)


def test_subset_all_and_number_of_cases():
    options = {
        "datalist_file": None,
        "dataset_dir": ".",
        "fold": 0,
        "num_folds": 5,
        "seed": 0,
        "modalities": MODALITIES,
    }
    items = cohort((1, 0, 0))
    assert datalist.make_datalist(items, subset="all", **options)["judged"] == items
    for subset, count in {"test": 30, "validation": 12, "training": 108, "all": 150}.items():
        assert len(datalist.make_datalist(cohort(), subset=subset, **options)["judged"]) == count
    assert len(datalist.make_datalist(cohort(), subset="test", num_eval_cases=7, **options)["judged"]) == 7
    assert "judged" not in datalist.make_datalist(cohort(), **options)
    for bad in ({"subset": "train"}, {"num_eval_cases": 0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            datalist.make_datalist(items, **options | bad)
    with pytest.raises(InputError, match="subset 'test' has no subject"):
        datalist.make_datalist(cohort(), subset="test", **options | {"num_folds": None})


def test_all_bad_files_are_listed_at_once(tmp_path, make_subject_folder, volumes):
    for i in range(30):
        folder = make_subject_folder(tmp_path, f"s{i:02d}", volumes)
        if i % 6:
            (folder / f"s{i:02d}_t1.nii.gz").write_bytes(b"damaged")
    with pytest.raises(InputError) as refused:
        subjects.load_subjects(str(tmp_path), MODALITIES)
    lines = str(refused.value).splitlines()
    assert lines[0] == "25 errors in the data:"
    assert [line[:13] for line in lines[1:3]] == ["- subject 's0", "- subject 's0"]
    assert len(lines) == 22
    assert lines[-1] == "- ... and 5 more"


def test_summary_counts(tmp_path, make_subject_folder, volumes):
    make_subject_folder(tmp_path, "s1", volumes)
    items = subjects.load_subjects(str(tmp_path), MODALITIES)
    text = datalist.describe({"training": items}, alpha=[2.4276, 0.6297], grade_labels=GRADES)
    assert "subjects=1 patients=1 slices=4 n_LGG=0 n_HGG=0 ungraded=1" in text
    assert "alpha_LGG=2.4276 alpha_HGG=0.6297" in text


def test_any_number_of_grades(tmp_path, make_subject_folder, volumes):
    for i in range(4):
        make_subject_folder(tmp_path, f"s{i}", volumes)
    items = subjects.find_subjects(str(tmp_path), MODALITIES)
    graded = [item | {"grade": grade} for item, grade in zip(items, (0, 1, 2, -1), strict=True)]
    labels = {"G2": 0, "G3": 1, "G4": 2}
    text = datalist.describe({"training": graded}, alpha=[1.0, 0.5, 2.0], grade_labels=labels)
    assert "n_G2=1 n_G3=1 n_G4=1 ungraded=1" in text
    assert "alpha_G2=1.0000 alpha_G3=0.5000 alpha_G4=2.0000" in text
    file = tmp_path / "datalist.json"
    datalist.write_datalist(
        {"training": graded[:2], "validation": graded[2:], "test": graded[2:]}, str(file), str(tmp_path)
    )
    options = {"dataset_dir": str(tmp_path), "modalities": MODALITIES}
    assert datalist.read_datalist(str(file), **options, grade_labels=labels)["validation"][0]["grade"] == 2
    with pytest.raises(InputError, match=r"a grade from \[-1, 0, 1\]"):
        datalist.read_datalist(str(file), **options)
