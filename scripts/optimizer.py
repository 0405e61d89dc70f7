"""What is optimised, and how its learning rate moves."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import torch
from monai.networks.utils import freeze_layers
from torch import nn
from torch.optim import lr_scheduler

from scripts.config import InputError

logger = logging.getLogger(__name__)

LR_SCHEDULES = ("constant", "cosine", "cosine_restarts", "plateau")


def freeze_all_but(network: nn.Module, trainable: str | None) -> None:
    """Freeze every parameter whose name does not match the regular expression ``trainable``; None freezes nothing.

    Raises:
        InputError: when no parameter matches, or it is not a regular expression.
    """
    if trainable is None:
        return
    names = [name for name, _ in network.named_parameters()]
    try:
        matches = any(re.search(trainable, name) for name in names)
    except re.error as error:
        raise InputError(f"trainable='{trainable}' is not a regular expression: {error}") from error
    if not matches:
        parts = sorted({name.split(".")[0] for name in names})
        raise InputError(f"trainable='{trainable}' matches no parameter; the network's parts are {parts}")
    freeze_layers(network, exclude_vars=trainable)


def parameter_groups(modules: Sequence[nn.Module], weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: weights decay; norms, biases and log sigmas (one dimension) do not."""
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    logger.info(f"{count:,} of {sum(p.numel() for m in modules for p in m.parameters()):,} parameters are trained")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_lr_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    *,
    max_epochs: int,
    warmup_epochs: int = 0,
    restart_epochs: int = 25,
    patience: int = 10,
) -> lr_scheduler.LRScheduler:
    """torch's schedule of the learning rate over epochs.

    Args:
        name: one of :data:`LR_SCHEDULES`. ``plateau`` halves the rate when the best validation Dice has not risen for
            ``patience`` epochs.
        optimizer: whose rate moves.
        max_epochs: length of the training; ``cosine`` ends there near 0.
        warmup_epochs: linear rise from a tenth of the rate before any of them but ``plateau``.
        restart_epochs: length of a cycle of ``cosine_restarts``.
        patience: of ``plateau``.

    Raises:
        InputError: for an unknown name or a warm-up that leaves nothing.
    """
    if name not in LR_SCHEDULES:
        raise InputError(f"lr_schedule '{name}' is not one of {list(LR_SCHEDULES)}")
    if name == "plateau":
        if warmup_epochs:
            raise InputError("lr_schedule 'plateau' has no warm-up: set warmup_epochs to 0")
        return lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=patience)
    if warmup_epochs >= max_epochs:
        raise InputError(f"warmup_epochs={warmup_epochs} must be less than max_epochs={max_epochs}")
    main: lr_scheduler.LRScheduler
    if name == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, max_epochs - warmup_epochs)
    elif name == "cosine_restarts":
        main = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, restart_epochs)
    else:
        main = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if not warmup_epochs:
        return main
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=warmup_epochs)
    return lr_scheduler.SequentialLR(optimizer, [warmup, main], milestones=[warmup_epochs])
