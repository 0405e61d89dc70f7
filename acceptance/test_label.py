"""MONAI Label serves the bundle: the real server on 127.0.0.1, asked over REST. Run by `make label-test`."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import monailabel
import nibabel as nib
import numpy as np
import psutil
import pytest
import requests
import SimpleITK as sitk
from monailabel.client import MONAILabelClient

from conftest import NAME as MODEL
from conftest import ORGANS, ROOT, SYNTHESIS, make_phantoms, unpack_release

SUBJECT = "BraTS20_Training_001"
SIZE = (64, 64, 32)
LABELS = {"necrotic or not enhancing core": 1, "oedema": 2, "enhancing tumour": 4}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("phantoms"), 6, *SIZE)


@pytest.fixture(scope="module")
def inferred(phantoms, tmp_path_factory) -> Path:
    """What the bundle writes for the subject on the command line."""
    folder = tmp_path_factory.mktemp("inferred")
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.yaml"]
    options = ["--dataset_dir", str(phantoms / SUBJECT), "--output_dir", str(folder)]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    return folder


class Server:
    """A running server."""

    def __init__(self, url: str, process: subprocess.Popen, log: Path, bundle: Path, model: str = MODEL) -> None:
        self.url, self.process, self.log, self.bundle, self.model = url, process, log, bundle, model

    def infer(self, image: str = "", output: str = "image", files: dict | None = None, **params) -> requests.Response:
        url = f"{self.url}/infer/{self.model}?image={image}&output={output}"
        return requests.post(url, files={"params": (None, json.dumps(params))} | (files or {}), timeout=120)

    def alive(self) -> bool:
        return self.process.poll() is None and requests.get(f"{self.url}/info/", timeout=30).ok


def is_stock(server: Server) -> bool:
    return server.log.parent.name.startswith("stock")


def documented(word: str, port: str, folder: Path) -> list[str]:
    """The commands of the docs' blocks that hold a word, with a port and folders of their own."""
    text = (ROOT / "docs" / "monai_label.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if word in block]
    assert blocks
    for old, new in (("8000", port), (".venv-label", sys.prefix), ("/path/to", str(folder)), (": 20", ": 1")):
        blocks = [block.replace(old, new) for block in blocks]
    return [block.replace(f"{sys.prefix}/bin/python", sys.executable) for block in blocks]


@pytest.fixture(scope="module", params=["stock", "own"])
def server(request, phantoms, tmp_path_factory):
    """MONAI Label's own app for bundles, and ours, started as the docs say, with a bundle that training may change."""
    folder = tmp_path_factory.mktemp(request.param)
    studies = folder / "studies"
    studies.mkdir()
    for file in phantoms.glob("*/*.nii.gz"):
        if not file.name.endswith("_seg.nii.gz"):
            shutil.copy(file, studies)
    shutil.copy(phantoms / SUBJECT / f"{SUBJECT}_seg.nii.gz", folder / "mask.nii.gz")
    bundle = unpack_release(folder)
    word = "cp -r" if request.param == "stock" else "--app label_app"
    with serve(lambda port: documented(word, port, folder)[0], folder, bundle) as running:
        yield Server(*running, bundle)


@contextlib.contextmanager
def serve(command: Callable[[str], str], folder: Path, root: Path) -> Iterator[tuple[str, subprocess.Popen, Path]]:
    """Start a server by a command with a free port, in the folder ``root``: its address, process and log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # a module that tells when it is imported
    (root / "marked.py").write_text(f"open({str(folder / 'imported')!r}, 'w')")
    url, log = f"http://127.0.0.1:{port}", folder / "server.log"
    with log.open("w") as stream:
        shell = ["bash", "-euc", command(port).replace("MONAI_ZOO_SOURCE", "exec env MONAI_ZOO_SOURCE")]
        process = subprocess.Popen(shell, cwd=root, stdout=stream, stderr=stream)
    try:
        wait_for(lambda: process.poll() is not None or answers(url), 180)
        assert process.poll() is None, log.read_text()[-3000:]
        yield url, process, log
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not after {seconds} s"
        time.sleep(1)


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/info/", timeout=5).ok
    except requests.ConnectionError:
        return False


def volume_of(response: requests.Response, folder: Path) -> nib.Nifti1Image:
    assert response.status_code == 200, response.text
    (folder / "answer.nii.gz").write_bytes(response.content)
    return nib.load(folder / "answer.nii.gz")


def truth(phantoms: Path) -> nib.Nifti1Image:
    return nib.load(phantoms / SUBJECT / f"{SUBJECT}_seg.nii.gz")


def dice(mask, other) -> float:
    return 2 * (mask & other).sum() / (mask.sum() + other.sum())


def test_sampler_settings_are_options_of_the_user(server):
    model = requests.get(f"{server.url}/info/", timeout=30).json()["models"][MODEL]
    assert model["labels"] == LABELS
    options = {"num_inference_steps": 1, "num_samples": 1, "sampler": "ddim", "fusion": "mean"}
    assert {key: model["config"][key] for key in options} == options


def test_one_of_four_files_is_segmented_on_its_own_grid(server, phantoms, inferred, tmp_path):
    start = time.monotonic()
    answer = server.infer(f"{SUBJECT}_t2")
    print(f"\n{server.log.parent.name}: a subject of {SIZE} in {time.monotonic() - start:.1f} s")
    mask, label = volume_of(answer, tmp_path), truth(phantoms)
    np.testing.assert_allclose(mask.affine, label.affine, atol=1e-5)
    values = np.asarray(mask.dataobj)
    assert (values.shape, set(np.unique(values))) == (SIZE, {0, *LABELS.values()})
    assert dice(values > 0, np.asarray(label.dataobj) > 0) > 0.75  # no such phantom was trained on
    assert np.array_equal(values, np.asarray(nib.load(inferred / f"{SUBJECT}_seg.nii.gz").dataobj))
    assert server.infer(f"{SUBJECT}_t2", "json").json()["label_names"] == LABELS


def test_an_uploaded_4d_file_gives_the_same_mask(server, phantoms, tmp_path):
    images = [nib.load(phantoms / SUBJECT / f"{SUBJECT}_{name}.nii.gz") for name in ("t1", "t1ce", "t2", "flair")]
    stack = np.stack([np.asarray(image.dataobj) for image in images], axis=-1)
    nib.save(nib.Nifti1Image(stack, images[0].affine), tmp_path / "subject.nii.gz")
    upload = {"file": ("subject.nii.gz", (tmp_path / "subject.nii.gz").read_bytes())}
    uploaded, named = (
        np.asarray(volume_of(answer, tmp_path).dataobj)
        for answer in (server.infer(files=upload), server.infer(f"{SUBJECT}_flair"))
    )
    assert np.array_equal(uploaded, named)


def test_options_change_the_sampling(server, tmp_path):
    def mask(**params):
        return np.asarray(volume_of(server.infer(f"{SUBJECT}_t1", **params), tmp_path).dataobj)

    masks = [mask(), mask(num_inference_steps=0), mask(num_inference_steps=4, num_samples=3, sampler="ddpm"), mask()]
    assert np.array_equal(masks[0], masks[-1])  # and they do not stay
    assert not np.array_equal(masks[0], masks[1])


def test_our_app_grades_and_returns_the_uncertainty(server, inferred, tmp_path):
    row = server.infer(f"{SUBJECT}_t1", "json").json()
    if is_stock(server):
        assert "grade" not in row  # it knows masks alone
        return
    (expected,) = csv.DictReader((inferred / "grades.csv").read_text().splitlines())
    for key, value in expected.items():
        text = key in ("subject", "grade", "modalities") or "_from_" in key
        assert str(row[key] or "") == value if text else close(row[key], value), key
    for name, ending in (("uncertainty", "uncertainty"), ("probability", "prob")):
        volume = volume_of(server.infer(f"{SUBJECT}_t1", volume=name), tmp_path)
        written = nib.load(inferred / f"{SUBJECT}_{ending}.nii.gz")
        np.testing.assert_allclose(volume.affine, written.affine, atol=1e-5)
        np.testing.assert_allclose(volume.get_fdata(), written.get_fdata(), atol=1e-6)


def close(value: float | None, text: str) -> bool:
    return value is None if text == "" else value == pytest.approx(float(text), rel=1e-4)


def write_series(folder: Path, nifti: Path) -> None:
    """A NIfTI volume as DICOM slices, by SimpleITK."""
    volume = sitk.Cast(sitk.ReadImage(str(nifti)), sitk.sitkInt16)
    folder.mkdir(parents=True)
    series = f"1.2.3.{len(list(folder.parent.iterdir()))}"
    tags = {"0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": series}
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    cosines = [volume.GetDirection()[row * 3 + axis] for axis in (0, 1) for row in range(3)]
    for index in range(volume.GetSize()[2]):
        image = volume[:, :, index]
        place = volume.TransformIndexToPhysicalPoint((0, 0, index))
        own = {"0020|0032": place, "0020|0037": cosines, "0020|0013": (volume.GetSize()[2] - index,)}
        own = {key: "\\".join(map(str, numbers)) for key, numbers in own.items()}
        for key, value in (tags | own | {"0008|0018": f"{series}.{index}"}).items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{index * 7 % 32:03d}.dcm"))  # in no order of space
        writer.Execute(image)


def test_a_folder_of_dicom_series_is_segmented_and_a_gap_is_told(server, phantoms, inferred, tmp_path):
    study = Path(server.log.parent, "studies", "dicom")
    for modality in ("t1", "t1ce", "t2", "flair"):
        write_series(study / modality, phantoms / SUBJECT / f"{SUBJECT}_{modality}.nii.gz")
    (study / "notes.txt").write_text("no image")
    mask = volume_of(server.infer(str(study)), tmp_path)
    expected = nib.load(inferred / f"{SUBJECT}_seg.nii.gz")
    np.testing.assert_allclose(mask.affine, expected.affine, atol=1e-4)
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(expected.dataobj))
    (study / "flair" / "014.dcm").unlink()
    answer, message = server.infer(str(study)), "add the missing slice, or remove the extra one"
    if is_stock(server):
        wait_for(lambda: message in server.log.read_text(), 10)
    else:
        assert message in answer.json()["detail"]
    assert server.alive()


def test_the_next_study_is_the_one_with_the_lowest_expected_dice(server, phantoms, tmp_path):
    """It is worse than what chance would give, and a labelled study is not asked for again."""
    if is_stock(server):
        return
    names = [f"BraTS20_Training_{number:03d}" for number in range(1, 7)]
    true, expected = {}, {}
    for name in names:
        mask = np.asarray(volume_of(server.infer(f"{name}_t1"), tmp_path).dataobj)
        label = np.asarray(nib.load(phantoms / name / f"{name}_seg.nii.gz").dataobj)
        true[name] = np.nanmean([dice(np.isin(mask, part), np.isin(label, part)) for part in ((1, 4), (1, 2, 4), (4,))])
        answer = server.infer(f"{name}_t1", "json").json()
        expected[name] = min(answer[f"expected_dice_{region}"] for region in ("TC", "WT", "ET"))
    asked = requests.post(f"{server.url}/activelearning/uncertainty", json={}, timeout=120).json()
    lowest = min(expected, key=lambda name: expected[name])
    assert asked["id"].startswith(lowest)
    assert asked["weight"] == pytest.approx(expected[lowest])
    assert true[lowest] < np.mean(list(true.values()))  # what a study by chance has on average
    mask = {"label": ("label.nii.gz", (phantoms / lowest / f"{lowest}_seg.nii.gz").read_bytes())}
    url = f"{server.url}/datastore/label?image={lowest}_t2&tag=final"
    assert requests.put(url, files=mask | {"params": (None, "{}")}, timeout=30).ok
    second = requests.post(f"{server.url}/activelearning/uncertainty", json={}, timeout=120).json()
    del expected[lowest]
    assert second["id"].startswith(min(expected, key=lambda name: expected[name]))
    assert requests.delete(f"{server.url}/datastore/label?id={lowest}_t2&tag=final", timeout=30).ok


def test_what_slicer_asks(server, phantoms, tmp_path):
    """The client that the extension of 3D Slicer is made of: info, next sample, image, mask, label."""
    client = MONAILabelClient(server.url, str(tmp_path))
    assert MODEL in client.info()["models"]
    sample = client.next_sample("first", {})
    assert (phantoms / SUBJECT / f"{sample['id']}.nii.gz").is_file()
    file, params = client.infer(MODEL, sample["id"], {"num_samples": 1})
    assert set(np.unique(nib.load(file).get_fdata())) <= {0, *LABELS.values()}
    assert params["label_names"] == LABELS
    assert is_stock(server) or "expected_dice_WT" in params
    client.save_label(sample["id"], str(phantoms / SUBJECT / f"{SUBJECT}_seg.nii.gz"), params={"label_info": []})
    saved = Path(server.log.parent, "studies", "labels", "final", f"{sample['id']}.nii.gz")
    assert np.array_equal(nib.load(saved).get_fdata(), truth(phantoms).get_fdata())
    assert requests.delete(f"{server.url}/datastore/label?id={sample['id']}&tag=final", timeout=30).ok


def three_modalities(folder: Path, phantoms: Path) -> bytes:
    stack = np.stack([np.asarray(truth(phantoms).dataobj)] * 3, axis=-1)
    nib.save(nib.Nifti1Image(stack, np.eye(4)), folder / "three.nii.gz")
    return (folder / "three.nii.gz").read_bytes()


def test_studies_may_lack_a_modality(phantoms, tmp_path):
    """With our app: the answer is that of the command line for the same modalities."""
    data, studies = tmp_path / SUBJECT, tmp_path / "studies"
    shutil.copytree(phantoms / SUBJECT, data)
    (data / f"{SUBJECT}_t2.nii.gz").unlink()
    shutil.copytree(data, studies)
    bundle = unpack_release(tmp_path)
    options = ["--dataset_dir", str(data), "--output_dir", str(tmp_path), "--modalities", "['t1','t1ce','flair']"]
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.yaml"]
    subprocess.run([*command, *options], cwd=bundle, check=True)
    expected = np.asarray(nib.load(tmp_path / f"{SUBJECT}_seg.nii.gz").dataobj)

    def start(port: str) -> str:
        return documented("--app label_app", port, tmp_path)[0].rstrip() + " --conf modalities t1,t1ce,flair"

    with serve(start, tmp_path, bundle) as running:
        server = Server(*running, bundle)
        found = np.asarray(volume_of(server.infer(f"{SUBJECT}_t1"), tmp_path).dataobj)
        answer = server.infer(f"{SUBJECT}_t1", output="json").json()
    assert answer["modalities"] == "t1;t1ce;flair"
    assert np.array_equal(found, expected)


def test_names_of_modalities_are_not_evaluated(tmp_path):
    bundle = unpack_release(tmp_path)

    def start(port: str) -> str:
        return (
            documented("--app label_app", port, tmp_path)[0].rstrip() + " --conf modalities '$__import__(\"marked\")'"
        )

    with pytest.raises(AssertionError, match="which is refused"), serve(start, tmp_path, bundle):
        pass
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("wrong file", "cannot read"),
        ("three modalities", "holds 3 of 4 modalities"),
        ("missing sibling", "no file for ['t1ce'] beside it"),
        ("unknown sampler", "sampler 'magic' is not one of"),
        ("no such image", "no image of this name"),
    ],
)
def test_bad_input_is_told_and_the_server_stays_up(server, phantoms, tmp_path, kind, message):
    studies = Path(server.log.parent, "studies")
    if kind == "wrong file":
        answer = server.infer(files={"file": ("notes.nii.gz", b"no volume")})
    elif kind == "three modalities":
        answer = server.infer(files={"file": ("three.nii.gz", three_modalities(tmp_path, phantoms))})
    elif kind == "missing sibling":
        hidden = studies / "BraTS20_Training_006_t1ce.nii.gz"
        hidden.rename(tmp_path / "hidden.nii.gz")
        answer = server.infer("BraTS20_Training_006_flair")
        (tmp_path / "hidden.nii.gz").rename(hidden)
    elif kind == "unknown sampler":
        answer = server.infer(f"{SUBJECT}_t1", sampler="magic")
    else:
        answer = server.infer("nobody")
    if is_stock(server):  # MONAI Label's app tells its log alone
        assert answer.status_code == 500
        message = message.replace("no image of this name", "is not a file")
        wait_for(lambda: message in server.log.read_text(), 10)
    else:
        assert answer.status_code in (404, 422)
        assert message in answer.json()["detail"]
    assert server.alive()


TOUCH = "__import__('pathlib').Path({marker!r}).touch()"
HOSTILE = {  # by the option; {code} would create a file
    "sampler": ["${code}", "$import marked", "@device", "%/etc/passwd", ["${code}"], {"_target_": "os.getpid"}, 7],
    "fusion": ["${code}", "mean; {code}", None],
    "num_samples": ["${code}", -1, 10**9, 1.5, True, "3"],
    "num_inference_steps": ["${code}", -1, 10**9, "$import marked"],
    "model_filename": ["${code}", "../../../etc/passwd", "last.pt\x00"],
    "result_extension": ["${code}", "/../../x", ".sh"],
    "device": ["${code}", "cuda; {code}", "$import marked", "%/etc/passwd"],
    "label_tag": ["${code}"],
}
CASES = [(option, value) for option, values in HOSTILE.items() for value in values]


@pytest.mark.parametrize(("option", "value"), CASES, ids=str)
def test_options_are_data(server, tmp_path, option, value):
    """Whatever an option holds, nothing of it is executed, and the server stays up."""
    marker = tmp_path / "executed"
    code = TOUCH.format(marker=str(marker))
    hostile = json.loads(json.dumps(value).replace("{code}", json.dumps(code)[1:-1]))
    answer = server.infer(f"{SUBJECT}_t1", "json", **{option: hostile})
    again = server.infer(f"{SUBJECT}_t1", "json")  # what was written into the configuration is parsed again
    assert not marker.exists()
    assert not (server.log.parent / "imported").exists()
    assert server.alive()
    assert again.status_code == 200, again.text
    if not is_stock(server):
        assert answer.status_code == 422, answer.text


def test_only_images_of_the_studies_are_read(server, phantoms, tmp_path):
    outside = phantoms / "BraTS20_Training_002" / "BraTS20_Training_002_t1.nii.gz"
    link = Path(server.log.parent, "studies", "link_t1.nii.gz")
    link.symlink_to(outside)
    try:
        answers = [server.infer(name) for name in (str(outside), "/etc/passwd", "link_t1")]
    finally:
        link.unlink()
    if not is_stock(server):  # the stock app reads any file that its user may read; docs/monai_label.md says so
        assert [answer.status_code for answer in answers[:2]] == [403, 403]
        assert answers[2].status_code in (403, 404)
    assert server.alive()


def test_an_epoch_is_trained_and_served(server, phantoms, tmp_path):
    for number in range(1, 6):
        name = f"BraTS20_Training_{number:03d}"
        label = {"label": (f"{name}.nii.gz", (phantoms / name / f"{name}_seg.nii.gz").read_bytes())}
        url = f"{server.url}/datastore/label?image={name}_t1ce&tag=final"
        assert requests.put(url, files=label | {"params": (None, "{}")}, timeout=30).ok
    weights = server.bundle / "models" / "model.pt"
    before = weights.read_bytes()
    request = {"max_epochs": 1, "val_split": 0.2, "multi_gpu": False}
    assert requests.post(f"{server.url}/train/{MODEL}", json=request, timeout=30).ok
    wait_for(lambda: status(server)["status"] not in ("SUBMITTED", "RUNNING"), 300)
    assert status(server)["status"] == "DONE", status(server)
    assert weights.read_bytes() != before
    split = json.loads((server.bundle / "output" / "train" / "datalist.json").read_text())
    assert [len(split[part]) for part in ("training", "validation")] == [4, 1]
    mask = np.asarray(volume_of(server.infer(f"{SUBJECT}_t1"), tmp_path).dataobj)
    assert dice(mask > 0, np.asarray(truth(phantoms).dataobj) > 0) > 0.8  # it started from the weights that were there


def test_the_documented_requests_are_answered(server, tmp_path):
    port = server.url.rsplit(":", 1)[1]
    blocks = documented("curl", port, server.log.parent)
    requests_ = [block for block in blocks if ORGANS not in block and SYNTHESIS not in block]
    for block in requests_ if not is_stock(server) else [block for block in requests_ if '"volume"' not in block]:
        subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True)
    wait_for(lambda: status(server)["status"] not in ("SUBMITTED", "RUNNING"), 300)
    assert status(server)["status"] == "DONE", status(server)
    assert nib.load(tmp_path / "mask.nii.gz").shape == SIZE


def status(server: Server) -> dict:
    return requests.get(f"{server.url}/train/", timeout=30).json()


def test_killed_while_it_trains(server, tmp_path):
    """Studies, labels and weights are whole, and a new training starts anew from the weights, and says so."""
    if is_stock(server):
        pytest.skip("the same code of the bundle trains in both apps")
    folder, bundle = server.log.parent, server.bundle
    kept = {path: path.read_bytes() for path in (folder / "studies").rglob("*.nii.gz")}
    assert any("labels" in path.parts for path in kept)
    last = bundle / "models" / "last.pt"
    before = last.stat().st_mtime_ns
    assert requests.post(f"{server.url}/train/{MODEL}", json={"max_epochs": 50}, timeout=30).ok
    wait_for(lambda: last.stat().st_mtime_ns != before, 300)  # an epoch is over
    for process in (*psutil.Process(server.process.pid).children(recursive=True), server.process):
        process.kill()
    assert {path: path.read_bytes() for path in (folder / "studies").rglob("*.nii.gz")} == kept
    (tmp_path / "again").mkdir()
    command = documented("--app label_app", "8000", folder)[0]
    with serve(lambda port: command.replace("8000", port), tmp_path / "again", bundle) as running:
        again = Server(*running, bundle)
        assert again.infer(f"{SUBJECT}_t1").ok
        assert requests.post(f"{again.url}/train/{MODEL}", json={"max_epochs": 1}, timeout=30).ok
        wait_for(lambda: status(again)["status"] not in ("SUBMITTED", "RUNNING"), 300)
        assert status(again)["status"] == "DONE", status(again)
        weights = bundle / "models" / "model.pt"
        assert f"training starts from the weights of '{weights}', with epoch 1" in again.log.read_text()


def test_the_server_is_the_version_that_the_docs_name():
    assert monailabel.__version__ == "0.8.5"
    assert "MONAI Label 0.8.5" in (ROOT / "docs" / "monai_label.md").read_text(encoding="utf-8")
