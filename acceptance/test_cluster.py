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

SLOW = {"num_samples": 4, "num_inference_steps": 10}  # so that there is time to kill something


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
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def cluster(folder: Path, stop: bool = False) -> Iterator[tuple[str, subprocess.Popen]]:
    """A scheduler and two workers: its address, and one of them. With ``stop``, the scheduler is killed first."""
    file = folder / "scheduler.json"
    with program(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file), log=folder / "s"
    ) as first_of_all:
        wait_for(file.is_file)
        worker = ("worker", "--scheduler-file", str(file), "--nthreads", "1", "--host", "127.0.0.1")
        with program(*worker, log=folder / "w1") as first, program(*worker, log=folder / "w2"):
            yield wait_for(lambda: json.loads(file.read_text() or "{}").get("address")), first
            if stop:
                first_of_all.kill()


def grid(data: Path, out: Path, **keys: object) -> subprocess.Popen:
    """The command of docs/ablation.md with tiny networks: two arms, one seed."""
    sizes = {f"ablation::settings::{key}": value for key, value in TINY.items()}
    given = {"dataset_dir": data, "output_dir": out, "configs": ["train.yaml"], "arms": ARMS, "seeds": [0]}
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


def bundle(configs: list[str], **keys: object) -> subprocess.Popen:
    """A command of the main bundle."""
    files = str([f"configs/{name}" for name in configs])
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", files]
    options = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}  # as Dask's workers have: more round otherwise
    return subprocess.Popen(
        [*command, *options], cwd=ROOT, env=threads, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(configs: list[str], **keys: object) -> str:
    """What a command of the main bundle that succeeds prints."""
    process = bundle(configs, **keys)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed[-3000:]
    return printed


def results(folder: Path) -> dict[str, bytes]:
    """Contents of the files of a run by name, without those that say when or with which command it ran."""
    others = {"report.html", "evaluate.yaml"}
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in others and "manifest" not in file.parts
    }


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory) -> Path:
    """Folder of tiny weights."""
    out = tmp_path_factory.mktemp("trained")
    run(["train.yaml"], dataset_dir=phantoms, output_dir=out, ckpt_dir=out, max_epochs=1, val_interval=2, **TINY)
    return out


@pytest.fixture(scope="module")
def inferred(phantoms, trained, tmp_path_factory) -> Path:
    """Folder of an inference in one process."""
    out = tmp_path_factory.mktemp("inferred")
    run(["inference.yaml"], dataset_dir=phantoms, ckpt_dir=trained, **SLOW, output_dir=out)
    return out


def test_inference_and_evaluation_on_workers_are_those_of_one_process(phantoms, trained, inferred, tmp_path):
    """A worker is stopped for some seconds and then killed while it infers; the other does the rest."""
    common = {"dataset_dir": phantoms, "ckpt_dir": trained}
    judged, sizes = ["train.yaml", "evaluate.yaml"], TINY | {"subset": "all"}
    run(judged, **common, **sizes, output_dir=tmp_path / "evaluated")
    with cluster(tmp_path) as (scheduler, first):
        there = {"scheduler": scheduler, **common}
        process = bundle(["inference.yaml"], **there, **SLOW, output_dir=tmp_path / "there" / "infer")
        wait_for(lambda: list((tmp_path / "there").glob("infer/manifest/*.json")))
        workers_ = [*psutil.Process(first.pid).children(recursive=True), first]
        signals = (signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL)
        for number, seconds in zip(signals, (2, 0.5, 0), strict=True):
            for worker in workers_:
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                    worker.send_signal(number)
            time.sleep(seconds)
        assert len(list((tmp_path / "there").glob("infer/manifest/*.json"))) < 10
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed[-3000:]
        run(judged, **there, **sizes, output_dir=tmp_path / "there" / "evaluate")
    for name, here in (("infer", inferred), ("evaluate", tmp_path / "evaluated")):
        ours, theirs = results(here), results(tmp_path / "there" / name)
        assert {"infer": "grades.csv", "evaluate": "summary.json"}[name] in ours
        assert [file for file in ours.keys() | theirs.keys() if ours.get(file) != theirs.get(file)] == []


def test_workers_read_from_and_write_to_an_object_store(phantoms, trained, inferred, tmp_path):
    """The workers share no disk, and one of them is killed; the files equal those of one process."""
    s3_server = pytest.importorskip("s3_server", reason="moto, a server that speaks S3, needs Python 3.11")
    with s3_server.bucket() as client:
        s3_server.upload(client, phantoms, "brains")
        with cluster(tmp_path) as (scheduler, first):
            places = {"dataset_dir": "s3://bucket/brains", "output_dir": "s3://bucket/out"}
            process = bundle(["inference.yaml"], **places, **SLOW, ckpt_dir=trained, scheduler=scheduler)
            wait_for(lambda: [key for key in s3_server.objects(client) if key.startswith("out/manifest")])
            for worker in [*psutil.Process(first.pid).children(recursive=True), first]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
            printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed[-3000:]
        keys = [key for key in s3_server.objects(client) if key.startswith("out/") and "manifest" not in key]
        theirs = {key.removeprefix("out/"): s3_server.content(client, key) for key in keys}
    theirs.pop("report.html")
    assert theirs == results(inferred)


def test_a_lost_scheduler_is_named_and_the_next_start_continues(phantoms, trained, tmp_path):
    common = {"dataset_dir": phantoms, "ckpt_dir": trained, "output_dir": tmp_path / "out"} | SLOW
    with cluster(tmp_path, stop=True) as (scheduler, _):
        process = bundle(["inference.yaml"], scheduler=scheduler, **common)
        wait_for(lambda: list((tmp_path / "out").glob("manifest/*.json")))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: the scheduler was lost; start it and the run again" in printed[-3000:]
    finished = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "manifest").glob("*.json")}
    assert 0 < len(finished) < 10
    assert f"{len(finished)} of 10 subjects are finished already" in run(["inference.yaml"], **common)
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "manifest").glob("*.json")}
    assert len(after) == 10
    assert finished.items() <= after.items()


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


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", 5])
def test_a_scheduler_that_does_not_answer_is_named(address):
    with pytest.raises(InputError, match=f"scheduler '{address}' does not answer"), workers(address):
        raise AssertionError("it runs")
