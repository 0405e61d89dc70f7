"""Several processes: who works on which subjects, and how their results come together."""

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
    """Join the processes that torchrun started, over NCCL where there are GPUs, else over gloo.

    Raises:
        InputError: when there are several processes and they have not been told to work together, or the reverse.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if distributed and "RANK" not in os.environ:
        raise InputError("configs/multi_gpu.yaml is for processes that torchrun starts: see docs/several_gpus.md")
    if processes > 1 and not distributed:
        raise InputError(
            f"torchrun started {processes} processes, each of which would do it all: add configs/multi_gpu.yaml"
        )
    if distributed and idist.backend() is None:
        idist.initialize("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(idist.finalize)


def shard(items: Sequence[T], even: bool = False) -> list[T]:
    """This process's items: every n-th of n processes. All items where there is one process.

    Args:
        items: of all processes.
        even: repeat some, so that all processes have equally many, as training needs.

    Raises:
        InputError: when some process would have none.
    """
    processes = idist.get_world_size()
    if processes == 1 or not items:
        return list(items)
    if len(items) < processes:
        raise InputError(f"{len(items)} subjects cannot be shared by {processes} processes: start at most {len(items)}")
    return list(partition_dataset(items, num_partitions=processes, even_divisible=even)[idist.get_rank()])


def gather_from_all(values: Sequence[T]) -> list[T]:
    """The values of all processes, in the order of the items that :func:`shard` shared out."""
    if idist.get_world_size() == 1:
        return list(values)
    missing = object()
    everyone: Any = idist.all_gather(list(values))
    turns = itertools.zip_longest(*everyone, fillvalue=missing)
    return [value for turn in turns for value in turn if value is not missing]


def average_over_processes(gradient: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes."""
    return torch.as_tensor(idist.all_reduce(gradient)) / idist.get_world_size()


def wrap_distributed(network: nn.Module) -> nn.Module:
    """The network as a process of several trains it: its gradients are averaged. Itself where there is one process."""
    if idist.get_world_size() == 1:
        return network
    device = next(network.parameters()).device
    return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)


def broadcast_buffers(network: nn.Module) -> None:
    """Give all processes the running statistics of the first, whose network is saved."""
    if idist.get_world_size() > 1:
        for buffer in network.buffers():
            buffer.copy_(torch.as_tensor(idist.broadcast(buffer, src=0)))
