"""An export gives the same logits, volumes and masks as the network."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import onnx
import pandas as pd
import pytest
import torch

from conftest import MODALITIES, TINY_TRAINING, run_configs, settings_of
from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.net import MedSegDiff
from scripts.networks.conditioning import MODULES
from scripts.sampling.inferer import VolumeInferer
from scripts.tools.onnx_network import CONDITION, DENOISER, OnnxNetwork, export_onnx
from test_net import TINY, randomise

SETTINGS = {"modalities": MODALITIES, "image_size": 16}
SETTINGS |= {"num_train_timesteps": 100, "schedule": "cosine", "prediction_type": "sample"}


def make(prediction_type="sample", **settings):
    return randomise(MedSegDiff(GaussianDiffusion(100, "cosine", prediction_type), **settings))


NETWORKS = {
    "all at once": lambda: make(
        prediction_type="v_prediction",
        use_cls_head=False,
        out_channels=2,
        conditioning=["highway", "self_conditioning", "dynamic_encoding", "anchor"],
        **TINY,
    ),
    "half resolution": lambda: make(conditioning=["highway", "anchor"], denoiser_stride=2, **TINY),
    "concatenation": lambda: make(channels=[8, 8, 8], conditioning=[]),
    "stochastic": lambda: make(conditioning=["highway", "stochastic"], **TINY),
}


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request, tmp_path_factory):
    """A network and its export, read again."""
    network = NETWORKS[request.param]()
    for name, buffer in network.named_buffers():
        if "calibration" in name:
            buffer.fill_(2.5)
    folder = tmp_path_factory.mktemp("onnx")
    settings = SETTINGS | {"prediction_type": network.diffusion.prediction_type}
    (folder / CONDITION).write_bytes(b"of an older export")
    export_onnx(network, str(folder), settings)
    assert (folder / CONDITION).exists() == network.has_calib_map
    assert not list(folder.glob(".partial_*"))
    return network, OnnxNetwork(str(folder))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (5, 4, 24, 40)])
def test_same_logits_at_any_batch_and_size(pair, shape):
    network = pair[0]
    image, x_t = torch.randn(shape), torch.randn(shape[0], network.out_channels, *shape[2:])
    timesteps, estimate = torch.randint(100, shape[:1]), torch.rand_like(x_t)
    conditions = [one.condition(image) for one in pair]
    assert conditions[0].keys() == conditions[1].keys()
    for name, part in conditions[0].items():
        assert torch.allclose(conditions[1][name], part, atol=1e-4)
    for guess in (None, estimate):
        ours, theirs = (one(image, x_t, timesteps, c, guess) for one, c in zip(pair, conditions, strict=True))
        for expected, found in zip(ours, theirs, strict=True):
            assert (expected is None) == (found is None)
            assert expected is None or torch.allclose(found, expected, atol=1e-4)


def test_same_volumes(pair):
    inferer = VolumeInferer(num_inference_steps=3, num_samples=2, sampling_batch_size=5, eta=0.5)
    inferer.check(pair[1], 16)
    volume = torch.randn(1, 4, 16, 16, 4)
    ours, theirs = (inferer.predict(volume, one) for one in pair)
    assert ours.keys() == theirs.keys()
    for name, expected in ours.items():
        assert torch.allclose(theirs[name], expected, atol=1e-4, equal_nan=True), name


def test_start_from_the_calibration_map(pair):
    network, exported = pair
    volume = torch.randn(1, 4, 16, 16, 2)
    for inferer in (VolumeInferer(0), VolumeInferer(start_timestep=50)):
        if network.has_calib_map:
            ours, theirs = (inferer.predict(volume, one)["prob"] for one in pair)
            assert torch.allclose(theirs, ours, atol=1e-4)
        else:
            with pytest.raises(InputError, match="need a calibration map"):
                inferer.check(exported, 16)


def test_a_size_that_does_not_fit(pair):
    with pytest.raises(InputError, match="divisible by"):
        pair[1].condition(torch.zeros(1, 4, 17, 17))


@pytest.mark.parametrize("module", ["ff_parser", "ss_former"])
def test_what_does_not_export_is_refused(module, tmp_path):
    assert module in MODULES
    network = make(conditioning=["highway", module], **TINY)
    with pytest.raises(InputError, match="cannot be exported to ONNX"):
        export_onnx(network, str(tmp_path / "onnx"), SETTINGS)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"need {package}: pip install -e '.\[onnx\]'"):
        export_onnx(make(**TINY), str(tmp_path), SETTINGS)


TRAINED_FOR = settings_of("train.yaml", **TINY_TRAINING)


def tiny_network():
    """The network of the tiny configuration with initial weights."""
    keys = ("channels", "calib_channels", "denoiser_stride")
    return MedSegDiff(GaussianDiffusion(), **{key: TRAINED_FOR[key] for key in keys}).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with a checkpoint of a network with random weights, and its export."""
    folder = tmp_path_factory.mktemp("trained")
    network = randomise(tiny_network())
    lineage = {"training": {}, "validation": {}}
    torch.save({"model": network.state_dict(), "settings": TRAINED_FOR, "lineage": lineage}, folder / "model.pt")
    run_configs(["inference.yaml", "export_onnx.yaml"], ckpt_dir=str(folder))
    return folder


ONNX = ["inference.yaml", "inference_onnx.yaml"]


def test_a_subject_through_onnxruntime_has_the_same_mask(trained, phantoms, run_bundle, tmp_path, monkeypatch):
    common = {"dataset_dir": str(phantoms / "BraTS20_Training_001"), "ckpt_dir": str(trained), "num_samples": 2}
    run_bundle(["inference.yaml"], output_dir=str(tmp_path / "torch"), **common)
    monkeypatch.setattr(MedSegDiff, "forward", None)  # must not be called
    run_bundle(ONNX, output_dir=str(tmp_path / "onnx"), **common)
    ours, theirs = (
        nib.load(tmp_path / name / "BraTS20_Training_001_seg.nii.gz").get_fdata() for name in ("torch", "onnx")
    )
    assert np.array_equal(ours, theirs)
    assert 0 < (ours > 0).mean() < 1
    grades = [pd.read_csv(tmp_path / name / "grades.csv")["prob_HGG"] for name in ("torch", "onnx")]
    assert np.allclose(*grades, atol=1e-4)


def test_a_wrong_graph_replaces_nothing(trained, tmp_path, monkeypatch):
    def write(graph, inputs, metadata, file):
        shutil.copy(trained / "onnx" / (DENOISER if "x_t" in inputs else CONDITION), file)

    monkeypatch.setattr("scripts.tools.onnx_network.write", write)
    (tmp_path / CONDITION).write_bytes(b"of before")
    network = randomise(tiny_network())
    network.denoiser.out[-1].conv.bias.data += 1e-3
    with pytest.raises(RuntimeError, match="seg_logits of onnxruntime and PyTorch differ by up to 1.0e-03"):
        export_onnx(network, str(tmp_path), SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [CONDITION]
    assert (tmp_path / CONDITION).read_bytes() == b"of before"


@pytest.mark.parametrize("settings", [{"image_size": 64}, {"prediction_type": "epsilon"}, {"modalities": ["pd"]}])
def test_other_settings_are_refused(settings, trained, phantoms, run_bundle, tmp_path):
    (key,) = settings
    with pytest.raises(InputError, match=f"the model was trained with {key}="):
        run_bundle(ONNX, dataset_dir=str(phantoms), ckpt_dir=str(trained), output_dir=str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()


def remove(folder: Path) -> None:
    (folder / CONDITION).unlink()


def cut(folder: Path) -> None:
    (folder / DENOISER).write_bytes((folder / DENOISER).read_bytes()[:-1000])


def foreign(folder: Path) -> None:
    model = onnx.load(folder / DENOISER)
    del model.metadata_props[:]
    onnx.save(model, folder / DENOISER)


def mix(folder: Path) -> None:
    model = onnx.load(folder / CONDITION)
    metadata = json.loads(model.metadata_props[0].value) | {"export": "another"}
    model.metadata_props[0].value = json.dumps(metadata)
    onnx.save(model, folder / CONDITION)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, "condition.onnx' does not exist; export it first"),
        (cut, "denoiser.onnx' cannot be read as an export of this bundle"),
        (foreign, "denoiser.onnx' cannot be read as an export of this bundle"),
        (mix, "files come from different exports"),
    ],
)
def test_unusable_folders(spoil, message, trained, tmp_path):
    for name in (CONDITION, DENOISER):
        (tmp_path / name).write_bytes((trained / "onnx" / name).read_bytes())
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        OnnxNetwork(str(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_traced(module):
    network = make(conditioning=["highway", module], **TINY)
    traced = torch.jit.trace(network, torch.randn(1, 4, 16, 16))
    image = torch.randn(3, 4, 32, 48)
    assert torch.allclose(traced(image), network(image), atol=1e-4)
