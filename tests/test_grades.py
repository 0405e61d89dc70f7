from __future__ import annotations

import logging

import pytest

from scripts import grades
from scripts.config import InputError

ONE_CLASS = [{"grade": 1}] * 5 + [{"grade": -1}] * 3


def test_unreadable_csv(tmp_path):
    for content in (b"", "ID,Grade\ns\xe9,HGG\n".encode("latin-1")):
        (tmp_path / "g.csv").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as a table"):
            grades.read_grades(tmp_path / "g.csv", "ID", "Grade", {"LGG": 0, "HGG": 1})


def test_grades_from_any_column_order(tmp_path):
    csv = tmp_path / "g.csv"
    csv.write_text("Grade,other,ID\nHGG,NA,s1\nLGG,x,s2\n,x,s3\nNA,x,s4\n")
    found = grades.read_grades(csv, "ID", "Grade", {"LGG": 0, "HGG": 1})
    assert found == {"s1": 1, "s2": 0, "s3": -1, "s4": -1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ID,WHO\ns1,HGG\n", "no column 'Grade'"),
        ("name,Grade\ns1,HGG\n", "no column 'ID'"),
        ("ID,Grade\ns1,HGG\ns1,LGG\n", r"more than once: \['s1'\]"),
        ("ID,Grade\ns1,III\n", "subject 's1' has grade 'III'"),
    ],
)
def test_unusable_csv_is_named(tmp_path, text, message):
    csv = tmp_path / "g.csv"
    csv.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        grades.read_grades(csv, "ID", "Grade", {"LGG": 0, "HGG": 1})
    assert "g.csv" in str(error.value)


def test_grade_labels_must_be_two_classes(tmp_path):
    with pytest.raises(InputError, match="must map each grade to 0"):
        grades.read_grades(tmp_path / "g.csv", "ID", "Grade", {"G2": 0, "G4": 2})


def test_real_brats2020_mapping(shared_data):
    found = grades.read_grades(
        shared_data / "brats2020" / "name_mapping.csv", "BraTS_2020_subject_ID", "Grade", {"LGG": 0, "HGG": 1}
    )
    items = [{"subject": subject, "grade": grade} for subject, grade in found.items()]
    assert len(items) == 369
    assert grades.class_weights(items) == pytest.approx([2.4276, 0.6297], abs=1e-4)


def test_class_weights_of_one_class_are_one_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert grades.class_weights(ONE_CLASS) == [1.0, 1.0]
    assert "one class only" in caplog.text
    assert grades.class_weights(ONE_CLASS, [2, 0.5]) == [2.0, 0.5]
    for bad in ([1.0], 1, [float("nan"), 1.0]):
        with pytest.raises(InputError, match="two positive numbers"):
            grades.class_weights(ONE_CLASS, bad)
