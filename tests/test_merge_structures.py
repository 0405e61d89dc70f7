from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from conftest import SHARED_DATA
from scripts.config import InputError
from scripts.data.datalist import read_datalist
from scripts.organs import merge_structures
from scripts.organs.structures import catalogue

AFFINE = np.diag([1.5, 1.5, 3.0, 1.0])


def save(file, values, affine=AFFINE):
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(values), affine), file)


def mask(*voxels):
    values = np.zeros((4, 5, 6), np.uint8)
    for voxel in voxels:
        values[voxel] = 1
    return values


@pytest.fixture
def dataset(tmp_path):
    """Three subjects. In each, the liver and the spleen share a voxel."""
    for name in ("s0001", "s0002", "s0003"):
        save(tmp_path / name / "ct.nii.gz", np.zeros((4, 5, 6), np.int16))
        save(tmp_path / name / "segmentations" / "spleen.nii.gz", mask((0, 0, 0), (1, 1, 1)))
        save(tmp_path / name / "segmentations" / "liver.nii.gz", mask((1, 1, 1), (2, 2, 2)))
    (tmp_path / "meta.csv").write_text("image_id;age;split\ns0001;50;train\ns0002;60;val\ns0003;70;test\n")
    return tmp_path


def test_one_label_map_and_the_published_split(dataset):
    assert merge_structures.merge(dataset) == {"s0001": 1, "s0002": 1, "s0003": 1}
    image = nib.load(dataset / "s0001" / "labels.nii.gz")
    labels = np.asarray(image.dataobj)
    assert labels.dtype == np.uint8
    assert np.array_equal(image.affine, AFFINE)
    assert labels[0, 0, 0] == catalogue()["spleen"]["number"]
    assert labels[1, 1, 1] == labels[2, 2, 2] == catalogue()["liver"]["number"]  # the later structure
    assert np.count_nonzero(labels) == 3
    lists = read_datalist(str(dataset / "datalist.json"), str(dataset), ["ct"])
    assert [[item["subject"] for item in items] for items in lists.values()] == [["s0001"], ["s0002"], ["s0003"]]
    assert json.loads((dataset / "datalist.json").read_text())["test"][0]["label"] == ["s0003/labels.nii.gz"]


def test_a_second_run_merges_only_what_is_missing(dataset):
    merge_structures.merge(dataset)
    (dataset / "s0002" / "labels.nii.gz").unlink()
    shutil.rmtree(dataset / "s0001" / "segmentations")
    assert merge_structures.merge(dataset) == {"s0002": 1}


def broken(dataset, file, values=None, affine=AFFINE, text=None):
    if text is not None:
        (dataset / file).write_text(text)
    else:
        save(dataset / file, values, affine)


SPLEEN = "s0002/segmentations/spleen.nii.gz"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "meta.csv", "text": "image_id;age\ns0001;1\n"}, r"no column \['split'\], only"),
        ({"file": "meta.csv", "text": "image_id,split\ns0001,train\n"}, "separated by ';'"),
        ({"file": "meta.csv", "text": "image_id;split\ns0001;train\n"}, "2 subjects are not in .*meta.csv"),
        ({"file": "meta.csv", "text": "image_id;split\ns0001;training\n"}, "split 'training' of 's0001'"),
        ({"file": "meta.csv", "text": "image_id;split\ns0001;train\ns0001;test\n"}, r"several rows for \['s0001'\]"),
        ({"file": SPLEEN, "values": 2 * mask((0, 0, 0))}, "'s0002'.*values other than 0 and 1"),
        ({"file": SPLEEN, "values": np.full((4, 5, 6), np.nan, np.float32)}, "'s0002'.*values other than 0 and 1"),
        ({"file": SPLEEN, "values": mask(), "affine": np.eye(4)}, "'s0002'.*not on the same grid"),
        ({"file": SPLEEN, "values": np.zeros((4, 5, 7), np.uint8)}, "'s0002'.*not on the same grid"),
        ({"file": SPLEEN, "text": "no NIfTI"}, "'s0002': cannot read"),
        ({"file": "s0003/ct.nii.gz", "text": "no NIfTI"}, "'s0003': cannot read"),
        (
            {"file": "s0001/segmentations/splen.nii.gz", "values": mask()},
            "'s0001': unknown structure 'splen'.*'spleen'",
        ),
    ],
)
def test_bad_input_names_the_file_and_leaves_no_data_list(dataset, change, message):
    broken(dataset, **change)
    with pytest.raises(InputError, match=message):
        merge_structures.merge(dataset)
    assert not (dataset / "datalist.json").exists()
    assert not list(dataset.rglob(".partial_*"))


def test_no_subject_and_no_table(tmp_path):
    with pytest.raises(InputError, match="meta.csv cannot be read"):
        merge_structures.merge(tmp_path)
    (tmp_path / "meta.csv").write_text("image_id;split\n")
    with pytest.raises(InputError, match="no subject found"):
        merge_structures.merge(tmp_path)


def test_the_command_prints_an_error_as_one_line(dataset, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["merge_structures", "--dataset_dir", str(dataset)])
    merge_structures.main()
    assert "s0001: 1 voxels were in several masks" in capsys.readouterr().out
    (dataset / "meta.csv").unlink()
    with pytest.raises(SystemExit) as stop:
        merge_structures.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.skipif(not (SHARED_DATA / "totalsegmentator").is_dir(), reason="needs ../shared/data/totalsegmentator")
def test_the_masks_of_a_real_subject_become_its_published_label_map(tmp_path):
    source = SHARED_DATA / "totalsegmentator"
    (tmp_path / "s0001" / "segmentations").mkdir(parents=True)
    shutil.copyfile(source / "example_ct_sm.nii.gz", tmp_path / "s0001" / "ct.nii.gz")
    for file in (source / "example_seg_fast").glob("*.nii.gz"):
        (tmp_path / "s0001" / "segmentations" / file.name).symlink_to(file)
    (tmp_path / "meta.csv").write_text("image_id;split\ns0001;train\n")
    merge_structures.merge(tmp_path)
    found = np.asarray(nib.load(tmp_path / "s0001" / "labels.nii.gz").dataobj)
    assert np.array_equal(found, np.asarray(nib.load(source / "example_seg_fast.nii.gz").dataobj))
    assert len(np.unique(found)) == 41
