"""Data sets that read and preprocess every volume once, before training, so that a bad file is found first."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.data.utils import pickle_hashing
from monai.transforms import Compose
from monai.utils import TraceKeys
from torch.utils.data import Sampler
from tqdm import tqdm

from scripts.config import InputError, atomic_path, refuse_all
from scripts.data.pictures import read_volume
from scripts.data.subjects import item_files

logger = logging.getLogger(__name__)

# data that cache entries hold beside tensors; MONAI allows its MetaTensor itself
torch.serialization.add_safe_globals(
    [
        np.ndarray,
        np.dtype,
        np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
        np._core.multiarray.scalar,  # type: ignore[attr-defined]
        *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
        TraceKeys,
    ]
)


def cached_dataset(
    data: Sequence[dict], transform: Compose, *, cache_dir: str | None = None, num_workers: int = 0
) -> Dataset:
    """Data set that has applied the deterministic transforms to every item when this function returns.

    Args:
        data: items of :mod:`scripts.data.subjects`.
        transform: preprocessing followed by random transforms; the input of the first random transform is cached.
        cache_dir: folder of a cache on disk, for data sets that do not fit in memory; None caches in memory.
        num_workers: number of threads that fill the cache.

    Raises:
        InputError: if a file cannot be read or a subject is invalid. The message names all of them.
    """
    if not data:
        return Dataset([])
    if cache_dir is None:
        memory = MemoryCache(data, transform, num_workers)
        refuse_all(memory.reasons)
        return memory
    cached, reasons = VolumeCache(data, transform, cache_dir), []

    def fill(item: dict) -> None:
        try:
            with readable_errors([item]):
                cached._cachecheck(item)
        except InputError as error:
            reasons.append(str(error))

    with ThreadPool(max(1, num_workers)) as pool:
        for _ in tqdm(pool.imap_unordered(fill, cached.data), "Caching volumes", len(data), disable=None):
            pass
    refuse_all(reasons)
    return cached


class MemoryCache(CacheDataset):
    """MONAI's CacheDataset, which goes on after an unusable subject; :attr:`reasons` holds all errors.

    Entries are not copied when they are drawn, because whole volumes are large. No transform may write into them.
    """

    def __init__(self, data: Sequence[dict], transform: Compose, num_workers: int) -> None:
        self.reasons: list[str] = []
        super().__init__(data, transform, num_workers=num_workers, copy_cache=False, progress=sys.stderr.isatty())

    def _load_cache_item(self, idx: int) -> Any:
        try:
            with readable_errors([self.data[idx]]):
                return super()._load_cache_item(idx)
        except InputError as error:
            self.reasons.append(str(error))
            return None


class VolumeCache(PersistentDataset):
    """MONAI's PersistentDataset with content-based keys and memory-mapped entries; damaged entries are replaced.

    The key of an entry is a hash of its subject, its grade, the content of its files and the settings of the
    deterministic transforms. A copied data set therefore reuses the entries; a changed file or setting does not.
    Volumes ``[C, H, W, S]`` are stored slice by slice and memory-mapped, so that drawing a slice reads only that slice.
    Each entry is written in one step, so that several processes can fill one folder and may be killed at any time.
    Entries are read without pickle's code execution; one that holds anything but data counts as damaged.
    """

    def __init__(self, data: Sequence[dict], transform: Compose, cache_dir: str) -> None:
        super().__init__(data, transform, cache_dir, hash_transform=pickle_hashing)
        self.files: dict[str, Path] = {}  # cache file of each subject, so that its volumes are hashed only once

    def _cachecheck(self, item: dict) -> dict:
        """Return the cached item, memory-mapped. Create its entry if it is missing or damaged."""
        if item["subject"] not in self.files:
            name = f"{hash_item(item).decode()}{self.transform_hash}.pt"
            self.files[item["subject"]] = Path(str(self.cache_dir)) / name
        file = self.files[item["subject"]]
        if file.is_file():
            try:
                return torch.load(file, mmap=True, weights_only=True)  # a foreign entry must not run code
            except Exception as error:
                logger.warning(f"cache entry {file} of '{item['subject']}' is damaged ({error}) and is replaced")
        content = self._pre_transform(copy.deepcopy(item))
        for key, value in content.items():
            if isinstance(value, torch.Tensor) and value.ndim == 4:
                content[key] = value.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        with atomic_path(file) as path:
            torch.save(content, path)
        return content


def hash_item(item: dict[str, Any]) -> bytes:
    """Cache key of an item: a hash of its subject, its grade and the content of its files."""
    return pickle_hashing([item["subject"], item.get("grade"), [fingerprint(file) for file in item_files(item)]])


def fingerprint(file: str) -> tuple[int, bytes]:
    """Size and checksum of a file. A gzip file ends with the CRC-32 and length of its content: only these are read."""
    with Path(file).open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8) if file.endswith(".gz") else 0)
        return size, hashlib.sha256(stream.read()).digest()


class UncachedDataset(Dataset):
    """MONAI's Dataset, which reads an item when it is needed, with the errors of :func:`readable_errors`."""

    def _transform(self, index: int):
        with readable_errors([self.data[index]]):
            return super()._transform(index)


@contextlib.contextmanager
def readable_errors(data: Sequence[dict]) -> Iterator[None]:
    """Replace MONAI's 'applying transform' error by an InputError that names the subject or the file.

    If no InputError caused it, the files of ``data`` are read one by one to find the damaged one: a truncated .nii.gz
    fails only when it is read to its end.
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
    """Draw every volume ``slices_per_volume`` times per epoch, in random order. Each time gives one slice of it.

    An epoch is a sequence of ``slices_per_volume`` permutations of the volumes, so that each batch mixes subjects.
    torch's RandomSampler is not used: it draws one more permutation when its iterator ends. That happens in the next
    epoch, after the generators are seeded, and would make the order depend on the epoch before.

    Args:
        data_source: data set of volumes.
        slices_per_volume: slices drawn from each volume per epoch.
        seed: seed of the order. A new value takes effect when the next iterator is created.

    Raises:
        InputError: if ``slices_per_volume`` is less than 1.
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
