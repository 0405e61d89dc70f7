"""The bundle end to end on tiny phantoms: train, evaluate, infer. Invalid input stops before anything is written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from conftest import MODALITIES, ROOT, TINY_TRAINING, run_configs
from scripts.config import InputError, TrainingError
from scripts.data.regions import LabelToRegionsd, RegionCoding
from scripts.networks.conditioning import CONDITIONING
from scripts.report.metrics import mask_scores


@pytest.fixture(scope="module")
def trained_once(phantoms, tmp_path_factory) -> Path:
    """Output folder of two epochs on the phantoms; tests must not write here."""
    folder = tmp_path_factory.mktemp("trained")
    run_configs(["train.yaml"], dataset_dir=str(phantoms), output_dir=str(folder), ckpt_dir=str(folder))
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    """A copy of this folder that a test may change."""
    return Path(shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def copied(phantoms, tmp_path):
    """A copy of the phantoms that a test may change."""
    return Path(shutil.copytree(phantoms, tmp_path / "data"))


def folders(tmp_path) -> dict[str, str]:
    return {"output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "out")}


def test_training_writes_what_the_docs_name(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "metrics.csv", "config.yaml", "datalist.json", "learning_curves.png", "tensorboard", "model.pt", "last.pt",
    }  # fmt: skip
    table = pd.read_csv(trained / "metrics.csv")
    assert list(table.columns) == [
        "epoch", "split", "dice", "iou", "auc", "f1", "f1_LGG", "f1_HGG", "accuracy", "L_seg", "L_calib", "L_draw",
        "L_first", "L_sample", "L_cls", "L_total", "sigma_seg", "sigma_cls", "alpha_LGG", "alpha_HGG", "grad_norm",
        "learning_rate", "seconds",
    ]  # fmt: skip
    assert table["split"].tolist() == ["train", "validation"] * 2
    always = ["dice", "iou", "auc", "f1", "accuracy", "L_seg", "L_cls", "L_total", "sigma_seg", "sigma_cls"]
    assert table[[name for name in always if name != "auc"]].notna().all(axis=None)
    assert table.loc[table["split"] == "train", "auc"].notna().all()  # the one validation subject has no AUC
    assert table["L_calib"].notna().all()  # L_total contains it in both rows
    assert table.loc[table["split"] == "train", "grad_norm"].gt(0).all()
    assert table["sigma_seg"].nunique() > 1  # the sigma is optimised
    split = json.loads((trained / "datalist.json").read_text())
    assert [len(split[name]) for name in ("training", "validation", "test")] == [7, 1, 2]


def test_training_is_reproducible(trained, phantoms, run_bundle, tmp_path):
    again = tmp_path / "again"
    run_bundle(["train.yaml"], dataset_dir=str(phantoms), output_dir=str(again), ckpt_dir=str(again))
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns="seconds") for folder in (trained, again)]
    pd.testing.assert_frame_equal(*tables)


def test_saved_configuration_runs_again(trained, run_bundle, tmp_path, monkeypatch):
    import monai.bundle

    before = pd.read_csv(trained / "metrics.csv").drop(columns="seconds")
    (tmp_path / "rerun").mkdir()
    monai.bundle.run(
        config_file=str(trained / "config.yaml"),
        meta_file=str(ROOT / "configs" / "metadata.json"),
        output_dir=str(tmp_path / "rerun"),
    )
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "rerun" / "metrics.csv").drop(columns="seconds"), before)


def test_evaluation_judges_subjects_that_chose_nothing(trained, phantoms, run_bundle, tmp_path):
    common = {"dataset_dir": str(phantoms), "ckpt_dir": str(trained)}
    split = json.loads((trained / "datalist.json").read_text())
    summaries = {}
    for subset in ("test", "validation"):
        out = tmp_path / subset
        run_bundle(["train.yaml", "evaluate.yaml"], output_dir=str(out), subset=subset, **common)
        assert pd.read_csv(out / "subjects.csv")["subject"].tolist() == [item["subject"] for item in split[subset]]
        summaries[subset] = json.loads((out / "summary.json").read_text())
    assert summaries["test"]["settings"]["chosen_by"] == 0
    assert summaries["validation"]["settings"]["chosen_by"] == len(split["validation"])
    best = pd.read_csv(trained / "metrics.csv").query("split == 'validation'")["dice"].max()
    dice = summaries["validation"]["segmentation"]["WT"]["dice"]["mean"]["value"]
    assert dice == pytest.approx(best, abs=1e-4)
    names = {"auc", "accuracy", "f1", "f1_LGG", "f1_HGG", "brier", "log_loss", "log_loss_of_prior"}
    assert names == summaries["test"]["grading"].keys()
    assert len(list((tmp_path / "test" / "overlays").glob("*.png"))) == 2


def test_a_two_way_split_says_that_the_judged_subjects_chose(phantoms, run_bundle, tmp_path, capsys):
    common = {"dataset_dir": str(phantoms), "ckpt_dir": str(tmp_path), "validation_share": 0}
    run_bundle(["train.yaml"], output_dir=str(tmp_path / "out"), **common)
    run_bundle(["train.yaml", "evaluate.yaml"], output_dir=str(tmp_path / "eval"), **common)
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["settings"]["chosen_by"] == 2
    assert "2 of them chose the weights or the calibration" in capsys.readouterr().out


def test_training_on_all_subjects(phantoms, run_bundle, tmp_path):
    common = {"dataset_dir": str(phantoms), "ckpt_dir": str(tmp_path), "validation_share": 0}
    run_bundle(["train.yaml", "all_subjects.yaml"], output_dir=str(tmp_path / "out"), **common)
    checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
    assert len(checkpoint["lineage"]["training"][phantoms.name]) == 10
    assert checkpoint["epoch"] == TINY_TRAINING["max_epochs"]  # the last weights: nothing could choose
    assert set(pd.read_csv(tmp_path / "out" / "metrics.csv")["split"]) == {"train"}
    for stop in ({"train::early_stopping": 1}, {"configs": "lr_plateau.yaml"}):
        files = ["train.yaml", "all_subjects.yaml", *([stop.pop("configs")] if "configs" in stop else [])]
        with pytest.raises(InputError, match="need validation subjects"):
            run_bundle(files, output_dir=str(tmp_path / "out"), **common, **stop)


def test_calibration_is_stored_and_applied(trained, phantoms, run_bundle, tmp_path):
    common = {"dataset_dir": str(phantoms), "ckpt_dir": str(trained)}
    shutil.copy(trained / "model.pt", tmp_path / "copy.pt")
    common["ckpt_path"] = str(tmp_path / "copy.pt")
    files, judge = ["train.yaml", "evaluate.yaml", "calibrate.yaml"], {"subset": "validation", **common}
    run_bundle(files[:2], output_dir=str(tmp_path / "before"), **judge)
    run_bundle(files, output_dir=str(tmp_path / "calibrate"), **common)
    run_bundle(files[:2], output_dir=str(tmp_path / "after"), **judge)
    fitted = json.loads((tmp_path / "calibrate" / "calibration.json").read_text())
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("before", "after"))
    assert fitted["WT"]["foreground"]["temperature"] != pytest.approx(1, abs=0.05)
    scores = [summary["uncertainty"]["WT"] for summary in (before, after)]
    assert scores[0]["ece_foreground"]["value"] == pytest.approx(fitted["WT"]["foreground"]["before"]["ece"], abs=1e-3)
    assert scores[1]["ece_foreground"]["value"] < scores[0]["ece_foreground"]["value"]
    dice = [summary["segmentation"]["WT"]["dice"]["mean"]["value"] for summary in (before, after)]
    assert dice[0] == pytest.approx(dice[1], abs=0.02)  # scaling keeps masks; only resampling changes them


def test_evaluation_of_all_and_of_some(trained, phantoms, run_bundle, tmp_path, capsys):
    common = {"dataset_dir": str(phantoms), "ckpt_dir": str(trained), "subset": "all", "num_eval_cases": 3}
    run_bundle(["train.yaml", "evaluate.yaml"], output_dir=str(tmp_path / "eval"), **common)
    assert len(pd.read_csv(tmp_path / "eval" / "subjects.csv")) == 3
    assert "not of unseen subjects" in capsys.readouterr().out


def test_evaluation_refuses_subjects_it_was_trained_on(trained, phantoms, run_bundle, tmp_path):
    common = {"dataset_dir": str(phantoms), "ckpt_dir": str(trained), "output_dir": str(tmp_path / "eval")}
    with pytest.raises(InputError, match="were trained on"):
        run_bundle(["train.yaml", "evaluate.yaml"], fold=1, **common)
    assert not (tmp_path / "eval").exists()
    file = str(trained / "datalist.json")
    run_bundle(["train.yaml", "evaluate.yaml"], fold=1, datalist_file=file, **common)
    assert (tmp_path / "eval" / "summary.json").is_file()


@pytest.mark.parametrize("with_label", [True, False])
def test_inference_writes_on_the_inputs_own_grid(trained, copied, run_bundle, tmp_path, with_label):
    data = tmp_path / "new"
    data.mkdir()
    for name in ("BraTS20_Training_002", "BraTS20_Training_005"):
        folder = Path(shutil.move(copied / name, data / name))
        if not with_label:
            (folder / f"{name}_seg.nii.gz").unlink()
    out = tmp_path / "pred"
    run_bundle(["inference.yaml"], dataset_dir=str(data), output_dir=str(out), ckpt_dir=str(trained), num_samples=2)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            *(f"{s}_{kind}" for s in ("BraTS20_Training_002", "BraTS20_Training_005")
              for kind in ("seg.nii.gz", "prob.nii.gz", "uncertainty.nii.gz", "variance.nii.gz", "overlay.png")),
            "grades.csv",
            "manifest",
            "report.html",
        ]
    )  # fmt: skip
    source = nib.load(data / "BraTS20_Training_002" / "BraTS20_Training_002_t1.nii.gz")
    seg, prob, uncertainty = (
        nib.load(out / f"BraTS20_Training_002_{kind}.nii.gz") for kind in ("seg", "prob", "uncertainty")
    )
    for image in (seg, prob, uncertainty):
        assert image.shape == source.shape
        assert np.allclose(image.affine, source.affine)
    assert seg.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(seg.dataobj) > 0, prob.get_fdata() >= 0.5)
    assert 0 <= prob.get_fdata().min() <= prob.get_fdata().max() <= 1
    grades = pd.read_csv(out / "grades.csv")
    assert grades["subject"].tolist() == ["BraTS20_Training_002", "BraTS20_Training_005"]
    assert (grades["prob_LGG"] + grades["prob_HGG"]).to_numpy() == pytest.approx(1, abs=1e-5)


def test_prediction_lies_where_the_volume_says(trained, phantoms, run_bundle, tmp_path):
    """A subject stored with other axes gives the same mask in world coordinates."""
    data = tmp_path / "new"
    for name, axes in (("a", None), ("b", [[1, 1], [0, -1], [2, 1]])):
        (data / name).mkdir(parents=True)
        for modality in MODALITIES:
            image = nib.load(phantoms / "BraTS20_Training_001" / f"BraTS20_Training_001_{modality}.nii.gz")
            nib.save(
                image if axes is None else image.as_reoriented(np.array(axes)),
                data / name / f"{name}_{modality}.nii.gz",
            )
    run_bundle(["inference.yaml"], dataset_dir=str(data), output_dir=str(tmp_path / "p"), ckpt_dir=str(trained))
    masks = [nib.as_closest_canonical(nib.load(tmp_path / "p" / f"{name}_prob.nii.gz")) for name in "ab"]
    assert masks[0].shape == masks[1].shape
    assert np.allclose(masks[0].get_fdata(), masks[1].get_fdata(), atol=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_cls_head": False},
        {"prediction_type": "epsilon", "num_train_timesteps": 20, "num_inference_steps": 4},
        {"prediction_type": "v_prediction", "schedule": "cosine", "num_samples": 2},
        {
            "train::inferer::noised_mask": "prediction",
            "validate::inferer::start_timestep": 499,
            "fusion": "staple",
            "num_samples": 2,
        },
        {
            "conditioning": ["highway", "self_conditioning"],
            "train::inferer::noised_mask": "truth",
            "validate::inferer::eta": 1.0,
        },
        {"conditioning": list(CONDITIONING), "amp": True, "num_samples": 2, "num_inference_steps": 2},
        {"conditioning": [], "loss::task_weighting": "sum"},
        {"conditioning": ["highway", "stochastic"], "num_samples": 3, "num_inference_steps": 2},
        {"num_inference_steps": 0},
        {"cache_dir": "cache"},
    ],
    ids=lambda overrides: ", ".join(overrides),
)
def test_settings_train_and_judge(overrides, phantoms, run_bundle, tmp_path):
    if "cache_dir" in overrides:
        overrides = {"cache_dir": str(tmp_path / "cache")}
    common = {"dataset_dir": str(phantoms), "ckpt_dir": str(tmp_path), **overrides}
    run_bundle(["train.yaml"], output_dir=str(tmp_path / "out"), max_epochs=1, **common)
    run_bundle(["train.yaml", "evaluate.yaml"], output_dir=str(tmp_path / "eval"), **common)
    table = pd.read_csv(tmp_path / "eval" / "subjects.csv")
    assert table[["dice_WT", "iou_WT", "hd95_WT"]].notna().all(axis=None)
    graded = overrides.get("use_cls_head", True) and overrides.get("num_inference_steps", 1) > 0
    assert table["prob_HGG"].isna().all() == (not graded)


def test_three_regions_are_judged_as_they_are_saved(phantoms, run_bundle, tmp_path):
    regions = ["TC", "WT", "ET"]
    common = {"dataset_dir": str(phantoms), "ckpt_dir": str(tmp_path), "regions": regions}
    run_bundle(["train.yaml"], output_dir=str(tmp_path / "out"), learning_rate=0.01, **common)
    best = pd.read_csv(tmp_path / "out" / "metrics.csv").query("split == 'validation'")["dice"].max()
    run_bundle(["train.yaml", "evaluate.yaml"], output_dir=str(tmp_path / "eval"), subset="validation", **common)
    run_bundle(["inference.yaml"], output_dir=str(tmp_path / "pred"), **common)
    table = pd.read_csv(tmp_path / "eval" / "subjects.csv").set_index("subject")
    assert table[[f"dice_{region}" for region in regions]].mean(axis=None) == pytest.approx(best, abs=1e-4)
    split_masks = LabelToRegionsd("label", RegionCoding(regions, {"TC": [1, 4], "WT": [1, 2, 4], "ET": [4]}))
    nested = []
    for name, row in table.iterrows():
        files = (tmp_path / "pred" / f"{name}_seg.nii.gz", phantoms / name / f"{name}_seg.nii.gz")
        maps = [torch.as_tensor(np.asarray(nib.load(file).dataobj))[None] for file in files]
        pred, truth = (split_masks({"label": label})["label"] for label in maps)
        scores = mask_scores(pred, truth, [1, 1, 1], regions)
        for region in regions:
            assert row[f"dice_{region}"] == pytest.approx(scores[f"dice_{region}"], abs=1e-5)
        prob = torch.as_tensor(nib.load(tmp_path / "pred" / f"{name}_prob.nii.gz").get_fdata()).movedim(-1, 0)
        nested.append(torch.equal(pred, (prob >= 0.5).float()))
    assert not all(nested)  # the test needs a mask that nesting changes


@pytest.mark.parametrize("baseline", ["baseline_unet.yaml", "baseline_resnet.yaml", "baseline_densenet.yaml"])
def test_baselines_run_on_the_same_data(baseline, phantoms, run_bundle, tmp_path):
    size = {"image_size": 64} if "densenet" in baseline else {}
    run_bundle(["train.yaml", baseline], dataset_dir=str(phantoms), max_epochs=1, **folders(tmp_path), **size)
    assert pd.read_csv(tmp_path / "out" / "metrics.csv")["L_calib"].isna().all()


def test_one_class_warns_and_leaves_auc_undefined(copied, run_bundle, tmp_path, capsys):
    csv = copied / "name_mapping.csv"
    csv.write_text(csv.read_text().replace("LGG", "HGG"))
    run_bundle(["train.yaml"], dataset_dir=str(copied), max_epochs=1, **folders(tmp_path))
    assert "no training subject has the grade LGG" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert (table[["alpha_LGG", "alpha_HGG"]] == 1).all(axis=None)
    assert table["auc"].isna().all()
    assert table["accuracy"].notna().all()


def test_without_grades_segmentation_is_trained(copied, run_bundle, tmp_path):
    (copied / "name_mapping.csv").unlink()
    run_bundle(["train.yaml"], dataset_dir=str(copied), max_epochs=1, **folders(tmp_path))
    table = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert table["L_cls"].isna().all()
    assert table["L_seg"].notna().all()


def test_exploding_loss_stops_and_names_subjects(phantoms, run_bundle, tmp_path):
    with pytest.raises(TrainingError, match="with the subjects .*BraTS20_Training_"):
        run_bundle(["train.yaml"], dataset_dir=str(phantoms), learning_rate=1e30, **folders(tmp_path))


def spoil_csv(data: Path) -> None:
    csv = data / "name_mapping.csv"
    csv.write_text(csv.read_text().replace("HGG", "IV"))


def spoil_modality(data: Path) -> None:
    (data / "BraTS20_Training_003" / "BraTS20_Training_003_t2.nii.gz").unlink()


def spoil_stream(data: Path) -> None:
    file = data / "BraTS20_Training_003" / "BraTS20_Training_003_t2.nii.gz"
    file.write_bytes(file.read_bytes()[:-2000])


def spoil_voxels(data: Path) -> None:
    file = data / "BraTS20_Training_003" / "BraTS20_Training_003_t2.nii.gz"
    image = nib.load(file)
    volume = image.get_fdata(dtype=np.float32)
    volume[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(volume, image.affine), file)


def spoil_labels(data: Path) -> None:
    file = data / "BraTS20_Training_003" / "BraTS20_Training_003_seg.nii.gz"
    image = nib.load(file)
    nib.save(nib.Nifti1Image(np.full(image.shape, 9, np.uint8), image.affine), file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_csv, "grade 'IV'"),
        (spoil_modality, "'BraTS20_Training_003': no file for modality 't2'"),
        (spoil_stream, "'BraTS20_Training_003': cannot read .*_t2.nii.gz"),
        (spoil_voxels, "'BraTS20_Training_003': modality 3 of 4 has NaN"),
        (spoil_labels, "'BraTS20_Training_003': .*label values"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_bad_data_stops_before_anything_is_written(spoil, message, copied, run_bundle, tmp_path):
    spoil(copied)
    with pytest.raises(InputError, match=message):
        run_bundle(["train.yaml"], dataset_dir=str(copied), **folders(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"batch_sizes": 4}, "did you mean 'batch_size'"),
        ({"image_size": 30}, "image_size .* divisible by 8"),
        ({"variant": "M", "channels": None}, "variant 'M'"),
        ({"conditioning": ["ff_parsers"]}, "conditioning=.*must be a list of names"),
        ({"conditioning": ["anchor"]}, "conditioning=.*add it"),
        ({"conditioning": ["stochastic"]}, "conditioning=.*'stochastic'.*add it"),
        (
            {"conditioning": ["highway", "stochastic"], "prediction_type": "epsilon"},
            "'stochastic' needs prediction_type",
        ),
        (
            {"conditioning": [], "train::inferer::noised_mask": "calibration"},
            "noised_mask='calibration' needs 'highway'",
        ),
        ({"conditioning": [], "num_inference_steps": 0}, "need a calibration map"),
        ({"modality_dropout": 1.5}, "modality_dropout=1.5"),
        ({"loss::task_weighting": "mean"}, "task_weighting 'mean'"),
        ({"regions": ["WTT"]}, "regions="),
        ({"modalities": "t1"}, "modalities='t1' must be a list"),
        ({"channels": 8}, "channels=8"),
        ({"num_inference_steps": 2000}, "num_inference_steps=2000"),
        ({"slices_per_volume": 0}, "slices_per_volume=0"),
        ({"alpha": [1.0]}, "alpha="),
        ({"alpha": [1.0, -1.0]}, "alpha="),
        ({"fold": 7}, "fold=7"),
        ({"grade_labels": {"LGG": 0, "HGG": 2}}, "without a gap"),
        ({"architecture": "UNet"}, "architecture 'UNet'"),
        ({"augmentation": 2.0}, "unknown configuration key 'augmentation'.*'augmentations'"),
        ({"train::early_stopping": 0}, "early_stopping=0 must be"),
        ({"optimizer::params::trainable": "["}, "is not a regular expression"),
        ({"optimizer::params::trainable": "^head"}, "matches no parameter"),
        ({"loss::tasks": ["grading"], "use_cls_head": False}, "needs use_cls_head"),
        ({"loss::tasks": ["masks"]}, "tasks="),
        ({"train::compile": "false"}, "train::compile='false' must be a bool"),
        ({"loss::lambda_focal": "much"}, "loss::lambda_focal='much' must be a number"),
        ({"train::compil": True}, r"unknown configuration key 'train::compil' \(did you mean 'compile'"),
        (
            {"loss::lambda_focl": 1.0},
            r"loss: MultiTaskLoss has no argument 'lambda_focl' \(did you mean 'lambda_focal'",
        ),
        ({"train::handlers::4::max_nrm": 1.0}, "train::handlers::4: GradientClipping has no argument 'max_nrm'"),
        ({"lr_schedule": "step"}, "unknown configuration key 'lr_schedule'.*'lr_scheduler'"),
        ({"train::amp_dtype": "half"}, "amp_dtype 'half'"),
        ({"init_ckpt": "missing.pt"}, "'missing.pt' does not exist"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_stop_before_anything_is_written(override, message, phantoms, run_bundle, tmp_path):
    with pytest.raises(InputError, match=message):
        run_bundle(["train.yaml"], dataset_dir=str(phantoms), **folders(tmp_path), **override)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overlay", "override", "message"),
    [
        ("ema.yaml", {"ema::decay": 2}, "ema::decay=2 must lie"),
        ("lr_warmup.yaml", {}, "warmup_epochs=5 must be less than max_epochs=2"),
    ],
)
def test_bad_settings_of_overlays(overlay, override, message, phantoms, run_bundle, tmp_path):
    with pytest.raises(InputError, match=message):
        run_bundle(["train.yaml", overlay], dataset_dir=str(phantoms), **folders(tmp_path), **override)
    assert not (tmp_path / "out").exists()


def test_three_grades(copied, run_bundle, tmp_path):
    """Only the mapping in the configuration changes."""
    csv = copied / "name_mapping.csv"
    rows = csv.read_text().splitlines()
    graded = [row.replace("LGG", "G2").replace("HGG", f"G{3 + i % 2}") for i, row in enumerate(rows)]
    csv.write_text("\n".join(graded) + "\n")
    common = {"dataset_dir": str(copied), "ckpt_dir": str(tmp_path)}
    labels = {"G2": 0, "G3": 1, "G4": 2}
    run_bundle(["train.yaml"], output_dir=str(tmp_path / "train"), grade_labels=labels, num_folds=2, **common)
    table = pd.read_csv(tmp_path / "train" / "metrics.csv")
    assert table[["f1_G2", "f1_G3", "f1_G4"]].notna().any(axis=None)
    assert (table[["alpha_G2", "alpha_G3", "alpha_G4"]] > 0).all(axis=None)
    files = ["train.yaml", "evaluate.yaml"]
    for kind in ("evaluate", "calibrate"):
        more = {"output_dir": str(tmp_path / kind), "grade_labels": labels, "num_folds": 2}
        run_bundle([*files, *(["calibrate.yaml"] if kind == "calibrate" else [])], **more, **common)
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    assert list(summary["grading"])[:6] == ["auc", "f1", "f1_G2", "f1_G3", "f1_G4", "accuracy"]
    run_bundle(["inference.yaml"], output_dir=str(tmp_path / "inference"), **common)
    grades = pd.read_csv(tmp_path / "inference" / "grades.csv")
    prob = grades[["prob_G2", "prob_G3", "prob_G4"]]
    assert prob.sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    assert (prob.idxmax(axis=1).str.removeprefix("prob_") == grades["grade"]).all()


def test_evaluation_names_a_file_that_cannot_be_read(trained, copied, run_bundle, tmp_path):
    spoil_stream(copied)
    common = {"dataset_dir": str(copied), "ckpt_dir": str(trained), "output_dir": str(tmp_path / "eval")}
    with pytest.raises(InputError, match="'BraTS20_Training_003': cannot read"):
        run_bundle(["train.yaml", "evaluate.yaml"], subset="all", **common)
    assert not (tmp_path / "eval" / "summary.json").exists()


def test_checkpoint_of_another_width_is_refused(trained, phantoms, run_bundle, tmp_path):
    common = {"dataset_dir": str(phantoms), "ckpt_dir": str(trained), "output_dir": str(tmp_path / "pred")}
    with pytest.raises(InputError, match=r"was trained with channels=\[8, 8, 8\]"):
        run_bundle(["inference.yaml"], channels=[16, 16, 16], **common)
    assert not (tmp_path / "pred").exists()


def test_inference_with_other_settings_is_refused(trained, phantoms, run_bundle, tmp_path):
    common = {"dataset_dir": str(phantoms), "ckpt_dir": str(trained), "output_dir": str(tmp_path / "pred")}
    with pytest.raises(InputError, match="was trained with modalities="):
        run_bundle(["inference.yaml"], modalities=["t1", "pd"], **common)


def trained_with_dropout(folder: Path) -> dict[str, str]:
    """The weights of a folder, as if they had been trained with modality_dropout."""
    checkpoint = torch.load(folder / "model.pt")
    checkpoint["settings"]["modality_dropout"] = 0.3
    torch.save(checkpoint, folder / "model.pt")
    return {"ckpt_dir": str(folder)}


def test_modalities_in_another_order_are_put_in_that_of_the_network(trained, phantoms, run_bundle, tmp_path):
    tables = []
    for order in (MODALITIES, MODALITIES[::-1]):
        out = str(tmp_path / order[0])
        run_bundle(
            ["inference.yaml"], dataset_dir=str(phantoms), ckpt_dir=str(trained), output_dir=out, modalities=order
        )
        tables.append(pd.read_csv(Path(out) / "grades.csv"))
    assert set(tables[0]["modalities"]) == {";".join(MODALITIES)}
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("config", [["inference.yaml"], ["train.yaml", "evaluate.yaml"]])
def test_channels_of_one_file_keep_their_order(trained, phantoms, run_bundle, tmp_path, config):
    """A file with all modalities does not name them: a wrong order would not be noticed."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for folder in phantoms.glob("*/"):
        files = [nib.load(folder / f"{folder.name}_{name}.nii.gz") for name in MODALITIES]
        stack = nib.Nifti1Image(np.stack([np.asarray(file.dataobj) for file in files], axis=-1), files[0].affine)
        nib.save(stack, tmp_path / "images" / f"{folder.name}.nii.gz")
        shutil.copy(folder / f"{folder.name}_seg.nii.gz", tmp_path / "masks" / f"{folder.name}.nii.gz")
    where = {"dataset_dir": str(tmp_path), "image_dir": "images", "mask_dir": "masks", "ckpt_dir": str(trained)}
    with pytest.raises(InputError, match="was trained with modalities="):
        run_bundle(config, modalities=MODALITIES[::-1], output_dir=str(tmp_path / "out"), **where)


def test_modalities_may_be_absent(trained, copied, run_bundle, tmp_path, capsys):
    for file in copied.rglob("*_t2.nii.gz"):
        file.unlink()
    some = ["t1", "t1ce", "flair"]
    data = {"dataset_dir": str(copied), "ckpt_dir": str(trained)}
    with pytest.raises(InputError, match="no file for modality 't2'"):
        run_bundle(["inference.yaml"], output_dir=str(tmp_path / "a"), **data)
    with pytest.raises(InputError, match=r"lacks \['t2'\]: the network was not trained for that"):
        run_bundle(["inference.yaml"], output_dir=str(tmp_path / "a"), modalities=some, **data)
    assert not (tmp_path / "a").exists()
    data |= trained_with_dropout(trained)
    run_bundle(["inference.yaml"], output_dir=str(tmp_path / "a"), modalities=some, **data)
    assert "modalities ['t2'] are absent" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "a" / "grades.csv")["modalities"]) == {"t1;t1ce;flair"}
    for name, order in (("b", some), ("c", some[::-1])):
        run_bundle(["train.yaml", "evaluate.yaml"], output_dir=str(tmp_path / name), modalities=order, **data)
    scores = [(tmp_path / name / "subjects.csv").read_text() for name in ("b", "c")]
    assert scores[0] == scores[1]


def test_weights_of_another_bundle_are_named(phantoms, run_bundle, tmp_path):
    first = str(ROOT / "bundles" / "organs" / "models" / "model.pt")
    with pytest.raises(InputError, match="holds weights of another bundle"):
        run_bundle(["train.yaml"], dataset_dir=str(phantoms), init_ckpt=first, **folders(tmp_path))


def test_training_starts_from_weights_with_more_modalities(trained, phantoms, run_bundle, tmp_path):
    out = folders(tmp_path / "fine") | {"dataset_dir": str(phantoms), "init_ckpt": str(trained / "model.pt")}
    with pytest.raises(InputError, match="lacks"):
        run_bundle(["train.yaml"], modalities=["flair", "t1"], **out)
    trained_with_dropout(trained)
    run_bundle(["train.yaml"], modalities=["flair", "t1"], **out)
    settings = torch.load(Path(out["ckpt_dir"]) / "model.pt")["settings"]
    assert (settings["modalities"], settings["modality_dropout"]) == (MODALITIES, 0.3)


def test_training_starts_from_weights_with_other_regions(trained, phantoms, run_bundle, tmp_path, capsys):
    """Layers of the same shape are taken over: without a step of the optimiser they stay as they are."""
    out = folders(tmp_path / "fine") | {"dataset_dir": str(phantoms), "init_ckpt": str(trained / "model.pt")}
    own = {"regions": ["TC", "WT", "ET"], "image_size": 24, "use_cls_head": False}
    run_bundle(["train.yaml"], max_epochs=1, learning_rate=0.0, **own, **out)
    printed = capsys.readouterr().out
    assert "['image_size', 'regions', 'use_cls_head'] differ from" in printed
    old, new = (torch.load(path)["model"] for path in (out["init_ckpt"], Path(out["ckpt_dir"]) / "model.pt"))
    own_shape = {name for name in new if name in old and old[name].shape != new[name].shape}
    assert own_shape
    assert not any(name.startswith("cls_head") for name in new)
    for name in new.keys() - own_shape:
        if not name.startswith("calibration.") and "running" not in name and "num_batches" not in name:
            assert torch.equal(new[name], old[name]), name
    for name in own_shape:
        layer = name.rpartition(".")[0]
        assert name.startswith("calibration.") or f"'{layer}'" in printed, name


def test_inference_does_not_write_among_the_volumes(trained, copied, run_bundle):
    folder = str(copied / "BraTS20_Training_001")
    with pytest.raises(InputError, match="choose another"):
        run_bundle(["inference.yaml"], dataset_dir=folder, output_dir=folder, ckpt_dir=str(trained))


def test_training_has_no_key_of_evaluation(phantoms, run_bundle):
    with pytest.raises(InputError, match="unknown configuration key 'subset'"):
        run_bundle(["train.yaml"], dataset_dir=str(phantoms), subset="all")


def test_a_log_file_has_a_line_per_epoch(phantoms, tmp_path):
    """No progress bar and no warning of MONAI that this bundle can avoid; warnings are not switched off here."""
    keys = {"dataset_dir": phantoms, "output_dir": tmp_path / "o", "ckpt_dir": tmp_path / "o", **TINY_TRAINING}
    run = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(ROOT / "configs" / "train.yaml")]
    run += [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    assert "\r" not in text
    assert "it/s" not in text
    assert len(re.findall(r"^\d+ +train ", text, re.MULTILINE)) == 2
    assert "Warning" not in text
    assert "deprecated" not in text


def test_command_line_from_another_folder_prints_the_error_alone(phantoms, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--dataset_dir", str(phantoms)]
    options = ["--config_file", str(ROOT / "configs" / "train.yaml"), "--learning_rat", "0.1"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: unknown configuration key 'learning_rat' (did you")
    assert "Traceback" not in done.stderr


def test_real_brats2021_case_has_every_region(shared_data):
    from scripts.data.subjects import find_subjects

    (item,) = find_subjects(str(shared_data / "brats2021"), MODALITIES)
    label = torch.as_tensor(np.asarray(nib.load(item["label"][0]).dataobj))[None]
    tc, wt, et = LabelToRegionsd("label", RegionCoding(["TC", "WT", "ET"], {"TC": [1, 4], "WT": [1, 2, 4], "ET": [4]}))(
        {"label": label}
    )["label"]
    assert label.shape[1:] == (240, 240, 155)
    assert et.sum() < tc.sum() < wt.sum()
    assert not (et > tc).any()
    assert not (tc > wt).any()
