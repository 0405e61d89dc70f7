"""Inference from and to an object store: a server that speaks S3, on this machine."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from dicom_phantom import write_series

from conftest import MODALITIES, run_configs
from scripts.config import InputError
from scripts.streams.storage import Output, Store
from scripts.streams.subjects import list_subjects

s3_server = pytest.importorskip("s3_server", reason="moto, a server that speaks S3, needs Python 3.11")
content, objects, upload = s3_server.content, s3_server.objects, s3_server.upload


@pytest.fixture
def s3():
    """Client of a server with an empty bucket."""
    with s3_server.bucket() as client:
        yield client


@pytest.fixture
def some(phantoms, tmp_path) -> Path:
    """Two phantoms, ``a`` and ``b [1]``."""
    for source, name in zip(sorted(path for path in phantoms.iterdir() if path.is_dir()), ("a", "b [1]"), strict=False):
        (tmp_path / "data" / name).mkdir(parents=True)
        for m in MODALITIES:
            (tmp_path / "data" / name / f"{name}_{m}.nii.gz").write_bytes(
                (source / f"{source.name}_{m}.nii.gz").read_bytes()
            )
    return tmp_path / "data"


@pytest.fixture
def infer(three_regions):
    def run(dataset_dir: str, output_dir: str, **options) -> None:
        keys = {"dataset_dir": dataset_dir, "output_dir": output_dir, "ckpt_dir": str(three_regions)}
        run_configs(["inference.yaml"], **keys | options)

    return run


def test_inference_in_a_store_is_that_on_a_disk(infer, some, s3, tmp_path):
    infer(str(some), str(tmp_path / "out"))
    upload(s3, some, "brains")
    infer("s3://bucket/brains", "s3://bucket/results/first")
    found = objects(s3)
    local = {str(f.relative_to(tmp_path / "out")): f for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert {key.removeprefix("results/first/") for key in found if key.startswith("results")} == local.keys()
    for name, file in local.items():
        if "manifest" not in name and name != "report.html":
            assert unzipped(content(s3, f"results/first/{name}")) == unzipped(file.read_bytes()), name
    infer("s3://bucket/brains", "s3://bucket/results/first/")
    assert objects(s3) == found  # a second start writes nothing


def unzipped(data: bytes) -> bytes:
    """The content, without the time that gzip writes."""
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def test_a_changed_object_is_computed_again(infer, some, s3, tmp_path):
    upload(s3, some, "brains")
    infer("s3://bucket/brains", "file://" + str(tmp_path / "out"))
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    image = nib.load(some / "a" / "a_t1.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata() + 1, image.affine), some / "a" / "a_t1.nii.gz")
    upload(s3, some / "a", "brains/a")
    infer("s3://bucket/brains", str(tmp_path / "out"))
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert before["a_seg.nii.gz"] != after["a_seg.nii.gz"]
    assert before["b [1]_seg.nii.gz"] == after["b [1]_seg.nii.gz"]


def test_a_damaged_object_is_named_by_its_address_and_the_others_are_done(infer, some, s3, capfd):
    upload(s3, some, "brains")
    s3.put_object(Bucket="bucket", Key="brains/a/a_t1.nii.gz", Body=b"damaged")
    for key in ("brains/", "brains/b [1]/", "brains/notes/"):  # as a console makes a folder
        s3.put_object(Bucket="bucket", Key=key, Body=b"")
    with pytest.raises(InputError, match=r"^subject 'a': .*s3://bucket/brains/a/a_t1.nii.gz"):
        infer("s3://bucket/brains", "s3://bucket/out")
    assert "1 folders hold no volume and are left out: ['notes']" in "".join(capfd.readouterr())
    assert {"out/b [1]_seg.nii.gz", "out/grades.csv", "out/manifest/b [1].json"} <= objects(s3).keys()
    assert not [key for key in objects(s3) if key.startswith("out/a")]


def test_a_list_and_a_folder_of_images_in_a_store(some, s3):
    upload(s3, some, "brains")
    table = pd.DataFrame([{"subject": "case 1"} | {m: f"a/a_{m}.nii.gz" for m in MODALITIES}])
    s3.put_object(Bucket="bucket", Key="brains/list.csv", Body=table.to_csv(index=False).encode())
    found = list_subjects("s3://bucket/brains", MODALITIES, datalist_file="s3://bucket/brains/list.csv")
    with found.opened(found.sources[0]) as (item, states):
        assert item["subject"] == "case 1"
        assert [Path(file).read_bytes() for file in item["image"]] == [
            (some / "a" / f"a_{m}.nii.gz").read_bytes() for m in MODALITIES
        ]
    assert not Path(item["image"][0]).exists()
    assert all(found.is_unchanged(name, state) for name, state in states.items())
    images = np.stack([nib.load(some / "a" / f"a_{m}.nii.gz").get_fdata() for m in MODALITIES], axis=-1)
    nib.save(nib.Nifti1Image(images, np.eye(4)), some / "7.nii.gz")
    s3.put_object(Bucket="bucket", Key="all/images/7.nii.gz", Body=(some / "7.nii.gz").read_bytes())
    found = list_subjects("s3://bucket/all/", MODALITIES, image_dir="images")
    with found.opened(found.sources[0]) as (item, states):
        assert (item["subject"], list(states)) == ("7", ["images/7.nii.gz"])


def test_dicom_series_in_a_store(s3, tmp_path):
    write_series(tmp_path / "case1", np.ones((8, 8, 4), np.int16), np.eye(4))
    upload(s3, tmp_path, "studies")
    found = list_subjects("s3://bucket/studies", ["t1"])
    with found.opened(found.sources[0]) as (item, states):
        assert item["subject"] == "case1"
        assert len(states) == len(list((tmp_path / "case1").iterdir()))
    with pytest.raises(InputError, match="list DICOM series as folders"):
        s3.put_object(Bucket="bucket", Key="l.json", Body=json.dumps({"test": ["case1/0"]}).encode())
        list_subjects("s3://bucket/studies", ["t1"], datalist_file="s3://bucket/l.json")


@pytest.mark.parametrize("key", ["brains/a/../../../evil", "brains/a//evil", "brains/a/./evil"])
def test_names_that_lead_out_of_the_folder_are_refused(some, s3, key):
    upload(s3, some / "a", "brains/a")
    s3.put_object(Bucket="bucket", Key=key, Body=b"x")
    found = list_subjects("s3://bucket/brains", MODALITIES)
    with pytest.raises(InputError, match="leads out of its folder"), found.opened(found.sources[0]):
        pass


@pytest.mark.parametrize("output", ["s3://bucket/brains/a", "s3://bucket/brains/a/out/"])
def test_output_may_not_go_among_the_objects_of_a_subject(infer, some, s3, output):
    upload(s3, some, "brains")
    before = objects(s3)
    with pytest.raises(InputError, match="holds volumes of the subjects"):
        infer("s3://bucket/brains", output)
    assert objects(s3) == before


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://bucket/nothing", "s3://bucket/nothing/' is empty, or there is no such folder"),
        ("s3://absent/brains", "s3://absent/brains/' is empty, or there is no such folder"),
        ("s3://bucket/files", r"has no folder, but \['1.nii.gz'\]: .* set 'image_dir'"),
        ("nonsense://bucket", "cannot be used: .*nonsense"),
    ],
)
def test_a_store_without_subjects_is_named(s3, place, message):
    s3.put_object(Bucket="bucket", Key="files/1.nii.gz", Body=b"x")
    with pytest.raises(InputError, match=message):
        list_subjects(place, MODALITIES)


def test_an_output_that_cannot_be_written_is_refused_before_work_starts(infer, some, s3, monkeypatch):
    monkeypatch.setattr("scripts.sampling.jobs.compute", None)
    with pytest.raises(InputError, match="'s3://absent/out' cannot be used: .*bucket"):
        infer(str(some), "s3://absent/out")


def test_a_lost_server_is_named(monkeypatch):
    for key, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "MAX_ATTEMPTS": "1", "ACCESS_KEY_ID": "x"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(InputError, match="check the address, the credentials"):
        Store("s3://other/out").write("x", "x")


@pytest.mark.parametrize("key", ["dataset_dir", "output_dir", "cache_dir", "ckpt_dir"])
def test_training_says_why_it_needs_a_disk(key):
    with pytest.raises(InputError, match=f"{key}='s3://bucket/x' must be a folder on a disk: .+"):
        run_configs(["train.yaml"], **{key: "s3://bucket/x"})


def test_file_addresses_have_whole_paths():
    with pytest.raises(InputError, match="must have a whole path, such as file:///data/brains"):
        run_configs(["inference.yaml"], dataset_dir="file://data/brains")


def test_what_was_written_is_moved(s3):
    output = Output("s3://bucket/out")
    (output.folder / "overlays").mkdir()
    (output.folder / "overlays" / "a.png").write_bytes(b"x")
    output.send()
    assert objects(s3).keys() == {"out/overlays/a.png"}
    assert not (output.folder / "overlays" / "a.png").exists()
