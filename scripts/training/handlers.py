"""Training handlers: reproducible seeds, a stop at non-finite losses, gradient clipping."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.data.utils import set_rnd
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import set_determinism

from scripts.config import TrainingError


class EpochSeeds:
    """Make the random numbers of an epoch depend only on seed, epoch and process.

    A training that is resumed after any epoch then draws the same numbers as one that was not interrupted.

    Args:
        dataloader: of training. Its transforms and its sampler are seeded as well as the global generators.
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
    """Stop training before a NaN or infinite loss reaches the weights; the message names the subjects."""

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
    """Clip the total gradient norm; the metric ``grad_norm`` is its mean before clipping.

    A hook of the optimiser clips right before each step. There the gradients are accumulated over the batches, and
    without the scale of mixed precision.

    Args:
        max_norm: upper bound of the norm.

    Raises:
        TrainingError: (in training) if the norm is NaN or infinite, before it reaches the weights.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        self.max_norm = max_norm

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: SupervisedTrainer) -> None:
        self.state = engine.state
        engine.optimizer.register_step_pre_hook(self.clip)

    def epoch_started(self, engine: SupervisedTrainer) -> None:
        self.norms: list[torch.Tensor] = []

    def clip(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm).detach()
        if not torch.isfinite(norm):  # clipping would turn every gradient into NaN
            raise TrainingError(
                f"the gradient norm is {norm.item()} in epoch {self.state.epoch}, iteration {self.state.iteration}: "
                "lower learning_rate; the weights are those of the step before"
            )
        self.norms.append(norm)

    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        engine.state.metrics["grad_norm"] = float(torch.stack(self.norms).mean()) if self.norms else float("nan")
