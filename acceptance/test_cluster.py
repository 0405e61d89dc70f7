"""Jobs and grids on Dask's workers, some of which are killed. Run by `make conformance`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conftest import ROOT, make_phantoms
from scripts.cluster import end_with_parent, run_all, workers
from scripts.config import InputError

ARMS = "{'plain': {}, 'anchor': {'conditioning': ['highway','anchor']}}"
TINY = {"image_size": 32, "channels": [8, 8, 8], "calib_channels": [8, 8, 8], "slices_per_volume": 2, "batch_size": 8}


@contextlib.contextmanager
def program(*words: str, log: Path) -> Iterator[subprocess.Popen]:
    """A program of Dask that runs until the end of the block."""
    with log.open("w") as stream:
        command = [str(Path(sys.executable).with_name("dask")), *words]
        paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "acceptance", "tests"))
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=stream, env=os.environ | {"PYTHONPATH": paths}
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """A scheduler and two workers: its address, and one of them."""
    file = folder / "scheduler.json"
    with program("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file), log=folder / "s"):
        wait_for(file.is_file)
        worker = ("worker", "--scheduler-file", str(file), "--nthreads", "1", "--host", "127.0.0.1")
        with program(*worker, log=folder / "w1") as first, program(*worker, log=folder / "w2"):
            yield wait_for(lambda: json.loads(file.read_text() or "{}").get("address")), first


def grid(data: Path, out: Path, **keys: object) -> subprocess.Popen:
    """The command of docs/ablation.md with tiny networks: two arms, two seeds."""
    sizes = {f"ablation::settings::{key}": value for key, value in TINY.items()}
    given = {"dataset_dir": data, "output_dir": out, "configs": ["train.yaml"], "arms": ARMS, "seeds": [0, 1]}
    given |= {"max_epochs": 3, "processes": 2} | sizes | keys
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/ablation.yaml"]
    options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("phantoms"), 10, 32, 32, 8)


def test_a_grid_on_other_workers_has_the_table_of_this_machine(phantoms, tmp_path):
    """One of the two workers is killed while it trains."""
    here = grid(phantoms, tmp_path / "here")
    printed, _ = here.communicate(timeout=600)
    assert here.returncode == 0, printed[-3000:]
    with cluster(tmp_path) as (scheduler, first):
        there = grid(phantoms, tmp_path / "there", scheduler=scheduler)
        wait_for(lambda: list((tmp_path / "there").glob("*/last.pt")))  # an epoch is over
        for process in [*psutil.Process(first.pid).children(recursive=True), first]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        printed, _ = there.communicate(timeout=600)
    assert there.returncode == 0, printed[-3000:]
    for name in ("table.csv", "runs.csv", "parts.csv"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def job(folder: Path, kind: str) -> None:
    """Write a file. A job of the kind ``first dies`` kills its worker at the first attempt, ``dies`` always."""
    with (folder / f"{kind}.attempts").open("a") as stream:
        stream.write("attempt\n")
    attempts = len((folder / f"{kind}.attempts").read_text().splitlines())
    if kind == "fails":
        raise ValueError("of this job")
    if kind == "dies" or (kind == "first dies" and attempts == 1):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=end_with_parent)
        (folder / f"{kind}.child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"{kind}.done").write_text(str(os.getpid()))


def test_jobs_of_killed_workers_are_taken_up(tmp_path):
    """What a killed worker started ends with it. A job that kills every worker fails alone."""
    kinds = ["good", "first dies", "fails", "other"]
    with cluster(tmp_path) as (scheduler, _), workers(scheduler, 2) as client:
        errors = run_all(client, job, [(tmp_path, kind) for kind in kinds])
        killed = run_all(client, job, [(tmp_path, "dies")])
    assert [str(error) for error in errors] == ["None", "None", "of this job", "None"]
    assert "Attempted to run task" in str(killed[0])
    assert {file.stem for file in tmp_path.glob("*.done")} == {"good", "first dies", "other"}
    attempts = {kind: (tmp_path / f"{kind}.attempts").read_text().count("attempt") for kind in ("first dies", "dies")}
    assert attempts == {"first dies": 2, "dies": 4}
    for file in tmp_path.glob("*.child") if sys.platform == "linux" else ():
        child = int(file.read_text())
        wait_for(lambda pid=child: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_failures_on_this_machine_are_returned(tmp_path):
    with workers(None, 2) as client:
        errors = run_all(client, job, [(tmp_path, kind) for kind in ("good", "fails")])
    assert [str(error) for error in errors] == ["None", "of this job"]


def test_a_scheduler_that_does_not_answer_is_named():
    with (
        pytest.raises(InputError, match="scheduler 'tcp://127.0.0.1:1' does not answer"),
        workers("tcp://127.0.0.1:1", 1),
    ):
        raise AssertionError("it runs")
