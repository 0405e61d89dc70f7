"""Volumes read once: MONAI's caching data sets, filled before training so that a bad file is found first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.data.utils import pickle_hashing
from monai.transforms import Compose
from tqdm import tqdm

from scripts.config import InputError
from scripts.datalist import item_files


def cached_dataset(
    data: Sequence[dict], transform: Compose, *, cache_dir: str | None = None, num_workers: int = 0
) -> Dataset:
    """Data set whose deterministic transforms have run once for every item when this returns.

    Args:
        data: items of :mod:`scripts.datalist`.
        transform: preprocessing, then random transforms; what precedes the first random one is cached.
        cache_dir: folder of the cache on disk (for sets that do not fit in memory); None caches in memory.
        num_workers: threads that fill the cache in memory.

    Raises:
        InputError: when there is no item, or naming the file that cannot be read or the subject that is unfit.
    """
    if not data:
        raise InputError("no subject is left to load: check the split, the data list and 'subset'")
    with explained(data):
        if cache_dir is None:
            # the first random transform is a crop, which copies: deep-copying whole volumes would cost more
            return CacheDataset(data, transform, num_workers=num_workers, copy_cache=False)
        cached = PersistentDataset(
            data, transform, cache_dir, hash_item, hash_transform=pickle_hashing, track_meta=True, weights_only=False
        )
        for item in tqdm(cached.data, desc="Caching volumes"):
            cached._cachecheck(item)
        return cached


def hash_item(item: dict) -> bytes:
    """Cache key of an item: what it names, and size and time of its files, so that a repaired file is read anew."""
    files = [Path(file).stat() for file in item_files(item)]
    return pickle_hashing([item, [(file.st_size, file.st_mtime_ns) for file in files]])


class ExplainedDataset(Dataset):
    """MONAI's Dataset, read as it goes, with the errors of :func:`explained`."""

    def _transform(self, index: int):
        with explained([self.data[index]]):
            return super()._transform(index)


@contextlib.contextmanager
def explained(data: Sequence[dict]) -> Iterator[None]:
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
                    np.asarray(nib.Nifti1Image.from_filename(file).dataobj)
                except Exception as reason:
                    raise InputError(f"subject '{item['subject']}': cannot read {file}: {reason}") from error
        raise


class SliceSampler(torch.utils.data.RandomSampler):
    """Visit every volume ``slices_per_volume`` times an epoch, in random order: one slice is drawn each time.

    Args:
        data_source: data set of volumes.
        slices_per_volume: visits per volume and epoch.
        seed: seed of the order.

    Raises:
        InputError: when ``slices_per_volume`` is not positive.
    """

    def __init__(self, data_source: Dataset, slices_per_volume: int, seed: int) -> None:
        if slices_per_volume < 1:
            raise InputError(f"slices_per_volume={slices_per_volume} must be at least 1")
        # without replacement, torch gives whole permutations of the volumes, one after another
        super().__init__(
            data_source,
            num_samples=slices_per_volume * len(data_source),
            generator=torch.Generator().manual_seed(seed),
        )
