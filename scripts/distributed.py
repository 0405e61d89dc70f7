"""Several processes of one training: share subjects among them, gather their results, synchronise the network."""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
from monai.data import partition_dataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scripts.config import InputError

T = TypeVar("T")


def join_processes(distributed: bool) -> None:
    """Connect the processes that torchrun started, by NCCL if there is a GPU and by gloo otherwise.

    Args:
        distributed: whether the configuration is for several processes (configs/multi_gpu.yaml).

    Raises:
        InputError: if torchrun started several processes without ``distributed``, or ``distributed`` is set without
            torchrun.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if distributed and "RANK" not in os.environ:
        raise InputError("configs/multi_gpu.yaml needs processes that torchrun starts: see docs/scale.md")
    if processes > 1 and not distributed:
        raise InputError(
            f"torchrun started {processes} processes, but each of them would do all of the work: add "
            "configs/multi_gpu.yaml in training; evaluation and inference are shared by scheduler (docs/scale.md)"
        )
    if distributed and idist.backend() is None:
        idist.initialize("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(idist.finalize)


def shard(items: Sequence[T], even: bool = False) -> list[T]:
    """The items of this process: every n-th item for n processes, and all items for one process.

    Args:
        items: items of all processes.
        even: repeat some items, so that all processes have the same number, which training needs.

    Raises:
        InputError: if a process would have no item.
    """
    processes = idist.get_world_size()
    if processes == 1 or not items:
        return list(items)
    if len(items) < processes:
        raise InputError(
            f"{len(items)} subjects cannot be shared by {processes} processes: start at most {len(items)}, or raise "
            "validation_share if these are the validation subjects"
        )
    return list(partition_dataset(items, num_partitions=processes, even_divisible=even)[idist.get_rank()])


def gather_from_all(values: Sequence[T]) -> list[T]:
    """The values of all processes, in the original order of the items that :func:`shard` distributed."""
    if idist.get_world_size() == 1:
        return list(values)
    missing = object()
    everyone: Any = idist.all_gather(list(values))
    rounds = itertools.zip_longest(*everyone, fillvalue=missing)
    return [value for one_round in rounds for value in one_round if value is not missing]


def average_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes."""
    return torch.as_tensor(idist.all_reduce(tensor)) / idist.get_world_size()


def wrap_distributed(network: nn.Module) -> nn.Module:
    """The network wrapped so that several processes average its gradients; for one process, the network itself."""
    if idist.get_world_size() == 1:
        return network
    device = next(network.parameters()).device
    return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)


def broadcast_buffers(network: nn.Module) -> None:
    """Copy the buffers of the first process, whose network is saved, to all processes."""
    if idist.get_world_size() > 1:
        for buffer in network.buffers():
            buffer.copy_(torch.as_tensor(idist.broadcast(buffer, src=0)))
