"""The bundle of organs from data to files, on tiny CTs."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from dicom_phantom import LPS, write_series
from monai.bundle import ConfigParser

from conftest import ROOT, run_files
from scripts.config import InputError
from scripts.organs.report import read_results
from scripts.organs.structures import catalogue, numbers

BUNDLE = ROOT / "bundles" / "organs"
STRUCTURES = ["liver", "lung_upper_lobe_left", "lung_lower_lobe_left", "hip_left", "hip_right"]
TINY = {"structures": STRUCTURES, "spacing": 10, "image_size": 32, "features": [8, 8, 8, 8, 8, 8], "val_interval": 1}
TINY |= {"slices_per_volume": 8, "batch_size": 6, "max_epochs": 2, "learning_rate": 0.01}


def run(*configs, **overrides):
    run_files([BUNDLE / "configs" / name for name in configs], **overrides)


@pytest.fixture(scope="session")
def trained(cts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("organs")
    run("train.yaml", dataset_dir=str(cts), output_dir=str(folder), ckpt_dir=str(folder), **TINY)
    return folder


def test_training_writes_a_table_and_weights_with_their_settings(trained):
    table = pd.read_csv(trained / "metrics.csv")
    assert table["split"].tolist() == ["train", "validation"] * 2
    rows = {split: table[table["split"] == split] for split in ("train", "validation")}
    assert rows["train"]["loss"].gt(0).all()  # NaN is not
    assert rows["validation"]["dice"].between(0, 1).all()
    settings = torch.load(trained / "model.pt", weights_only=True)["settings"]
    assert settings["structures"] == sorted(STRUCTURES, key=lambda name: catalogue()[name]["number"])
    assert settings["windows"] == [[-1024, -200], [-160, 240], [100, 1300]]


def test_resuming_a_complete_training_changes_nothing(trained, cts, capsys):
    before = (trained / "last.pt").read_bytes()
    run("train.yaml", dataset_dir=str(cts), output_dir=str(trained), ckpt_dir=str(trained), **TINY, resume=True)
    assert "training is complete" in capsys.readouterr().out
    assert (trained / "last.pt").read_bytes() == before


def test_an_ablation_compares_arms(cts, tmp_path):
    keys = {name: TINY[name] for name in ("structures", "spacing", "image_size", "features", "slices_per_volume")}
    settings = keys | {"dataset_dir": str(cts), "max_epochs": 1, "batch_size": 6, "device": "cpu"}
    arms = {"weighted": {}, "plain": {"loss::weight": None}}
    options = {"output_dir": str(tmp_path), "seeds": [0], "configs": ["train.yaml"], "arms": arms}
    run("ablation.yaml", **options, dataset_dir=str(cts), **{"ablation::settings": settings})
    table = pd.read_csv(tmp_path / "table.csv").set_index("arm")
    assert list(table.index) == ["weighted", "plain"]
    assert table["dice"].between(0, 1).all()
    assert set(pd.read_csv(tmp_path / "parts.csv")["part"]) == set(STRUCTURES)
    weights = [torch.load(path, weights_only=True)["model"] for path in sorted(tmp_path.glob("*_seed0/last.pt"))]
    assert not torch.equal(weights[0]["final_conv.bias"], weights[1]["final_conv.bias"])  # None reached the loss


def test_evaluation_beside_the_prior(trained, cts, tmp_path):
    common = {"dataset_dir": str(cts), "ckpt_path": str(trained / "model.pt"), **TINY}
    run("train.yaml", "evaluate.yaml", output_dir=str(tmp_path), **common)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["subjects"] == 1
    assert list(summary["structures"]) == sorted(STRUCTURES, key=lambda name: catalogue()[name]["number"])
    table = pd.read_csv(tmp_path / "structures.csv").set_index("structure")
    assert summary["mean over structures"]["dice"]["value"] == pytest.approx(table["dice"].mean(), rel=1e-4)
    found = read_results(tmp_path, {})  # for an ablation
    assert found.parts == pytest.approx(table["dice"].to_dict(), rel=1e-4)
    assert found.scores["dice"] == pytest.approx(found.subjects["dice"].mean(), rel=1e-4)
    assert found.scores["at 0"] == (table["dice"] == 0).sum()
    assert table.loc["liver", "true_volume_mm3"] > 0
    assert table["prior_dice"].max() > 0
    assert {path.name for path in tmp_path.iterdir()} >= {"structures.png", "overlays", "evaluate.yaml"}
    lists = json.loads((cts / "datalist.json").read_text())
    swapped = lists | {"training": lists["test"], "test": lists["training"]}
    (tmp_path / "swapped.json").write_text(json.dumps(swapped))
    common |= {"datalist_file": str(tmp_path / "swapped.json"), "output_dir": str(tmp_path / "no")}
    with pytest.raises(InputError, match="3 of 3 subjects, such as .* were trained on"):
        run("train.yaml", "evaluate.yaml", **common)
    assert not (tmp_path / "no").exists()


def infer(trained, data, out, **overrides):
    options = {"dataset_dir": str(data), "ckpt_path": str(trained / "model.pt"), "output_dir": str(out)}
    run("inference.yaml", **options | overrides)


def test_files_of_inference(trained, cts, tmp_path):
    infer(trained, cts, tmp_path)
    image = nib.load(tmp_path / "s0_seg.nii.gz")
    labels = np.asarray(image.dataobj)
    assert labels.dtype == np.uint8
    assert labels.shape == (32, 32, 24)
    assert np.allclose(image.affine, np.diag([10.0, 10.0, 20.0, 1.0]))
    assert set(np.unique(labels)) <= {0, *numbers(STRUCTURES)}
    text = image.header.extensions[0].get_content().decode()
    present = [name for name in STRUCTURES if (labels == catalogue()[name]["number"]).any()]
    assert present
    assert all(f">{name}</Label>" in text for name in present)
    statistics = json.loads((tmp_path / "s0_statistics.json").read_text())
    assert len(statistics) == 117
    assert statistics[present[0]]["volume"] == 2000.0 * (labels == catalogue()[present[0]]["number"]).sum()
    table = pd.read_csv(tmp_path / "statistics.csv")
    assert set(table.loc[table["subject"] == "s0", "structure"]) == set(present)
    assert table["probability"].between(0, 1).all()
    assert (tmp_path / "s4_preview.png").is_file()


def test_a_subset_is_written_and_a_typo_is_refused(trained, cts, tmp_path):
    infer(trained, cts / "s0", tmp_path / "a", roi_subset=["organs"])
    labels = np.asarray(nib.load(tmp_path / "a" / "s0_seg.nii.gz").dataobj)
    assert set(np.unique(labels)) <= {0, *numbers(["liver", "lung_upper_lobe_left", "lung_lower_lobe_left"])}
    with pytest.raises(InputError, match="'hip_lft'; did you mean 'hip_left'"):
        infer(trained, cts / "s0", tmp_path / "b", roi_subset=["hip_lft"])
    with pytest.raises(InputError, match="trained with spacing=10, now it is 5"):
        infer(trained, cts / "s0", tmp_path / "b", spacing=5)
    with pytest.raises(InputError, match="holds volumes"):
        infer(trained, cts, cts / "s0")
    assert not (tmp_path / "b").exists()


def test_structures_of_the_weights(trained, cts, tmp_path):
    """They may be given as groups, but only those that were trained; a checkpoint with others is refused by name."""
    infer(trained, cts / "s0", tmp_path / "a", structures=["hip_right", *STRUCTURES[:4]])
    with pytest.raises(InputError, match="the model was trained with structures=.*, now it is"):
        infer(trained, cts / "s0", tmp_path / "b", structures=["organs"])
    checkpoint = torch.load(trained / "model.pt", weights_only=True)
    checkpoint["settings"]["structures"][0] = "livr"
    torch.save(checkpoint, tmp_path / "model.pt")
    with pytest.raises(InputError, match="trained with an unknown structure 'livr'; did you mean 'liver'"):
        infer(tmp_path, cts / "s0", tmp_path / "b")
    assert not (tmp_path / "b").exists()


class Oracle(torch.nn.Module):
    """Knows the class of a voxel by its HU: above 330 it is the second, above -420 the first, else background."""

    def forward(self, x):
        bone, soft = x[:, 2] > (330 - 100) / 1200, x[:, 0] > (-420 + 1024) / 824
        return torch.stack([~soft, soft & ~bone, bone], dim=1).float() * 20


def cylinder(shape):
    """HU and truth of a cylinder (class 2, liver) with a box in it (class 1, hip_left), towards right and front."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    truth = np.zeros(shape, np.uint8)
    truth[(np.hypot(x, y) < 0.7) & (abs(z) < 0.8)] = catalogue()["liver"]["number"]
    truth[(x > 0.1) & (x < 0.5) & (abs(y) < 0.25) & (abs(z) < 0.5)] = catalogue()["hip_left"]["number"]
    hu = np.select([truth == catalogue()["hip_left"]["number"], truth > 0], [600, 60], -900).astype(np.int16)
    return hu, truth


def rotation(angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([2.0, 2.0, 2.0]),
        np.diag([-2.0, -2.0, 3.0]),
        np.diag([2.0, -2.0, -3.0]),
        np.array([[0, 0, 3.0], [2.0, 0, 0], [0, -2.0, 0]]),
        rotation(0.2) @ np.diag([2.0, 2.0, 4.0]),
    ],
    ids=["RAS", "LPS", "flipped", "permuted", "oblique"],
)
def test_a_perfect_network_gives_the_truth_on_the_grid_of_the_input(affine, tmp_path):
    hu, truth = cylinder((60, 56, 40))
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = affine, (-30, 20, 10)
    (tmp_path / "data" / "s1").mkdir(parents=True)
    nib.save(nib.Nifti1Image(hu, matrix), tmp_path / "data" / "s1" / "ct.nii.gz")
    segment_perfectly(tmp_path / "data", tmp_path / "out")
    image = nib.load(tmp_path / "out" / "s1_seg.nii.gz")
    found = np.asarray(image.dataobj)
    assert found.shape == truth.shape
    assert np.allclose(image.affine, matrix, atol=1e-4)
    for number in numbers(["liver", "hip_left"]):
        assert dice(found == number, truth == number) >= 0.98


def segment_perfectly(data, out):
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "inference.yaml"))
    settings = {"modalities": ["ct"], "structures": ["liver", "hip_left"], "num_slices": 1, "spacing": 1.5}
    settings |= {"windows": [[-1024, -200], [-160, 240], [100, 1300]], "image_size": 64, "features": [8] * 6}
    parser.update({"settings": settings, "network": Oracle(), "dataset_dir": str(data), "output_dir": str(out)})
    parser.update({"device": torch.device("cpu")})
    parser.get_parsed_content("evaluator").run()


def dice(one, two):
    return 2 * (one & two).sum() / (one.sum() + two.sum())


@pytest.mark.parametrize("plane", ["axial", "oblique", "sagittal"])
def test_a_perfect_network_gives_the_truth_of_a_dicom_series(plane, tmp_path):
    """Each voxel of the label map is compared with the truth at its place in the patient."""
    hu, truth = cylinder((60, 56, 40))
    direction = {"axial": np.eye(3), "oblique": rotation(0.2), "sagittal": np.eye(3)[[2, 0, 1]]}[plane]
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = LPS[:3, :3] @ direction @ np.diag([2.0, 2.0, 3.0]), (-30, 20, 10)
    write_series(tmp_path / "data" / "s1" / "series", hu, matrix, "ct")
    segment_perfectly(tmp_path / "data", tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*_seg.nii.gz")
    image = nib.load(file)
    found = np.asarray(image.dataobj)
    assert sorted(found.shape) == sorted(truth.shape)
    voxels = nib.affines.apply_affine(np.linalg.inv(matrix) @ image.affine, np.argwhere(found >= 0))
    assert np.allclose(voxels, voxels.round(), atol=1e-3)  # the same grid
    expected = truth[tuple(voxels.round().astype(int).T)].reshape(found.shape)
    for number in numbers(["liver", "hip_left"]):
        assert dice(found == number, expected == number) >= 0.98


def test_the_bundle_needs_a_data_list_of_its_own(cts, tmp_path):
    with pytest.raises(
        InputError, match=r"datalist_file '.*' does not exist; run scripts.organs.merge_structures first"
    ):
        run("train.yaml", dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"), **TINY)
    with pytest.raises(InputError, match="unknown configuration key 'structure' .did you mean 'structures'"):
        run("train.yaml", dataset_dir=str(cts), structure=["liver"])
    with pytest.raises(InputError, match="an epoch has 3 slices, fewer than batch_size; raise slices_per_volume"):
        run("train.yaml", dataset_dir=str(cts), output_dir=str(tmp_path / "out"), **TINY | {"slices_per_volume": 1})
    with pytest.raises(InputError, match="image_size=40 must be divisible by 16"):
        run("train.yaml", dataset_dir=str(cts), output_dir=str(tmp_path / "out"), **TINY | {"image_size": 40})
    assert not (tmp_path / "out").exists()


def test_int8_is_evaluated_and_segments_like_the_network(trained, cts, tmp_path):
    pytest.importorskip("onnxruntime")
    common = {"dataset_dir": str(cts), "ckpt_path": str(trained / "model.pt"), "onnx_dir": str(tmp_path), **TINY}
    run("train.yaml", "export_int8.yaml", output_dir=str(tmp_path / "export"), **common)
    run("train.yaml", "evaluate.yaml", output_dir=str(tmp_path / "float32"), **common)
    run("train.yaml", "evaluate.yaml", "evaluate_int8.yaml", output_dir=str(tmp_path / "int8"), **common)
    dice = [
        json.loads((tmp_path / name / "summary.json").read_text())["mean over structures"]["dice"]["value"]
        for name in ("float32", "int8")
    ]
    assert dice[1] == pytest.approx(dice[0], abs=0.1)
    options = {"dataset_dir": str(cts / "s0"), "onnx_dir": str(tmp_path), "ckpt_path": "none"}
    for name in ("inference.yaml", "inference_int8.yaml"):
        assert (BUNDLE / "configs" / name).is_file()
    run("inference.yaml", "inference_int8.yaml", output_dir=str(tmp_path / "out"), **options)
    assert (tmp_path / "out" / "s0_seg.nii.gz").is_file()
    with pytest.raises(InputError, match="onnx_dir '.*' was trained with spacing=10, now it is 5"):
        run("train.yaml", "evaluate.yaml", "evaluate_int8.yaml", output_dir="no", **common | {"spacing": 5})


def test_the_binary_cross_entropy_is_that_of_torch():
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "loss_bce.yaml"))
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8))
    truth = torch.nn.functional.one_hot(label[:, 0], 3).movedim(-1, 1).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
    assert torch.allclose(parser.get_parsed_content("loss")(logits, label), expected)


def test_the_usual_recipe_trains_and_segments(cts, tmp_path):
    tiny = TINY | {"max_epochs": 1}
    del tiny["batch_size"]
    folders = {"dataset_dir": str(cts), "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}
    run("train.yaml", "seed_settings.yaml", "loss_bce.yaml", **folders, **tiny)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["settings"]["windows"] == [[-200, 300]]
    infer(tmp_path, cts / "s0", tmp_path / "out")
    assert (tmp_path / "out" / "s0_seg.nii.gz").is_file()


def test_the_3d_baseline_is_trained_and_evaluated(cts, tmp_path):
    network = {"network_def::init_filters": 8, "network_def::blocks_down": [1, 1], "network_def::blocks_up": [1]}
    tiny = {key: TINY[key] for key in ("structures", "spacing", "image_size", "features")} | network
    common = {"dataset_dir": str(cts), "ckpt_dir": str(tmp_path / "models"), **tiny}
    files = ("train.yaml", "baseline_segresnet.yaml")
    run(*files, output_dir=str(tmp_path / "train"), max_epochs=1, val_interval=1, **common)
    run(*files, "evaluate.yaml", output_dir=str(tmp_path / "evaluate"), **common)
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    assert summary["subjects"] == 1
    assert next(iter(summary["structures"])) == "liver"
