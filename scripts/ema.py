"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn

from scripts.config import InputError


class WeightAverage(EMAHandler):
    """ignite's EMA handler, exact for frozen parameters and resumable; the average is :attr:`ema_model`.

    ema <- ema + (1 - decay) (weight - ema) after every optimiser step, which leaves a parameter that equals its
    average bit for bit as it is; ignite's (1 - m) ema + m weight rounds. The decay rises linearly from 0 over
    ``warmup_steps``, so that the average forgets the initial weights.

    Args:
        model: network to average.
        decay: share of the old average that is kept at each step, between 0 and 1.
        warmup_steps: optimiser steps.
        every: iterations per optimiser step (gradient accumulation).

    Raises:
        InputError: for a decay outside (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, warmup_steps: int = 100, every: int = 1) -> None:
        if not isinstance(decay, float) or not 0 < decay < 1:
            raise InputError(f"ema_decay={decay!r} must lie between 0 and 1, such as 0.999; null turns the average off")
        super().__init__(model, 1 - decay, momentum_warmup=1.0, warmup_iters=warmup_steps)
        self.every = every

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        """Attach to the trainer."""
        super().attach(engine, event=Events.ITERATION_COMPLETED(every=self.every))  # ignite warms up its own name only

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        with torch.no_grad():
            averages: list[torch.Tensor] = list(self.ema_model.parameters())
            weights: list[torch.Tensor] = list(self.model.parameters())
            torch._foreach_lerp_(averages, weights, getattr(engine.state, name))
            for average, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
                average.copy_(buffer)

    @property
    def warm_up(self) -> Any:
        """ignite's scheduler of the momentum, there once the handler is attached; it counts the steps."""
        return self.momentum_scheduler

    def state_dict(self) -> dict[str, Any]:
        """The average and how far its warm-up is."""
        return {"ema_model": self.ema_model.state_dict(), "steps": self.warm_up.event_index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.ema_model.load_state_dict(state["ema_model"])
        self.warm_up.event_index = state["steps"]
