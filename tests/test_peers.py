"""The peer bench: what nnU-Net gets, how its masks are judged, and the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from benchmarks.peers import nnunet
from benchmarks.peers.bundle_arm import BundleArm
from benchmarks.peers.process import run
from benchmarks.peers.run import check_unchanged
from benchmarks.peers.table import compare


@pytest.fixture
def config(phantoms):
    """Evaluation of three nested regions on the phantoms' own grid."""
    settings = {"dataset_dir": str(phantoms), "regions": ["ET", "WT", "TC"], "image_size": 32, "ckpt_dir": "/nowhere"}
    arm = nnunet.NnUNetArm(["train.yaml"], settings | {"validation_share": 0.25}, 1, 1, Path(sys.executable))
    return arm.config(0)


def test_nnunet_gets_the_slices_and_the_split(config, tmp_path):
    nnunet.export(config, tmp_path)
    raw, datalist = tmp_path / "nnUNet_raw" / nnunet.DATASET, config.get_parsed_content("datalist")
    names = {split: [item["subject"] for item in datalist[split]] for split in ("training", "validation", "judged")}
    (split,) = json.loads((tmp_path / "nnUNet_preprocessed" / nnunet.DATASET / "splits_final.json").read_text())
    assert split == {"train": names["training"], "val": names["validation"]}
    described = json.loads((raw / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "WT": [1, 2, 3], "TC": [2, 3], "ET": [3]}
    assert list(described["labels"]) == ["background", "WT", "TC", "ET"]  # painted in this order
    assert described["numTraining"] == len(list((raw / "labelsTr").iterdir())) == sum(map(len, split.values()))
    assert {file.name[:-12] for file in (tmp_path / "images").iterdir()} == set(names["judged"])
    seen = config.get_parsed_content("validate::preprocessing")(datalist["judged"][0])
    for channel in range(4):
        file = tmp_path / "images" / f"{names['judged'][0]}_{channel:04d}.nii.gz"
        assert np.allclose(nib.load(file).get_fdata(), seen["image"][channel], atol=1e-5)
    labels = [np.asarray(nib.load(file).dataobj) for file in (raw / "labelsTr").iterdir()]
    assert set(np.unique(labels)) == {0, 1, 2, 3}


def test_a_single_region_is_no_list(config, tmp_path):
    config.update({"regions": ["WT"]})
    nnunet.export(config, tmp_path)
    described = json.loads((tmp_path / "nnUNet_raw" / nnunet.DATASET / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "WT": 1}


def test_masks_are_judged_on_the_grid_of_the_images(config, tmp_path):
    """The file of nnU-Net has reversed axes and the largest region first."""
    seen = config.get_parsed_content("train::preprocessing")
    right, _ = items = config.get_parsed_content("datalist")["judged"]
    for item in items:
        truth = seen(item)["label"].numpy()  # ET, WT, TC, in RAS as the network's image; the files are not
        prob = truth[[1, 2, 0]] * (1.0 if item is right else 0.4)
        np.savez(tmp_path / f"{item['subject']}.npz", probabilities=prob.transpose(0, 3, 2, 1))
    table = nnunet.judge(config, tmp_path).set_index("subject")
    assert (table.filter(like="dice_").loc[right["subject"]] == 1).all()
    assert table["dice_WT"].drop(right["subject"]).item() == 0
    assert list(table["patient"]) == [item["subject"] for item in items]


def test_probabilities_of_one_region_are_those_of_the_foreground(config, tmp_path):
    config.update({"regions": ["WT"]})
    prob = np.random.default_rng(0).random((1, 4, 3, 2))
    np.savez(tmp_path / "a.npz", probabilities=np.concatenate([1 - prob, prob]).transpose(0, 3, 2, 1))
    found = nnunet.region_probabilities(tmp_path / "a.npz", config.get_parsed_content("region_coding"))
    assert np.allclose(found, prob)


def test_some_patients_of_a_fold_are_chosen_by_the_seed(phantoms, tmp_path):
    """More patients contain the fewer, and validation and test stay."""
    settings = {"dataset_dir": str(phantoms), "validation_share": 0.25}

    def chosen(count, seed):
        arm = BundleArm(["train.yaml"], settings, 1, 1, tmp_path, count)
        (file,) = arm._chosen(tmp_path, 0, seed).values()
        found = json.loads(Path(file).read_text())
        return {name: [item["subject"] for item in items] for name, items in found.items()}

    few, more, other = chosen(2, 0), chosen(4, 0), chosen(2, 1)
    assert (len(few["training"]), len(more["training"])) == (2, 4)
    assert set(few["training"]) < set(more["training"])
    assert few["training"] != other["training"]
    for name in ("validation", "test"):
        assert few[name] == more[name] == other[name] != []
    assert BundleArm(["train.yaml"], settings, 1, 1, tmp_path)._chosen(tmp_path, 0, 0) == {}
    with pytest.raises(SystemExit, match="there are 6 in fold 0"):
        chosen(7, 0)


def write_run(folder, dice, prob=None, area=1.0):
    """What a run of an arm leaves: scores of four patients and costs."""
    table = pd.DataFrame({"subject": list("dcba"), "patient": list("dcba"), "dice_WT": dice, "volume_ml_WT": area})
    if prob is not None:
        table = table.assign(
            grade=[0, 0, 1, 1], prob_LGG=1 - np.array(prob), prob_HGG=prob, prior_LGG=0.5, prior_HGG=0.5
        )
    folder.mkdir(parents=True)
    table.to_csv(folder / "subjects.csv", index=False)
    cost = {"minutes": 2.0, "epochs": 3, "gib": 1.0, "seconds": 0.5}
    (folder / "cost.json").write_text(json.dumps(cost))
    return folder


def test_the_table_compares_patient_by_patient(tmp_path):
    folders = {
        "ours": {0: [write_run(tmp_path / "a", [0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.8, 0.9])]},
        "U-Net": {s: [write_run(tmp_path / f"b{s}", np.array([0.8, 0.7, 0.6, 0.5]) + s / 10)] for s in (0, 1)},
        "ResNet": {0: [write_run(tmp_path / "c", 0.0, [0.9, 0.2, 0.8, 0.1], area=0.0)]},
    }
    table = compare(folders, resamples=50).set_index("arm")
    assert list(table.index) == list(folders)
    assert table.loc["ours", "dice"].startswith("0.750 (")
    assert table.loc["U-Net", "dice, minus ours"] == "-0.050 (-0.050 to -0.050)"  # the mean of both seeds
    assert table.loc["ours", "auc"].startswith("1.000")
    assert table.loc["ResNet", "auc, minus ours"].startswith("-0.750")
    assert table.loc["ResNet", "dice"] == table.loc["U-Net", "auc"] == table.loc["ours", "dice, minus ours"] == "-"
    assert table.loc["U-Net", "minutes"] == 2


def test_a_collapsed_run_counts(tmp_path):
    """All masks of one seed are empty: its Dice is 0, not missing."""
    runs = {0: [write_run(tmp_path / "a", 0.8)], 1: [write_run(tmp_path / "b", 0.0, area=0.0)]}
    assert compare({"ours": runs}, resamples=50)["dice"].item().startswith("0.400")


def test_a_bench_does_not_mix_settings(tmp_path):
    check_unchanged(tmp_path / "out" / "bench.json", {"minutes": 5})
    check_unchanged(tmp_path / "out" / "bench.json", {"minutes": 5})
    with pytest.raises(SystemExit, match="give another --output_dir"):
        check_unchanged(tmp_path / "out" / "bench.json", {"minutes": 7})


def test_a_failed_command_stops_with_the_end_of_its_log(tmp_path):
    log = tmp_path / "log.txt"
    command = [sys.executable, "-c", "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit('out of paper')"]
    with pytest.raises(SystemExit, match="out of paper"):
        run(command, log, threads=3)
    assert "3\n" in log.read_text()
    assert run([sys.executable, "-c", "pass"], log, threads=1).gib > 0
