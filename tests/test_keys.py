from __future__ import annotations

import re

import pytest
from monai.bundle import ConfigParser

from benchmarks.structure import public_keys
from conftest import ROOT
from scripts.tools.keys import END, PAGE, START, tables


def test_the_page_is_that_of_the_configuration():
    generated = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    assert generated == tables(), "run: python -m scripts.tools.keys"


def test_every_public_key_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == public_keys((ROOT / "configs" / "train.yaml").read_text())


OVERLAYS = ["ema.yaml", "evaluate.yaml"]
ADDRESSES = re.findall(r"^\| `--(\w+::[\w:]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_address_exists(address):
    schedules = {"T_0": "lr_restarts.yaml"}
    files = ["train.yaml", *OVERLAYS, *(file for end, file in schedules.items() if address.endswith(end))]
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / name) for name in files])
    node = parser.get()
    for key in address.split("::"):
        node = node[int(key) if isinstance(node, list) else key]


def test_a_key_without_a_comment_is_named(monkeypatch, tmp_path):
    text = (ROOT / "configs" / "train.yaml").read_text()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.yaml").write_text(text.replace("fold: 0 ", "fold: 0\n# "))
    monkeypatch.setattr("scripts.tools.keys.BUNDLE_ROOT", tmp_path)
    with pytest.raises(ValueError, match="'fold: 0' has no comment"):
        tables()
