"""The archives of a release. acceptance/test_conformance.py unpacks and runs them."""

from __future__ import annotations

import json
import sys
import zipfile

import pytest
import yaml

from scripts.tools import release

MAIN, ORGANS, SYNTHESIS = release.BUNDLES


def write(folder, monkeypatch):
    """Archives by the name of their bundle."""
    monkeypatch.setattr(sys, "argv", ["release", "--output_dir", str(folder)])
    release.main()
    return {name: next(folder.glob(f"{name}_v*.zip")) for name in release.BUNDLES}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield write(tmp_path_factory.mktemp("release"), monkeypatch)


@pytest.mark.parametrize("name", release.BUNDLES)
def test_an_archive_is_one_bundle(name, archives):
    with zipfile.ZipFile(archives[name]) as archive:
        names = archive.namelist()
        twin = json.loads(archive.read(f"{name}/configs/inference.json"))
    assert {file.split("/")[0] for file in names} == {name}
    source = release.BUNDLES[name] / "configs" / "inference.yaml"
    assert twin == yaml.safe_load(source.read_text())
    files = {file.removeprefix(f"{name}/") for file in names}
    assert files >= {"LICENSE", "configs/metadata.json", "docs/README.md", "models/model.pt", "scripts/config.py"}


def test_an_archive_has_the_modules_that_its_bundle_uses(archives):
    contents = []
    for name in (MAIN, ORGANS, SYNTHESIS):
        with zipfile.ZipFile(archives[name]) as archive:
            contents.append({file.split("/", 1)[1] for file in archive.namelist()})
    ours, theirs, synthesis = contents
    assert {"scripts/net.py", "scripts/workflow.py", "scripts/tools/phantom.py", "label_app/strategy.py"} <= ours
    assert all(any(name.startswith("label_app/") for name in files) for files in contents)
    assert [any(name.startswith("scripts/adversarial/") for name in files) for files in contents] == [
        False,
        False,
        True,
    ]
    assert {"scripts/tools/monai_label.py", "scripts/diffusion/samplers.py", "scripts/page/page.html"} <= ours
    assert not [name for name in ours if name.startswith("scripts/organs/")]
    assert {"scripts/organs/workflow.py", "scripts/organs/merge_structures.py", "configs/structures.json"} <= theirs
    assert {"scripts/synthesis/workflow.py", "scripts/tools/phantom_ct.py", "configs/train.yaml"} <= synthesis
    diffusion = ("scripts/diffusion/", "scripts/networks/", "scripts/net.")
    assert not [name for name in theirs | synthesis if name.startswith(diffusion)]
    assert not [name for name in synthesis if name.startswith("scripts/organs/")]


def test_the_same_files_give_the_same_archives(archives, tmp_path, monkeypatch):
    for name, file in write(tmp_path, monkeypatch).items():
        assert file.name == archives[name].name
        assert file.read_bytes() == archives[name].read_bytes()


def test_an_older_release_is_replaced_as_a_whole(tmp_path, monkeypatch):
    (tmp_path / MAIN).mkdir()
    (tmp_path / MAIN / "of_before.txt").write_text("old")
    write(tmp_path, monkeypatch)
    assert not (tmp_path / MAIN / "of_before.txt").exists()
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == sorted(release.BUNDLES)  # and no partial folder
    assert len(list(tmp_path.iterdir())) == 2 * len(release.BUNDLES)
