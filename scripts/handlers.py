"""Training handlers: seeds, guards, gradients, early stopping, and the epoch table."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.data.utils import set_rnd
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.engines.workflow import Workflow
from monai.handlers import MLFlowHandler
from monai.utils import set_determinism
from torch.nn.functional import cosine_similarity
from torch.utils.tensorboard import SummaryWriter

from scripts.baselines import Baseline
from scripts.config import InputError, TrainingError, atomic_path
from scripts.losses import TASKS, MultiTaskLoss
from scripts.net import MedSegDiff
from scripts.plots import plot_learning_curves

logger = logging.getLogger(__name__)


class EpochSeeds:
    """Make the random numbers of an epoch depend on nothing but seed, epoch and process.

    Training that is resumed at any epoch then draws what it would have drawn uninterrupted.

    Args:
        dataloader: of training; its transforms and its sampler are seeded beside the global generators.
        seed: seed of the training.
    """

    def __init__(self, dataloader: DataLoader, seed: int) -> None:
        self.dataloader = dataloader
        self.sampler: Any = dataloader.sampler
        self.seed = seed

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        key = (self.seed, engine.state.epoch, idist.get_rank())
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        set_determinism(seed)
        set_rnd(self.dataloader.dataset, seed)
        self.sampler.seed = seed


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

    Right before the optimiser steps: there the gradients are accumulated over batches and free of the loss scale.

    Args:
        max_norm: largest norm let through.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        self.max_norm = max_norm

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: SupervisedTrainer) -> None:
        engine.optimizer.register_step_pre_hook(self.clip)

    def epoch_started(self, engine: SupervisedTrainer) -> None:
        self.norms: list[torch.Tensor] = []

    def clip(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norms.append(torch.nn.utils.clip_grad_norm_(parameters, self.max_norm).detach())

    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        engine.state.metrics["grad_norm"] = float(torch.stack(self.norms).mean()) if self.norms else float("nan")


class GradientCosine:
    """Do the tasks pull the shared features the same way? Their gradients' cosine, as the metric ``gradient_cosine``.

    At every ``every``-th iteration the gradients of the two task losses with respect to the output of the network's
    ``bottleneck`` are compared, over the slices that grading learns from; the epoch's mean is logged. 1 is the same
    direction, 0 none in common, below 0 a conflict (Yu et al., NeurIPS 2020, Gradient Surgery).

    Args:
        network: has a ``bottleneck``.
        loss: whose ``task_losses`` are compared.
        every: iterations between comparisons, each of which costs two backward passes to the bottleneck.
    """

    def __init__(self, network: MedSegDiff | Baseline, loss: MultiTaskLoss, every: int = 10) -> None:
        self.loss = loss
        self.every = every
        network.bottleneck.register_forward_hook(self.keep_features)

    def keep_features(self, module: torch.nn.Module, inputs: tuple, features: torch.Tensor) -> None:
        self.features = features

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.loss_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def epoch_started(self, engine: SupervisedTrainer) -> None:
        self.cosines: list[float] = []

    def loss_completed(self, engine: SupervisedTrainer) -> None:
        losses = self.loss.task_losses
        if engine.state.iteration % self.every == 0 and len(losses) == 2 and self.features.requires_grad:
            masks, grade = (
                torch.autograd.grad(losses[task], self.features, retain_graph=True)[0].float() for task in TASKS
            )
            learnt = grade.flatten(1).any(dim=1)
            self.cosines.append(float(cosine_similarity(masks[learnt].flatten(), grade[learnt].flatten(), dim=0)))

    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        engine.state.metrics["gradient_cosine"] = float(np.mean(self.cosines)) if self.cosines else float("nan")


class EarlyStopping:
    """Stop when the best validation Dice is older than ``patience`` epochs; MONAI's keeps a count no checkpoint holds.

    Args:
        evaluator: validation engine.
        patience: epochs.

    Raises:
        InputError: when ``patience`` is not a positive whole number.
    """

    def __init__(self, evaluator: Workflow, patience: int) -> None:
        if not isinstance(patience, int) or patience < 1:
            raise InputError(f"early_stopping={patience!r} must be a whole number of epochs, 1 or more; null is never")
        self.evaluator = evaluator
        self.patience = patience

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer, after the handler that validates."""
        # also at the start: a training that had stopped stays so when it is resumed
        engine.add_event_handler(Events.STARTED | Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        best = self.evaluator.state.best_metric_epoch
        if 0 < best <= engine.state.epoch - self.patience:
            logger.info(f"no better validation Dice since epoch {best}: training stops early")
            engine.terminate()


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
        "L_total", "sigma_seg", "sigma_cls", "alpha_LGG", "alpha_HGG", "grad_norm", "gradient_cosine",
        "learning_rate", "seconds",
    )  # fmt: skip

    def __init__(self, evaluator: Workflow, loss: MultiTaskLoss, alpha: Sequence[float], output_dir: str) -> None:
        self.evaluator = evaluator
        self.loss = loss
        self.alpha = {"alpha_LGG": alpha[0], "alpha_HGG": alpha[1]}
        self.output_dir = Path(output_dir)
        self.rows: list[dict] = []
        self.tracker: MLFlowHandler | None = None

    def track(self, handlers: Sequence[Any], files: Sequence[str]) -> None:
        """Hand rows and files to the first of MONAI's MLFlow handlers, which ``--tracking mlflow`` puts among ours.

        By themselves they expect decollated output, and log training and validation under the same names.
        """
        trackers = [handler for handler in handlers if isinstance(handler, MLFlowHandler)]
        for tracker in trackers:
            tracker.iteration_logger = tracker.epoch_logger = lambda engine: None
        if trackers:
            self.tracker = trackers[0]
            self.tracker.artifacts = (*self.tracker.artifacts, *map(Path, files))

    def state_dict(self) -> dict[str, list]:
        """The rows so far, for a training that is resumed."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Go on after the rows of :meth:`state_dict`."""
        self.rows = list(state["rows"])

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer, after the handler that validates."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    @idist.one_rank_only()
    def started(self, engine: SupervisedTrainer) -> None:
        self.next_drawing, self.max_epochs = 0.0, engine.state.max_epochs
        # what an interrupted run logged after its last checkpoint is logged anew
        self.writer = SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=engine.state.epoch + 1)

    def epoch_started(self, engine: SupervisedTrainer) -> None:
        self.start = time.monotonic()
        self.learning_rate = engine.optimizer.param_groups[0]["lr"]  # the scheduler has stepped when the epoch ends

    @idist.one_rank_only()
    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        epoch = engine.state.epoch
        shared = {"epoch": epoch} | self.loss.sigmas | self.alpha
        shared |= {"learning_rate": self.learning_rate, "seconds": time.monotonic() - self.start}
        new = [engine.state.metrics | shared | {"split": "train"}]
        if self.evaluator.state.epoch == epoch:
            new.append(self.evaluator.state.metrics | shared | {"split": "validation"})
        self.rows += [{column: row.get(column, float("nan")) for column in self.COLUMNS} for row in new]
        self._write(self.rows[-len(new) :])

    @idist.one_rank_only()
    def completed(self, engine: SupervisedTrainer) -> None:
        self.writer.close()

    def _write(self, new: Sequence[Mapping]) -> None:
        logger.info("\n" + format_rows(new))
        for row in new:
            scores = {f"{name}/{row['split']}": row[name] for name in self.COLUMNS[2:] if not np.isnan(row[name])}
            for name, value in scores.items():
                self.writer.add_scalar(name, value, row["epoch"])
            if self.tracker is not None:
                self.tracker._log_metrics(scores, row["epoch"])
        table = pd.DataFrame(self.rows, columns=list(self.COLUMNS))
        with atomic_path(self.output_dir / "metrics.csv") as path:
            table.to_csv(path, index=False, float_format="%.6g")
        if time.monotonic() >= self.next_drawing or new[0]["epoch"] == self.max_epochs:
            self._draw()

    def _draw(self) -> None:
        """Draw the curves, and let a hundred times as long go by before they are drawn again."""
        start = time.monotonic()
        table = pd.DataFrame(self.rows, columns=list(self.COLUMNS))
        plot_learning_curves(table, self.output_dir / "learning_curves.png")
        self.next_drawing = time.monotonic() + 100 * (time.monotonic() - start)


def format_rows(rows: Sequence[Mapping]) -> str:
    """Rows of the epoch table as aligned text; scores that are undefined are a dash."""
    table = pd.DataFrame(rows).astype({"epoch": int}).set_index(["epoch", "split"]).dropna(axis="columns", how="all")
    return table.to_string(float_format=lambda value: f"{value:.3g}" if value < 1e-2 else f"{value:.3f}", na_rep="-")
