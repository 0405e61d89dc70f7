"""Checkpoints that are never half-written, and loading that says what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from monai.engines.workflow import Workflow
from torch import nn

from scripts.config import BUNDLE_ROOT, InputError, TrainingError, atomic_path
from scripts.split import PATIENT_PATTERN, patient

logger = logging.getLogger(__name__)


class SaveCheckpoints:
    """Handler that writes ``last.pt`` (full state) every epoch and ``model.pt`` (weights) at the best validation.

    ignite's and MONAI's savers remove the old file before they write a new one under the same name; these are
    replaced in one step, ``model.pt`` first: a run that is killed in between finds it again when it is resumed from
    ``last.pt``. When training ends without any validation, ``model.pt`` holds the last weights.

    Args:
        ckpt_dir: folder of both files.
        save_dict: objects with a ``state_dict``, or None; ``model`` is the network that is validated.
        evaluator: engine whose best epoch decides.
        training_subjects: names kept in the checkpoint, so that evaluation can tell what the network has seen.
        trained_for: settings kept in the checkpoint, under which alone its weights mean what they say.
        output_names: settings kept for inference, which do not matter to the weights.
        training_plan: settings kept in the checkpoint, under which alone its training can be resumed.
    """

    def __init__(
        self,
        ckpt_dir: str,
        save_dict: Mapping[str, Any],
        evaluator: Workflow,
        training_subjects: Sequence[str],
        trained_for: Mapping[str, Any],
        output_names: Mapping[str, Any],
        training_plan: Mapping[str, Any],
    ) -> None:
        self.notes = {
            "training_subjects": list(training_subjects),
            "trained_for": dict(trained_for),
            "output_names": dict(output_names),
        }
        self.training_plan = dict(training_plan)
        self.ckpt_dir = Path(ckpt_dir)
        self.save_dict = {name: part for name, part in save_dict.items() if part is not None}
        self.evaluator = evaluator

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer, after all handlers whose state is saved."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        state = self.evaluator.state
        if state.best_metric_epoch == engine.state.epoch:
            self._save_best(engine)
        full = {name: part.state_dict() for name, part in self.save_dict.items()}
        if engine.scaler is not None:
            full["scaler"] = engine.scaler.state_dict()
        best = {"best_metric": float(state.best_metric), "best_metric_epoch": state.best_metric_epoch}
        self._save(full | best | {"epoch": engine.state.epoch, "training_plan": self.training_plan}, "last.pt")

    def completed(self, engine: SupervisedTrainer) -> None:
        if self.evaluator.state.best_metric_epoch == -1:
            self._save_best(engine)

    def _save_best(self, engine: SupervisedTrainer) -> None:
        best = {name: self.save_dict[name].state_dict() for name in ("model", "loss")}
        self._save(best | {"epoch": engine.state.epoch}, "model.pt")

    @idist.one_rank_only()
    def _save(self, content: dict, name: str) -> None:
        try:
            with atomic_path(self.ckpt_dir / name) as path:
                torch.save(content | self.notes, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise TrainingError(
                f"cannot write {self.ckpt_dir / name}: {error}. The file of before, if there was one, is whole; "
                "make room and go on with configs/resume.yaml"
            ) from error

    def resume(self, engine: SupervisedTrainer) -> None:
        """Bring the trainer and all that is saved to the end of the epoch that ``last.pt`` was written in.

        Without ``last.pt`` training starts at its beginning, so that one command serves for both. Whether the file
        fits is for :func:`check_resumable` to say, before any volume is read.
        """
        file = self.ckpt_dir / "last.pt"
        if idist.get_rank() == 0:
            for partial in self.ckpt_dir.glob(".partial_*"):
                partial.unlink(missing_ok=True)
        if not file.is_file():
            logger.info(f"no {file}: training starts at the beginning")
            return
        checkpoint = read_checkpoint(str(file))
        for name, part in self.save_dict.items():
            part.load_state_dict(checkpoint[name])
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
    trained_for: Mapping[str, Any],
    training_plan: Mapping[str, Any],
    training_subjects: Sequence[str],
) -> None:
    """Make sure that ``last.pt``, where there is one, is of this network, plan and data.

    Raises:
        InputError: when it is damaged, or of a training with another network, other settings or other subjects.
    """
    file = Path(ckpt_dir) / "last.pt"
    if not file.is_file():
        return
    checkpoint = read_checkpoint(str(file))
    for key, planned in checkpoint.get("training_plan", {}).items():
        if training_plan[key] != planned:
            raise InputError(
                f"{file} was trained with {key}={planned}, now it is {training_plan[key]}: resume with the same "
                "settings, or start anew from its weights with init_ckpt and another ckpt_dir"
            )
    seen = checkpoint["training_subjects"]
    if seen != list(training_subjects):
        raise InputError(
            f"{file} was trained on {len(seen)} subjects that are not the {len(training_subjects)} of now: resume with "
            "the same dataset_dir, fold and seed"
        )
    load_weights(network, str(file), trained_for)


def read_checkpoint(ckpt_path: str) -> dict[str, Any]:
    """Read a checkpoint of :class:`SaveCheckpoints` onto the CPU.

    Raises:
        InputError: when the file is missing or damaged.
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
    return checkpoint


def trained_settings(ckpt_path: str) -> dict[str, Any]:
    """Settings that a checkpoint was trained with, so that inference needs no more than its file.

    What older files do not say are the defaults of training.

    Raises:
        InputError: when the file is missing or damaged.
    """
    checkpoint = read_checkpoint(ckpt_path)
    base = ConfigParser.load_config_file(str(BUNDLE_ROOT / "configs" / "train.yaml"))
    defaults = {key: base[key] for key in base["trained_for"] | base["output_names"]}
    return defaults | checkpoint.get("trained_for", {}) | checkpoint.get("output_names", {})


def store_in_model(ckpt_path: str, buffers: Mapping[str, torch.Tensor]) -> None:
    """Replace named tensors of a checkpoint's network, in one step."""
    checkpoint = read_checkpoint(ckpt_path)
    checkpoint["model"] |= buffers
    with atomic_path(ckpt_path) as path:
        torch.save(checkpoint, path)


def check_unseen(
    ckpt_path: str, items: Sequence[Mapping[str, Any]], subset: str, patient_pattern: str = PATIENT_PATTERN
) -> None:
    """Make sure that a checkpoint is not judged on subjects it was trained on.

    Raises:
        InputError: when it would be; with ``subset: all``, where names of two data sets may coincide, a warning.
    """
    names = read_checkpoint(ckpt_path).get("training_subjects", [])
    trained = {patient(name, patient_pattern) for name in names}
    seen = {item["subject"] for item in items if patient(item["subject"], patient_pattern) in trained}
    if seen:
        message = f"{len(seen)} of {len(items)} subjects, such as {sorted(seen)[:3]}, were trained on"
        if subset != "all":
            raise InputError(
                f"{message} by '{ckpt_path}'; set seed, fold and num_folds as in training, or datalist_file to its "
                "datalist.json"
            )
        logger.warning(f"{message}, or have the same name: the scores are not of unseen subjects")


def check_settings(trained_for: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> None:
    """Raise InputError when weights of a ``source`` were trained for other ``settings``."""
    for key, trained in trained_for.items():
        if key in settings and settings[key] != trained:
            raise InputError(f"{source} was trained with {key}={trained}, now it is {settings[key]}")


def load_weights(network: nn.Module, ckpt_path: str, settings: Mapping[str, Any]) -> None:
    """Load ``model`` of a checkpoint into the network, if it was trained for the same ``settings``.

    Raises:
        InputError: when the file is missing or damaged, or its network has another shape or other settings.
    """
    checkpoint = read_checkpoint(ckpt_path)
    weights = checkpoint["model"]
    check_settings(checkpoint.get("trained_for", {}), settings, f"ckpt_path '{ckpt_path}'")
    expected = network.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        ours, theirs = (tuple(part[name].shape) if name in part else "absent" for part in (expected, weights))
        if ours != theirs:
            raise InputError(
                f"ckpt_path '{ckpt_path}' does not fit the configured network: '{name}' is {theirs} in the file and "
                f"{ours} in the network; set variant, channels, calib_channels, modalities, regions and use_cls_head "
                "as in training (its config.yaml has them)"
            )
    network.load_state_dict(weights)
