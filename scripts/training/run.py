"""The order of a run, whatever the network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from ignite.handlers import EarlyStopping
from monai.bundle import ConfigParser
from monai.engines import Evaluator, Trainer
from monai.utils import set_determinism
from torch import nn

from scripts.config import InputError, resumable_config, save_config, start_run
from scripts.data.datalist import write_datalist
from scripts.data.subjects import Item
from scripts.distributed import join_processes
from scripts.training.autocast import warn_of_slow_amp
from scripts.training.checkpoints import check_settings, read_checkpoint
from scripts.training.lineage import check_unseen
from scripts.training.weights import load_weights, start_from


def start(*bases: str) -> tuple[ConfigParser, Callable[[str], Any]]:
    """Check the keys, join the other processes, seed everything, warn of slow settings.

    Args:
        bases: see :func:`scripts.config.start_run`.

    Returns:
        The parser of the running configuration, and the function that reads one of its keys.

    Raises:
        InputError: also for several processes in an evaluation or inference.
    """
    parser = start_run(*bases)
    value, distributed = parser.get_parsed_content, parser.get().get("distributed", False)
    if distributed and bases != ("train.yaml",):
        raise InputError("multi_gpu.yaml is for training; workers of scheduler share subjects (docs/scale.md)")
    join_processes(distributed)
    set_determinism(value("seed"))
    group = "validate::" if bases[0] == "train.yaml" else ""
    warn_of_slow_amp(value("amp"), torch.device(value("device")), lambda: value(f"{group}evaluator::amp_kwargs"))
    return parser, value


def run_training(
    parser: ConfigParser,
    network: nn.Module,
    datalist: Mapping[str, list[Item]],
    loaded: Callable[[], None] = lambda: None,
) -> None:
    """Train from the start, from the weights of ``init_ckpt``, or from where an earlier run stopped (``resume``).

    Args:
        parser: the running configuration, which has been checked.
        network: ``network_def`` of the configuration.
        datalist: its ``datalist``.
        loaded: is called when the first weights are in the network.
    """
    value = parser.get_parsed_content
    if first := value("init_ckpt"):
        check_unseen(first, datalist["validation"] + datalist["test"], value("dataset_name"), value("patient_pattern"))
        start_from(network, first, value("settings"))
    checkpoints = value("checkpoints")
    checkpoints.config = resumable_config()
    if value("resume"):
        check_resumable(value("ckpt_dir"), network, value("settings"), checkpoints.config, value("lineage"))
    value("optimizer")  # freezes parameters, which must be done before the network is wrapped for several processes
    if value("train::compile"):
        compile_parts(network)
    output_dir = Path(value("output_dir"))
    files = [output_dir / name for name in ("metrics.csv", "learning_curves.png", "config.yaml")]
    files += [Path(value("ckpt_dir"), name) for name in ("model.pt", "last.pt")]
    value("epoch_table").track(value("train::handlers") + value("validate::handlers"), files)
    trainer = value("train::trainer")
    stopping = _early_stopping(value("train::early_stopping"), trainer, value("validate::evaluator"))
    if stopping:
        checkpoints.full["early_stopping"] = stopping
    if value("resume"):
        checkpoints.resume(trainer)
    loaded()
    write_datalist(datalist, str(output_dir / "datalist.json"), value("dataset_dir"))
    save_config(str(output_dir / "config.yaml"))
    if trainer.state.epoch < value("max_epochs") and not (stopping and stopping.counter >= stopping.patience):
        trainer.run()
    else:
        print("training is complete")


def compile_parts(network: nn.Module) -> None:
    """Compile each part of a network in place: its own methods call the parts, and their names stay the same."""
    for child in network.children():
        if next(child.parameters(), None) is not None:
            child.compile()


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


def _early_stopping(patience: int | None, trainer: Trainer, evaluator: Evaluator) -> EarlyStopping | None:
    """ignite's early stopping, attached to the validation; None if ``patience`` is None.

    It cannot be declared: it needs the trainer, whose handlers need the evaluator.
    """
    if patience is None:
        return None
    if not isinstance(patience, int) or patience < 1:
        raise InputError(f"train::early_stopping={patience!r} must be null or a whole number of validations, 1 or more")
    handler = EarlyStopping(patience, lambda engine: engine.state.metrics[engine.state.key_metric_name], trainer)
    evaluator.add_event_handler(Events.COMPLETED, handler)
    return handler
