"""Faults during training: it is killed, the disk is full, files are damaged or processes die."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from ignite.engine import Engine

from conftest import ROOT, assert_same, run_configs, state, tiny_settings, wait_for
from scripts.config import InputError, TrainingError
from scripts.training.checkpoints import SaveCheckpoints

# options whose state a resumed training must restore
STATEFUL = {
    "max_epochs": 4,
    "val_interval": 2,
    "slices_per_volume": 4,
    "batch_size": 4,
    "ema::decay": 0.9,
    "lr_scheduler::T_0": 3,
    "train::early_stopping": 9,
    "train::trainer::accumulation_steps": 2,
}
FILES = ["train.yaml", "ema.yaml", "lr_restarts.yaml", "augment.yaml", "augment_mr.yaml"]


def command(configs: list[str], **settings) -> list[str]:
    files = str([f"configs/{name}" for name in configs])
    options = [text for key, value in (tiny_settings(configs) | settings).items() for text in (f"--{key}", str(value))]
    return [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", files, *options]


def folders(folder: Path) -> dict[str, str]:
    return {"output_dir": str(folder), "ckpt_dir": str(folder)}


def test_killed_training_resumes_to_the_same_weights(phantoms, run_bundle, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"dataset_dir": str(phantoms), **STATEFUL}
    run_bundle(FILES, **settings, **folders(whole))
    run = command([*FILES, "resume.yaml"], **settings, **folders(killed))
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: (killed / "last.pt").is_file(), process)  # in the second epoch or later
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 1 <= state(killed / "last.pt")["epoch"] < 4
    (killed / ".partial_left.pt").write_bytes(b"half")
    run_bundle([*FILES, "resume.yaml"], **settings, **folders(killed))
    for name in ("last.pt", "model.pt"):
        assert_same(state(whole / name), state(killed / name))
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns="seconds") for folder in (whole, killed)]
    pd.testing.assert_frame_equal(*tables)
    assert not list(killed.glob(".partial_*"))


def test_a_complete_training_is_left_as_it_is(phantoms, run_bundle, tmp_path, capsys):
    settings = {"dataset_dir": str(phantoms), "max_epochs": 1, **folders(tmp_path)}
    run_bundle(["train.yaml", "resume.yaml"], **settings)
    assert "training starts from the beginning" in capsys.readouterr().out
    before = (tmp_path / "last.pt").read_bytes()
    run_bundle(["train.yaml", "resume.yaml"], **settings)
    assert "training is complete" in capsys.readouterr().out
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory) -> Path:
    """Folder of two epochs; tests must not write here."""
    folder = tmp_path_factory.mktemp("trained")
    run_configs(["train.yaml"], dataset_dir=str(phantoms), **folders(folder))
    return folder


def test_a_renamed_data_folder_is_the_same_training(trained, phantoms, run_bundle, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "out")
    shutil.copytree(phantoms, tmp_path / "renamed")
    run_bundle(["train.yaml", "resume.yaml"], dataset_dir=str(tmp_path / "renamed"), **folders(tmp_path / "out"))
    assert "training is complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"channels": [16, 16, 16]}, r"was trained with channels=\[8, 8, 8\], now it is \[16, 16, 16\]"),
        ({"alpha": [1.0, 2.0]}, r"was trained with alpha=absent, now it is \[1.0, 2.0\]"),
        ({"amp": True}, "was trained with amp=False, now it is True"),
        ({"val_interval": 2}, "was trained with val_interval=1, now it is 2"),
        ({"augmentations": [{"_target_": "Identityd", "keys": "image"}]}, "was trained with augmentations"),
        ({"image_size": 16}, "was trained with image_size=32"),
        ({"max_epochs": 9}, "was trained with max_epochs=2, now it is 9"),
        ({"learning_rate": 1e-2}, "was trained with learning_rate=0.0005"),
        ({"fold": 1}, "was trained with fold=0, now it is 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resume_with_another_network_plan_or_data_is_refused(
    override, message, trained, phantoms, run_bundle, tmp_path
):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    settings = {"dataset_dir": str(phantoms), **folders(tmp_path)}
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}
    with pytest.raises(InputError, match=message):
        run_bundle(["train.yaml", "resume.yaml"], **settings | override)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.*")} == before


def test_a_damaged_checkpoint_is_named(phantoms, run_bundle, tmp_path):
    file = tmp_path / "last.pt"
    file.write_bytes(b"PK\x03\x04 half of a file")
    with pytest.raises(InputError, match=rf"{file}' cannot be read as a checkpoint"):
        run_bundle(["train.yaml", "resume.yaml"], dataset_dir=str(phantoms), **folders(tmp_path))


def save_twice(folder: Path, fault: str) -> None:
    """Save two epochs in this process; the second save is interrupted."""
    evaluator, trainer = (Engine(lambda engine, batch: None) for _ in range(2))
    evaluator.state.best_metric, evaluator.state.best_metric_epoch, trainer.scaler = 0.5, 0, None
    saver = SaveCheckpoints(str(folder), {"model": torch.nn.Linear(300, 300)}, ["model"], evaluator, {}, {})
    saver.attach(trainer)
    trainer.run([0], max_epochs=1)
    save = torch.save

    def killed(content, path):
        save(content, path)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    if fault == "killed":
        torch.save = killed
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        trainer.run([0], max_epochs=2)
    except TrainingError as error:
        (folder / "message.txt").write_text(str(error))
        raise SystemExit(1) from error


@pytest.mark.parametrize(("fault", "exitcode"), [("killed", -signal.SIGKILL), ("full", 1)])
def test_the_old_checkpoint_outlives_a_failed_save(fault, exitcode, tmp_path):
    """A SIGKILL half way through the file, and a file that cannot grow any further, as on a full disk."""
    process = multiprocessing.get_context("fork").Process(target=save_twice, args=(tmp_path, fault))
    process.start()
    process.join(60)
    assert process.exitcode == exitcode
    assert state(tmp_path / "last.pt")["epoch"] == 1
    if fault == "full":
        message = (tmp_path / "message.txt").read_text()
        assert message.startswith(f"cannot write {tmp_path / 'last.pt'}")
        assert "Free some space" in message
        assert sorted(file.name for file in tmp_path.iterdir()) == ["last.pt", "message.txt"]


def test_a_killed_loader_process_is_explained(phantoms, tmp_path):
    overlay = tmp_path / "kill.yaml"
    kill = {"_target_": "Lambdad", "keys": "image", "func": "$lambda image: __import__('os')._exit(1)"}
    overlay.write_text(yaml.safe_dump({"augmentations": [kill]}))
    settings = {"dataset_dir": str(phantoms), "num_workers": 1, **folders(tmp_path / "out")}
    run = command(["train.yaml"], **settings)
    run[run.index("--config_file") + 1] = str(["configs/train.yaml", str(overlay)])
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: a data-loading process was killed")


@pytest.fixture
def alone():
    """Restore the environment: the variables of torchrun must not remain for the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_processes_and_configuration_must_agree(phantoms, run_bundle, tmp_path, alone):
    with pytest.raises(InputError, match=r"configs/multi_gpu.yaml needs processes that torchrun starts"):
        run_bundle(["train.yaml", "multi_gpu.yaml"], dataset_dir=str(phantoms), **folders(tmp_path))
    os.environ |= {"WORLD_SIZE": "2", "RANK": "0"}
    with pytest.raises(InputError, match="2 processes, but each of them would do all of the work"):
        run_bundle(["train.yaml"], dataset_dir=str(phantoms), **folders(tmp_path))
