"""MONAI Label serves and trains the bundle of synthesis, with the stock app and with ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import requests
from test_label import MODEL, Server, documented, is_stock, serve, status, volume_of, wait_for

from conftest import ROOT, SYNTHESIS, unpack_release

SUBJECT = "s0001"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Made-up pairs of CTs."""
    folder = tmp_path_factory.mktemp("pairs")
    command = [sys.executable, "-m", "scripts.tools.phantom_ct", "--output_dir", str(folder), "--num_subjects", "5"]
    subprocess.run([*command, "--pairs"], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def inferred(pairs, tmp_path_factory):
    """What the bundle writes for the subject on the command line."""
    folder = tmp_path_factory.mktemp("inferred")
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run"]
    command += ["--config_file", "bundles/synthesis/configs/inference.yaml"]
    options = ["--dataset_dir", str(pairs / SUBJECT), "--output_dir", str(folder)]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module", params=["stock", "own"])
def server(request, pairs, tmp_path_factory):
    """The stock app, and ours, with the release of the bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    studies = folder / "studies"
    studies.mkdir()
    for file in pairs.glob("s*/*_ncct.nii.gz"):
        shutil.copy(file, studies)
    bundle = unpack_release(folder).parent / SYNTHESIS
    word = "cp -r" if request.param == "stock" else "--app label_app"
    with serve(lambda port: documented(word, port, folder)[0].replace(MODEL, SYNTHESIS), folder, bundle) as running:
        yield Server(*running, bundle, SYNTHESIS)


def test_the_answer_is_the_contrast_ct_of_the_command_line(server, inferred, tmp_path):
    written = nib.load(inferred / f"{SUBJECT}_cta.nii.gz")
    answer = volume_of(server.infer(f"{SUBJECT}_ncct"), tmp_path)
    np.testing.assert_allclose(answer.affine, written.affine, atol=1e-5)
    assert np.array_equal(np.asarray(answer.dataobj), np.asarray(written.dataobj))
    assert np.asarray(answer.dataobj).min() < -500  # HU, with their sign
    flipped = volume_of(server.infer(f"{SUBJECT}_ncct", tta=True), tmp_path)
    assert not np.array_equal(np.asarray(flipped.dataobj), np.asarray(written.dataobj))
    if not is_stock(server):
        row = server.infer(f"{SUBJECT}_ncct", "json").json()
        assert row["subject"] == SUBJECT
        assert row["enhanced_ml"] > 0


def test_the_documented_requests_are_answered(server, tmp_path):
    blocks = [block for block in documented("curl", server.url.rsplit(":", 1)[1], tmp_path) if SYNTHESIS in block]
    assert blocks
    for block in blocks:
        subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True)
    assert nib.load(tmp_path / "contrast.nii.gz").shape == (64, 64, 48)


@pytest.mark.parametrize("name", ["tta", "batch_size", "model_filename", "result_extension", "device"])
def test_options_are_data(server, tmp_path, name):
    marker = tmp_path / "executed"
    for text in (f"$__import__('pathlib').Path({str(marker)!r}).touch()", "$import marked", "@device", "%/etc/passwd"):
        answer = server.infer(f"{SUBJECT}_ncct", "json", **{name: text})
        assert not marker.exists()
        assert server.alive()
        assert not (server.log.parent / "imported").exists()
        if not is_stock(server):
            assert answer.status_code == 422, answer.text
    assert server.infer(f"{SUBJECT}_ncct", "json").status_code == 200
    assert not marker.exists()


def test_an_epoch_is_trained_and_served(server, pairs, tmp_path):
    for file in pairs.glob("s*/*_cta.nii.gz"):
        url = f"{server.url}/datastore/label?image={file.parent.name}_ncct&tag=final"
        label = {"label": ("cta.nii.gz", file.read_bytes()), "params": (None, "{}")}
        assert requests.put(url, files=label, timeout=30).ok
    weights = server.bundle / "models" / "model.pt"
    before = weights.read_bytes()
    request = {"max_epochs": 1, "val_split": 0.2, "multi_gpu": False}
    assert requests.post(f"{server.url}/train/{SYNTHESIS}", json=request, timeout=30).ok
    wait_for(lambda: status(server)["status"] not in ("SUBMITTED", "RUNNING"), 300)
    assert status(server)["status"] == "DONE", status(server)
    assert weights.read_bytes() != before
    split = json.loads((server.bundle / "output" / "train" / "datalist.json").read_text())
    assert [len(split[part]) for part in ("training", "validation")] == [4, 1]
    assert volume_of(server.infer(f"{SUBJECT}_ncct"), tmp_path).shape == (64, 64, 48)
