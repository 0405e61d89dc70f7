"""Training handlers: gradient clipping, the stop at a non-finite loss, and the epoch table."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.engines.workflow import Workflow
from torch.utils.tensorboard import SummaryWriter

from scripts.config import TrainingError, atomic_path
from scripts.losses import MultiTaskLoss
from scripts.plots import plot_learning_curves

logger = logging.getLogger(__name__)


class StopOnNonFiniteLoss:
    """Stop before a NaN or infinite loss reaches the weights, naming the subjects of the batch."""

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        loss = engine.state.output["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} in epoch {engine.state.epoch}, iteration {engine.state.iteration}, "
                f"with the subjects {sorted(set(engine.state.batch['subject']))}: "
                "check these volumes, or lower learning_rate"
            )


class GradientClipping:
    """Clip the total gradient norm and log its mean before clipping as the metric ``grad_norm``.

    Args:
        max_norm: largest norm let through.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        self.max_norm = max_norm

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.backward_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def epoch_started(self, engine: SupervisedTrainer) -> None:
        self.norms: list[float] = []

    def backward_completed(self, engine: SupervisedTrainer) -> None:
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_norm))
        if np.isfinite(norm):  # under AMP the scaler skips a step that overflowed
            self.norms.append(norm)

    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        engine.state.metrics["grad_norm"] = float(np.mean(self.norms)) if self.norms else float("nan")


class EpochTable:
    """Every epoch's scores, losses, sigmas and alphas: console, CSV, TensorBoard and learning curves.

    Training Dice is of the x_0 predicted from a noised truth, over slices with tumour; validation Dice is of sampled
    masks of whole volumes. One row per epoch and split, rewritten in one step.

    Args:
        evaluator: validation engine; its row is written in epochs that it ran in.
        loss: gives the sigmas.
        alpha: class weights ``[alpha_LGG, alpha_HGG]``.
        output_dir: folder of ``metrics.csv``, ``learning_curves.png`` and ``tensorboard/``.
    """

    COLUMNS = (
        "epoch", "split", "dice", "iou", "auc", "f1", "f1_LGG", "f1_HGG", "accuracy", "L_seg", "L_calib", "L_cls",
        "L_total", "sigma_seg", "sigma_cls", "alpha_LGG", "alpha_HGG", "grad_norm", "learning_rate", "seconds",
    )  # fmt: skip

    def __init__(self, evaluator: Workflow, loss: MultiTaskLoss, alpha: Sequence[float], output_dir: str) -> None:
        self.evaluator = evaluator
        self.loss = loss
        self.alpha = {"alpha_LGG": alpha[0], "alpha_HGG": alpha[1]}
        self.output_dir = Path(output_dir)
        self.rows: list[dict] = []

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer, after the handler that validates."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: SupervisedTrainer) -> None:
        self.writer = SummaryWriter(str(self.output_dir / "tensorboard"))

    def epoch_started(self, engine: SupervisedTrainer) -> None:
        self.start = time.monotonic()
        self.learning_rate = engine.optimizer.param_groups[0]["lr"]  # the scheduler has stepped when the epoch ends

    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        epoch = engine.state.epoch
        shared = {"epoch": epoch} | self.loss.sigmas | self.alpha
        shared |= {"learning_rate": self.learning_rate, "seconds": time.monotonic() - self.start}
        new = [engine.state.metrics | shared | {"split": "train"}]
        if self.evaluator.state.epoch == epoch:
            new.append(self.evaluator.state.metrics | shared | {"split": "validation"})
        self.rows += [{column: row.get(column, float("nan")) for column in self.COLUMNS} for row in new]
        self._write(self.rows[-len(new) :])

    def completed(self, engine: SupervisedTrainer) -> None:
        self.writer.close()

    def _write(self, new: Sequence[Mapping]) -> None:
        logger.info("\n" + format_rows(new))
        for row in new:
            for name in self.COLUMNS[2:]:
                if not np.isnan(row[name]):
                    self.writer.add_scalar(f"{name}/{row['split']}", row[name], row["epoch"])
        table = pd.DataFrame(self.rows, columns=list(self.COLUMNS))
        with atomic_path(self.output_dir / "metrics.csv") as path:
            table.to_csv(path, index=False, float_format="%.6g")
        plot_learning_curves(table, self.output_dir / "learning_curves.png")


def format_rows(rows: Sequence[Mapping]) -> str:
    """Rows of the epoch table as aligned text; scores that are undefined are a dash."""
    table = pd.DataFrame(rows).astype({"epoch": int}).set_index(["epoch", "split"]).dropna(axis="columns", how="all")
    return table.to_string(float_format=lambda value: f"{value:.3g}" if value < 1e-2 else f"{value:.3f}", na_rep="-")
