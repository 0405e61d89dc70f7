"""Precision, memory layout, NCCL and memory on a GPU, and the benchmark of all that, which also runs on a processor."""

from __future__ import annotations

import subprocess
from pathlib import Path

import ignite.distributed as idist
import pandas as pd
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks import gpu
from benchmarks.bundle import command, options
from benchmarks.device import peak_memory, start_memory
from conftest import ROOT, TINY_TRAINING, state
from scripts.config import InputError, explain
from scripts.distributed import average_over_processes, gather_from_all
from scripts.net import MedSegDiff
from scripts.sampling.inferer import VolumeInferer
from scripts.training.losses import MultiTaskLoss
from scripts.training.steps import DenoisingInferer, DrawNoise
from test_steps import batch, learner

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA, and there is none")
TINY = ["--channels", "[8,8,8]", "--calib_channels", "[8,8,8]", "--batch_size", "4", "--steps", "1"]
TINY += ["--device", "cpu", "--sizes", "32", "--shape", "32", "32", "4", "--num_samples", "2"]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing curves is half of the time of a tiny training."""
    monkeypatch.setattr("scripts.report.epoch_table.plot_learning_curves", lambda *args: None)


# ---- the same training in every mode
def losses(run_bundle, phantoms, folder: Path, **settings) -> list[float]:
    """L_total of each epoch of a tiny training."""
    folders = {"dataset_dir": str(phantoms), "output_dir": str(folder), "ckpt_dir": str(folder)}
    run_bundle(["train.yaml"], val_interval=3, **settings, **folders)
    return pd.read_csv(folder / "metrics.csv")["L_total"].tolist()


@pytest.mark.parametrize(
    ("device", "mode"),
    [("cpu", "float16"), ("cpu", "bfloat16, channels-last")]  # compiling takes minutes there
    + [pytest.param("cuda", mode, marks=needs_gpu) for mode in gpu.MODES if mode != "float32"],
)
def test_every_mode_trains_as_float32(device, mode, phantoms, run_bundle, tmp_path):
    run = {name: dict(gpu.MODES[name]) for name in ("float32", mode)}
    exact, found = (losses(run_bundle, phantoms, tmp_path / name, device=device, **keys) for name, keys in run.items())
    assert len(found) == TINY_TRAINING["max_epochs"]
    assert found == pytest.approx(exact, rel=0.02)
    if device == "cuda" and mode == "float16":
        assert state(tmp_path / mode / "last.pt")["scaler"]["scale"] > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_channels_last_gives_the_same_masks(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    network, volume = learner().to(device).eval(), torch.randn(1, 4, 16, 16, 3, device=device)
    plain = VolumeInferer().predict(volume, network)["prob"]
    last = network.to(memory_format=torch.channels_last)
    assert last.denoiser.conv_in.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(VolumeInferer().predict(volume, last)["prob"], plain, atol=1e-4)


# ---- one process with NCCL, or gloo
def gradients(network: MedSegDiff, wrapped: torch.nn.Module, device: torch.device) -> list[torch.Tensor]:
    """Gradients of a training step of the wrapped network."""
    torch.manual_seed(0)
    image, targets, _, kwargs = DrawNoise(1000)(batch(4), device)
    network.zero_grad()
    loss = MultiTaskLoss(network.diffusion).to(device)
    loss(DenoisingInferer()(image, wrapped, **kwargs), targets).backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


def one_of_one(rank: int) -> None:
    """A step under DistributedDataParallel is that of the network alone, and a sum over one process changes nothing."""
    device = idist.device()
    network = learner().to(device)
    alone = gradients(network, network, device)
    wrapped = DistributedDataParallel(network, [device.index] if device.type == "cuda" else None)
    together = gradients(network, wrapped, device)
    assert len(alone) == len(together) > 0
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert average_over_processes(torch.tensor([2.0], device=device)).item() == 2
    assert gather_from_all(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=needs_gpu)])
def test_one_process_of_a_group(backend):
    if backend == "gloo" and torch.cuda.is_available():
        pytest.skip("ignite would give gloo the GPU")
    idist.spawn(backend, one_of_one, (), nproc_per_node=1)


@needs_gpu
def test_torchrun_with_nccl(phantoms, tmp_path):
    folders = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}
    run = command(["train.yaml", "multi_gpu.yaml"], options(TINY_TRAINING | folders), processes=1)
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 2 * TINY_TRAINING["max_epochs"]


# ---- out of memory
def no_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15 GiB")


def test_out_of_memory_in_training(phantoms, run_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(MedSegDiff, "forward", no_memory)
    with pytest.raises(RuntimeError) as caught:
        losses(run_bundle, phantoms, tmp_path)
    assert "lower batch_size and raise train::trainer::accumulation_steps" in explain(caught.value)


@pytest.mark.parametrize(
    ("configs", "address"),
    [
        (["train.yaml", "evaluate.yaml"], "validate::inferer::sampling_batch_size"),
        (["inference.yaml"], "in inference, inferer::sampling_batch_size"),
    ],
)
def test_out_of_memory_in_sampling(configs, address, three_regions, phantoms, run_bundle, tmp_path, monkeypatch):
    regions = {"regions": ["TC", "WT", "ET"]} if configs[0] == "train.yaml" else {}
    folders = {"dataset_dir": str(phantoms), "ckpt_dir": str(three_regions), "output_dir": str(tmp_path)}
    monkeypatch.setattr(VolumeInferer, "sample_with", no_memory)
    with pytest.raises(InputError, match=r"subject 'BraTS20_Training_\d+': the GPU is out of memory") as caught:
        run_bundle(configs, **regions, **folders)
    assert address in str(caught.value)


def peak_of(call) -> float:
    start_memory()
    call()
    return peak_memory()


@needs_gpu
def test_the_advice_for_training_works(phantoms, run_bundle, tmp_path):
    def train(batch_size: int, accumulation_steps: int) -> None:
        settings = {"device": "cuda", "amp": False, "image_size": 128, "slices_per_volume": 8, "max_epochs": 1}
        settings |= {"batch_size": batch_size, "train::trainer::accumulation_steps": accumulation_steps}
        losses(run_bundle, phantoms, tmp_path / str(batch_size), **settings)

    check_advice(lambda: train(56, 1), lambda: train(7, 8), "lower batch_size")


@needs_gpu
def test_the_advice_for_sampling_works():
    network, volume = learner().cuda().eval(), torch.randn(1, 4, 128, 128, 128, device="cuda")
    large, small = (lambda size=size: VolumeInferer(1, 1, size).predict(volume, network) for size in (128, 4))
    check_advice(large, small, "sampling_batch_size")


def check_advice(large, small, advice: str) -> None:
    """Where the memory lies half-way between both, the first fails with the advice, and the second runs."""
    limit = (peak_of(large) + peak_of(small)) / 2
    try:
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / torch.cuda.get_device_properties().total_memory)
        start_memory()
        with pytest.raises(RuntimeError) as caught:
            large()
        assert advice in explain(caught.value)
        caught = None  # its frames hold tensors
        start_memory()
        small()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---- the benchmark
def test_the_first_of_each_list_is_the_reference():
    args = type("Args", (), {"variants": ["S", "B"], "sizes": [128, 64], "modes": ["float32", "float16"]})
    grid = [("S", 128), ("S", 64), ("B", 128), ("B", 64)]
    assert list(gpu.cases(args)) == [(*case, "float32") for case in grid] + [("S", 128, "float16")]


def test_a_case_that_fails_has_its_reason_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def no_compiler(network):
        raise RuntimeError("wrapped") from OSError("no C++ compiler\nsecond line")

    monkeypatch.setattr(gpu, "compile_parts", no_compiler)
    modes = ["float32", "bfloat16, compile", "bfloat16, channels-last"]
    gpu.main(["--output_dir", str(tmp_path), "--parts", "training", "sampling", "flops", "--modes", *modes,
              "--variants", "S", *TINY])  # fmt: skip
    for part, figure in (("training", "images/s"), ("sampling", "slices/s")):
        table = pd.read_csv(tmp_path / f"{part}.csv")
        assert table["mode"].tolist() == modes
        assert table[figure].notna().tolist() == [True, False, True]
        assert table["failed"].tolist()[1] == "OSError: no C++ compiler"
        assert table["GPU memory (GiB)"].isna().all()
    assert pd.read_csv(tmp_path / "flops.csv")["variant"].tolist() == ["S"]
    report = (tmp_path / "gpu.md").read_text()
    assert report.startswith("hardware: ")
    assert all(line in report for line in capsys.readouterr().out.splitlines())


def test_the_benchmark_needs_a_gpu_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU is available here"):
        gpu.main(["--output_dir", str(tmp_path)])
