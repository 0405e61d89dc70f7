"""Parameters to optimise, and the learning-rate schedules that torch lacks."""

from __future__ import annotations

import logging
import re

import torch
from monai.networks.utils import freeze_layers
from torch import nn
from torch.optim import lr_scheduler

from scripts.config import InputError

logger = logging.getLogger(__name__)


def freeze_all_but(network: nn.Module, trainable: str | None) -> None:
    """Freeze every parameter whose name does not match the regular expression ``trainable``; None freezes nothing.

    Raises:
        InputError: if no parameter matches, or ``trainable`` is not a regular expression.
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


def parameter_groups(
    network: nn.Module, loss: nn.Module, weight_decay: float = 0.01, trainable: str | None = None
) -> list[dict]:
    """Trainable parameters in two groups: weights decay; norms, biases and log sigmas (one dimension) do not.

    Args:
        network: its parameters are frozen first, see :func:`freeze_all_but`.
        loss: holds the log sigmas.
        weight_decay: of the weights.
        trainable: regular expression of the parameters that are trained; None trains all.
    """
    freeze_all_but(network, trainable)
    modules = (network, loss)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    logger.info(f"{count:,} of {sum(p.numel() for m in modules for p in m.parameters()):,} parameters are trained")
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine_with_warmup(
    optimizer: torch.optim.Optimizer, max_epochs: int, warmup_epochs: int
) -> lr_scheduler.SequentialLR:
    """Linear rise from a tenth of the learning rate, then torch's cosine schedule down to 0 at ``max_epochs``.

    Raises:
        InputError: if the warm-up is as long as the training.
    """
    if not 0 < warmup_epochs < max_epochs:
        raise InputError(f"warmup_epochs={warmup_epochs} must be less than max_epochs={max_epochs}, and at least 1")
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=warmup_epochs)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, max_epochs - warmup_epochs)
    return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_epochs])
