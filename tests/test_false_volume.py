from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
import pytest

from benchmarks import false_volume

AFFINE = np.diag([2.0, 5.0, 10.0, 1.0])  # a voxel has 0.1 ml


def save(file, mask):
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), AFFINE), file)


@pytest.fixture
def folders(tmp_path):
    """An empty subject with 12 false voxels, and one whose tumour fills the first of three slices."""
    tumour = np.zeros((4, 4, 3))
    tumour[..., 0] = 4
    false = np.zeros((4, 4, 3))
    false[:3, :, 1] = 1
    save(tmp_path / "data" / "healthy" / "healthy_seg.nii.gz", np.zeros((4, 4, 3)))
    save(tmp_path / "data" / "ill" / "ill_seg.nii.gz", tumour)
    save(tmp_path / "masks" / "healthy_seg.nii.gz", false)
    save(tmp_path / "masks" / "ill_seg.nii.gz", np.where(np.arange(3) == 2, 0, 2) * np.ones((4, 4, 3)))
    return tmp_path


def test_only_slices_without_truth_count(folders):
    data, masks = folders / "data", folders / "masks"
    for subject, expected in (("healthy", (True, 1.2)), ("ill", (False, 1.6))):
        name = f"{subject}_seg.nii.gz"
        assert false_volume.false_volume(data / subject / name, masks / name) == pytest.approx(expected)


def test_subjects_without_a_tumour_are_told_apart(folders, monkeypatch, capsys):
    options = ["--dataset_dir", str(folders / "data"), "--masks", str(folders / "masks"), "--limit", "1.5"]
    monkeypatch.setattr(sys, "argv", ["false_volume.py", *options])
    false_volume.main()
    healthy, ill = capsys.readouterr().out.split("empty slices of the others: 1 subjects")
    assert "subjects without a tumour: 1 subjects" in healthy
    assert "| mean (ml)          |     1.2 |" in healthy
    assert "| mean (ml)          |     1.6 |" in ill
    assert "share below 1.5 ml" in ill


def test_a_mask_on_another_grid_is_told(folders):
    save(folders / "masks" / "ill_seg.nii.gz", np.zeros((4, 4, 2)))
    with pytest.raises(SystemExit, match=r"shape \(4, 4, 2\), .* has \(4, 4, 3\)"):
        false_volume.false_volume(folders / "data" / "ill" / "ill_seg.nii.gz", folders / "masks" / "ill_seg.nii.gz")
