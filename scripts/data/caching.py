"""Volumes read once: MONAI's caching data sets, filled before training so that a bad file is found first."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.data.utils import pickle_hashing
from monai.transforms import Compose
from torch.utils.data import Sampler
from tqdm import tqdm

from scripts.config import InputError, atomic_path
from scripts.data.pictures import read_volume
from scripts.data.subjects import item_files

logger = logging.getLogger(__name__)


def cached_dataset(
    data: Sequence[dict], transform: Compose, *, cache_dir: str | None = None, num_workers: int = 0
) -> Dataset:
    """Data set whose deterministic transforms have run once for every item when this returns.

    Args:
        data: items of :mod:`scripts.data.subjects`.
        transform: preprocessing, then random transforms; what precedes the first random one is cached.
        cache_dir: folder of the cache on disk (for sets that do not fit in memory); None caches in memory.
        num_workers: threads that fill the cache.

    Raises:
        InputError: when there is no item, or naming the file that cannot be read or the subject that is unfit.
    """
    if not data:
        raise InputError("no subject is left to load: check the split, the data list and 'subset'")
    with readable_errors(data):
        if cache_dir is None:
            # the first random transform is a crop, which copies: deep-copying whole volumes would cost more
            return CacheDataset(data, transform, num_workers=num_workers, copy_cache=False)
        cached = VolumeCache(data, transform, cache_dir)
        with ThreadPool(max(1, num_workers)) as pool:
            for _ in tqdm(pool.imap_unordered(cached._cachecheck, cached.data), "Caching volumes", len(data)):
                pass
        return cached


class VolumeCache(PersistentDataset):
    """MONAI's PersistentDataset with entries that are keyed by content, mapped into memory, and repaired.

    The key is what an item's files hold, its subject and grade, and the settings of the deterministic transforms: a
    copied data set finds its entries again, a changed file or setting does not. Volumes ``[C, H, W, S]`` are stored
    slice by slice and mapped, so that drawing a slice reads that slice alone. Entries are written in one step,
    so that several processes may fill one folder and any of them may be killed.
    """

    def __init__(self, data: Sequence[dict], transform: Compose, cache_dir: str) -> None:
        super().__init__(data, transform, cache_dir, hash_transform=pickle_hashing)
        self.files: dict[str, Path] = {}  # by subject: the files' content is looked at once

    def _cachecheck(self, item: dict) -> dict:
        """The cached item, mapped; made when it is absent or damaged."""
        if item["subject"] not in self.files:
            name = f"{hash_item(item).decode()}{self.transform_hash}.pt"
            self.files[item["subject"]] = Path(str(self.cache_dir)) / name
        file = self.files[item["subject"]]
        if file.is_file():
            try:
                return torch.load(file, mmap=True, weights_only=False)
            except Exception as error:
                logger.warning(f"cache entry {file} of '{item['subject']}' is damaged ({error}): it is made anew")
        content = self._pre_transform(copy.deepcopy(item))
        for key, value in content.items():
            if isinstance(value, torch.Tensor) and value.ndim == 4:
                content[key] = value.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        with atomic_path(file) as path:
            torch.save(content, path)
        return content


def hash_item(item: dict[str, Any]) -> bytes:
    """Cache key of an item: its subject, its grade, and what its files hold."""
    return pickle_hashing([item["subject"], item["grade"], [fingerprint(file) for file in item_files(item)]])


def fingerprint(file: str) -> tuple[int, bytes]:
    """Size and checksum of a file; gzip ends with CRC-32 and length of its content, which saves reading it."""
    with Path(file).open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8) if file.endswith(".gz") else 0)
        return size, hashlib.sha256(stream.read()).digest()


class UncachedDataset(Dataset):
    """MONAI's Dataset, read as it goes, with the errors of :func:`readable_errors`."""

    def _transform(self, index: int):
        with readable_errors([self.data[index]]):
            return super()._transform(index)


@contextlib.contextmanager
def readable_errors(data: Sequence[dict]) -> Iterator[None]:
    """Turn MONAI's 'applying transform' into the InputError behind it, which names the subject or the file.

    A truncated .nii.gz shows only when it is read to its end, so the files of ``data`` are tried one by one.
    """
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__
        for item in data:
            for file in item_files(item):
                try:
                    read_volume(file)
                except Exception as reason:
                    raise InputError(f"subject '{item['subject']}': cannot read {file}: {reason}") from error
        raise


class SliceSampler(Sampler[int]):
    """Visit every volume ``slices_per_volume`` times an epoch, in random order: one slice is drawn each time.

    Whole permutations of the volumes follow one another, so that a batch mixes subjects. torch's RandomSampler, asked
    for as many, draws from its generator once more when it is exhausted, within the next epoch.

    Args:
        data_source: data set of volumes.
        slices_per_volume: visits per volume and epoch.
        seed: seed of the order, for the iterators to come.

    Raises:
        InputError: when ``slices_per_volume`` is not positive.
    """

    def __init__(self, data_source: Dataset, slices_per_volume: int, seed: int) -> None:
        if slices_per_volume < 1:
            raise InputError(f"slices_per_volume={slices_per_volume} must be at least 1")
        self.volumes = len(data_source)
        self.slices_per_volume = slices_per_volume
        self.seed = seed

    def __len__(self) -> int:
        return self.volumes * self.slices_per_volume

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.slices_per_volume):
            yield from torch.randperm(self.volumes, generator=generator).tolist()
