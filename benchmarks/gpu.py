"""Everything that is measured on a GPU: training, sampling, a whole volume, FLOP, and a training under torchrun.

The first variant, size and mode are the reference. Each variant is measured at each size in the first mode; the other
modes are measured with the first variant and size. A case that fails has the reason in its row.

Example:
    python benchmarks/gpu.py --output_dir runs/gpu
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import flops, inference, training  # noqa: E402
from benchmarks.bundle import command, finish, options, parsed  # noqa: E402
from benchmarks.device import peak_memory, start_memory  # noqa: E402
from benchmarks.network import timed  # noqa: E402
from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.data.writing import write_csv  # noqa: E402
from scripts.networks.variants import VARIANTS  # noqa: E402
from scripts.tools.phantom import make_dataset  # noqa: E402
from scripts.training.run import compile_parts  # noqa: E402

MODES: dict[str, dict] = {  # as settings of the command line
    "bfloat16": {"amp": True},
    "float32": {"amp": False},
    "float16": {"amp": True, "train::amp_dtype": "float16"},
    "bfloat16, compile": {"amp": True, "train::compile": True},
    "bfloat16, channels-last": {"amp": True, "network": "$@network_def.to(@device, memory_format=torch.channels_last)"},
}
REPEATS = 3  # volumes that are sampled, after one that does not count
SAMPLING_BATCHES = (32, 512)  # slices times samples of the whole volume: the default, and what fills a large GPU
Settings = dict[str, object]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the hardware and a table per part, and write them to ``gpu.md`` and ``<part>.csv``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 64, 256], help="pixels")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--steps", type=int, default=20, help="training steps that are timed")
    parser.add_argument("--shape", nargs=3, type=int, default=[240, 240, 155], help="voxels of the volume")
    parser.add_argument("--num_samples", type=int, default=16, help="of the volume")
    args, overrides = parser.parse_known_args(arguments)
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("no GPU is available here; --device cpu runs the same on the processor, slowly")
    set_determinism(0)  # as the bundle does, which chooses deterministic cuDNN
    text = hardware()
    print(text, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folders = {"dataset_dir": f"{folder}/data", "output_dir": f"{folder}/out", "ckpt_dir": f"{folder}/out"}
        settings = parsed(overrides) | folders | {"device": args.device}
        for name in args.parts:
            table = PARTS[name](args, settings)
            write_csv(table, args.output_dir / f"{name}.csv")
            text += f"\n\n## {name}\n\n{markdown(table)}"
            print(f"\n{markdown(table)}", flush=True)
    (args.output_dir / "gpu.md").write_text(text + "\n", encoding="utf-8")


def cases(args: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Variant, size and mode of each case, the reference first."""
    yield from ((variant, size, args.modes[0]) for variant in args.variants for size in args.sizes)
    yield from ((args.variants[0], args.sizes[0], mode) for mode in args.modes[1:])


def each_case(args: argparse.Namespace, settings: Settings, measure: Callable[[ConfigParser], dict]) -> pd.DataFrame:
    """A row per case: what is measured, the memory that it takes on the GPU, or why it failed."""
    rows = []
    for variant, size, mode in cases(args):
        row = {"variant": variant, "size": str(size), "mode": mode}
        start_memory()
        found = attempt(lambda: measure(configured(settings, variant, size, mode)))  # noqa: B023
        torch.compiler.reset()  # forget what was compiled
        rows.append(row | found | {"GPU memory (GiB)": peak_memory()})
    return pd.DataFrame(rows)


def attempt(measure: Callable[[], dict]) -> dict:
    """What is measured; the reason if it fails, because other cases may work."""
    try:
        return measure()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return {"failed": f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:100]}"}


def configured(settings: Settings, variant: str, size: int, mode: str) -> ConfigParser:
    """The configuration of a case."""
    return training.built(["train.yaml"], settings | {"variant": variant, "image_size": size} | MODES[mode])


def network_of(config: ConfigParser) -> torch.nn.Module:
    """The network of a case on its device, compiled if the case says so."""
    network = config.get_parsed_content("network")
    if config.get_parsed_content("train::compile"):
        compile_parts(network)
    return network


def train(args: argparse.Namespace, settings: Settings) -> pd.DataFrame:
    """Images a second of a training step, and with loading and scores, which follow one another; the second epoch."""
    settings = settings | training.phantoms(["train.yaml"], settings, args.steps)

    def measure(config: ConfigParser) -> dict:
        network_of(config)
        training.timed_epoch(config)
        seconds = {part: float(np.median(values)) for part, values in training.timed_epoch(config).items()}
        batch_size = config.get_parsed_content("batch_size")
        whole = seconds["step"] + seconds["data"] + seconds["handlers"]
        speeds = {"images/s": batch_size / seconds["step"], "with data and scores (images/s)": batch_size / whole}
        return {"batch": batch_size} | speeds

    return each_case(args, settings, measure)


def sample(args: argparse.Namespace, settings: Settings) -> pd.DataFrame:
    """Slices a second of volumes with as many slices as ``--shape``, one evaluation and one sample each."""

    def measure(config: ConfigParser) -> dict:
        network, inferer = network_of(config).eval(), config.get_parsed_content("validate::inferer")
        modalities, slices = len(config.get_parsed_content("modalities")), args.shape[2]
        size, amp = config.get_parsed_content("image_size"), config.get_parsed_content("amp")
        dtype = getattr(torch, config.get_parsed_content("train::amp_dtype"))
        volume = torch.randn(1, modalities, size, size, slices, device=args.device)

        def predict() -> None:
            with torch.autocast(volume.device.type, dtype, enabled=amp):
                inferer.predict(volume, network)

        return {"slices/s": slices / float(np.median(timed({"": predict}, REPEATS)[""]))}

    return each_case(args, settings, measure)


def infer_volume(args: argparse.Namespace, settings: Settings) -> pd.DataFrame:
    """Seconds of the bundle's inference on a phantom, part by part, in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(folder, 1, tuple(args.shape))
        (subject,) = (path for path in Path(folder).iterdir() if path.is_dir())
        network = {key: value for key, value in settings.items() if not key.endswith("_dir")}
        network |= {"variant": args.variants[0], "image_size": args.sizes[0], "num_samples": args.num_samples}
        mode = MODES[args.modes[0]]
        precision = mode.get("train::amp_dtype", "bfloat16") if mode["amp"] else "float32"
        for batch in SAMPLING_BATCHES:
            sampling = {"inferer::sampling_batch_size": batch, "amp": mode["amp"]}
            sampling |= {"evaluator::amp_kwargs::dtype": f"$torch.{precision}"}
            row = {"precision": precision, "samples": args.num_samples, "sampling_batch_size": batch}
            found = attempt(lambda: inference.measure(str(subject), [], network, sampling))  # noqa: B023
            found.pop("peak memory (GiB)", None)  # that of the largest process so far
            if "total (s)" in found:
                found["without start (s)"] = sum(found[part] for part in inference.PARTS)
            rows.append(row | found)
    return pd.DataFrame(rows)


def count_flops(args: argparse.Namespace, settings: Settings) -> pd.DataFrame:
    """GFLOP of a slice with five samples, beside that of the official network, which takes five by default."""
    tables = []
    for variant in args.variants:
        config = configured(settings | {"num_samples": 5}, variant, args.sizes[0], "float32")
        found = attempt(lambda: {"table": flops.slices(config, sorted(args.sizes))})  # noqa: B023
        tables.append(found.get("table", pd.DataFrame([found])).assign(variant=variant))
    table = pd.concat(tables)
    return table[["variant", *table.columns.drop("variant")]]


def train_with_torchrun(args: argparse.Namespace, settings: Settings) -> pd.DataFrame:
    """Seconds of an epoch under torchrun with one process, its start included."""
    small = training.phantoms(["train.yaml"], settings, 2) | {"image_size": args.sizes[0], "max_epochs": 1}
    own = settings | small | {"variant": args.variants[0]} | MODES[args.modes[0]]
    words = options({key: value for key, value in own.items() if key != "device"})  # multi_gpu.yaml sets it
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}

    def measure() -> dict:
        start = time.perf_counter()
        finish(command(["train.yaml", "multi_gpu.yaml"], words, processes=1), os.environ | hidden)
        return {"seconds": time.perf_counter() - start}

    row = {"backend": "gloo" if hidden else "nccl", "processes": 1, "mode": args.modes[0]}
    return pd.DataFrame([row | attempt(measure)])


PARTS: dict[str, Callable[[argparse.Namespace, Settings], pd.DataFrame]] = {
    "training": train,
    "sampling": sample,
    "volume": infer_volume,
    "flops": count_flops,
    "torchrun": train_with_torchrun,
}


if __name__ == "__main__":
    main()
