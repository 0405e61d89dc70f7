"""Stages and options of training, end to end on tiny phantoms."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from scripts.config import InputError


def weights(folder: Path, name: str = "model.pt") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["model"]


def same(ours: dict, theirs: dict, part: str) -> bool:
    return all(torch.equal(value, theirs[name]) for name, value in ours.items() if name.startswith(part))


@pytest.fixture(scope="module")
def staged(phantoms, tmp_path_factory):
    """Folder of the three stages, trained with a moving average, which must not change frozen weights."""
    from conftest import run_configs

    folder = tmp_path_factory.mktemp("staged")
    for stage in ("stage1_segmentation", "stage2_grading", "stage3_joint"):
        settings = {"dataset_dir": str(phantoms), "max_epochs": 3, "ema::decay": 0.9}
        settings |= {"output_dir": str(folder / stage), "ckpt_dir": str(folder / stage)}
        run_configs(["train.yaml", f"{stage}.yaml", "ema.yaml"], **settings)
    return folder


def test_stages_train_what_they_name(staged):
    first, second, third = (
        weights(staged / name) for name in ("stage1_segmentation", "stage2_grading", "stage3_joint")
    )
    trunk = ("calibrator", "denoiser")
    assert all(same(first, second, part) for part in trunk)  # bit for bit, including the norms
    assert not same(first, second, "cls_head")
    assert not any(same(second, third, part) for part in (*trunk, "cls_head"))
    tables = [pd.read_csv(staged / name / "metrics.csv") for name in ("stage1_segmentation", "stage2_grading")]
    dice = [table.query("split == 'validation'")["dice"] for table in tables]
    assert dice[1].nunique() == 1
    assert dice[1].iloc[0] == dice[0].max()  # in all six digits
    rates = [pd.read_csv(path / "metrics.csv")["learning_rate"].iloc[0] for path in sorted(staged.iterdir())]
    assert rates == pytest.approx([5e-4, 5e-3, 5e-5])


def test_stage_one_leaves_the_head_and_stage_two_optimises_nothing_else(staged):
    last = torch.load(staged / "stage1_segmentation" / "last.pt", weights_only=True)
    assert same(last["network"], last["model"], "cls_head.3")  # the average of weights that did not change
    optimised = [
        torch.load(staged / stage / "last.pt", weights_only=True)["optimizer"]["state"]
        for stage in ("stage1_segmentation", "stage2_grading", "stage3_joint")
    ]
    assert [len(state) for state in optimised][1] == 4  # two layers, weight and bias
    assert len(optimised[2]) == len(optimised[0]) + 4 + 1  # the head and the log sigmas


def test_the_last_head_of_stage_two_is_kept(staged):
    checkpoint = torch.load(staged / "stage2_grading" / "model.pt", weights_only=True)
    assert checkpoint["epoch"] == 3  # Dice is constant in this stage, so the last epoch is kept


def test_a_stage_without_the_one_before_says_so(phantoms, run_bundle, tmp_path):
    with pytest.raises(InputError, match="stage1_segmentation/model.pt' does not exist"):
        folder = str(tmp_path / "stage2_grading")
        files = ["train.yaml", "stage2_grading.yaml"]
        run_bundle(files, dataset_dir=str(phantoms), output_dir=folder, ckpt_dir=folder)
    assert not list(tmp_path.iterdir())


def test_weights_that_have_seen_the_validation_subjects_are_no_start(staged, phantoms, run_bundle, tmp_path):
    start = {
        "init_ckpt": str(staged / "stage1_segmentation" / "model.pt"),
        "fold": 1,
        "output_dir": str(tmp_path / "o"),
    }
    with pytest.raises(InputError, match="were trained on"):
        run_bundle(["train.yaml"], dataset_dir=str(phantoms), **start)


def test_average_is_validated_and_kept(phantoms, run_bundle, tmp_path):
    folders = {"output_dir": str(tmp_path), "ckpt_dir": str(tmp_path), "dataset_dir": str(phantoms)}
    run_bundle(["train.yaml", "ema.yaml"], **folders | {"ema::decay": 0.95})
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert not same(last["network"], last["model"], "denoiser")
    average = {name.removeprefix("module."): value for name, value in last["ema"].items() if name != "n_averaged"}
    assert same(average, last["model"], "")
    assert last["ema"]["n_averaged"] == 4  # 2 epochs of 2 batches
    run_bundle(
        ["train.yaml", "evaluate.yaml"],
        **folders | {"output_dir": str(tmp_path / "e")},
        ckpt_path=str(tmp_path / "last.pt"),
        subset="validation",
    )
    judged = json.loads((tmp_path / "e" / "summary.json").read_text())["segmentation"]["WT"]["dice"]["mean"]["value"]
    assert judged == pytest.approx(pd.read_csv(tmp_path / "metrics.csv")["dice"].iloc[-1], abs=1e-5)


ACCUMULATE = "train::trainer::accumulation_steps"


@pytest.mark.parametrize(
    ("overlays", "settings", "steps"),
    [
        ([], {ACCUMULATE: 2, "batch_size": 4, "max_epochs": 1}, 2),  # 8 subjects x 2 slices: 4 batches
        ([], {ACCUMULATE: 3, "batch_size": 4, "max_epochs": 1}, 2),  # the last batch of an epoch is a step of its own
        (["lr_plateau.yaml"], {"lr_scheduler::patience": 1, "learning_rate": 1e-7, "max_epochs": 3}, 6),
        (["lr_restarts.yaml"], {"lr_scheduler::T_0": 1}, 4),
        (["lr_constant.yaml"], {"conditioning": ["highway", "self_conditioning"], "amp": True}, 4),
        (["lr_warmup.yaml"], {"lr_scheduler::warmup_epochs": 1}, 4),
        (["augment.yaml", "augment_mr.yaml"], {"train::early_stopping": 1, "batch_size": 1}, None),
        (["augment.yaml", "augment_pictures.yaml"], {}, 4),
    ],
    ids=str,
)
def test_options_run(overlays, settings, steps, phantoms, run_bundle, tmp_path):
    folders = {"output_dir": str(tmp_path), "ckpt_dir": str(tmp_path), "dataset_dir": str(phantoms)}
    run_bundle(["train.yaml", *overlays], **folders, **settings)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["L_total"].notna().all()
    if steps:
        assert {int(part["step"]) for part in last["optimizer"]["state"].values()} == {steps}
    if "lr_plateau.yaml" in overlays:
        assert last["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.5e-7)  # Dice did not improve
    if "lr_restarts.yaml" in overlays:
        assert table["learning_rate"].nunique() == 1  # the schedule restarts every epoch
    if "lr_warmup.yaml" in overlays:
        assert table["learning_rate"].iloc[0] == pytest.approx(table["learning_rate"].max() / 10)


def test_early_stopping_stays_stopped(phantoms, run_bundle, tmp_path):
    folders = {"output_dir": str(tmp_path), "ckpt_dir": str(tmp_path), "dataset_dir": str(phantoms)}
    settings = {"train::early_stopping": 2, "learning_rate": 1e-9, "max_epochs": 8}
    for files in (["train.yaml"], ["train.yaml", "resume.yaml"]):
        run_bundle(files, **folders, **settings)
        assert pd.read_csv(tmp_path / "metrics.csv")["epoch"].max() == 3  # the first epoch is the best


def test_the_parts_with_weights_are_compiled(phantoms, run_bundle, tmp_path, monkeypatch):
    """Traced by torch's compiler, and run by its simplest backend: the default one needs a C++ compiler and minutes."""
    compiled, compile_part = [], torch.nn.Module.compile

    def compile_for_eager(part):
        compiled.append(type(part).__name__)
        compile_part(part, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_for_eager)
    losses = []
    for name, compiles in (("plain", False), ("compiled", True)):
        folders = {"output_dir": str(tmp_path / name), "ckpt_dir": str(tmp_path / name), "dataset_dir": str(phantoms)}
        run_bundle(["train.yaml"], **folders, max_epochs=1, **{"train::compile": compiles})
        losses.append(pd.read_csv(tmp_path / name / "metrics.csv")["L_total"].tolist())
    assert compiled == ["ImageUNet", "Denoiser", "GradingHead"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_tracking_with_mlflow(phantoms, run_bundle, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="its pins are for Python 3.11 and newer")
    folders = {"output_dir": str(tmp_path), "ckpt_dir": str(tmp_path), "dataset_dir": str(phantoms)}
    run_bundle(["train.yaml"], **folders, tracking="mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlruns.db'}")
    (run,) = [run for e in client.search_experiments() for run in client.search_runs(e.experiment_id)]
    assert run.info.status == "FINISHED"
    table = pd.read_csv(tmp_path / "metrics.csv")
    for split in ("train", "validation"):
        logged = client.get_metric_history(run.info.run_id, f"dice/{split}")
        assert [m.step for m in logged] == [1, 2]
        assert [m.value for m in logged] == pytest.approx(table.query("split == @split")["dice"].tolist(), abs=1e-5)
    assert all("/" in name for name in run.data.metrics)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"metrics.csv", "learning_curves.png", "config.yaml", "model.pt", "last.pt"} <= files
    run_bundle(["train.yaml", "resume.yaml"], **folders)  # tracking is no part of what must stay the same
