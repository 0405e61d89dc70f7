"""Time, FLOP and memory of a training step, what its parts cost, and how an epoch grows with the number of subjects.

A real trainer runs on phantoms; the variants take turns, so that a busy machine slows all of them alike.

Example:
    python benchmarks/training.py --steps 4
    python benchmarks/training.py --configs train.yaml seed_settings.yaml --steps 1 --variants default
    python benchmarks/training.py --configs train.yaml demo.yaml --subjects 8 32 128
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.engines.utils import IterationEvents
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bundle import parsed  # noqa: E402
from benchmarks.device import peak_memory, synchronize  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.tools.phantom import make_dataset  # noqa: E402

VARIANTS: dict[str, dict] = {
    "default": {},
    "no grading head": {"use_cls_head": False, "loss::tasks": ["segmentation"]},
    "EMA": {"ema": yaml.safe_load((ROOT / "configs" / "ema.yaml").read_text())["ema"]},
    "bfloat16": {"amp": True},
}


def main() -> None:
    """Print one table: of the variants' steps, or with ``--subjects`` of epochs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=["train.yaml"], help="files in configs/")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--subjects", nargs="+", type=int)
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = {"dataset_dir": f"{folder}/data", "output_dir": f"{folder}/out", "ckpt_dir": f"{folder}/out"}
        settings = parsed(overrides) | folders
        print(hardware())
        if args.subjects:
            print(markdown(epochs(args, settings)))
        else:
            print(markdown(variants(args, settings)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gpu = peak_memory()
    print(f"peak memory {peak:.1f} GiB" + (f", {gpu:.1f} GiB of the GPU" if gpu else ""))


def variants(args: argparse.Namespace, settings: dict) -> pd.DataFrame:
    """Median seconds of a step, of the data and of the logging after it, per variant; FLOP of the step."""
    settings |= phantoms(args.configs, settings, args.steps)
    seconds = defaultdict(lambda: defaultdict(list))
    flops = {}
    for _ in range(args.repeats):
        for name in args.variants:
            config = built(args.configs, settings | VARIANTS[name])
            for part, values in timed_epoch(config).items():
                seconds[name][part] += values
            if name not in flops:
                flops[name] = step_flops(config)
            if name == "default":
                seconds[name]["image branch"] += branch(config)
    rows = []
    for name, parts in seconds.items():
        median = {part: float(np.median(values)) for part, values in parts.items()}
        row = {"variant": name, "step (s)": median["step"], "of default": median["step"] + median["handlers"]}
        row |= {"data (%)": median["data"], "handlers (%)": median["handlers"], "table (%)": median["table"]}
        rows.append(row | {"image branch (%)": median.get("image branch", np.nan), "GFLOP": flops[name]})
    table = pd.DataFrame(rows)
    for column in ("data (%)", "handlers (%)", "image branch (%)"):
        table[column] *= 100 / table["step (s)"]
    table["table (%)"] *= 100 / table["step (s)"] / args.steps  # once an epoch
    table["of default"] /= table["of default"][0]
    return table


def phantoms(configs: list[str], settings: dict, steps: int) -> dict[str, int]:
    """Write ten phantoms into ``dataset_dir``: the setting with which an epoch has so many steps of whole batches."""
    make_dataset(settings["dataset_dir"], num_subjects=10)
    batch_size = built(configs, settings).get_parsed_content("batch_size")
    return {"slices_per_volume": -(-steps * batch_size // 7)}  # 7 of 10 subjects train


def epochs(args: argparse.Namespace, settings: dict) -> pd.DataFrame:
    """Seconds of the second epoch, without validation, by number of training subjects."""
    rows = []
    for subjects in args.subjects:
        folder = f"{settings['dataset_dir']}_{subjects}"
        make_dataset(folder, num_subjects=subjects)
        config = built(args.configs, settings | {"dataset_dir": folder})
        config.update({"train::dataset::data": "$@subjects"})
        timed_epoch(config)
        start = time.perf_counter()
        timed_epoch(config)
        seconds = time.perf_counter() - start
        rows.append({"subjects": subjects, "seconds": seconds, "per subject (ms)": 1000 * seconds / subjects})
    return pd.DataFrame(rows)


def built(configs: list[str], settings: dict) -> ConfigParser:
    """The configuration of a training that does not validate."""
    config = ConfigParser()
    config.read_config([str(ROOT / "configs" / name) for name in configs])
    config.update({"max_epochs": 1, "val_interval": 2} | settings)
    return config


def timed_epoch(config: ConfigParser) -> dict[str, list[float]]:
    """Run an epoch: seconds of ``data``, ``step`` and ``handlers`` per iteration, and of the epoch's ``table``."""
    trainer = config.get_parsed_content("train::trainer")
    trainer.state.epoch = trainer.state.iteration = 0
    seconds: dict[str, list[float]] = defaultdict(list)
    last = [time.perf_counter()]

    def lap(engine: Engine, part: str) -> None:
        synchronize()
        now = time.perf_counter()
        seconds[part].append(now - last[0])
        last[0] = now

    with (
        trainer.add_event_handler(Events.GET_BATCH_STARTED, lap, "handlers"),
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lap, "data"),
        trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, lap, "step"),
    ):
        table = config.get_parsed_content("epoch_table")
        write = table._write
        table._write = lambda rows: (lap(trainer, "rest"), write(rows), lap(trainer, "table"))
        trainer.run()
        table._write = write
    seconds["handlers"] = seconds["handlers"][1:]  # the first is the start of the epoch
    return {part: values[1:] if len(values) > 1 and part != "table" else values for part, values in seconds.items()}


def step_flops(config: ConfigParser) -> float:
    """GFLOP of a step, forward and backward; a multiplication and an addition are two."""
    trainer = config.get_parsed_content("train::trainer")
    batch = next(iter(trainer.data_loader))
    trainer.state.batch = batch
    with FlopCounterMode(display=False) as counter:
        trainer._iteration(trainer, batch)
    return counter.get_total_flops() / 1e9


def branch(config: ConfigParser) -> list[float]:
    """Seconds of the image-only branch, forward and backward, on a batch."""
    network, device = config.get_parsed_content("network"), config.get_parsed_content("device")
    image = next(iter(config.get_parsed_content("train::dataloader")))["image"].to(device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(image.device.type, torch.bfloat16, enabled=config.get_parsed_content("amp")):
            network.condition(image)["calib_map"].sum().backward()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


if __name__ == "__main__":
    main()
