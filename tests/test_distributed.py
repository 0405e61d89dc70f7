"""Two gloo processes under torchrun give the same results as one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import pandas as pd
import pytest
import torch

from conftest import ROOT, wait_for
from scripts.config import InputError
from scripts.distributed import gather_from_all, shard
from test_faults import command, folders


def together(configs: list[str], **settings) -> list[str]:
    run = command([*configs, "multi_gpu.yaml"], **settings)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "monai.bundle"]
    return [sys.executable, "-W", "ignore", *launcher, *run[run.index("run") :]]


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory) -> Path:
    """Output folder of a training of two epochs by two processes."""
    folder = tmp_path_factory.mktemp("together")
    run = together(["train.yaml"], dataset_dir=str(phantoms), validation_share=0.34, **folders(folder))
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_one_process_keeps_everything():
    assert shard(["a", "b", "c"]) == gather_from_all(["a", "b", "c"]) == ["a", "b", "c"]


def share_letters(rank: int, folder: Path) -> None:
    """What each of two processes gets and gathers, as a file."""
    gathered = gather_from_all(shard("abcde"))
    found = {"uneven": shard("abcde"), "even": shard("abcde", even=True), "gathered": gathered}
    try:
        shard(["a"])
    except InputError as error:
        found["refused"] = str(error)
    (folder / f"{idist.get_rank()}.json").write_text(json.dumps(found))


def test_shares_of_two_processes(tmp_path):
    idist.spawn("gloo", share_letters, (tmp_path,), nproc_per_node=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ["".join(part["uneven"]) for part in found] == ["ace", "bd"]
    assert ["".join(part["even"]) for part in found] == ["ace", "bda"]
    for part in found:
        assert sorted(part["gathered"]) == [*"abcde"]
        assert "1 subjects cannot be shared by 2 processes" in part["refused"]


def test_two_processes_train_one_network(trained):
    table = pd.read_csv(trained / "metrics.csv")
    assert table["split"].tolist() == ["train", "validation"] * 2  # written by one process only
    last = torch.load(trained / "last.pt", weights_only=True)
    steps = {int(part["step"]) for part in last["optimizer"]["state"].values()}
    assert steps == {2}  # 4 subjects x 2 slices per process in batches of 8: one step per epoch
    assert table["sigma_seg"].nunique() == 2


@pytest.mark.parametrize("configs", [["train.yaml", "evaluate.yaml"], ["inference.yaml"]])
def test_evaluation_and_inference_are_for_one_process(phantoms, run_bundle, tmp_path, configs):
    folders = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path / "out")}
    with pytest.raises(InputError, match=r"multi_gpu.yaml is for training; workers of scheduler share subjects"):
        run_bundle([*configs, "multi_gpu.yaml"], **folders)
    assert not (tmp_path / "out").exists()


def test_validation_scores_of_the_epoch_table_are_gathered(trained, phantoms, run_bundle, tmp_path):
    """The validation row of the table equals an evaluation of the same weights by one process."""
    common = {"dataset_dir": str(phantoms), "ckpt_path": str(trained / "last.pt")}
    split = {"subset": "validation", "validation_share": 0.34}
    run_bundle(["train.yaml", "evaluate.yaml"], **common, **split, output_dir=str(tmp_path))
    subjects = pd.read_csv(tmp_path / "subjects.csv")
    row = pd.read_csv(trained / "metrics.csv").iloc[-1]
    assert row["dice"] == pytest.approx(subjects["dice_WT"].mean(), abs=1e-5)
    assert row["iou"] == pytest.approx(subjects["iou_WT"].mean(), abs=1e-5)
    accuracy = np.mean((subjects["prob_HGG"] > 0.5) == subjects["grade"])
    assert row["accuracy"] == pytest.approx(accuracy, abs=1e-5)


def test_when_one_process_dies_the_other_stops_with_a_message(phantoms, tmp_path):
    run = together(
        ["train.yaml"],
        dataset_dir=str(phantoms),
        max_epochs=1000,
        val_interval=1000,
        validation_share=0,
        **folders(tmp_path),
    )
    log = tmp_path / "log.txt"
    with log.open("w") as stream, subprocess.Popen(run, cwd=ROOT, stdout=stream, stderr=stream) as process:
        wait_for(lambda: (tmp_path / "last.pt").is_file(), process)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, check=True)
        victim = max(map(int, children.stdout.split()))
        start = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        process.wait(timeout=60)
    assert time.monotonic() - start < 60
    assert process.returncode != 0
    text = log.read_text()
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in text
    assert "error: another process of this run died" in text or "Signal 15 (SIGTERM)" in text
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] >= 1
