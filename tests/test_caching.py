from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from conftest import MODALITIES, ROOT
from scripts.config import InputError, explain
from scripts.data.caching import SliceSampler, UncachedDataset, cached_dataset
from scripts.data.subjects import load_subjects


def training_config(phantoms: Path, **overrides) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs" / "train.yaml"))
    parser.update({"dataset_dir": str(phantoms), "image_size": 32, **overrides})
    return parser


@pytest.fixture
def copied_phantoms(phantoms, tmp_path):
    return Path(shutil.copytree(phantoms, tmp_path / "data"))


@pytest.fixture
def broken(phantoms, tmp_path):
    """Function that gives the item of a phantom with one file replaced by an array or bytes."""

    def make(suffix: str, content) -> list[dict]:
        items = load_subjects(str(phantoms), MODALITIES)[:1]
        file = tmp_path / f"broken_{suffix}.nii.gz"
        key = "label" if suffix == "seg" else "image"
        old = items[0]["label"][0] if suffix == "seg" else items[0]["image"][MODALITIES.index(suffix)]
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            nib.save(nib.Nifti1Image(content, nib.load(old).affine), file)
        items[0][key] = [str(file) if f == old else f for f in items[0][key]]
        return items

    return make


def preprocessing(phantoms):
    return training_config(phantoms).get_parsed_content("train::preprocessing")


def test_truncated_file_is_named(phantoms, broken):
    whole = Path(load_subjects(str(phantoms), MODALITIES)[0]["image"][2]).read_bytes()
    with pytest.raises(InputError, match="cannot read .*broken_t2.nii.gz"):
        cached_dataset(broken("t2", whole[: len(whole) // 2]), preprocessing(phantoms))


def test_truncated_file_is_named_when_read_as_it_goes(phantoms, broken):
    whole = Path(load_subjects(str(phantoms), MODALITIES)[0]["image"][0]).read_bytes()
    items = broken("t1", whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot read .*broken_t1.nii.gz"):
        UncachedDataset(items, preprocessing(phantoms))[0]


@pytest.mark.parametrize(
    ("suffix", "volume", "message"),
    [
        ("flair", np.full((32, 32, 8), np.nan, np.float32), "modality 4 of 4 has NaN"),
        ("t1", np.full((32, 32, 8), 7, np.int16), r"modality 1 of 4 is constant \(7\)"),
        ("seg", np.full((32, 32, 8), 3, np.uint8), r"label values \[3.*\] outside \[0, 1, 2, 4\]"),
    ],
)
def test_unfit_volumes_name_the_subject(phantoms, broken, suffix, volume, message):
    items = broken(suffix, volume)
    with pytest.raises(InputError, match=f"'{items[0]['subject']}': .*{message}"):
        cached_dataset(items, preprocessing(phantoms))


@pytest.mark.parametrize("cache", [None, "cache"])
def test_all_unusable_subjects_are_named(copied_phantoms, tmp_path, cache):
    config = training_config(copied_phantoms, cache_dir=cache and str(tmp_path / cache))
    for item in config.get_parsed_content("datalist")["training"][:3]:
        volume = nib.load(item["image"][0])
        nib.save(nib.Nifti1Image(np.full(volume.shape, np.nan, np.float32), volume.affine), item["image"][0])
    with pytest.raises(RuntimeError) as refused:  # MONAI's parser wraps it; the workflow prints our message
        config.get_parsed_content("train::dataset")
    assert re.match(r"3 errors in the data:(\n- subject '.*': modality 1 of 4 has NaN.*){3}", explain(refused.value))


def test_training_slices(phantoms):
    dataset = training_config(phantoms).get_parsed_content("train::dataset")
    ((slice_),) = [dataset[0]]
    (item,) = slice_
    assert item["image"].shape == (4, 32, 32)
    assert item["label"].shape == (1, 32, 32)
    assert set(torch.as_tensor(item["label"]).unique().tolist()) <= {0.0, 1.0}


def test_volumes_are_read_once(phantoms, monkeypatch):
    dataset = training_config(phantoms).get_parsed_content("train::dataset")
    monkeypatch.setattr(nib, "load", lambda *_: pytest.fail("a volume was read again"))
    for _ in range(3):
        assert dataset[0][0]["image"].isfinite().all()


@pytest.mark.parametrize(
    "overlays", [[], ["augment.yaml", "augment_mr.yaml"], ["augment.yaml", "augment_pictures.yaml"]]
)
def test_random_transforms_leave_the_cache_alone(overlays, phantoms):
    """A crop is a view of the cached volume, which is not copied: no transform may write into its input."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / name) for name in ("train.yaml", *overlays)])
    parser.update({"dataset_dir": str(phantoms), "image_size": 32})
    if "augment_pictures.yaml" in overlays:
        parser.update({"modalities": ["t1", "t1ce", "t2"]})
    dataset = parser.get_parsed_content("train::dataset")
    before = {key: torch.as_tensor(dataset._cache[0][key]).clone() for key in ("image", "label")}
    drawn = [torch.as_tensor(dataset[0][0]["image"]).clone() for _ in range(40)]
    assert len({tuple(image.flatten()[:200].tolist()) for image in drawn}) > 10  # the transforms do something
    for key, volume in before.items():
        assert torch.equal(torch.as_tensor(dataset._cache[0][key]), volume)


def test_modalities_are_normalised_inside_the_brain(phantoms):
    volume = torch.as_tensor(training_config(phantoms).get_parsed_content("train::dataset")._cache[0]["image"])
    for modality in volume:
        brain = modality[modality != 0]
        assert abs(brain.mean()) < 1e-3
        assert abs(brain.std() - 1) < 1e-2
    assert (volume == 0).float().mean() > 0.3


def test_resizing_keeps_labels_binary(phantoms):
    dataset = training_config(phantoms, image_size=48).get_parsed_content("train::dataset")
    label = torch.as_tensor(dataset._cache[0]["label"])
    assert label.shape == (1, 48, 48, 8)
    assert set(label.unique().tolist()) == {0.0, 1.0}


def test_cache_on_disk_gives_what_memory_gives(phantoms, tmp_path):
    memory = training_config(phantoms).get_parsed_content("validate::dataset")
    config = training_config(phantoms, cache_dir=str(tmp_path))
    for _ in range(2):  # first fills the cache, then reads it
        disk = config.get_parsed_content("validate::dataset", lazy=False)
        assert torch.equal(torch.as_tensor(disk[0]["image"]), torch.as_tensor(memory[0]["image"]))
        assert torch.equal(disk[0]["image"].affine, memory[0]["image"].affine)
        assert len(disk[0]["image"].applied_operations) == len(memory[0]["image"].applied_operations)
    assert len(list(tmp_path.glob("*.pt"))) == len(disk)


def cached(items, phantoms, folder, **settings):
    """Training data set of ``items``, cached in ``folder`` or, if it is None, in memory."""
    config = training_config(phantoms, cache_dir=folder and str(folder), **settings)
    config.update({"train::dataset::data": items})
    return config.get_parsed_content("train::dataset")


def test_drawing_from_the_mapped_cache_gives_what_memory_gives(phantoms, tmp_path):
    items = load_subjects(str(phantoms), MODALITIES)[:2]
    memory, disk = (cached(items, phantoms, folder) for folder in (None, tmp_path / "cache"))
    disk = cached(items, phantoms, tmp_path / "cache")  # a second time, so that it is read from the files
    for dataset in (memory, disk):
        dataset.transform.set_random_state(0)
    for _ in range(4):
        ours, theirs = memory[1][0], disk[1][0]
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["label"], theirs["label"])


@pytest.mark.parametrize("folder", [None, "cache"])
def test_threads_that_fill_the_cache_do_not_mix_volumes_up(folder, phantoms, tmp_path):
    """With MONAI's reader, one image in eight got the channel of another subject's label; see LoadVolumesd."""
    items = load_subjects(str(phantoms), MODALITIES)
    alone = cached(items, phantoms, None)._cache
    for attempt in range(3):
        threads = cached(items, phantoms, tmp_path / f"{folder}{attempt}" if folder else None, num_workers=4)
        volumes = threads._cache if folder is None else [threads._cachecheck(item) for item in items]
        for ours, theirs in zip(volumes, alone, strict=True):
            assert torch.equal(torch.as_tensor(ours["image"]), torch.as_tensor(theirs["image"]))


def test_cache_is_keyed_by_content_and_settings(copied_phantoms, phantoms, tmp_path):
    cache = tmp_path / "cache"

    def entries(folder, **settings):
        cached(load_subjects(str(folder), MODALITIES)[:2], folder, cache, **settings)
        return {file.name for file in cache.iterdir()}

    first = entries(phantoms)
    assert len(first) == 2
    assert entries(copied_phantoms) == first  # another folder and time stamp, the same content
    assert len(entries(phantoms, image_size=48)) == 4
    file = copied_phantoms / "BraTS20_Training_001" / "BraTS20_Training_001_t1.nii.gz"
    image, before = nib.load(file), file.stat()
    volume = np.asarray(image.dataobj).copy()
    volume[16, 16, 4] += 1
    nib.save(nib.Nifti1Image(volume, image.affine), file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(entries(copied_phantoms)) == 5


@pytest.mark.parametrize("damage", [lambda old: old[: len(old) // 2], lambda old: b"", lambda old: b"x" * len(old)])
def test_a_damaged_cache_entry_is_named_and_made_anew(damage, phantoms, tmp_path, caplog):
    items = load_subjects(str(phantoms), MODALITIES)[:1]
    before = cached(items, phantoms, tmp_path / "cache")[0][0]["image"].shape
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert cached(items, phantoms, tmp_path / "cache")[0][0]["image"].shape == before
    assert f"cache entry {file} of '{items[0]['subject']}' is damaged" in caplog.text
    assert abs(len(file.read_bytes()) - len(whole)) < 1000


FILL = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import test_caching
items = test_caching.load_subjects({data!r}, test_caching.MODALITIES)
if {kill}:
    from scripts.data.caching import VolumeCache
    make, count = VolumeCache._pre_transform, []
    def fail(self, item):
        count.append(item)
        return make(self, item) if len(count) < 4 else os._exit(9)
    VolumeCache._pre_transform = fail
test_caching.cached(items, {data!r}, {cache!r})
"""


def test_cache_survives_a_kill_and_two_processes_fill_it(phantoms, tmp_path):
    cache = tmp_path / "cache"

    def fill(kill: bool) -> subprocess.Popen:
        places = {"root": str(ROOT), "tests": str(ROOT / "tests"), "data": str(phantoms), "cache": str(cache)}
        return subprocess.Popen([sys.executable, "-W", "ignore", "-c", FILL.format(kill=kill, **places)])

    assert fill(kill=True).wait() == 9
    assert len(list(cache.glob("[!.]*.pt"))) == 3
    assert [process.wait() for process in (fill(False), fill(False))] == [0, 0]
    names = {file.name for file in cache.iterdir()}
    assert len(names) == 10
    cached(load_subjects(str(phantoms), MODALITIES), phantoms, cache)
    assert {file.name for file in cache.iterdir()} == names


def test_cache_on_disk_notices_a_repaired_file(copied_phantoms, tmp_path):
    file = copied_phantoms / "BraTS20_Training_001" / "BraTS20_Training_001_seg.nii.gz"
    config = training_config(copied_phantoms, cache_dir=str(tmp_path / "cache"), **{"datalist::num_folds": None})
    items = load_subjects(str(copied_phantoms), MODALITIES)[:1]

    def label():
        content = config.get_parsed_content("validate::preprocessing")
        return torch.as_tensor(cached_dataset(items, content, cache_dir=str(tmp_path / "cache"))[0]["label"])

    assert label().any()
    image = nib.load(file)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), file)
    assert not label().any()


def test_sampler_visits_every_volume_equally_often():
    data = list(range(7))
    visits = list(SliceSampler(data, slices_per_volume=3, seed=0))
    assert sorted(visits) == sorted(data * 3)
    assert visits == list(SliceSampler(data, slices_per_volume=3, seed=0))
    assert visits != list(SliceSampler(data, slices_per_volume=3, seed=1))
    with pytest.raises(InputError, match="slices_per_volume=0"):
        SliceSampler(data, slices_per_volume=0, seed=0)


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_foreign_entry_runs_no_code(phantoms, tmp_path, caplog):
    items = load_subjects(str(phantoms), MODALITIES)[:2]
    for _ in range(2):
        shape = cached(items, phantoms, tmp_path)[0][0]["image"].shape
    assert "is damaged" not in caplog.text  # our own entries can be read without running code
    for entry in tmp_path.glob("*.pt"):
        torch.save({"image": Payload(tmp_path / "executed")}, entry)
    assert cached(items, phantoms, tmp_path)[0][0]["image"].shape == shape
    assert not (tmp_path / "executed").exists()
    assert "is damaged" in caplog.text
