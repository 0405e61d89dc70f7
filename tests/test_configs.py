"""The configuration files: they can be parsed, agree with each other and declare what MONAI expects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data.utils import pickle_hashing

from conftest import ROOT, settings_of
from scripts.net import SETTINGS
from scripts.organs.workflow import SETTINGS as ORGAN_SETTINGS
from scripts.synthesis.workflow import SETTINGS as SYNTHESIS_SETTINGS
from scripts.training.checkpoints import read_checkpoint

CONFIGS = ROOT / "configs"
ORGANS, SYNTHESIS = (ROOT / "bundles" / name / "configs" for name in ("organs", "synthesis"))
FOLDERS = (CONFIGS, ORGANS, SYNTHESIS)
BASES = ("train.yaml", "inference.yaml")
ABLATIONS = sorted(path for folder in FOLDERS for path in folder.glob("ablation*.yaml"))
FILES = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))
OVERLAYS = [path for path in FILES if path.name not in BASES and not path.name.startswith("ablation")]
EVALUATION = (
    "scheduler",
    "subset",
    "num_eval_cases",
    "chosen_by",
    "grade_from",
    "grade_prior",
    "prior",
    "lookup",
)  # keys that evaluate.yaml declares
PUBLIC_KEYS = {
    "dataset_dir", "output_dir", "ckpt_dir", "ckpt_path", "device", "seed", "amp", "modalities", "regions",
    "grade_csv", "subject_column", "grade_column", "grade_labels", "use_cls_head", "image_size", "variant", "channels",
    "batch_size", "slices_per_volume", "max_epochs", "val_interval", "learning_rate", "fold", "num_folds",
    "num_train_timesteps", "num_inference_steps", "num_samples", "validation_share", "cache_dir", "num_workers",
}  # fmt: skip


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load(name: str, folder: Path = CONFIGS) -> dict:
    return yaml.safe_load((folder / name).read_text(encoding="ascii"))


def parsed(*files: str, folder: Path = CONFIGS, **overrides) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(folder / name) for name in files])
    parser.update(overrides)
    return parser


def test_base_declares_the_public_keys():
    assert load("train.yaml").keys() >= PUBLIC_KEYS


@pytest.mark.parametrize("file", OVERLAYS, ids=identify)
def test_overlays_only_override(file):
    overlay = load(file.name, file.parent)
    base = load("inference.yaml", file.parent) | load("train.yaml", file.parent)
    if file.name in ("evaluate.yaml", "calibrate.yaml"):  # calibrate.yaml sets keys of evaluate.yaml
        base |= dict.fromkeys(EVALUATION, ...)
    assert {key.split("::")[0].removeprefix("+") for key in overlay} <= base.keys()
    assert [
        key for key in overlay if key in base and overlay[key] == base[key] and key != "run"
    ] == []  # no overlay repeats the base
    assert len(file.read_text().splitlines()) <= 80


@pytest.mark.parametrize("file", ABLATIONS, ids=identify)
def test_ablations_are_grids_of_known_keys(file, tmp_path):
    files, folder = dict.fromkeys(["ablation.yaml", file.name]), file.parent
    parser = parsed(*files, folder=folder, output_dir=str(tmp_path), dataset_dir=str(tmp_path))
    ablation = parser.get_parsed_content("ablation")
    assert len(ablation.arms) == len(parsed(*files, folder=folder).get("arms"))
    for arm in ablation.arms:
        overrides = arm.training | arm.evaluating
        assert parsed(*arm.configs, folder=folder, **overrides).get_parsed_content("network_def")


@pytest.mark.parametrize("file", FILES, ids=identify)
def test_numbers_are_numbers(file):
    def texts(node):
        if isinstance(node, dict):
            return [text for value in node.values() for text in texts(value)]
        if isinstance(node, list):
            return [text for value in node for text in texts(value)]
        return [node] if isinstance(node, str) else []

    for text in texts(load(file.name, file.parent)):
        with pytest.raises(ValueError, match="could not convert"):
            float(text)  # YAML reads 1e-4 as a string, 1.0e-4 as a number


@pytest.mark.parametrize(
    ("folder", "of_the_label"), [(CONFIGS, 3), (ORGANS, 2), (SYNTHESIS, 2)], ids=["main", "organs", "synthesis"]
)
def test_both_bases_prepare_images_alike(folder, of_the_label):
    """MONAI Label needs inference in one file, so the preprocessing is written twice. Both must be equal."""
    settings = settings_of("train.yaml")
    if folder != CONFIGS:
        names = ORGAN_SETTINGS if folder == ORGANS else SYNTHESIS_SETTINGS
        settings = {name: load("train.yaml", folder)[name] for name in names} | {"structures": ["liver"]}
    train = parsed("train.yaml", folder=folder, names=["liver"])
    inference = parsed("inference.yaml", folder=folder, settings=settings)
    chains = [
        train.get_parsed_content("validate::preprocessing").transforms,
        inference.get_parsed_content("preprocessing").transforms,
    ]
    labels = [transform for transform in chains[0] if getattr(transform, "keys", None) == ("label",)]
    assert len(labels) == of_the_label
    images = [transform for transform in chains[0] if transform not in labels]
    assert [type(transform) for transform in images] == [type(transform) for transform in chains[1]]
    assert len(images) >= 5
    for ours, theirs in zip(images, chains[1], strict=True):
        assert pickle_hashing(ours) == pickle_hashing(theirs)


def test_both_bases_sample_alike():
    train, inference = load("train.yaml")["validate"]["inferer"], load("inference.yaml")["inferer"]
    for key in ("_target_", "sampling_batch_size", "eta", "start_timestep", "calibrated_for"):
        assert train[key] == inference[key], key
    shared = {"seed", "num_inference_steps", "num_samples", "sampler", "fusion", "device", "amp", "ckpt_path"}
    assert {key: load("train.yaml")[key] for key in shared} == {key: load("inference.yaml")[key] for key in shared}


def test_the_weights_are_those_of_weights_yaml_and_inference_needs_no_other_setting():
    checkpoint = read_checkpoint(str(ROOT / "models" / "model.pt"))
    assert checkpoint["settings"] == settings_of("train.yaml", "weights.yaml")
    for parser in (parsed("train.yaml", "weights.yaml"), parsed("inference.yaml")):
        parser.get_parsed_content("network_def").load_state_dict(checkpoint["model"])
    assert (ROOT / "models" / "model.pt").stat().st_size < 10e6


def test_fine_tuning_has_the_network_of_the_weights():
    settings = settings_of("train.yaml", "small.yaml", "fine_tune.yaml")
    own = {"learning_rate", "regions", "region_labels", "grade_labels", "modalities", "use_cls_head"}
    trained = read_checkpoint(str(ROOT / "models" / "model.pt"))["settings"]
    assert {key: settings[key] for key in trained.keys() - own} == {key: trained[key] for key in trained.keys() - own}


def test_every_setting_is_a_public_key_and_an_argument():
    assert set(SETTINGS) <= load("train.yaml").keys()
    # inference reads them from the checkpoint, but a folder may have fewer modalities
    assert set(SETTINGS) & load("inference.yaml").keys() == {"modalities"}


@pytest.mark.parametrize(
    "overlay", ["baseline_unet.yaml", "data_brats2023.yaml", "demo.yaml", "fast.yaml", "small.yaml"]
)
def test_overlays_build_networks(overlay):
    network = parsed("train.yaml", overlay).get_parsed_content("network_def")
    assert network(torch.zeros(1, 4, 64, 64)).shape == (1, 1, 64, 64)


def test_seed_settings_train_a_step_and_sample_a_slice():
    """seed_settings.yaml at full width: a training step on one slice of 64 px, and a sample of one slice of 128 px."""
    parser = parsed("train.yaml", "seed_settings.yaml", alpha=[1.0, 1.0], device="cpu", amp=False)
    content = parser.get_parsed_content
    expected = {"image_size": 256, "num_train_timesteps": 1000, "schedule": "linear", "batch_size": 4}
    assert {key: content(key) for key in expected} == expected
    network, loss, optimizer = content("network_def"), content("loss_on_device"), content("optimizer")
    assert network.denoiser.block_out_channels[0] == 128
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert content("lr_scheduler").get_last_lr()[0] == 1e-4
    batch = {
        "image": torch.randn(1, 4, 64, 64),
        "label": (torch.rand(1, 1, 64, 64) > 0.9).float(),
        "grade": torch.tensor([1]),
        "empty": torch.tensor([False]),
        "subject": ["s"],
    }
    prepare = content("train::trainer::prepare_batch")
    image, targets, _, kwargs = prepare(batch)
    assert not network.denoiser.out[-1].conv.weight.any()
    loss(content("train::inferer")(image, network, **kwargs), targets).backward()
    optimizer.step()
    assert network.denoiser.out[-1].conv.weight.any()  # it is initialised with zeros
    prob = content("validate::inferer").predict(torch.randn(1, 4, 128, 128, 1), network.eval())["pred"]
    assert prob.shape == (1, 1, 128, 128, 1)
    assert prob.isfinite().all()


def test_metadata_at_the_root_is_a_link():
    assert (ROOT / "metadata.json").is_symlink()
    assert (ROOT / "metadata.json").resolve() == CONFIGS / "metadata.json"


@pytest.mark.parametrize("folder", FOLDERS, ids=identify)
def test_metadata_names_the_pinned_versions(folder):
    pins = dict(
        line.split(" ;")[0].split("==")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    pins = {name.lower(): version for name, version in pins.items()}
    metadata = json.loads((folder / "metadata.json").read_text())
    named = metadata["required_packages_version"] | {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    assert {name: pins[name] for name in named} == named


@pytest.mark.parametrize("folder", FOLDERS, ids=identify)
@pytest.mark.parametrize(("name", "kind"), [("train.yaml", "train"), ("inference.yaml", "infer")])
def test_monai_finds_the_required_properties(folder, name, kind, phantoms, cts, pairs, tmp_path):
    data = {CONFIGS: phantoms, ORGANS: cts, SYNTHESIS: pairs}[folder]
    options = {"dataset_dir": str(data), "output_dir": str(tmp_path)}
    if folder == SYNTHESIS:  # the weights that are included hold a generator
        options |= {"generator_ckpt": str(folder.parent / "models" / "model.pt")} if kind == "train" else {}
    workflow = ConfigWorkflow(config_file=str(folder / name), workflow_type=kind, **options)
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.parametrize("folder", FOLDERS, ids=identify)
def test_no_two_files_of_one_name_differ_in_case(folder):
    names = [path.name.lower() for path in folder.iterdir()]
    assert len(names) == len(set(names))
