"""Workers on this machine: results, failures, and workers that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scripts.cluster import end_with_parent, run_all, workers
from scripts.config import InputError


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
    kinds = ["good", "first dies", "fails", "other"]
    with workers(None, 2) as client:
        errors = run_all(client, job, [(tmp_path, kind) for kind in kinds])
    assert [str(error) for error in errors] == ["None", "None", "of this job", "None"]
    assert all((tmp_path / f"{kind}.done").is_file() for kind in ("good", "first dies", "other"))
    assert (tmp_path / "first dies.attempts").read_text().count("attempt") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_what_a_killed_worker_started_ends_with_it(tmp_path):
    with workers(None, 1) as client:
        assert run_all(client, job, [(tmp_path, "first dies")]) == [None]
    child, end = int((tmp_path / "first dies.child").read_text()), time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_job_that_kills_every_worker_fails_alone(tmp_path):
    with workers(None, 2) as client:
        errors = run_all(client, job, [(tmp_path, "dies"), (tmp_path, "good")])
    assert errors[1] is None
    assert "Attempted to run task" in str(errors[0])
    assert (tmp_path / "dies.attempts").read_text().count("attempt") == 4


@pytest.mark.parametrize(
    ("scheduler", "processes", "message"),
    [
        (None, 0, "processes=0 must be a whole number, 1 or more"),
        (None, "2", "processes='2' must be"),
        ("tcp://127.0.0.1:1", 1, "scheduler 'tcp://127.0.0.1:1' does not answer"),
        ("nowhere", 1, "scheduler 'nowhere' does not answer"),
    ],
)
def test_what_cannot_run_is_refused(scheduler, processes, message):
    with pytest.raises(InputError, match=message), workers(scheduler, processes):
        raise AssertionError("it runs")
