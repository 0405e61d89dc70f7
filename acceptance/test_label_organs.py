"""MONAI Label serves and trains the bundle of organs, beside the main bundle and on its own."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import requests
from test_label import MODEL, Server, documented, serve, status, volume_of, wait_for

from conftest import ORGANS, ROOT, unpack_release

SUBJECT = "s0001"
SHAPE = (64, 64, 48)


@pytest.fixture(scope="module")
def cts(tmp_path_factory):
    """Made-up CTs with label maps, as folders."""
    folder = tmp_path_factory.mktemp("cts")
    command = [sys.executable, "-m", "scripts.tools.phantom_ct", "--output_dir", str(folder), "--num_subjects", "5"]
    subprocess.run(command, cwd=ROOT, check=True)
    command = [sys.executable, "-m", "scripts.organs.merge_structures", "--dataset_dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def inferred(cts, tmp_path_factory):
    """What the bundle writes for the subject on the command line."""
    folder = tmp_path_factory.mktemp("inferred")
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run"]
    command += ["--config_file", "bundles/organs/configs/inference.yaml"]
    options = ["--dataset_dir", str(cts / SUBJECT), "--output_dir", str(folder)]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module", params=["stock", "own", "own, beside the main bundle"])
def server(request, cts, tmp_path_factory):
    """The stock app, our app in the release of the bundle, and our app in a folder with both bundles."""
    folder = tmp_path_factory.mktemp(request.param.split(",")[0])
    studies = folder / "studies"
    studies.mkdir()
    for path in sorted(cts.glob("s*/ct.nii.gz")):
        shutil.copy(path, studies / f"{path.parent.name}_ct.nii.gz")
    root = bundle = unpack_release(folder).parent / ORGANS
    if "beside" in request.param:
        root = folder / MODEL
        bundle = root / "bundles" / "organs"
        bundle.parent.mkdir()
        (folder / ORGANS).rename(bundle)
    word = "cp -r" if request.param == "stock" else "--app label_app"
    with serve(lambda port: documented(word, port, folder)[0].replace(MODEL, ORGANS), folder, root) as running:
        yield Server(*running, bundle, ORGANS)


def test_a_ct_is_segmented_on_its_own_grid_with_its_statistics(server, inferred, tmp_path):
    models = requests.get(f"{server.url}/info/", timeout=30).json()["models"]
    assert set(models) == ({ORGANS, MODEL} if server.bundle.name == "organs" else {ORGANS})
    assert models[ORGANS]["labels"]["aorta"] == 52
    written = nib.load(inferred / f"{SUBJECT}_seg.nii.gz")
    mask = volume_of(server.infer(f"{SUBJECT}_ct"), tmp_path)
    np.testing.assert_allclose(mask.affine, written.affine, atol=1e-5)
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(written.dataobj))
    answer = server.infer(f"{SUBJECT}_ct", "json").json()
    assert answer["label_names"]["aorta"] == 52
    if server.log.parent.name.startswith("stock"):
        assert "structures" not in answer  # it knows masks alone
        return
    published = json.loads((inferred / f"{SUBJECT}_statistics.json").read_text())
    found = {row["structure"]: row for row in answer["structures"]}
    assert set(found) == {name for name, values in published.items() if values["volume"]}
    for name, row in found.items():
        assert row["volume_mm3"] == published[name]["volume"]
        assert row["mean_hu"] == pytest.approx(published[name]["intensity"], abs=1e-4)
        assert 0 < row["probability"] <= 1


def test_the_documented_requests_are_answered(server, tmp_path):
    blocks = [block for block in documented("curl", server.url.rsplit(":", 1)[1], tmp_path) if ORGANS in block]
    assert blocks
    for block in blocks:
        subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True)
    assert nib.load(tmp_path / "labels.nii.gz").shape == SHAPE


HOSTILE = [
    (name, text)
    for name in ("overlap", "sw_batch_size", "model_filename", "result_extension", "device", "label_tag", "volume")
    for text in ("$CODE", "$import marked", "@device", "%/etc/passwd")
]


@pytest.mark.parametrize(("name", "text"), HOSTILE)
def test_options_are_data(server, tmp_path, name, text):
    marker = tmp_path / "executed"
    hostile = text.replace("CODE", f"__import__('pathlib').Path({str(marker)!r}).touch()")
    answer = server.infer(f"{SUBJECT}_ct", "json", **{name: hostile})
    assert not marker.exists()
    assert server.alive()
    assert server.infer(f"{SUBJECT}_ct", "json").status_code == 200
    assert not marker.exists()
    assert not (server.log.parent / "imported").exists()
    if not server.log.parent.name.startswith("stock"):
        assert answer.status_code == 422, answer.text


def test_an_epoch_is_trained_and_served(server, cts, tmp_path):
    for number in range(1, 6):
        truth = (cts / f"s{number:04d}" / "labels.nii.gz").read_bytes()
        url = f"{server.url}/datastore/label?image=s{number:04d}_ct&tag=final"
        label = {"label": ("labels.nii.gz", truth)}
        assert requests.put(url, files=label | {"params": (None, "{}")}, timeout=30).ok
    weights = server.bundle / "models" / "model.pt"
    before = weights.read_bytes()
    request = {"max_epochs": 1, "val_split": 0.2, "multi_gpu": False}
    assert requests.post(f"{server.url}/train/{ORGANS}", json=request, timeout=30).ok
    wait_for(lambda: status(server)["status"] not in ("SUBMITTED", "RUNNING"), 300)
    assert status(server)["status"] == "DONE", status(server)
    assert weights.read_bytes() != before
    split = json.loads((server.bundle / "output" / "train" / "datalist.json").read_text())
    assert [len(split[part]) for part in ("training", "validation")] == [4, 1]
    rows = list(csv.DictReader((server.bundle / "output" / "train" / "metrics.csv").read_text().splitlines()))
    assert 0 < float(rows[0]["loss"]) < 2  # it started from the weights that were there; new ones have 4
    assert volume_of(server.infer(f"{SUBJECT}_ct"), tmp_path).shape == SHAPE
