"""Inference of many subjects: start-up and memory by their number, second start, and two workers against one.

Example: python benchmarks/scale.py --counts 10 1000 10000 --shared 64
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.tools.phantom import make_dataset  # noqa: E402

MODALITIES = ("t1", "t1ce", "t2", "flair")
SHAPE = (32, 32, 8)  # of the made-up subjects whose number is measured


def main() -> None:
    """Print one table for the start, and one for two workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 1000, 10000], help="numbers of subjects")
    parser.add_argument("--shared", type=int, default=64, help="phantoms that two workers share; 0: none")
    parser.add_argument("--ckpt_path", default=str(ROOT / "models" / "model.pt"))
    args = parser.parse_args()
    print(hardware())
    with tempfile.TemporaryDirectory() as name:
        print(markdown(pd.DataFrame([start(Path(name) / str(n), n, args.ckpt_path) for n in args.counts])), flush=True)
        if args.shared:
            print("\n" + markdown(share(Path(name) / "shared", args.shared, args.ckpt_path)))


def command(data: Path, out: Path, ckpt_path: str, *options: str) -> list[str]:
    """The command of an inference."""
    words = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.yaml"]
    return [*words, "--dataset_dir", str(data), "--output_dir", str(out), "--ckpt_path", ckpt_path, *options]


def start(folder: Path, count: int, ckpt_path: str) -> dict[str, float]:
    """Seconds and memory until the first of many subjects is finished; seconds of a start when all are finished."""
    data, out = folder / "data", folder / "out"
    make_dataset(folder / "one", 1, SHAPE)
    (one,) = [path for path in (folder / "one").iterdir() if path.is_dir()]
    for number in range(count):
        (data / f"s{number:06}").mkdir(parents=True)
        for modality in MODALITIES:
            os.link(one / f"{one.name}_{modality}.nii.gz", data / f"s{number:06}" / f"s{number:06}_{modality}.nii.gz")
    first = out / "manifest" / "s000000.json"
    began = time.perf_counter()
    with subprocess.Popen(
        command(data, out, ckpt_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        while not first.is_file():
            assert run.poll() is None, "the inference failed"
            time.sleep(0.01)
        seconds, memory = time.perf_counter() - began, psutil.Process(run.pid).memory_info().rss / 2**20
        run.kill()
    finish(out, count)
    subprocess.run(command(data, out, ckpt_path), cwd=ROOT, check=True, capture_output=True)  # writes the tables
    before = states(out)
    began = time.perf_counter()
    subprocess.run(command(data, out, ckpt_path), cwd=ROOT, check=True, capture_output=True)
    again = time.perf_counter() - began
    changed = len(before.items() ^ states(out).items())
    return {"subjects": count, "first (s)": seconds, "memory (MB)": memory, "finished (s)": again, "written": changed}


def finish(out: Path, count: int) -> None:
    """Give all subjects the record of the first one, as if they had been computed."""
    text = (out / "manifest" / "s000000.json").read_text()
    data = json.loads(text)["images"]
    for number in range(1, count):
        record = json.loads(text.replace("s000000", f"s{number:06}"))
        assert len(record["images"]) == len(data)
        if number >= 200:  # these have no pictures in the report
            record["rows"][1] = []
        (out / "manifest" / f"s{number:06}.json").write_text(json.dumps(record))


def states(folder: Path) -> dict[str, int]:
    """Time of the last change of every file."""
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def share(folder: Path, count: int, ckpt_path: str) -> pd.DataFrame:
    """Seconds of an inference by one and by two workers, and whether all files are the same."""
    make_dataset(folder / "data", count, (64, 64, 32))
    rows, found = [], []
    for number in (1, 2):
        out = folder / str(number)
        with cluster(folder, number) as scheduler:
            # the workers have read libraries, weights and settings
            for warm in range(2):
                began = time.perf_counter()
                subprocess.run(
                    command(folder / "data", out / str(warm), ckpt_path, "--scheduler", scheduler),
                    cwd=ROOT, check=True, capture_output=True,
                )  # fmt: skip
                seconds = time.perf_counter() - began
        found.append(
            {file.name: file.read_bytes() for file in (out / "1").iterdir() if file.suffix in (".gz", ".csv", ".png")}
        )
        rows.append({"workers": number, "subjects": count, "seconds": seconds})
    table = pd.DataFrame(rows)
    return table.assign(**{"times faster": table["seconds"][0] / table["seconds"], "same files": found[0] == found[1]})


@contextlib.contextmanager
def cluster(folder: Path, number: int) -> Iterator[str]:
    """A scheduler with workers on this machine: its address."""
    file = folder / f"scheduler{number}.json"
    dask, local = str(Path(sys.executable).with_name("dask")), ["--host", "127.0.0.1"]
    programs: Sequence[list[str]] = [
        [dask, "scheduler", *local, "--port", "0", "--no-dashboard", "--scheduler-file", str(file)],
        [dask, "worker", *local, "--nthreads", "1", "--nworkers", str(number), "--scheduler-file", str(file)],
    ]
    with contextlib.ExitStack() as stack:
        for words in programs:
            process = stack.enter_context(
                subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            stack.callback(process.terminate)
            while not file.is_file() or not file.read_text():
                time.sleep(0.1)
        yield json.loads(file.read_text())["address"]


if __name__ == "__main__":
    main()
