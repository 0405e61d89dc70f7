from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ConvertToMultiChannelBasedOnBratsClassesd

from scripts.config import InputError
from scripts.data.regions import LabelToRegionsd, RegionCoding, RegionsToLabeld

BRATS = {"TC": [1, 4], "WT": [1, 2, 4], "ET": [4]}
LABEL = torch.tensor([0, 1, 2, 4, 4, 2, 0, 1]).reshape(1, 2, 2, 2).float()


def test_regions_agree_with_monai():
    ours = LabelToRegionsd("label", RegionCoding(["TC", "WT", "ET"], BRATS))({"label": LABEL})["label"]
    monai = ConvertToMultiChannelBasedOnBratsClassesd("label")({"label": LABEL})["label"]
    assert torch.equal(ours, monai.float())


def test_brats_2023_by_its_own_labels():
    label = torch.where(LABEL == 4, 3, LABEL)
    regions = {"TC": [1, 3], "WT": [1, 2, 3], "ET": [3]}
    assert torch.equal(
        LabelToRegionsd("label", RegionCoding(["ET"], regions))({"label": label})["label"], (LABEL == 4).float()
    )
    with pytest.raises(InputError, match=r"'s': .*\[3.0\] outside \[0, 1, 2, 4\].*data_brats2023"):
        LabelToRegionsd("label", RegionCoding(["ET"], BRATS))({"label": label, "subject": "s"})


def test_regions_keep_the_affine():
    affine = np.diag([-1.0, -1, 2, 1])
    regions = LabelToRegionsd("label", RegionCoding(["WT"], BRATS))({"label": MetaTensor(LABEL, affine=affine)})[
        "label"
    ]
    assert np.allclose(regions.affine, affine)


@pytest.mark.parametrize("regions", [["XX"], [], "WT", ["WT", "WT"]])
def test_unknown_regions(regions):
    with pytest.raises(InputError, match="regions="):
        LabelToRegionsd("label", RegionCoding(regions, BRATS))


def test_label_map_round_trip():
    regions = LabelToRegionsd("pred", RegionCoding(["TC", "WT", "ET"], BRATS))({"pred": LABEL})
    assert torch.equal(RegionsToLabeld("pred", RegionCoding(["TC", "WT", "ET"], BRATS))(regions)["pred"], LABEL.byte())


def test_label_map_is_nested_even_if_regions_are_not():
    pred = torch.zeros(2, 1, 1, 2)
    pred[1] = 1  # ET without WT
    assert RegionsToLabeld("pred", RegionCoding(["WT", "ET"], BRATS))({"pred": pred})["pred"].flatten().tolist() == [
        4,
        4,
    ]


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
    label = RegionsToLabeld("pred", RegionCoding(regions, region_labels, background))({"pred": pred})["pred"]
    assert label.flatten().tolist() == painted


@pytest.mark.parametrize("region_labels", [{"a": [0]}, {"a": [256]}, {"a": []}, {"a": ["1"]}])
def test_labels_that_cannot_be_painted(region_labels):
    with pytest.raises(InputError, match="region_labels: a="):
        LabelToRegionsd("label", RegionCoding(["a"], region_labels))


def test_regions_that_overlap_without_nesting_are_refused():
    """They would come back changed: a voxel in both would be painted as one of them."""
    with pytest.raises(InputError, match=r"A=\[1, 2\] and B=\[2, 3\] overlap, but neither contains the other"):
        RegionCoding(["A", "B"], {"A": [1, 2], "B": [2, 3]})
    for labels in ({"A": [1, 2], "B": [3]}, {"A": [1, 2, 3], "B": [2]}, {"A": [1], "B": [1]}):
        coding = RegionCoding(["A", "B"], labels)
        label = torch.arange(4).reshape(1, 1, 1, 4)
        regions = coding.to_regions(label * torch.isin(label, torch.tensor(sorted({*labels["A"], *labels["B"]}))))
        assert torch.equal(coding.to_regions(coding.to_label(regions)), regions)
