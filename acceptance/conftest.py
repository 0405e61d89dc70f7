"""Checks that need minutes or an environment of their own: `make conformance`, `make docs-test` and so on."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # for what writes test data; this file is the conftest that is found first
NAME, ORGANS, SYNTHESIS = "medsegdiff_segmentation", "ct_structures_segmentation", "ncct_to_cta_synthesis"


def make_phantoms(folder: Path, number: int, *shape: int) -> Path:
    """A folder of phantoms."""
    options = ["--shape", *map(str, shape)] if shape else []
    command = [
        sys.executable,
        "-m",
        "scripts.tools.phantom",
        "--output_dir",
        str(folder),
        "--num_subjects",
        str(number),
    ]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    return folder


def unpack_release(folder: Path) -> Path:
    """The main bundle as it is released, unpacked in a folder; the other bundles lie beside it."""
    subprocess.run(
        [sys.executable, "-m", "scripts.tools.release", "--output_dir", str(folder / "dist")], cwd=ROOT, check=True
    )
    for archive in (folder / "dist").glob("*.zip"):
        zipfile.ZipFile(archive).extractall(folder)
    return folder / NAME


@pytest.fixture(scope="session")
def released(tmp_path_factory) -> Path:
    """The release, unpacked away from the repository; tests must not write here."""
    return unpack_release(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="session")
def browser():
    """A running Chromium of the system, without a window."""
    from playwright.sync_api import sync_playwright  # not in the environment of the other tests

    program = shutil.which("chromium")
    assert program, "no chromium: make clinic-test installs it"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()
