"""Checkpoints that are never half-written, and loading that says what does not fit."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.workflow import Workflow
from monai.networks.utils import copy_model_state
from torch import nn

from scripts.config import InputError, TrainingError, atomic_path, check_plain

logger = logging.getLogger(__name__)

# settings that name and paint the outputs, or say how weights were trained; weights may be used under others
NAMING = ("grade_labels", "background_label", "modality_dropout")
# settings that may differ from those of the weights from which a training starts
OWN = ("regions", "region_labels", "grade_labels", "use_cls_head", "image_size", "slice_size")
# what older checkpoints lack: fitted since versions 0.9, 0.11 and 0.16
FITTED_LATER = ("calibration.measurement_", "calibration.dice_", "calibration.high_threshold")


class SaveCheckpoints:
    """Handler that writes ``last.pt`` (full state) every epoch and ``model.pt`` (weights) at the best validation.

    The savers of ignite and MONAI delete the old file before they write a new one of the same name; here each file is
    replaced in one step. ``model.pt`` is written first, so that a run killed between the two finds it again when it is
    resumed from ``last.pt``. If training ends without a validation, ``model.pt`` holds the last weights.

    Args:
        ckpt_dir: folder of both files.
        full: objects with a ``state_dict`` (or None) that are saved in ``last.pt``.
        best: names in ``full`` that are saved in ``model.pt``.
        evaluator: engine whose best epoch decides.
        settings: plain data that give the weights their meaning; saved in both files.
        lineage: subjects that the weights have seen (:mod:`scripts.training.lineage`), saved in both files.
    """

    def __init__(
        self,
        ckpt_dir: str,
        full: Mapping[str, Any],
        best: Sequence[str],
        evaluator: Workflow,
        settings: Mapping[str, Any],
        lineage: Mapping[str, Any],
    ) -> None:
        self.ckpt_dir = Path(ckpt_dir)
        self.full = {name: item for name, item in full.items() if item is not None}
        self.best = list(best)
        self.evaluator = evaluator
        self.notes = {"settings": dict(settings), "lineage": dict(lineage)}
        self.config: dict[str, Any] = {}  # what must not change on resume; the workflow fills it

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer, after all handlers whose state is saved."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        state = self.evaluator.state
        if state.best_metric_epoch == engine.state.epoch:
            self._save_best(engine)
        full = {name: item.state_dict() for name, item in self.full.items()}
        if engine.scaler is not None:
            full["scaler"] = engine.scaler.state_dict()
        best = {"best_metric": float(state.best_metric), "best_metric_epoch": state.best_metric_epoch}
        self._save(full | best | {"epoch": engine.state.epoch, "config": self.config}, "last.pt")

    def completed(self, engine: SupervisedTrainer) -> None:
        if self.evaluator.state.best_metric_epoch == -1:
            self._save_best(engine)

    def _save_best(self, engine: SupervisedTrainer) -> None:
        best = {name: self.full[name].state_dict() for name in self.best}
        self._save(best | {"epoch": engine.state.epoch}, "model.pt")

    @idist.one_rank_only()
    def _save(self, content: dict, name: str) -> None:
        try:
            with atomic_path(self.ckpt_dir / name) as path:
                torch.save(content | self.notes, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise TrainingError(
                f"cannot write {self.ckpt_dir / name}: {error}. The file of the epoch before is intact. Free some "
                "space and continue with configs/resume.yaml"
            ) from error

    def resume(self, engine: SupervisedTrainer) -> None:
        """Restore the trainer and everything that was saved to the end of the epoch of ``last.pt``.

        Without ``last.pt`` training starts from the beginning, so that one command serves for both.
        :func:`check_resumable` says, before any volume is read, whether the file fits.
        """
        file = self.ckpt_dir / "last.pt"
        if idist.get_rank() == 0:
            for partial in self.ckpt_dir.glob(".partial_*"):
                partial.unlink(missing_ok=True)
        if not file.is_file():
            logger.info(f"no {file}: training starts from the beginning")
            return
        checkpoint = read_checkpoint(str(file))
        for name, item in self.full.items():
            item.load_state_dict(checkpoint[name])
        if engine.scaler is not None and checkpoint.get("scaler"):
            engine.scaler.load_state_dict(checkpoint["scaler"])
        self.evaluator.state.best_metric = checkpoint["best_metric"]
        self.evaluator.state.best_metric_epoch = checkpoint["best_metric_epoch"]
        engine.state.epoch = checkpoint["epoch"]
        engine.state.iteration = checkpoint["epoch"] * engine.state.epoch_length
        logger.info(f"resumed after epoch {checkpoint['epoch']} of {engine.state.max_epochs}")


def check_resumable(
    ckpt_dir: str,
    network: nn.Module,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    lineage: Mapping[str, Any],
) -> None:
    """Check that ``last.pt``, if it exists, belongs to this network, configuration and data.

    Args:
        ckpt_dir: folder of ``last.pt``.
        network: network to be trained.
        settings: its settings.
        config: what must not change, see :func:`scripts.config.resumable_config`.
        lineage: of the training.

    Raises:
        InputError: if the file is damaged, or of a training with another configuration or other subjects.
    """
    file = Path(ckpt_dir) / "last.pt"
    if not file.is_file():
        return
    checkpoint = read_checkpoint(str(file))
    check_settings(checkpoint["settings"], settings, str(file))
    before = checkpoint.get("config", {})
    for key in sorted(before.keys() | config.keys()):
        old, new = (values.get(key, "absent") for values in (before, config))
        if old != new:
            raise InputError(
                f"{file} was trained with {key}={old}, now it is {new}: resume with the same configuration, or start a "
                "new training from its weights with init_ckpt and another ckpt_dir"
            )
    for name, now in lineage.items():
        # the folder of a data set, after which it is named, may be renamed before training is resumed
        then, now = (sorted(itertools.chain(*sets.values())) for sets in (checkpoint["lineage"][name], now))
        if then != now:
            raise InputError(
                f"{file} has {len(then)} {name} subjects, and these are not the {len(now)} of now: resume with the "
                "same dataset_dir, fold, seed and validation_share"
            )
    load_weights(network, str(file), settings)


def read_checkpoint(ckpt_path: str) -> dict[str, Any]:
    """Read a checkpoint of :class:`SaveCheckpoints` onto the CPU.

    Raises:
        InputError: if the file is missing, damaged or older than version 0.7, or not a checkpoint of this bundle.
    """
    if not Path(ckpt_path).is_file():
        raise InputError(
            f"ckpt_path '{ckpt_path}' does not exist: train first, or set ckpt_path (see models/README.md)"
        )
    try:
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        checkpoint["model"].keys()
    except Exception as error:
        raise InputError(f"ckpt_path '{ckpt_path}' cannot be read as a checkpoint of this bundle: {error!r}") from error
    if not isinstance(checkpoint.get("settings"), dict) or not _is_lineage(checkpoint.get("lineage")):
        raise InputError(f"ckpt_path '{ckpt_path}' is older than version 0.7; train it again")
    checkpoint["settings"] = of_this_version(checkpoint["settings"])
    if type(checkpoint["settings"].get("modality_dropout", 0)) not in (int, float):
        raise InputError(f"ckpt_path '{ckpt_path}' has a modality_dropout that is no number; train it again")
    return checkpoint


def of_this_version(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint, also of an older one, under the names of now; those of other bundles as they are."""
    if "architecture" not in settings:
        return settings
    # since versions 0.10, 0.11 and 0.12
    settings = {"slice_size": None, "denoiser_stride": 1, "modality_dropout": 0.0} | settings
    if settings.pop("self_conditioning", False) is True:  # before version 0.11 a setting of its own
        given = settings.get("conditioning")
        named = ["highway", "anchor", "ss_former"] if settings.get("variant") == "v2" else ["highway"]
        settings["conditioning"] = [*(given if isinstance(given, list) else named), "self_conditioning"]
    if "normalise_nonzero" in settings:  # until version 0.12
        settings["normalisation"] = "nonzero" if settings.pop("normalise_nonzero") else "all"
    blocks, variant = settings.pop("num_res_blocks", None), settings.get("variant")  # until version 0.11
    if blocks == 2 and variant != "v2" and settings.get("channels"):
        named = ["highway"] if settings.get("conditioning") is None else settings["conditioning"]
        settings |= {"variant": "v2", "conditioning": named}  # the same network
    elif blocks not in (None, 2 if variant == "v2" else 1):
        raise InputError(f"the checkpoint has num_res_blocks={blocks}, a setting until version 0.11; train it again")
    return settings


def _has_stride(settings: Mapping[str, Any]) -> bool:
    """Whether the stride of the denoiser has an effect; see :class:`scripts.net.MedSegDiff`."""
    conditioning = settings.get("conditioning")
    if isinstance(conditioning, list) and ("highway" not in conditioning or "stochastic" in conditioning):
        return False
    return (settings.get("architecture"), settings.get("prediction_type")) == ("MedSegDiff", "sample")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_lineage(value: Any) -> bool:
    """Whether a value has the form of :mod:`scripts.training.lineage`."""
    return isinstance(value, dict) and all(
        isinstance(value.get(name), dict)
        and all(isinstance(names, list) and all(map(_is_text, names)) for names in value[name].values())
        for name in ("training", "validation")
    )


def trained_settings(ckpt_path: str) -> dict[str, Any]:
    """The settings that a checkpoint was trained with; inference takes them from here.

    Raises:
        InputError: if the file is missing, damaged or too old, or holds text that a configuration would evaluate.
    """
    return check_plain(read_checkpoint(ckpt_path)["settings"], f"ckpt_path '{ckpt_path}'")


def store_calibration(
    ckpt_path: str, calibration: Mapping[str, torch.Tensor], subjects: Mapping[str, Sequence[str]]
) -> None:
    """Replace the calibration of a checkpoint, in one step.

    Args:
        ckpt_path: the checkpoint.
        calibration: state of :class:`scripts.networks.calibration.Calibration`.
        subjects: names of the subjects it was fitted to, by data set; they join those that chose the weights.
    """
    checkpoint = read_checkpoint(ckpt_path)
    checkpoint["model"] |= {f"calibration.{name}": tensor for name, tensor in calibration.items()}
    chosen = checkpoint["lineage"]["validation"]
    for dataset, names in subjects.items():
        chosen[dataset] = sorted({*chosen.get(dataset, []), *names})
    with atomic_path(ckpt_path) as path:
        torch.save(checkpoint, path)


def check_settings(trained: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> None:
    """Raise InputError if ``settings`` differ from those that the weights of ``source`` were ``trained`` with."""
    for key, value in trained.items():
        if key == "denoiser_stride" and not _has_stride(trained):
            continue
        if key not in NAMING and key in settings and settings[key] != value:
            raise InputError(f"{source} was trained with {key}={value}, now it is {settings[key]}")


def load_weights(network: nn.Module, ckpt_path: str, settings: Mapping[str, Any]) -> None:
    """Load ``model`` of a checkpoint into the network.

    Args:
        network: takes the weights.
        ckpt_path: the checkpoint.
        settings: of the network; must be those of the checkpoint, but for :data:`NAMING`.

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
