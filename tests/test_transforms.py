from __future__ import annotations

import nibabel as nib
import numpy as np
import torch
from monai.transforms import RandCropByPosNegLabeld

from scripts.data.transforms import LoadVolumesd, RandModalityDropoutd, SliceIndicesd

BRATS = {"TC": [1, 4], "WT": [1, 2, 4], "ET": [4]}
LABEL = torch.tensor([0, 1, 2, 4, 4, 2, 0, 1]).reshape(1, 2, 2, 2).float()


def test_slice_indices_drive_monais_crop():
    label = torch.zeros(1, 6, 6, 5)
    label[0, 1, 1, 3] = 1
    image = torch.ones(2, 6, 6, 5)
    image[..., 0] = 0  # an empty slice
    data = SliceIndicesd("label")({"image": image, "label": label})
    crop = RandCropByPosNegLabeld(
        ["image", "label"],
        "label",
        [-1, -1, 1],
        pos=1,
        neg=1,
        num_samples=200,
        fg_indices_key="fg_indices",
        bg_indices_key="bg_indices",
    ).set_random_state(0)
    drawn = crop(data)
    assert drawn[0]["image"].shape == (2, 6, 6, 1)
    assert all((item["image"] != 0).any() for item in drawn)
    assert 70 < sum(bool(item["label"].any()) for item in drawn) < 130


def test_slices_of_one_kind_are_drawn_without_a_warning():
    for label in (torch.zeros(1, 4, 4, 1), torch.ones(1, 4, 4, 1)):
        indices = SliceIndicesd("label")({"image": torch.ones(1, 4, 4, 1), "label": label})
        assert indices["fg_indices"].tolist() == indices["bg_indices"].tolist() == [10]


def test_one_file_of_four_dimensions_is_read_channel_first(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((5, 4, 3, 2), np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    assert LoadVolumesd("image", ["t1", "t2"])({"image": str(tmp_path / "a.nii.gz")})["image"].shape == (2, 5, 4, 3)


def test_modality_dropout_zeroes_one_modality_and_never_the_only_one():
    dropout = RandModalityDropoutd("image", prob=1.0).set_random_state(0)
    image = torch.ones(4, 3, 3)
    dropped = [dropout({"image": image})["image"].flatten(1).any(dim=1).tolist() for _ in range(40)]
    assert {tuple(kept) for kept in dropped} == {tuple(i != j for i in range(4)) for j in range(4)}
    assert image.all()
    assert dropout({"image": image[:1]})["image"].all()
    assert RandModalityDropoutd("image", prob=0.0)({"image": image})["image"].all()
