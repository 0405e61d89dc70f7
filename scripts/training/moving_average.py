"""Exponential moving average of the weights, by torch."""

from __future__ import annotations

from typing import Any

from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripts.config import InputError


class MovingAverage:
    """Handler that updates torch's :class:`AveragedModel` after every step of the optimiser.

    The average starts as the weights after the first step. Buffers are copied, not averaged. Validation uses
    :attr:`network`, and ``model.pt`` keeps it.

    Args:
        network: network to average.
        decay: share of the old average that is kept at each step, between 0 and 1.

    Raises:
        InputError: for a decay outside (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not isinstance(decay, float) or not 0 < decay < 1:
            raise InputError(f"ema::decay={decay!r} must lie between 0 and 1, such as 0.999")
        self.trained = network
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def network(self) -> nn.Module:
        """The network with the averaged weights."""
        return self.average.module

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.started)

    def started(self, engine: SupervisedTrainer) -> None:
        engine.optimizer.register_step_post_hook(lambda *_: self.average.update_parameters(self.trained))

    def state_dict(self) -> dict[str, Any]:
        """The average and its number of updates."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.average.load_state_dict(state)
