from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ConvertToMultiChannelBasedOnBratsClassesd, RandCropByPosNegLabeld, SaveImage

from scripts.config import InputError
from scripts.transforms import (
    LabelToRegionsd,
    LikeInputWriter,
    LoadVolumesd,
    RandModalityDropoutd,
    RegionsToLabeld,
    SliceIndicesd,
    entropy_bits,
    subject_name,
)

BRATS = {"TC": [1, 4], "WT": [1, 2, 4], "ET": [4]}
LABEL = torch.tensor([0, 1, 2, 4, 4, 2, 0, 1]).reshape(1, 2, 2, 2).float()


def test_regions_agree_with_monai():
    ours = LabelToRegionsd("label", ["TC", "WT", "ET"], BRATS)({"label": LABEL})["label"]
    monai = ConvertToMultiChannelBasedOnBratsClassesd("label")({"label": LABEL})["label"]
    assert torch.equal(ours, monai.float())


def test_brats_2023_by_its_own_labels():
    label = torch.where(LABEL == 4, 3, LABEL)
    regions = {"TC": [1, 3], "WT": [1, 2, 3], "ET": [3]}
    assert torch.equal(LabelToRegionsd("label", ["ET"], regions)({"label": label})["label"], (LABEL == 4).float())
    with pytest.raises(InputError, match=r"'s': .*\[3.0\] outside \[0, 1, 2, 4\].*data_brats2023"):
        LabelToRegionsd("label", ["ET"], BRATS)({"label": label, "subject": "s"})


def test_regions_keep_the_affine():
    affine = np.diag([-1.0, -1, 2, 1])
    regions = LabelToRegionsd("label", ["WT"], BRATS)({"label": MetaTensor(LABEL, affine=affine)})["label"]
    assert np.allclose(regions.affine, affine)


@pytest.mark.parametrize("regions", [["XX"], [], "WT", ["WT", "WT"]])
def test_unknown_regions(regions):
    with pytest.raises(InputError, match="regions="):
        LabelToRegionsd("label", regions, BRATS)


def test_label_map_round_trip():
    regions = LabelToRegionsd("pred", ["TC", "WT", "ET"], BRATS)({"pred": LABEL})
    assert torch.equal(RegionsToLabeld("pred", ["TC", "WT", "ET"], BRATS)(regions)["pred"], LABEL.byte())


def test_label_map_is_nested_even_if_regions_are_not():
    pred = torch.zeros(2, 1, 1, 2)
    pred[1] = 1  # ET without WT
    assert RegionsToLabeld("pred", ["WT", "ET"], BRATS)({"pred": pred})["pred"].flatten().tolist() == [4, 4]


@pytest.mark.parametrize(
    ("regions", "region_labels", "background", "painted"),
    [
        (["WT"], BRATS, 0, [0, 1]),
        (["ET"], BRATS, 0, [0, 4]),
        (["nodule"], {"nodule": [255]}, 0, [0, 255]),
        (["cup", "disc"], {"disc": [128, 0], "cup": [0]}, 255, [255, 0]),
        (["disc"], {"disc": [128, 0], "cup": [0]}, 255, [255, 128]),
    ],
)
def test_regions_are_painted_with_the_first_value_of_their_own(regions, region_labels, background, painted):
    pred = torch.tensor([0.0, 1]).expand(len(regions), 1, 1, 2)
    label = RegionsToLabeld("pred", regions, region_labels, background)({"pred": pred})["pred"]
    assert label.flatten().tolist() == painted


@pytest.mark.parametrize("region_labels", [{"a": [0]}, {"a": [256]}, {"a": []}, {"a": ["1"]}])
def test_labels_that_cannot_be_painted(region_labels):
    with pytest.raises(InputError, match="region_labels: a="):
        LabelToRegionsd("label", ["a"], region_labels)


def test_slice_indices_drive_monais_crop():
    label = torch.zeros(1, 6, 6, 5)
    label[0, 1, 1, 3] = 1
    image = torch.ones(2, 6, 6, 5)
    image[..., 0] = 0  # no brain
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


def test_entropy():
    values = entropy_bits(torch.tensor([0.0, 0.5, 1.0, 0.25]))
    expected = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert values.tolist() == pytest.approx([0, 1, 0, expected])


def test_modality_dropout_zeroes_one_modality_and_never_the_only_one():
    dropout = RandModalityDropoutd("image", prob=1.0).set_random_state(0)
    image = torch.ones(4, 3, 3)
    dropped = [dropout({"image": image})["image"].flatten(1).any(dim=1).tolist() for _ in range(40)]
    assert {tuple(kept) for kept in dropped} == {tuple(i != j for i in range(4)) for j in range(4)}
    assert image.all()
    assert dropout({"image": image[:1]})["image"].all()
    assert RandModalityDropoutd("image", prob=0.0)({"image": image})["image"].all()
