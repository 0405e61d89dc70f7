"""Inference of many subjects: what is finished is kept, one bad subject does not stop the others, lists of subjects."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from conftest import MODALITIES, run_configs
from scripts.config import InputError
from scripts.data.subjects import EmptyFolder
from scripts.streams.subjects import list_subjects

OUTPUTS = ("seg", "prob", "uncertainty")


@pytest.fixture
def some(phantoms, tmp_path) -> Path:
    """A copy of three phantoms: ``a``, ``b`` and ``c``."""
    found = sorted(path for path in phantoms.iterdir() if path.is_dir())
    for source, name in zip(found, "abc", strict=False):
        (tmp_path / "data" / name).mkdir(parents=True)
        for modality in MODALITIES:
            file = source / f"{source.name}_{modality}.nii.gz"
            shutil.copy(file, tmp_path / "data" / name / f"{name}_{modality}.nii.gz")
    return tmp_path / "data"


@pytest.fixture
def infer(some, three_regions):
    """Function that runs inference on the copy, and returns the times of the last change of all files by name."""

    def run(**options) -> dict[str, int]:
        out = some.parent / "out"
        run_configs(
            ["inference.yaml"],
            **{"dataset_dir": str(some), "output_dir": str(out), "ckpt_dir": str(three_regions)} | options,
        )
        return times(out)

    return run


def times(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def cut(file: Path) -> bytes:
    """Cut the end of a file: its header can still be read. Returns the content."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return content


def test_what_is_finished_is_not_written_again(infer, some):
    before = infer()
    assert {f"{name}_{kind}.nii.gz" for name in "abc" for kind in OUTPUTS} <= before.keys()
    assert infer() == before
    file = some / "b" / "b_t1.nii.gz"  # a changed image is computed again
    nib.save(nib.Nifti1Image(nib.load(file).get_fdata() + 1, nib.load(file).affine), file)
    after = infer()
    written = {name for name, time in after.items() if before.get(name) != time}
    assert written >= {"b_seg.nii.gz", "b_overlay.png", "manifest/b.json", "grades.csv", "report.html"}
    assert not [name for name in written if Path(name).name.startswith(("a", "c"))]


@pytest.mark.parametrize("options", [{"num_samples": 2}, {"seed": 1}])
def test_other_settings_compute_all_again(infer, options):
    before, after = infer(), infer(**options)
    assert all(before[name] != after[name] for name in before)


def test_other_weights_compute_all_again(infer, three_regions, tmp_path):
    before = infer()
    shutil.copytree(three_regions, tmp_path / "copy")
    assert infer(ckpt_dir=str(tmp_path / "copy")) == before  # the same content under another name
    assert all(before[name] != time for name, time in infer(ckpt_path=str(three_regions / "last.pt")).items())


def test_a_bad_subject_does_not_stop_the_others(infer, some):
    content = cut(some / "b" / "b_flair.nii.gz")
    (some / "c" / "c_t2.nii.gz").unlink()
    with pytest.raises(InputError, match="2 errors in the data") as caught:
        infer()
    assert "subject 'b': cannot read" in str(caught.value)
    assert "subject 'c': no file for modality 't2'" in str(caught.value)
    out = some.parent / "out"
    assert pd.read_csv(out / "grades.csv")["subject"].tolist() == ["a"]
    assert not list(out.rglob("b*")) + list(out.rglob("c*"))
    before = times(out)
    (some / "b" / "b_flair.nii.gz").write_bytes(content)
    shutil.rmtree(some / "c")
    after = infer()
    assert pd.read_csv(out / "grades.csv")["subject"].tolist() == ["a", "b"]
    assert {name for name, time in before.items() if after[name] != time} == {
        "grades.csv", "report.html", "manifest/.written"
    }  # fmt: skip


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"origin": 1}', '{"origin": "x", "images": {}, "rows": "__import__"}']
)
def test_a_damaged_record_is_replaced(infer, some, content):
    before = infer()
    record = some.parent / "out" / "manifest" / "a.json"
    whole = record.read_text()
    record.write_text(content)
    after = infer()
    assert json.loads(record.read_text())["rows"] == json.loads(whole)["rows"]
    assert after["a_seg.nii.gz"] != before["a_seg.nii.gz"]
    assert after["b_seg.nii.gz"] == before["b_seg.nii.gz"]


def test_subjects_are_listed_before_they_are_opened(some):
    for file in (some / "b").iterdir():
        file.write_bytes(b"damaged")
    (some / "d").mkdir()
    found = list_subjects(str(some), MODALITIES)
    assert found.names == ["a", "b", "c", "d"]
    assert found[0]["subject"] == "a"
    with pytest.raises(InputError, match="subject 'b'"):
        found[1]
    with pytest.raises(EmptyFolder, match="holds neither a NIfTI volume nor a DICOM series"):
        found[3]


def test_empty_folders_are_left_out_and_named(infer, some, capfd):
    (some / "notes").mkdir()
    infer()
    assert "1 folders hold no volume and are left out: ['notes']" in "".join(capfd.readouterr())
    assert len(pd.read_csv(some.parent / "out" / "grades.csv")) == 3


def listed(some: Path, kind: str, names: str = "ac") -> str:
    """A list of subjects in a file, which names its columns in another order than the network."""
    if kind == "csv":
        rows = [
            {m: f"{name}/{name}_{m}.nii.gz" for m in MODALITIES[::-1]} | {"subject": f"case {name}"} for name in names
        ]
        pd.DataFrame(rows).to_csv(some / "list.csv", index=False)
    else:
        images = [[f"{name}/{name}_{m}.nii.gz" for m in MODALITIES] for name in names]
        entries = [{"subject": f"case {name}", "image": image} for name, image in zip(names, images, strict=True)]
        (some / "list.json").write_text(json.dumps({"training": [], "test": entries}))
    return str(some / f"list.{kind}")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_list_of_subjects(infer, some, kind):
    infer(datalist_file=listed(some, kind))
    out = some.parent / "out"
    assert pd.read_csv(out / "grades.csv")["subject"].tolist() == ["case a", "case c"]
    from_list = nib.load(out / "case a_prob.nii.gz").get_fdata()
    infer()
    np.testing.assert_array_equal(nib.load(out / "a_prob.nii.gz").get_fdata(), from_list)


def test_a_decathlon_list_of_4d_files(some, phantoms):
    first = some / "a"
    volumes = [nib.load(first / f"a_{m}.nii.gz").get_fdata() for m in MODALITIES]
    (some / "imagesTs").mkdir()
    nib.save(nib.Nifti1Image(np.stack(volumes, axis=-1), np.eye(4)), some / "imagesTs" / "BRATS_001.nii.gz")
    (some / "dataset.json").write_text(json.dumps({"test": ["./imagesTs/BRATS_001.nii.gz"]}))
    (item,) = list_subjects(str(some), MODALITIES, datalist_file=str(some / "dataset.json"))
    assert item["subject"] == "BRATS_001"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject,t1\na,b\n", "no list of subjects"),
        ("subject,t1,t1ce,t2,flair\n", "lists no subject"),
        ("subject,t1,t1ce,t2,flair\n../a,1,2,3,4\n", "'../a'.* no names of files"),
        ("subject,t1,t1ce,t2,flair\na,1,2,3,4\na,1,2,3,4\n", "'a'.* listed twice"),
    ],
)
def test_a_damaged_list_is_refused(some, text, message):
    (some / "list.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        list_subjects(str(some), MODALITIES, datalist_file=str(some / "list.csv"))


@pytest.mark.parametrize("text", ["", "[]", '{"training": []}', '{"test": [{"label": "x"}]}', '{"test": 3}'])
def test_a_file_without_a_list_is_refused(some, text):
    (some / "list.json").write_text(text)
    with pytest.raises(InputError, match="is no list of subjects"):
        list_subjects(str(some), MODALITIES, datalist_file=str(some / "list.json"))


def test_a_full_disk_is_named_for_each_subject(infer, some):
    """Files cannot grow beyond 10 kB, as on a full disk; the next start does what is missing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(InputError, match="3 errors in the data") as caught:
            infer()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert all(f"subject '{name}': " in str(caught.value) for name in "abc")
    assert str(caught.value).count("File too large") == 3
    out = some.parent / "out"
    assert not list(out.rglob(".partial_*")) + list(out.rglob("*.csv")) + list(out.rglob("manifest/*.json"))
    assert {f"{name}_prob.nii.gz" for name in "abc"} <= infer().keys()
