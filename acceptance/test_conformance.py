"""The bundles as MONAI and its model zoo ask for them, in their folder and away from it. Run by `make conformance`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jsonschema
import monai.bundle
import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from monai.apps.utils import HashCheckError
from monai.bundle import ConfigParser, load_bundle_config

from conftest import NAME, ORGANS, ROOT, SYNTHESIS, make_phantoms

SOURCES = {NAME: ROOT, ORGANS: ROOT / "bundles" / "organs", SYNTHESIS: ROOT / "bundles" / "synthesis"}
SCHEMA = ROOT.parent / "shared" / "tools" / "meta_schema_20240725.json"
WORKFLOW = """
import sys
from monai.bundle import ConfigWorkflow
kind, files, overrides = sys.argv[1], sys.argv[2].split(","), dict(zip(sys.argv[3::2], sys.argv[4::2]))
numbers = {"max_epochs": 1, "val_interval": 1, "slices_per_volume": 4} if kind == "train" else {}
workflow = ConfigWorkflow(config_file=files, workflow_type=kind, **overrides, **numbers)
workflow.initialize()
assert workflow.check_properties() == [], workflow.check_properties()
workflow.run()
workflow.finalize()
"""


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("phantoms"), 10, 32, 32, 8)


@pytest.fixture(scope="session")
def cts(tmp_path_factory) -> Path:
    """Ten made-up CTs with their label maps."""
    folder = tmp_path_factory.mktemp("cts")
    made, merged = ["--output_dir", str(folder), "--num_subjects", "10"], ["--dataset_dir", str(folder)]
    python(ROOT, True, folder, "-m", "scripts.tools.phantom_ct", *made)
    python(ROOT, True, folder, "-m", "scripts.organs.merge_structures", *merged)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Ten made-up pairs of native and contrast CTs."""
    folder = tmp_path_factory.mktemp("pairs")
    made = ["--output_dir", str(folder), "--num_subjects", "10", "--pairs"]
    python(ROOT, True, folder, "-m", "scripts.tools.phantom_ct", *made)
    return folder


@pytest.fixture(params=SOURCES)
def bundle(request, released) -> Path:
    """Each bundle as it is released."""
    return released.with_name(request.param)


@pytest.fixture(params=SOURCES)
def source(request) -> Path:
    """Each bundle in the repository."""
    return SOURCES[request.param]


def python(bundle: Path, inside: bool, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python in the bundle's folder, or in another that has it on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if not inside:
        environment["PYTHONPATH"] = str(bundle)
    command = [sys.executable, "-B", "-W", "ignore", *arguments]
    options = {"cwd": bundle if inside else folder, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def configs(bundle: Path, inside: bool, *names: str) -> list[str]:
    return [f"configs/{name}" if inside else str(bundle / "configs" / name) for name in names]


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_workflows_run_from_start_to_end(bundle, inside, phantoms, cts, pairs, tmp_path):
    """Training, its evaluation and inference, of the unpacked release."""
    folders = {name: str(tmp_path / name) for name in ("generator", "train", "evaluate", "inference")}
    models = {"generator": str(tmp_path / "models" / "generator")}
    data = {NAME: phantoms, ORGANS: cts, SYNTHESIS: pairs}[bundle.name]
    runs = [
        ("train", "train", ["train.yaml", "demo.yaml"]),
        ("evaluate", "train", ["train.yaml", "demo.yaml", "evaluate.yaml"]),
        ("inference", "inference", ["inference.yaml"]),
    ]
    common = ["dataset_dir", str(data)]
    if bundle.name == SYNTHESIS:
        runs.insert(0, ("generator", "train", ["train.yaml", "demo.yaml", "stage0_generator.yaml"]))
        common += ["generator_ckpt", f"{models['generator']}/model.pt"]
    for name, kind, files in runs:
        own = ["ckpt_dir", models.get(name, str(tmp_path / "models")), "output_dir", folders[name]]
        arguments = [kind, ",".join(configs(bundle, inside, *files)), *common, *own]
        python(bundle, inside, tmp_path, "-c", WORKFLOW, *arguments)
    assert Path(folders["train"], "metrics.csv").is_file()
    assert json.loads(Path(folders["evaluate"], "summary.json").read_text())["subjects"] == 2
    assert len(list(Path(folders["inference"]).glob("*.nii.gz"))) == (30 if bundle.name == NAME else 10)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("kind", ["train", "inference"])
def test_network_in_and_out_are_verified(bundle, inside, kind, tmp_path):
    overlay = "weights.yaml" if bundle.name == NAME else "demo.yaml"  # of the weights that the metadata describe
    files = ["train.yaml", overlay] if kind == "train" else ["inference.json"]
    (meta,) = configs(bundle, inside, "metadata.json")
    options = ["--net_id", "network_def", "--meta_file", meta, "--device", "cpu"]
    options += ["--config_file", str(configs(bundle, inside, *files))]
    done = python(bundle, inside, tmp_path, "-m", "monai.bundle", "verify_net_in_out", *options)
    assert "verified with no error" in done.stdout + done.stderr


def test_metadata_is_complete(source):
    metadata = json.loads((source / "configs" / "metadata.json").read_text())
    jsonschema.validate(metadata, json.loads((ROOT / "acceptance" / "metadata_schema.json").read_text()))
    assert metadata["version"] in metadata["changelog"]
    image = metadata["network_data_format"]["inputs"]["image"]
    assert len(image["channel_def"]) == image["num_channels"]
    for file in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md") if source == ROOT else ():
        assert metadata["version"] in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.skipif(not SCHEMA.is_file(), reason="MONAI's schema is not at hand; our own is checked above")
def test_metadata_is_verified_against_the_schema_of_monai(bundle, tmp_path):
    schema = tmp_path / SCHEMA.name
    schema.write_bytes(SCHEMA.read_bytes())
    options = ["--meta_file", "configs/metadata.json", "--filepath", str(schema)]
    done = python(bundle, True, tmp_path, "-m", "monai.bundle", "verify_metadata", *options)
    assert "metadata is verified with no error" in done.stdout + done.stderr


def test_the_metrics_of_the_metadata_are_those_of_the_weights(tmp_path):
    """`make weights` gives the brains; the rest is its evaluation with the weights that are there."""
    data = str(tmp_path / "data")
    sizes = ["--num_subjects", "60", "--randomise", "1", "--size", "64"]
    python(ROOT, True, tmp_path, "-m", "scripts.tools.phantom", "--output_dir", data, *sizes)
    names = configs(ROOT, True, "train.yaml", "weights.yaml", "evaluate.yaml")
    options = ["--dataset_dir", data, "--ckpt_dir", "models", "--output_dir", str(tmp_path / "evaluate")]
    python(ROOT, True, tmp_path, "-m", "monai.bundle", "run", "--config_file", str(names), *options)
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    measured = {
        f"random_brains_test_dice_{region}": cells["dice"]["mean"]["value"]
        for region, cells in summary["segmentation"].items()
    }
    metadata = json.loads((ROOT / "configs" / "metadata.json").read_text())
    assert measured == pytest.approx(metadata["eval_metrics"], abs=0.002)


def test_the_metrics_of_the_metadata_are_those_of_the_weights_of_organs(tmp_path):
    """`make organs-demo` gives the CTs; the rest is its evaluation with the weights that are there."""
    bundle, data = SOURCES[ORGANS], str(tmp_path / "data")
    python(ROOT, True, tmp_path, "-m", "scripts.tools.phantom_ct", "--output_dir", data, "--num_subjects", "40")
    python(ROOT, True, tmp_path, "-m", "scripts.organs.merge_structures", "--dataset_dir", data)
    names = configs(bundle, True, "train.yaml", "demo.yaml", "evaluate.yaml")
    options = ["--dataset_dir", data, "--ckpt_dir", "models", "--output_dir", str(tmp_path / "evaluate")]
    python(bundle, True, tmp_path, "-m", "monai.bundle", "run", "--config_file", str(names), *options)
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    measured = {f"phantom_test_{name}": cell["value"] for name, cell in summary["mean over structures"].items()}
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    named = metadata["eval_metrics"]
    assert named == pytest.approx({name: measured[name] for name in named}, rel=0.005)


def test_the_metrics_of_the_metadata_are_those_of_the_weights_of_synthesis(tmp_path):
    """`make synthesis-demo` gives the pairs; the rest is its evaluation with the weights that are there."""
    bundle, data = SOURCES[SYNTHESIS], str(tmp_path / "data")
    made = ["--output_dir", data, "--num_subjects", "40", "--pairs"]
    python(ROOT, True, tmp_path, "-m", "scripts.tools.phantom_ct", *made)
    names = configs(bundle, True, "train.yaml", "demo.yaml", "evaluate.yaml")
    options = ["--dataset_dir", data, "--ckpt_dir", "models", "--output_dir", str(tmp_path / "evaluate")]
    python(bundle, True, tmp_path, "-m", "monai.bundle", "run", "--config_file", str(names), *options)
    found = json.loads((tmp_path / "evaluate" / "summary.json").read_text())["methods"]
    measured = {
        f"phantom_test_{method}_{score}": cell["value"]
        for method, cells in found.items()
        for score, cell in cells.items()
    }
    named = json.loads((bundle / "configs" / "metadata.json").read_text())["eval_metrics"]
    assert named == pytest.approx({name: measured[name] for name in named}, rel=0.005)


def test_json_twins_are_the_yaml(bundle):
    for name in ("train", "inference"):
        twin = json.loads((bundle / "configs" / f"{name}.json").read_text())
        assert twin == yaml.safe_load((SOURCES[bundle.name] / "configs" / f"{name}.yaml").read_text())
        parser = load_bundle_config(str(bundle), f"{name}.json")
        assert {key: parser[key] for key in twin} == twin
        metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
        assert parser["_meta_"]["name"] == metadata["name"]


@pytest.mark.parametrize(
    ("bundle", "shapes"), [(NAME, [4, 3]), (ORGANS, [3, 25]), (SYNTHESIS, [3, 1])], indirect=["bundle"]
)
def test_load_finds_the_weights(bundle, shapes, tmp_path):
    code = """
import sys, torch, monai.bundle
options = {"bundle_dir": sys.argv[1], "workflow_type": "inference", "key_in_ckpt": "model", "device": "cpu"}
network = monai.bundle.load(sys.argv[2], **options)
weights = torch.load(f"{sys.argv[1]}/{sys.argv[2]}/models/model.pt", weights_only=True)["model"]
assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
inputs, outputs = map(int, sys.argv[3:])
assert network.eval()(torch.zeros(2, inputs, 64, 48)).shape == (2, outputs, 64, 48)
"""
    python(bundle, False, tmp_path, "-c", code, str(bundle.parent), bundle.name, *map(str, shapes))


def test_the_release_holds_no_more_than_it_should(bundle):
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert not [path for path in bundle.rglob("*") if path.is_symlink()]
    endings = (".py", ".yaml", ".json", ".md", ".txt", ".png", ".conf", ".yml", "LICENSE", "models/model.pt")
    endings += (".html", ".css", ".js")
    assert [name for name in files if not name.endswith(endings)] == []
    zoo = {"LICENSE", "large_files.yml", "docs/README.md", "configs/metadata.json"}
    zoo |= {NAME: {"docs/data_license.txt"}, ORGANS: {"configs/structures.json"}}.get(bundle.name, set())
    assert files >= zoo | {"configs/train.json", "configs/inference.json", "models/model.pt"}


def test_large_files_are_those_that_the_list_names(bundle, tmp_path):
    """MONAI's own check: nothing is fetched where the hash is right, and another file is told."""
    monai.bundle.download_large_files(bundle_path=str(bundle))
    copy = tmp_path / "models"
    copy.mkdir()
    (tmp_path / "large_files.yml").write_bytes((bundle / "large_files.yml").read_bytes())
    (copy / "model.pt").write_bytes(b"other weights")
    with pytest.raises(HashCheckError, match="sha256 hash check of existing file failed"):
        monai.bundle.download_large_files(bundle_path=str(tmp_path))


@pytest.mark.parametrize(("bundle", "files"), [(NAME, 30), (ORGANS, 10), (SYNTHESIS, 10)], indirect=["bundle"])
def test_inference_of_the_release_is_that_of_the_repository(bundle, files, phantoms, cts, pairs, tmp_path):
    data = {NAME: phantoms, ORGANS: cts, SYNTHESIS: pairs}[bundle.name]
    for folder, file in ((SOURCES[bundle.name], "inference.yaml"), (bundle, "inference.json")):
        (config,) = configs(folder, True, file)
        options = ["--dataset_dir", str(data), "--output_dir", str(tmp_path / file)]
        python(folder, True, tmp_path, "-m", "monai.bundle", "run", "--config_file", config, *options)
    written = sorted((tmp_path / "inference.yaml").glob("*.nii.gz"))
    assert len(written) == files
    for file in written:
        ours, theirs = (np.asarray(nib.load(path).dataobj) for path in (file, tmp_path / "inference.json" / file.name))
        assert np.array_equal(ours, theirs)


def test_a_push_to_the_hub_uploads_the_release_alone(released, tmp_path, monkeypatch):
    """A dry run: what would be sent is looked at, nothing is."""
    sent: dict = {}

    class DryRun:
        def __init__(self, token=None) -> None:
            pass

        def create_repo(self, **options) -> None:
            sent["repo"] = options

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            folder = Path(folder_path)
            sent["files"] = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            sent["card"] = (folder / "README.md").read_text(encoding="utf-8")
            return f"https://example.org/{repo_id}"

        def create_tag(self, **options) -> None:
            sent["tag"] = options["tag"]

    monkeypatch.setattr(huggingface_hub, "HfApi", DryRun)
    monkeypatch.setattr(monai.bundle.scripts.huggingface_hub, "HfApi", DryRun)
    bundle = tmp_path / NAME
    subprocess.run(["cp", "-r", str(released), str(bundle)], check=True)
    monai.bundle.push_to_hf_hub("someone/medsegdiff", NAME, str(tmp_path), version="0.8.0")
    assert sent["tag"] == "0.8.0"
    assert sent["files"] == {str(p.relative_to(released)) for p in released.rglob("*") if p.is_file()} | {"README.md"}
    assert "# Model card" in sent["card"]


def test_weights_load_without_pickled_code(source):
    checkpoint = torch.load(source / "models" / "model.pt", weights_only=True)
    assert {"model", "settings", "lineage"} <= checkpoint.keys()
    assert (source / "models" / "model.pt").stat().st_size < 10e6


@pytest.mark.parametrize("verb", ["ckpt_export", "onnx_export"])
def test_the_verbs_of_monai_export_the_network(source, verb, tmp_path):
    """TorchScript and ONNX of any batch and size, against PyTorch."""
    file = tmp_path / "exported.ts"  # the suffix that ckpt_export would add
    channels = dict(zip(SOURCES.values(), (4, 3, 3), strict=True))[source]
    common = {"net_id": "network_def", "ckpt_file": str(source / "models" / "model.pt"), "key_in_ckpt": "model"}
    config, meta = (str(source / "configs" / name) for name in ("inference.yaml", "metadata.json"))
    converter = {"input_names": ["image"], "output_names": ["logits"], "verify": True, "use_ort": True, "atol": 1e-4}
    converter |= {"dynamic_axes": {"image": {0: "batch", 2: "height", 3: "width"}}}
    options = {"input_shape": [2, channels, 64, 64], "converter_kwargs": converter} if verb == "onnx_export" else {}
    export = getattr(monai.bundle, verb)
    export(**common, filepath=str(file), config_file=config, meta_file=meta, use_trace=True, **options)
    if verb == "ckpt_export":
        exported = torch.jit.load(file)
    else:
        session = onnxruntime.InferenceSession(str(file))
        exported = lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])  # noqa: E731
    parser = ConfigParser()
    parser.read_config(config)
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(common["ckpt_file"], weights_only=True)["model"])
    with torch.no_grad():
        for shape in ((1, channels, 16, 16), (3, channels, 32, 48)):
            image = torch.randn(shape)
            assert torch.allclose(exported(image), network(image), atol=1e-4)
