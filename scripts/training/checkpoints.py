"""Checkpoints: files that are never half-written, and are read with checks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.workflow import Workflow

from scripts.config import InputError, TrainingError, atomic_path, check_plain

logger = logging.getLogger(__name__)

# settings that name and paint the outputs, or say how weights were trained; weights may be used under others
NAMING = ("grade_labels", "background_label", "modality_dropout")


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
        :func:`scripts.training.run.check_resumable` says, before any volume is read, whether the file fits.
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
