"""Which timesteps training draws."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from torch.nn.functional import binary_cross_entropy_with_logits

from scripts.config import InputError

STRATEGIES = ("uniform", "high_noise", "terminal", "importance")
NUM_BINS = 10


class TimestepSampler:
    """Draw training timesteps by a weight per timestep, t = 0 to T - 1.

    ``uniform``: all alike. ``high_noise``: in proportion to t + 1. ``terminal``: half of them at T - 1, where sampling
    starts and the mask has to come from the image, the others uniform. ``importance``: in proportion to the root of
    the mean squared loss of ten equal ranges of t (Nichol and Dhariwal 2021, equation 18), which it learns as a handler
    of the trainer. Their reweighting of the loss is left out: Dice over a batch has no weight per slice, and the
    aim here is to train more where the error is.

    Args:
        strategy: one of :data:`STRATEGIES`.
        num_train_timesteps: T.

    Raises:
        InputError: for an unknown strategy.
    """

    def __init__(self, strategy: str, num_train_timesteps: int) -> None:
        if strategy not in STRATEGIES:
            raise InputError(f"timestep_sampling '{strategy}' is not one of {list(STRATEGIES)}")
        self.strategy = strategy
        self.weight = torch.ones(num_train_timesteps)
        if strategy == "high_noise":
            self.weight = torch.arange(1.0, num_train_timesteps + 1)
        elif strategy == "terminal":
            self.weight[-1] += num_train_timesteps
        self.squared_loss = torch.ones(NUM_BINS)

    def __call__(self, num: int) -> torch.Tensor:
        """``num`` timesteps, ``[num]`` on the CPU."""
        return torch.multinomial(self.weight, num, replacement=True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What ``importance`` has learnt."""
        return {"weight": self.weight, "squared_loss": self.squared_loss}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        self.weight, self.squared_loss = state["weight"], state["squared_loss"]

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, whose output ``importance`` learns from."""
        if self.strategy == "importance":
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)

    def iteration_completed(self, engine: Engine) -> None:
        output: Any = engine.state.output
        seg_logits, targets = output["pred"][0].detach().float(), output["label"]
        loss = binary_cross_entropy_with_logits(seg_logits, targets["label"].float(), reduction="none")
        squared = loss.flatten(1).mean(dim=1).square().cpu()
        steps = len(self.weight)
        bins = targets["timesteps"].cpu() * NUM_BINS // steps
        for index in bins.unique():  # a running mean over some ten batches
            self.squared_loss[index] += 0.1 * (squared[bins == index].mean() - self.squared_loss[index])
        self.weight = self.squared_loss.sqrt()[torch.arange(steps) * NUM_BINS // steps]
