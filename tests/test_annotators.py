"""Several annotators: as files, as votes, drawn in training, and as the truth that samples are compared with."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from conftest import MODALITIES, run_configs
from scripts.config import InputError
from scripts.data.datalist import read_datalist, write_datalist
from scripts.data.regions import AnnotationsToRegionsd, DrawAnnotatord, MajorityVoted, RegionCoding
from scripts.data.subjects import find_subjects
from scripts.report.annotators import (
    annotator_scores,
    crps,
    distances,
    energy_distance,
    matched_iou,
    mean_distance,
    quantile_coverage,
)
from scripts.tools.phantom import make_annotations, make_dataset
from scripts.tools.phantom_pictures import KINDS, draw_masks, make_picture, make_pictures

PICTURES = {"image_dir": "images", "mask_dir": "masks"}
NAMES = ["1", "2", "3", "4"]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    make_pictures(folder, "places", num_pictures=12, annotators=4, size=32)
    return folder


# ---- files
def test_pictures_of_several_annotators(places):
    items = find_subjects(str(places), ["grey"], mask_names=NAMES, **PICTURES)
    assert len(items) == 12
    assert [Path(file).name for file in items[3]["label"]] == [f"0003_{name}.png" for name in NAMES]


def test_volumes_of_several_annotators(tmp_path):
    make_dataset(tmp_path, num_subjects=2, shape=(32, 32, 8), annotators=3)
    items = find_subjects(str(tmp_path), MODALITIES, mask_names=["2", "3"])
    assert [Path(file).name for file in items[0]["label"]] == [f"BraTS20_Training_001_seg_{a}.nii.gz" for a in "23"]
    (tmp_path / "BraTS20_Training_002" / "BraTS20_Training_002_seg_2.nii.gz").unlink()
    with pytest.raises(InputError, match=r"'BraTS20_Training_002': no segmentation '\*seg_2.nii\[.gz\]'"):
        find_subjects(str(tmp_path), MODALITIES, mask_names=["2", "3"])


def test_a_missing_annotator_is_named(places):
    with pytest.raises(InputError, match=r"12 of 12 images .* each name of \['1', '5'\] .*\['0000', '0001'"):
        find_subjects(str(places), ["grey"], mask_names=["1", "5"], **PICTURES)


@pytest.mark.parametrize("names", ["12", ["1", "1"]])
def test_unusable_names(places, names):
    with pytest.raises(InputError, match="must be a list of distinct names"):
        find_subjects(str(places), ["grey"], mask_names=names, **PICTURES)


def test_an_annotator_on_another_grid_is_refused(tmp_path):
    make_pictures(tmp_path, "nested", num_pictures=2, annotators=2, size=16)
    Image.fromarray(np.zeros((16, 15), np.uint8)).save(tmp_path / "masks" / "0001_2.png")
    with pytest.raises(InputError, match=r"the mask .*0001_2.png has shape \(15, 16, 1\)"):
        find_subjects(str(tmp_path), ["grey"], mask_names=["1", "2"], **PICTURES)


def test_a_data_list_keeps_the_annotators(places, tmp_path):
    items = [item | {"grade": -1} for item in find_subjects(str(places), ["grey"], mask_names=NAMES, **PICTURES)]
    write_datalist({"training": items[:4], "validation": items[4:], "test": []}, str(tmp_path / "d.json"), str(places))
    read = read_datalist(str(tmp_path / "d.json"), str(places), ["grey"], "images")
    assert [item["label"] for item in read["training"]] == [item["label"] for item in items[:4]]


# ---- region channels
def coded(masks: list, regions=("WT", "TC"), **options) -> torch.Tensor:
    coding = RegionCoding(list(regions), {"WT": [1, 2], "TC": [1]})
    label = MetaTensor(torch.tensor(masks, dtype=torch.float32)[:, :, None, None])
    return AnnotationsToRegionsd("label", coding, **options)({"label": label, "subject": "s"})["label"][..., 0, 0]


def test_one_annotator_with_several_masks_is_a_union():
    assert coded([[0, 1, 0], [0, 0, 2]]).tolist() == [[0, 1, 1], [0, 1, 0]]


def test_annotators_keep_their_masks():
    found = coded([[0, 1, 0], [0, 0, 2]], annotators=["a", "b"])
    assert found.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]  # WT and TC of a, then of b


@pytest.mark.parametrize("masks", [[[0, 1, 2, 3], [0, 0, 1, 3]], [[0, 85, 170, 255], [0, 0, 85, 255]]])
def test_votes_are_nested_masks(masks):
    """In numbers, and as shares of 255."""
    found = coded(masks, annotators=3).unflatten(0, (3, 2))
    assert found.sum(dim=0).tolist() == [[0, 1, 2, 3], [0, 0, 1, 3]]
    assert (found[0] >= found[1]).all()
    assert (found[1] >= found[2]).all()


def test_the_published_votes_of_drishti():
    found = coded([[0, 64, 128, 191, 255]], regions=["WT"], annotators=4)
    assert found.sum(dim=0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        ([[0, 1]], {"annotators": ["a", "b"]}, "subject 's': 1 masks, expected 2"),
        ([[0, 1]], {"annotators": 4}, "subject 's': 1 masks, expected 2"),
        ([[0, 100], [0, 0]], {"annotators": 4}, "neither 0 to 4 nor shares of 255"),
        ([[0, -1], [0, 0]], {"annotators": 4}, "neither 0 to 4 nor shares of 255"),
        ([[0, float("nan")], [0, 0]], {"annotators": 4}, "neither 0 to 4 nor shares of 255"),
        ([[0, float("inf")], [0, 0]], {"annotators": 4}, "neither 0 to 4 nor shares of 255"),
        ([[0, 7], [0, 0]], {"annotators": ["a", "b"]}, "label values"),
        ([[0, 1]], {"annotators": 1}, "annotators=1"),
        ([[0, 1]], {"annotators": "$__import__('os')"}, "annotators="),
    ],
)
def test_masks_that_are_refused(masks, options, message):
    with pytest.raises(InputError, match=message):
        coded(masks, **options)


def test_one_annotator_is_drawn():
    draw = DrawAnnotatord("label", num_regions=2).set_random_state(0)
    label = torch.arange(6.0)[:, None]
    found = [tuple(draw({"label": label})["label"][:, 0].tolist()) for _ in range(300)]
    assert set(found) == {(0, 1), (2, 3), (4, 5)}
    assert min(found.count(pair) for pair in set(found)) > 70
    assert torch.equal(draw({"label": label[:2]})["label"], label[:2])


def test_half_of_the_annotators_are_a_majority():
    label = MetaTensor(torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 0, 1], [0, 1, 0]]))
    d = MajorityVoted("label", num_regions=1)({"label": label})
    assert d["label"].tolist() == [[1, 1, 0]]
    assert torch.equal(d["annotations"], label)
    single = MajorityVoted("label", num_regions=1)({"label": label[:1]})
    assert torch.equal(single["label"], label[:1])
    assert "annotations" not in single


# ---- scores
def masks(*rows: str) -> np.ndarray:
    return np.array([[value == "1" for value in row] for row in rows])


def test_distances_of_masks():
    found = distances(masks("1100", "0000"), masks("0110", "0000", "1100"))
    assert found == pytest.approx(np.array([[2 / 3, 1, 0], [1, 0, 1]]))


def test_the_energy_distance_of_equal_distributions_is_zero_on_average():
    """Published code, which counts pairs of a mask with itself, would give the mean distance / n more."""
    rng = np.random.default_rng(0)
    drawn = [energy_distance(*(rng.uniform(size=(2, 5, 30)) < 0.4)) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(0, abs=0.005)
    assert np.std(drawn) / np.sqrt(2000) < 0.002


def test_the_energy_distance_of_two_certain_masks_is_twice_their_distance():
    one, two = masks("1100", "1100"), masks("0110", "0110", "0110")
    assert energy_distance(one, two) == pytest.approx(2 * 2 / 3)
    assert energy_distance(one[:1], two) == pytest.approx(2 * 2 / 3)


def test_the_mean_distance_has_no_pair_of_a_mask_with_itself():
    assert mean_distance(masks("10", "01")) == 1
    assert mean_distance(masks("10")) == 0


def test_matching_is_one_to_one():
    """Three samples of one annotator's mask cannot stand for both annotators."""
    truth = masks("1000", "0001")
    assert matched_iou(masks("1000", "0001", "1000", "0001"), truth) == 1
    assert matched_iou(masks("1000", "1000", "1000", "0001"), truth) == pytest.approx(3 / 4)
    best = max(
        np.mean([1 - distances(truth[[a]], masks("1000", "1100")[[b]])[0, 0] for a, b in enumerate(order)])
        for order in itertools.permutations(range(2))
    )
    assert matched_iou(masks("1000", "1100"), truth) == pytest.approx(best)


def test_crps_of_a_normal_ensemble():
    """Closed form for N(0, 1) at y: y (2 Phi(y) - 1) + 2 phi(y) - 1 / sqrt(pi) (Gneiting and Raftery 2007)."""
    from scipy.stats import norm

    values, y = np.random.default_rng(0).normal(size=4000), 0.7
    exact = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / np.sqrt(np.pi)
    assert crps(values, np.array([y])) == pytest.approx(exact, abs=0.02)
    assert crps(np.array([3.0]), np.array([1.0, 6.0])) == pytest.approx(2.5)  # the absolute error


def test_coverage_of_quantiles():
    assert quantile_coverage(np.arange(101.0), np.array([4.0, 5.0, 50.0, 95.0, 96.0])) == pytest.approx(3 / 5)


def evaluated(samples: np.ndarray, pred: np.ndarray, annotations: np.ndarray) -> dict:
    return {
        "samples": torch.tensor(samples, dtype=torch.float32),
        "pred": torch.tensor(pred, dtype=torch.float32),
        "annotations": torch.tensor(annotations, dtype=torch.float32),
    }


def test_samples_are_scored_beside_one_mask_and_level_sets():
    """Each annotator counts another quarter: samples that know it are perfect, no level set can be."""
    quarters = np.kron(np.eye(4).reshape(4, 2, 2), np.ones((4, 4)))[..., None]
    item = evaluated(np.tile(quarters, (4, 1, 1, 1)), quarters[:1], quarters)
    scores, bins = annotator_scores(item, 0, np.full((8, 8, 1), 0.25), 2.0)
    assert scores["ged_samples"] < 0 < scores["ged_levels"] < scores["ged_mask"]
    assert scores["diversity_annotators"] == 1
    assert scores["diversity_samples"] == pytest.approx(12 / 15)
    assert scores["diversity_mask"] == 0
    assert scores["matched_iou_samples"] == 1
    assert scores["vote_brier_samples"] == scores["vote_brier_levels"] == 0
    assert scores["vote_brier_mask"] == pytest.approx(0.25 * 0.75**2 + 0.75 * 0.25**2)
    assert scores["coverage_samples"] == 1
    assert scores["crps_mask"] == 0  # all quarters have 16 pixels
    assert scores["crps_levels"] == pytest.approx(2 * (4 * 48 + 12 * 16) / 16 - 2 * 64 * 2 * 4 * 12 / (16 * 15) / 2)
    assert bins["samples"].shape == (3, 20)


def test_the_second_region_is_scored_with_its_own_masks():
    rng = np.random.default_rng(0)
    truth = (rng.uniform(size=(3, 2, 6, 6, 2)) < 0.5).astype(float)  # annotators, regions
    sampled = (rng.uniform(size=(4, 2, 6, 6, 2)) < 0.5).astype(float)
    item = evaluated(sampled.reshape(8, 6, 6, 2), sampled[0], truth.reshape(6, 6, 6, 2))
    scores, _ = annotator_scores(item, 1, np.full((6, 6, 2), 0.5), 1.0)
    expected = energy_distance(sampled[:, 1].reshape(4, -1) > 0, truth[:, 1].reshape(3, -1) > 0)
    assert scores["ged_samples"] == pytest.approx(expected)


def test_nobody_sees_anything():
    nothing = np.zeros((4, 8, 8, 1))
    scores, _ = annotator_scores(evaluated(nothing, nothing[:1], nothing), 0, nothing[0], 1.0)
    assert scores["ged_samples"] == scores["crps_levels"] == 0
    assert scores["matched_iou_mask"] == 1
    assert np.isnan(scores["vote_brier_mask"])


# ---- phantoms
@pytest.mark.parametrize("kind", KINDS)
def test_annotators_follow_the_stated_distribution(kind):
    image, parts, probability = make_picture(kind, 32, np.random.default_rng(1))
    drawn = draw_masks(kind, parts, probability, 4000, np.random.default_rng(2))
    assert image.dtype == np.uint8
    assert image.shape == drawn.shape[1:] == (32, 32)
    assert (drawn | ~parts[0]).all()  # the first part is always counted
    for part, p in zip(parts[1:], probability, strict=True):
        own = part & ~(np.sum(parts, axis=0) > 1)
        assert drawn[:, own].mean() == pytest.approx(p, abs=0.03)
    if kind == "places":
        assert probability.sum() == pytest.approx(1)
        assert (drawn[:, parts[1:].any(axis=0)].sum(axis=1) > 0).all()


def test_pictures_are_the_same_with_the_same_seed(tmp_path):
    for name in ("one", "two"):
        make_pictures(tmp_path / name, "nested", num_pictures=2, annotators=3, size=16, seed=4)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(files) == 2 + 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_annotators_of_brains_differ_and_the_lesion_is_common():
    images, segmentations = make_annotations("HGG", (48, 48, 20), 5, 12)
    assert set(images) == set(MODALITIES)
    whole = np.stack(segmentations) > 0
    assert len({mask.tobytes() for mask in whole}) > 4
    assert 0.3 < whole.all(axis=0).sum() / whole.any(axis=0).sum() < 0.999
    assert set(np.unique(segmentations)) <= {0, 1, 2, 4}


# ---- the whole way
def test_train_evaluate_and_save_samples(places, tmp_path):
    files = ["train.yaml", "data_images.yaml", "data_phantom_pictures.yaml"]
    keys = {"dataset_dir": str(places), "ckpt_dir": str(tmp_path), "num_folds": 3, "num_samples": 4}
    keys |= {"validation_share": 0.25, "max_epochs": 1}
    run_configs(files, output_dir=str(tmp_path / "train"), **keys)
    assert {"L_calib", "L_draw", "L_first", "L_sample"} <= set(pd.read_csv(tmp_path / "train" / "metrics.csv").columns)
    run_configs([*files, "evaluate.yaml"], output_dir=str(tmp_path / "evaluate"), **keys)
    scores = json.loads((tmp_path / "evaluate" / "summary.json").read_text())["annotators"]["lesion"]
    table = pd.read_csv(tmp_path / "evaluate" / "subjects.csv")
    assert scores["ged_samples"]["value"] == pytest.approx(table["ged_samples_lesion"].mean(), rel=1e-4)
    assert scores["ged_gain"]["value"] == pytest.approx(
        (table["ged_levels_lesion"] - table["ged_samples_lesion"]).mean(), abs=1e-4
    )
    for name in ("ece_samples", "ece_mask", "ece_levels"):
        assert 0 <= scores[name]["value"] <= 1
    run_configs([*files, "evaluate.yaml", "calibrate.yaml"], output_dir=str(tmp_path / "calibrate"), **keys)
    held = json.loads((tmp_path / "calibrate" / "calibration.json").read_text())["lesion"]
    assert set(held["volume_coverage"]) == {"levels", "samples"}
    run_configs(
        ["inference.yaml"],
        dataset_dir=str(places),
        image_dir="images",
        ckpt_dir=str(tmp_path),
        output_dir=str(tmp_path / "out"),
        num_samples=4,
        save_samples=True,
    )
    grades = pd.read_csv(tmp_path / "out" / "grades.csv")
    assert set(grades["area_from_lesion"]) == {held["volumes_from"]}
    with Image.open(tmp_path / "out" / "0000_samples.tiff") as image:
        assert image.n_frames == 4
        pages = np.stack([np.asarray(image.seek(page) or image) for page in range(4)])
    assert set(np.unique(pages)) <= {0, 255}


def test_samples_of_a_volume_are_a_4d_file(phantoms, three_regions, tmp_path):
    run_configs(
        ["inference.yaml"],
        dataset_dir=str(phantoms / "BraTS20_Training_001"),
        ckpt_dir=str(three_regions),
        output_dir=str(tmp_path),
        num_samples=3,
        save_samples=True,
    )
    samples = nib.load(tmp_path / "BraTS20_Training_001_samples.nii.gz")
    mask = nib.load(tmp_path / "BraTS20_Training_001_seg.nii.gz")
    assert samples.shape == (32, 32, 8, 3)
    assert samples.get_data_dtype() == np.uint8
    assert np.allclose(samples.affine, mask.affine)
    values = np.asarray(samples.dataobj)
    assert set(np.unique(values)) <= {0, 1, 2, 4}
    assert (values > 0).any()


def test_the_real_votes_of_drishti(shared_data, tmp_path):
    """Four experts, disc and cup: every level occurs, cups lie in discs, and grades are read."""
    from monai.bundle import ConfigParser

    from conftest import ROOT

    parser = ConfigParser()
    parser.read_config(
        [str(ROOT / "configs" / f"{name}.yaml") for name in ("train", "data_images", "data_drishti")],
    )
    parser.update({"dataset_dir": str(shared_data / "drishti"), "image_size": 64})
    items = parser.get_parsed_content("datalist")["training"]
    assert {item["grade"] for item in items} == {0, 1}
    d = parser.get_parsed_content("validate::preprocessing")(items[0])
    assert d["annotations"].shape == (8, 256, 256, 1)
    disc, cup = torch.as_tensor(d["annotations"]).unflatten(0, (4, 2)).sum(dim=0)
    assert sorted(disc.unique().tolist()) == sorted(cup.unique().tolist()) == [0, 1, 2, 3, 4]
    assert ((cup > 0) & (disc == 0)).float().mean() < 0.001
    assert torch.equal(torch.as_tensor(d["label"][0]), (disc >= 2).float())
