"""The archive of a release. acceptance/test_conformance.py unpacks and runs it."""

from __future__ import annotations

import json
import sys
import zipfile

import yaml

from conftest import ROOT
from scripts.tools import release


def write(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["release", "--output_dir", str(folder)])
    release.main()
    (archive,) = folder.glob("*.zip")
    return archive


def test_the_same_files_give_the_same_archive(tmp_path, monkeypatch):
    first, second = (write(tmp_path / name, monkeypatch) for name in ("a", "b"))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        names = archive.namelist()
        twin = json.loads(archive.read(f"{release.NAME}/configs/inference.json"))
    assert {name.split("/")[0] for name in names} == {release.NAME}
    assert twin == yaml.safe_load((ROOT / "configs" / "inference.yaml").read_text())


def test_an_older_release_is_replaced_as_a_whole(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch)
    (tmp_path / release.NAME / "of_before.txt").write_text("old")
    write(tmp_path, monkeypatch)
    assert not (tmp_path / release.NAME / "of_before.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir())[0] == release.NAME  # and no partial folder
    assert len(list(tmp_path.iterdir())) == 2
