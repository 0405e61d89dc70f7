from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImage

from scripts.data.writing import LikeInputWriter, SaveMapd, subject_name


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    writer = LikeInputWriter()
    writer.set_data_array(np.ones((1, 2, 2, 2), np.float32))
    writer.set_metadata({"affine": np.eye(4)}, resample=False)
    writer.write(tmp_path / "a.nii.gz")
    assert nib.load(tmp_path / "a.nii.gz").shape == (2, 2, 2)

    def half(image, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", half)
    writer.set_data_array(np.ones((1, 2, 2, 2), np.float32))
    with pytest.raises(OSError, match="disk full"):
        writer.write(tmp_path / "b.nii.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


@pytest.mark.parametrize("subject", ["S1", "scan.1"])
def test_files_are_named_by_the_subject(tmp_path, subject):
    saver = SaveImage(tmp_path, "seg", output_name_formatter=subject_name, separate_folder=False, print_log=False)
    saver(MetaTensor(torch.ones(1, 2, 2, 2), meta={"subject": subject}))
    assert [path.name for path in tmp_path.iterdir()] == [f"{subject}_seg.nii.gz"]


def test_maps_are_saved_by_subject_and_absent_ones_are_skipped(tmp_path):
    save = SaveMapd("prob", "prob", str(tmp_path))
    save({"prob": MetaTensor(torch.ones(1, 2, 2, 2), meta={"subject": "S1"})})
    save({"pred": torch.ones(1, 2, 2, 2)})
    assert [path.name for path in tmp_path.iterdir()] == ["S1_prob.nii.gz"]
    assert nib.load(tmp_path / "S1_prob.nii.gz").get_data_dtype() == np.float32
