"""Weights of a checkpoint in a network, and what to say when they do not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.utils import copy_model_state
from torch import nn

from scripts.config import InputError
from scripts.training.checkpoints import check_settings, read_checkpoint

logger = logging.getLogger(__name__)

# settings that may differ from those of the weights from which a training starts
OWN = ("regions", "region_labels", "grade_labels", "use_cls_head", "image_size", "slice_size")
# what older checkpoints lack: fitted since versions 0.9, 0.11 and 0.16
FITTED_LATER = ("calibration.measurement_", "calibration.dice_", "calibration.high_threshold")


def load_weights(network: nn.Module, ckpt_path: str, settings: Mapping[str, Any]) -> None:
    """Load ``model`` of a checkpoint into the network.

    Args:
        network: takes the weights.
        ckpt_path: the checkpoint.
        settings: of the network; must be those of the checkpoint, but for :data:`scripts.training.checkpoints.NAMING`.

    Raises:
        InputError: if the file is missing or damaged, or its network has another shape or other settings.
    """
    checkpoint = read_checkpoint(ckpt_path)
    weights = checkpoint["model"]
    check_settings(checkpoint["settings"], settings, f"ckpt_path '{ckpt_path}'")
    expected = network.state_dict()
    weights = {name: value for name, value in expected.items() if name.startswith(FITTED_LATER)} | weights
    for name in sorted(expected.keys() | weights.keys()):
        ours, theirs = (_shape(state.get(name)) for state in (expected, weights))
        text = name.endswith("_extra_state") and isinstance(theirs, tuple)  # that of version 0.7 has another length
        if ours != theirs and not (text and isinstance(ours, tuple)):
            raise InputError(
                f"ckpt_path '{ckpt_path}' does not fit the configured network: '{name}' is {theirs} in the file and "
                f"{ours} in the network; set the keys of data and network as in training (its config.yaml has them)"
            )
    _check_finite(weights, network, ckpt_path)
    try:
        network.load_state_dict(weights)
    except (TypeError, ValueError) as error:  # the text of the calibration
        raise InputError(f"ckpt_path '{ckpt_path}' does not fit the configured network: {error}") from error


def trained_network(network: nn.Module, ckpt_path: str, settings: Mapping[str, Any]) -> nn.Module:
    """The network, after :func:`load_weights`."""
    load_weights(network, ckpt_path, settings)
    return network


def start_from(network: nn.Module, ckpt_path: str, settings: Mapping[str, Any]) -> None:
    """Load the weights from which a training starts.

    The settings :data:`OWN` may differ from those of the checkpoint. Layers that have another shape for that reason
    start with random weights, and a warning names them. If the regions differ, the channels of those that both have are
    taken over.

    Args:
        network: takes the weights.
        ckpt_path: the checkpoint.
        settings: of the network.

    Raises:
        InputError: as :func:`load_weights`, for all other settings.
    """
    checkpoint = read_checkpoint(ckpt_path)
    trained = checkpoint["settings"]
    weights = {name: value for name, value in checkpoint["model"].items() if isinstance(value, torch.Tensor)}
    own = {key for key in OWN if key in settings and settings[key] != trained.get(key)}
    if not own:
        return load_weights(network, ckpt_path, settings)
    others = {key: value for key, value in settings.items() if key not in own}
    check_settings(trained, others, f"ckpt_path '{ckpt_path}'")
    _check_finite(weights, network, ckpt_path)
    # the module stochastic has channels of its own
    has_own = "stochastic" in str(trained.get("conditioning"))
    if "regions" in own and isinstance(trained.get("regions"), list) and not has_own:
        for name, new in network.state_dict().items():
            if name in weights:
                weights[name] = of_shared_regions(weights[name], new, trained["regions"], settings["regions"])
    _, taken, _ = copy_model_state(network, weights, exclude_vars=r"^calibration\.")
    changed = {name for name in taken if weights[name] is not checkpoint["model"][name]}
    new = network.state_dict().keys() - set(taken) | changed
    layers = sorted({name.rpartition(".")[0] for name in new if not name.startswith("calibration.")})
    logger.warning(f"{sorted(own)} differ from '{ckpt_path}': layers that are not taken from it as a whole: {layers}")


def of_shared_regions(old: torch.Tensor, new: torch.Tensor, before: Sequence[str], now: Sequence[str]) -> torch.Tensor:
    """The new tensor with the channels of ``old`` that do not belong to a region, or to one that both networks have.

    The channels are those of the image, if there are any, and then one or more blocks with one channel for each region.

    Args:
        old: of the trained network, ``[..., image + blocks * len(before), ...]``.
        new: of the other network, ``[..., image + blocks * len(now), ...]``.
        before: regions of the trained network.
        now: regions of the other network.

    Returns:
        The old tensor, if the shapes are the same or have no such meaning.
    """
    axes = [axis for axis in range(min(old.ndim, new.ndim)) if old.shape[axis] != new.shape[axis]]
    if old.ndim != new.ndim or len(axes) != 1 or len(before) == len(now):
        return old
    (axis,) = axes
    blocks, rest = divmod(old.shape[axis] - new.shape[axis], len(before) - len(now))
    image = old.shape[axis] - blocks * len(before)
    if rest or blocks < 1 or image < 0:
        return old
    sources, targets = list(range(image)), list(range(image))
    for block in range(blocks):
        for region in set(before) & set(now):
            sources.append(image + block * len(before) + before.index(region))
            targets.append(image + block * len(now) + now.index(region))
    return new.index_copy(axis, torch.tensor(targets), old.index_select(axis, torch.tensor(sources)).to(new.dtype))


def _check_finite(weights: Mapping[str, Any], network: nn.Module, ckpt_path: str) -> None:
    """Raise InputError if a parameter of the network is not finite in the weights."""
    names = [name for name, _ in network.named_parameters() if name in weights]
    if not all(torch.isfinite(weights[name]).all() for name in names):
        raise InputError(f"ckpt_path '{ckpt_path}' holds NaN or infinite weights; train it again")


def _shape(value: Any) -> str | tuple[int, ...]:
    """What an entry of a checkpoint is, for comparison and for the message."""
    return "absent" if value is None else tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)[:80]
