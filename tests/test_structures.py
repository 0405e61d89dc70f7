from __future__ import annotations

import pytest

from conftest import SHARED_DATA
from scripts.config import InputError
from scripts.organs.structures import catalogue, chosen, numbers


def test_the_catalogue_has_117_structures_with_codes():
    structures = list(catalogue().values())
    assert [entry["number"] for entry in structures] == list(range(1, 118))
    assert {entry["group"] for entry in structures} == {"organs", "vertebrae", "cardiac", "muscles", "ribs"}
    assert all(value.isdigit() and meaning for entry in structures for value, meaning in (entry["type"],))
    sides = {entry["name"]: entry.get("modifier", entry.get("region_modifier", [0, None]))[1] for entry in structures}
    sides["lung_middle_lobe_right"] = "Right"  # its type says it: there is no left one
    for name, side in sides.items():
        expected = next((s.capitalize() for s in ("left", "right") if s in name.split("_")), None)
        assert side == expected, name


@pytest.mark.skipif(not (SHARED_DATA / "totalsegmentator").is_dir(), reason="needs ../shared/data/totalsegmentator")
def test_names_and_order_are_those_of_totalsegmentator():
    assert list(catalogue()) == (SHARED_DATA / "totalsegmentator" / "classes117.txt").read_text().split()


def test_names_and_groups_are_chosen_in_the_order_of_their_numbers():
    assert chosen(["liver", "spleen"]) == ["spleen", "liver"]
    assert numbers(chosen(["liver", "spleen"])) == [1, 5]
    assert len(chosen(["ribs"])) == 26
    assert chosen(["ribs", "rib_left_1"]) == chosen(["ribs"])
    assert len(chosen(None)) == 117
    assert chosen(None, known=["liver", "heart"]) == ["liver", "heart"]
    assert chosen(["organs"], known=["liver", "heart"]) == ["liver"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["livr"], "'livr'; did you mean 'liver'"),
        (["kidney_lft"], "'kidney_lft'; did you mean 'kidney_left'"),
        (["rib"], "'rib'; did you mean 'ribs'"),
        ([], "must be a list"),
        ("liver", "must be a list"),
        ([5], "must be a list"),
    ],
)
def test_unknown_names(names, message):
    with pytest.raises(InputError, match=message):
        chosen(names)


def test_a_structure_that_was_not_trained_cannot_be_chosen():
    with pytest.raises(InputError, match="'spleen'; the known ones are liver, heart"):
        chosen(["spleen"], known=["liver", "heart"])
