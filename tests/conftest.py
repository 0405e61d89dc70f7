"""Shared fixtures: a tiny phantom data set and a runner for bundle configurations."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
os.environ["MONAI_FAIL_ON_DUPLICATE_CONFIG"] = "1"

from scripts.config import InputError, TrainingError  # noqa: E402
from scripts.organs.merge_structures import merge  # noqa: E402
from scripts.tools import phantom_ct  # noqa: E402
from scripts.tools.phantom import make_dataset  # noqa: E402

MODALITIES = ["t1", "t1ce", "t2", "flair"]
TINY_TRAINING = {
    "image_size": 32,
    "channels": [8, 8, 8],
    "calib_channels": [8, 8, 8],
    "max_epochs": 2,
    "val_interval": 1,
    "slices_per_volume": 2,
    "batch_size": 8,
}


def tiny_settings(configs: list[str]) -> dict:
    """Settings of a tiny network that trains in seconds. Inference reads them from the checkpoint."""
    return TINY_TRAINING if configs[0] == "train.yaml" else {}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images. Tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """Ten phantoms of 32 x 32 x 8 voxels, four of them LGG; tests must not write here."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_dataset(folder, num_subjects=10, shape=(32, 32, 8), seed=3)
    return folder


@pytest.fixture(scope="session")
def cts(tmp_path_factory):
    """Five CTs of 32 x 32 x 24 voxels with label maps: three for training, one for validation, one for testing."""
    folder = tmp_path_factory.mktemp("cts")
    for index, split in enumerate(["train", "train", "train", "val", "test"]):
        image, structures = phantom_ct.make_subject(np.random.default_rng(index), (32, 32, 24), (10.0, 10.0, 20.0))
        subject, affine = folder / f"s{index}", np.diag([10.0, 10.0, 20.0, 1.0])
        (subject / "segmentations").mkdir(parents=True)
        nib.save(nib.Nifti1Image(image, affine), subject / "ct.nii.gz")
        for name, mask in structures.items():
            nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), subject / "segmentations" / f"{name}.nii.gz")
        with (folder / "meta.csv").open("a") as table:
            table.write(f"{'image_id;split' + chr(10) if not index else ''}s{index};{split}\n")
    merge(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Six pairs of a native and a contrast CT of 32 x 32 x 24 voxels, with masks of vessels and lung."""
    folder = tmp_path_factory.mktemp("pairs")
    grid = ((32, 32, 24), (10.0, 10.0, 20.0))
    for index in range(6):
        subject = folder / f"s{index}"
        subject.mkdir()
        for name, volume in phantom_ct.make_pair(np.random.default_rng(index), 0.0, *grid).items():
            image = nib.Nifti1Image(volume, np.diag([10.0, 10.0, 20.0, 1.0]))
            nib.save(image, subject / f"s{index}_{name}.nii.gz")
    return folder


@pytest.fixture(scope="session")
def three_regions(phantoms, tmp_path_factory) -> Path:
    """Folder with a checkpoint that was trained on TC, WT and ET for a few seconds."""
    out = tmp_path_factory.mktemp("three_regions")
    folders = {"dataset_dir": str(phantoms), "output_dir": str(out), "ckpt_dir": str(out)}
    run_configs(["train.yaml"], regions=["TC", "WT", "ET"], max_epochs=3, val_interval=3, learning_rate=0.01, **folders)
    return out


@pytest.fixture
def make_subject_folder():
    """Function that writes the folder of one subject, given its parent folder, name and ``{suffix: array}``."""

    def make(root: Path, name: str, volumes: dict[str, np.ndarray], affine=None, extension: str = ".nii.gz") -> Path:
        (root / name).mkdir(parents=True, exist_ok=True)
        for suffix, volume in volumes.items():
            joint = "-" if name.startswith("BraTS-GLI") else "_"
            file = root / name / f"{name}{joint}{suffix}{extension}"
            nib.save(nib.Nifti1Image(volume, np.eye(4) if affine is None else affine), file)
        return root / name

    return make


@pytest.fixture
def volumes() -> dict[str, np.ndarray]:
    """Four modalities and a segmentation of 8 x 8 x 4 voxels."""
    rng = np.random.default_rng(0)
    images = {m: rng.integers(1, 100, (8, 8, 4)).astype(np.int16) for m in MODALITIES}
    segmentation = np.zeros((8, 8, 4), np.uint8)
    segmentation[2:5, 2:5, 1:3] = 1
    return images | {"seg": segmentation}


def run_configs(configs: list[str], **overrides) -> None:
    """Run configurations of the main bundle with a tiny network."""
    run_files([ROOT / "configs" / name for name in configs], **tiny_settings(configs) | overrides)


def run_files(files: list[Path], **overrides) -> None:
    """Run configurations as the command line does. Raise our own errors instead of MONAI's errors around them."""
    import monai.bundle

    hook = sys.excepthook
    try:
        monai.bundle.run(config_file=[str(file) for file in files], **overrides)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, (InputError, TrainingError)):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise
    finally:
        sys.excepthook = hook


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until something has happened, while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def state(file: Path) -> dict:
    """Content of a checkpoint."""
    return torch.load(file, weights_only=True)


def assert_same(ours, theirs) -> None:
    """Check that two checkpoints are equal bit for bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"rows"}:  # the rows hold times
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def settings_of(*configs: str, **overrides) -> dict:
    """Settings that training with these configurations saves in the checkpoint."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / name) for name in configs])
    parser.update(overrides)
    return parser.get_parsed_content("settings")


@pytest.fixture
def run_bundle():
    """Function that runs configurations."""
    return run_configs


@pytest.fixture
def item(tmp_path):
    """An evaluated subject with a true mask of 4 x 4 x 2 voxels of 2 mm. The axes of the volume are L, P, S."""
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    file = tmp_path / "s1" / "s1_t1.nii.gz"
    file.parent.mkdir()
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(16, 16, 4)).astype(np.float32), affine), file)
    label = torch.zeros(1, 16, 16, 4)
    label[:, 2:6, 3:7, 1:3] = 1

    def meta(array):
        return MetaTensor(array, affine=affine, meta={"filename_or_obj": str(file)})

    return {
        "subject": "s1",
        "grade": 1,
        "grade_prob": torch.tensor([0.3, 0.7]),
        "label": meta(label),
        "pred": meta(label.clone()),
        "prob": meta(0.02 + 0.9 * label),
        "uncertainty": meta(0.5 * label),
        "sample_dice": torch.tensor([0.75]),
        "confidence": torch.tensor([0.92]),
        "expected_dice": torch.tensor([math.nan]),  # no calibration was fitted
        "volume_temperature": torch.tensor([1.0]),
        "volume_margin": torch.tensor([0.0]),
        "volumes_from": torch.tensor(0),
        "grade_prior": torch.tensor([0.5, 0.5]),
    }


@pytest.fixture
def evaluate_items():
    """Function that lets a report write what it says of computed items. Returns their rows."""

    def run(report, items) -> list[dict]:
        rows = [row for order, item in enumerate(items) for row in report.rows_of(item | {"order": order})]
        report.write(rows)
        return rows

    return run
