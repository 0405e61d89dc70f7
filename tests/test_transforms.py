from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import NormalizeIntensity, RandCropByPosNegLabeld, Resized

from scripts.config import InputError
from scripts.data.transforms import (
    NORMALISATIONS,
    CompleteModalitiesd,
    LoadVolumesd,
    NormaliseModalitiesd,
    RandModalityDropoutd,
    ResizeSlicesd,
    SliceIndicesd,
    normalised,
)

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


NAMES = ["t1", "t1ce", "t2", "flair"]


def network_of(names, dropout):
    return {"modalities": names, "modality_dropout": dropout}


def test_modality_dropout_zeroes_some_modalities_and_never_all():
    dropout = RandModalityDropoutd("image", network_of(NAMES, 1.0)).set_random_state(0)
    image = torch.ones(4, 3, 3)
    kept = torch.stack([dropout({"image": image})["image"].flatten(1).any(dim=1) for _ in range(90)])
    assert set(kept.sum(dim=1).tolist()) == {1, 2, 3}
    assert kept.any(dim=0).all()
    assert not kept.all(dim=0).any()
    assert image.all()
    assert RandModalityDropoutd("image", network_of(["t1"], 1.0))({"image": image[:1]})["image"].all()
    assert RandModalityDropoutd("image", network_of(NAMES, 0.0))({"image": image})["image"].all()


def test_modality_dropout_keeps_one_that_is_there_and_zeroes_what_augmentation_made_of_absent_ones():
    dropout = RandModalityDropoutd("image", network_of(NAMES, 0.5)).set_random_state(0)
    item = {"image": torch.ones(4, 3, 3), "modalities": "t1;flair"}
    kept = torch.stack([dropout(item)["image"].flatten(1).any(dim=1) for _ in range(90)])
    assert not kept[:, 1:3].any()
    assert set(kept.sum(dim=1).tolist()) == {1, 2}


def test_names_of_modalities_may_hold_spaces():
    settings = network_of(["t1 post", "flair"], 0.0)
    found = CompleteModalitiesd("image", settings)(volumes_of(torch.rand(2, 4, 4, 2), ["t1 post", "flair"]))
    assert RandModalityDropoutd("image", settings)(found)["image"].flatten(1).any(dim=1).all()


def smooth_volume(size=(3, 96, 80, 5)):
    """A volume of a few long waves, and its affine."""
    grids = torch.meshgrid(*(torch.linspace(0, 3, side) for side in size[1:3]), indexing="ij")
    waves = torch.stack([torch.sin((channel + 1) * grids[0]) * torch.cos(grids[1]) for channel in range(size[0])])
    return MetaTensor(waves[..., None] * torch.arange(1, size[3] + 1), affine=np.diag([1.0, 2.0, 3.0, 1.0]))


@pytest.mark.parametrize(("size", "loss"), [(16, 1.5), (64, 0.3), (128, 0.3)])
def test_slices_are_resized_like_monai_does_and_back(size, loss):
    volume = smooth_volume()
    ours, monai = ResizeSlicesd("image", size), Resized("image", (size, size, -1), mode="trilinear", anti_aliasing=True)
    found, expected = ours({"image": volume}), monai({"image": volume})
    assert found["image"].shape == (3, size, size, 5)
    assert torch.allclose(found["image"].affine, expected["image"].affine)
    inside = (slice(None), slice(3, -3), slice(3, -3))  # MONAI's filter takes what is outside of the image for 0
    assert (found["image"] - expected["image"])[inside].abs().max() < 0.15  # of values up to 5
    back = ours.inverse(found)["image"]
    assert back.shape == volume.shape
    assert torch.allclose(back.affine, volume.affine)
    assert (back - volume).abs().max() < loss


def test_resizing_averages_what_it_leaves_out():
    """Lines of one voxel: without anti-aliasing the small image would be all 0 or all 1."""
    lines = torch.zeros(1, 64, 64, 2)
    lines[:, ::4] = 1
    small = ResizeSlicesd("image", 16)({"image": MetaTensor(lines)})["image"]
    assert small[:, 1:-1].sub(0.25).abs().max() < 0.05


def test_masks_are_resized_to_the_nearest_voxel():
    mask = MetaTensor((torch.rand(1, 30, 30, 2) > 0.5).float())
    resized = ResizeSlicesd(["image", "label"], 16, ["trilinear", "nearest-exact"])({"image": mask, "label": mask})
    expected = Resized("label", (16, 16, -1), mode="nearest-exact")({"label": mask})["label"]
    assert torch.equal(resized["label"], expected)
    assert set(resized["image"].unique().tolist()) != {0.0, 1.0}


def volumes_of(volume, names, file="a.nii.gz"):
    return {"image": MetaTensor(volume, meta={"filename_or_obj": file, "modalities": names}), "subject": "s1"}


def test_absent_modalities_are_0_and_the_others_in_the_order_of_the_network():
    complete = CompleteModalitiesd("image", network_of(["t1", "t2", "flair"], 0.1))
    volume = torch.rand(2, 4, 4, 2)
    for names, order in ((["flair", "t1"], [1, 0]), (["t1", "flair"], [0, 1])):
        found = complete(volumes_of(volume, names))
        first, last = (volume[index] for index in order)
        assert torch.equal(found["image"], torch.stack([first, torch.zeros(4, 4, 2), last]))
        assert found["modalities"] == "t1;flair"
    whole = torch.rand(3, 4, 4, 2)
    assert torch.equal(complete(volumes_of(whole, ["t1", "t2", "flair"]))["image"], whole)
    assert torch.equal(complete(volumes_of(whole, ["flair", "t2", "t1"]))["image"], whole.flip(0))


@pytest.mark.parametrize(
    ("names", "dropout", "message"), [(["t1", "FLAIR"], 0.1, r"\['FLAIR'\] are not among"), (["t1"], 0.0, "lacks")]
)
def test_unknown_modalities_and_those_that_may_not_be_absent(names, dropout, message):
    complete = CompleteModalitiesd("image", network_of(["t1", "flair"], dropout))
    with pytest.raises(InputError, match=message):
        complete(volumes_of(torch.rand(len(names), 4, 4, 2), names))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_a_copy_of_a_modality_counts_as_absent(caplog, order):
    volume, names = torch.rand(3, 4, 4, 2), ["t1", "t2", "flair"]
    volume[0] = volume[2]
    given = volume[order], [names[index] for index in order]
    found = CompleteModalitiesd("image", network_of(names, 0.1))(volumes_of(*given))
    assert not found["image"][0].any()
    assert torch.equal(found["image"][1:], volume[1:])
    assert found["modalities"] == "t2;flair"
    assert "subject 's1': t1 is a copy of another modality and is left out" in caplog.text
    kept = CompleteModalitiesd("image", network_of(names, 0.0))(volumes_of(*given))
    assert torch.equal(kept["image"], volume)
    assert "t1 is a copy of another modality and may be missing" in caplog.text


def test_grey_pictures_saved_in_colour_have_no_copies(caplog):
    volume, names = torch.rand(1, 4, 4, 1).repeat(3, 1, 1, 1), ["red", "green", "blue"]
    grey = CompleteModalitiesd("image", network_of(names, 0.1))(volumes_of(volume, names, "grey.png"))
    assert torch.equal(grey["image"], volume)
    assert not caplog.text


def test_an_empty_mask_is_marked():
    label = torch.zeros(1, 4, 4, 3)
    image = torch.ones(1, 4, 4, 3)
    assert SliceIndicesd("label")({"image": image, "label": label})["empty"] is True
    label[0, 1, 1, 1] = 1
    assert SliceIndicesd("label")({"image": image, "label": label})["empty"] is False


@pytest.mark.parametrize("normalisation", ["nonzero", "all"])
def test_z_scores_are_those_of_monai(normalisation):
    volume = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0)).clamp(min=0) * 100
    before = volume.clone()
    found = NormaliseModalitiesd("image", normalisation)({"image": volume})["image"]
    assert torch.equal(volume, before)
    expected = NormalizeIntensity(nonzero=normalisation == "nonzero", channel_wise=True)(volume)
    assert torch.allclose(found, torch.as_tensor(expected), atol=1e-5)


def test_the_foreground_hardly_depends_on_air_and_scalp():
    """A brain alone, and the same brain with a bright scalp in noisy air: its voxels get similar values."""
    generator = torch.Generator().manual_seed(0)
    brain = 100 + 20 * torch.randn(20, 20, 10, generator=generator)
    alone, head = torch.zeros(40, 40, 10), 2 * torch.rand(40, 40, 10, generator=generator)
    head[7:33, 7:33] = 300
    head[8:32, 8:32] = 1  # the skull
    for volume in (alone, head):
        volume[10:30, 10:30] = brain
    found = {how: [normalised(volume, volume, how)[10:30, 10:30] for volume in (alone, head)] for how in NORMALISATIONS}
    gap = {how: (one - other).abs().mean() for how, (one, other) in found.items()}
    assert gap["foreground"] < 0.5 * min(gap["nonzero"], gap["all"])
    middle = normalised(alone, alone, "foreground")[10:30, 10:30]
    assert abs(middle.median()) < 0.02
    assert abs(middle.std() - 1) < 0.05


def test_slices_are_normalised_with_the_statistics_of_the_volume():
    volume = torch.tensor([0.0, 1.0, 3.0])
    assert torch.allclose(normalised(torch.tensor([0.0, 2.0, 4.0]), volume, "nonzero"), torch.tensor([0.0, 0.0, 2.0]))
    assert torch.equal(normalised(torch.zeros(3), torch.zeros(3), "foreground"), torch.zeros(3))  # an absent modality
    alike = torch.tensor([0.0] * 9 + [5.0] * 7 + [9.0])
    assert normalised(alike, alike, "foreground").abs().max() < 10
    with pytest.raises(InputError, match="normalisation='z' is not one of"):
        normalised(volume, volume, "z")
