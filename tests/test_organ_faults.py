"""Bad input of the bundle of organs: one message that names file, subject or key, and nothing is written."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from test_organs import TINY, infer, run, trained  # noqa: F401 -- a fixture

from scripts.config import InputError

AFFINE = np.diag([10.0, 10.0, 20.0, 1.0])
SHAPE = (32, 32, 24)


def ct(shape=SHAPE, dtype=np.int16):
    return np.linspace(-1000, 500, int(np.prod(shape))).reshape(shape).astype(dtype)


def colours():
    return np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))


def with_nan():
    volume = ct(dtype=np.float32)
    volume[3, 4, 5] = np.nan
    return volume


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (with_nan(), "subject 's1': modality 1 of 1 has NaN or infinite voxels"),
        (np.full(SHAPE, -1000, np.int16), "subject 's1': modality 1 of 1 is constant"),
        (ct((*SHAPE, 2)), "subject 's1': .*s1/ct.nii.gz holds 2 volumes, expected 1"),
        (colours(), "s1/ct.nii.gz"),
        (ct().astype(np.complex64), "s1/ct.nii.gz"),
    ],
    ids=["NaN", "constant", "4D", "RGB", "complex"],
)
def test_a_ct_that_cannot_be_segmented(trained, tmp_path, volume, message):  # noqa: F811
    (tmp_path / "data" / "s1").mkdir(parents=True)
    nib.save(nib.Nifti1Image(volume, AFFINE), tmp_path / "data" / "s1" / "ct.nii.gz")
    with pytest.raises(InputError, match=message):
        infer(trained, tmp_path / "data", tmp_path / "out")
    assert not list(tmp_path.glob("out/*.nii.gz")) + list(tmp_path.glob("out/*.json"))


def test_no_ct(trained, tmp_path):  # noqa: F811
    (tmp_path / "data" / "s1").mkdir(parents=True)
    nib.save(nib.Nifti1Image(ct(), AFFINE), tmp_path / "data" / "s1" / "mr.nii.gz")
    with pytest.raises(InputError, match="subject 's1': no file for modality 'ct' among .*mr.nii.gz"):
        infer(trained, tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_window_that_was_not_trained(trained, cts, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="trained with windows=.*, now it is .*-100"):
        infer(trained, cts / "s0", tmp_path / "out", windows=[[-100, 100]])
    assert not (tmp_path / "out").exists()


def change_labels(values, affine=AFFINE):
    return lambda folder: nib.save(nib.Nifti1Image(values, affine), folder / "labels.nii.gz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_labels(np.full(SHAPE, 1.5, np.float32)),
            "subject 's1': the label map has the value 1.5, which is no whole number",
        ),
        (change_labels(np.full(SHAPE, 200, np.uint8)), "subject 's1': the label map has the value 200"),
        (change_labels(np.zeros((32, 32, 20), np.uint8)), "subject 's1': .*32, 32, 20"),
        (change_labels(np.zeros(SHAPE, np.uint8), np.diag([5.0, 10.0, 20.0, 1.0])), "subject 's1': .*labels"),
        (lambda folder: (folder / "labels.nii.gz").write_bytes(b"no volume"), "labels.nii.gz"),
    ],
    ids=["not an integer", "unknown number", "another shape", "another grid", "no volume"],
)
def test_a_label_map_that_cannot_be_trained_on(cts, tmp_path, change, message):
    data = tmp_path / "data"
    shutil.copytree(cts, data)
    change(data / "s1")
    folders = {"dataset_dir": str(data), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "out")}
    with pytest.raises(InputError, match=message):
        run("train.yaml", **folders, **TINY)
    assert not list(tmp_path.glob("out/*.pt"))


def test_structures_without_a_voxel(cts, tmp_path, capsys):
    """Several of which some exist are trained, with a warning; none of them is an error."""
    folders = {"dataset_dir": str(cts), "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}
    with pytest.raises(InputError, match="no training subject has a voxel of .*'brain'"):
        run("train.yaml", **folders, **TINY | {"structures": ["brain"]})
    assert not list(tmp_path.iterdir())
    run("train.yaml", **folders, **TINY | {"structures": ["brain", "liver"], "max_epochs": 1})
    assert "structures are in no training subject: ['brain']" in capsys.readouterr().out


def test_a_subject_on_both_sides(cts, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cts, data)
    text = (data / "datalist.json").read_text().replace("s4", "s0")
    (data / "datalist.json").write_text(text)
    folders = {"dataset_dir": str(data), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "out")}
    with pytest.raises(InputError, match="s0"):
        run("train.yaml", **folders, **TINY)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_weights(cts, tmp_path):
    for content in ({"a": torch.zeros(1)}, [1, 2]):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(InputError, match="model.pt"):
            infer(tmp_path, cts / "s0", tmp_path / "out")
    assert not (tmp_path / "out").exists()
