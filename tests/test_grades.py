from __future__ import annotations

import logging

import pytest

from scripts.config import InputError
from scripts.data import grades

TWO = {"LGG": 0, "HGG": 1}
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


def test_grade_labels_must_be_classes_without_a_gap(tmp_path):
    with pytest.raises(InputError, match="without a gap"):
        grades.read_grades(tmp_path / "g.csv", "ID", "Grade", {"G2": 0, "G4": 2})


def test_real_brats2020_mapping(shared_data):
    found = grades.read_grades(
        shared_data / "brats2020" / "name_mapping.csv", "BraTS_2020_subject_ID", "Grade", {"LGG": 0, "HGG": 1}
    )
    items = [{"subject": subject, "grade": grade} for subject, grade in found.items()]
    assert len(items) == 369
    assert grades.class_weights(items, TWO) == pytest.approx([2.4276, 0.6297], abs=1e-4)


def test_class_weights_of_one_class_are_one_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert grades.class_weights(ONE_CLASS, TWO) == [1.0, 1.0]
        assert grades.class_weights([{"grade": -1}], TWO) == [1.0, 1.0]
    assert "no training subject has the grade LGG: alpha is 1" in caplog.text


def test_class_weights_of_three_grades():
    items = [{"grade": grade} for grade in (0, 0, 0, 1, 1, 2, -1)]
    three = {"G2": 0, "G3": 1, "G4": 2}
    assert grades.class_weights(items, three) == pytest.approx([6 / (3 * 3), 6 / (3 * 2), 6 / (3 * 1)])
    assert grades.class_weights(items[:5], three) == pytest.approx([5 / (2 * 3), 5 / (2 * 2), 1.0])


@pytest.mark.parametrize("alpha", [[1.0], 1, [float("nan"), 1.0], [1.0, 1.0, 1.0], ["a", "b"]])
def test_alpha_must_be_a_positive_number_per_grade(alpha):
    grades.check_alpha([2, 0.5], TWO)
    with pytest.raises(InputError, match="one positive number per grade"):
        grades.check_alpha(alpha, TWO)


def test_names_of_grades():
    assert grades.grade_names({"HGG": 1, "LGG": 0}) == ["LGG", "HGG"]
    assert grades.grade_names({"G2": 0, "G3": 1, "G4": 1}) == ["G2", "G3/G4"]
    for bad in ({"LGG": 0}, {"a": 0, "b": 2}, {"a": 1, "b": 2}, {}):
        with pytest.raises(InputError, match="without a gap"):
            grades.grade_names(bad)
