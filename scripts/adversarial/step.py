"""Training step of a network that makes slices, and of the discriminator that judges them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import nn

from scripts.adversarial.augmentation import augment
from scripts.adversarial.losses import Features, GanLoss, feature_matching, gradient_penalty, slice_scores
from scripts.config import InputError, TrainingError
from scripts.distributed import wrap_distributed

# what the discriminator sees of a slice and of the native one
D_INPUTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "diff": lambda image, native: image - native,
    "none": lambda image, native: image,
    "concat": lambda image, native: torch.cat([native, image], dim=1),
}


def d_channels(d_input: str) -> int:
    """Channels of what the discriminator sees.

    Raises:
        InputError: for an unknown ``d_input``.
    """
    if d_input not in D_INPUTS:
        raise InputError(f"d_input '{d_input}' is not one of {list(D_INPUTS)}")
    return 2 if d_input == "concat" else 1


class AdversarialStep:
    """``iteration_update`` of MONAI's SupervisedTrainer: one step of the network, then one of the discriminator.

    Without a discriminator, MONAI's own step is used; all else stays the same. This step fires the same events and
    accumulates gradients in the same way. MONAI's AdversarialTrainer is not used: it takes the true
    slices from the inputs of the network, sets every part of the network to training mode, and has no ``loss``.

    While the network is trained, the parameters of the discriminator need no gradient: none can be left for the step
    of the discriminator. ``components`` has the losses and diagnostics of the last step.

    Args:
        discriminator: gives features and logits of each scale (:mod:`scripts.adversarial.discriminators`).
        optimizer: of the discriminator.
        gan_weight: weight of the adversarial loss in the loss of the network.
        gan_loss: see :class:`~scripts.adversarial.losses.GanLoss`.
        d_input: what it sees: ``diff``, the slice minus the native one; ``none``, the slice alone; ``concat``, both.
        feature_weight: of feature matching.
        warmup_epochs: first epochs, in which the network is trained without the discriminator, which learns already.
        ramp_epochs: epochs after these, in which both weights rise from 0.
        r1_gamma: weight of the gradient penalty R1; 0 leaves it out.
        r1_interval: the penalty is computed once in so many iterations, and multiplied by that number (lazy
            regularisation, Karras et al., CVPR 2020).
        label_smoothing: see :class:`~scripts.adversarial.losses.GanLoss`.
        augmented: change what the discriminator sees (:func:`~scripts.adversarial.augmentation.augment`).
        amp: bfloat16 autocast of the discriminator; R1 is always in float32.

    Raises:
        InputError: for values out of range.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        optimizer: torch.optim.Optimizer,
        gan_weight: float,
        gan_loss: str = "hinge",
        d_input: str = "diff",
        feature_weight: float = 0.0,
        warmup_epochs: int = 0,
        ramp_epochs: int = 0,
        r1_gamma: float = 0.0,
        r1_interval: int = 16,
        label_smoothing: float = 0.0,
        augmented: bool = False,
        amp: bool = False,
    ) -> None:
        d_channels(d_input)
        numbers = {"gan_weight": gan_weight, "feature_weight": feature_weight, "r1_gamma": r1_gamma}
        numbers |= {"warmup_epochs": warmup_epochs, "ramp_epochs": ramp_epochs}
        for name, number in numbers.items():
            if number < 0:
                raise InputError(f"{name}={number} must be 0 or more")
        if r1_interval < 1:
            raise InputError(f"adversary::r1_interval={r1_interval} must be 1 or more")
        self.discriminator, self.optimizer = discriminator, optimizer
        self.wrapped = wrap_distributed(discriminator)
        self.loss = GanLoss(gan_loss, label_smoothing)
        self.see = D_INPUTS[d_input]
        self.gan_weight, self.feature_weight = gan_weight, feature_weight
        self.warmup_epochs, self.ramp_epochs = warmup_epochs, ramp_epochs
        self.r1_gamma, self.r1_interval = r1_gamma, r1_interval
        self.augmented = augmented
        self.amp = amp
        self.components: dict[str, torch.Tensor] = {}

    def __call__(self, engine: SupervisedTrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        """One iteration. Targets must have ``label [B, 1, H, W]``, the true slices."""
        inputs, targets = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        engine.state.output = {Keys.IMAGE: inputs, Keys.LABEL: targets}
        native = inputs[:, inputs.shape[1] // 2, None]
        real = self.see(targets[Keys.LABEL], native)
        first, last = _accumulation(engine)
        self.components = {}
        engine.network.train()
        if first:
            engine.optimizer.zero_grad(set_to_none=engine.optim_set_to_none)
            self.optimizer.zero_grad(set_to_none=True)
        self._train_network(engine, native, real)
        if last:
            engine.optimizer.step()
        self._train_discriminator(engine, real, self.see(engine.state.output[Keys.PRED].detach(), native), last)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def state_dict(self) -> dict[str, Any]:
        """Weights of the discriminator and state of its optimiser."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])

    def scores(self, image: torch.Tensor, native: torch.Tensor) -> torch.Tensor:
        """Mean logit of slices ``[B]``, for the slices and the native ones ``[B, 1, H, W]``."""
        return slice_scores(self._judge(self.discriminator, self.see(image, native)))

    def ramp(self, epoch: int) -> float:
        """Share of the weights in an epoch (from 1): 0 in the warm-up, then rising to 1."""
        return min(1.0, max(0.0, (epoch - self.warmup_epochs) / (self.ramp_epochs + 1)))

    def _train_network(self, engine: SupervisedTrainer, native: torch.Tensor, real: torch.Tensor) -> None:
        output = engine.state.output
        with _frozen(self.discriminator):
            output[Keys.PRED] = engine.inferer(output[Keys.IMAGE], engine.network)
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            loss = engine.loss_function(output[Keys.PRED], output[Keys.LABEL]).mean()
            if (share := self.ramp(engine.state.epoch)) > 0:
                loss = loss + self._adversarial_loss(self.see(output[Keys.PRED], native), real, share)
            output[Keys.LOSS] = loss
            engine.fire_event(IterationEvents.LOSS_COMPLETED)
            (loss / engine.accumulation_steps).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)

    def _adversarial_loss(self, fake: torch.Tensor, real: torch.Tensor, share: float) -> torch.Tensor:
        """What the discriminator adds to the loss of the network, with this share of its weights."""
        if self.augmented:
            real, fake = augment(torch.cat([real, fake], dim=1)).chunk(2, dim=1)
        judged = self._judge(self.discriminator, fake)
        terms = {"gan": share * self.gan_weight * self.loss.of_network(judged)}
        if self.feature_weight:
            with torch.no_grad():
                true = self._judge(self.discriminator, real)
            terms["feature"] = share * self.feature_weight * feature_matching(true, judged)
        self.components |= {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum()

    def _train_discriminator(
        self, engine: SupervisedTrainer, real: torch.Tensor, fake: torch.Tensor, last: bool
    ) -> None:
        if self.augmented:
            real, fake = augment(torch.cat([real, fake], dim=1)).chunk(2, dim=1)
        both = self._judge(self.wrapped, torch.cat([real, fake]))  # one pass: several processes wait for one
        true, made = ([[layer.chunk(2)[index] for layer in scale] for scale in both] for index in (0, 1))
        loss = self.loss.of_discriminator(true, made)
        self.components |= {"d_loss": loss.detach()}
        self.components |= {"d_real": slice_scores(true).mean().detach(), "d_fake": slice_scores(made).mean().detach()}
        if self.r1_gamma and (engine.state.iteration - 1) % self.r1_interval == 0:
            slices = real.detach().float().requires_grad_()
            penalty = gradient_penalty(self.discriminator(slices), slices)
            self.components["r1"] = penalty.detach()
            loss = loss + self.r1_gamma / 2 * self.r1_interval * penalty
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of the discriminator is {loss.item()} in epoch {engine.state.epoch}, iteration "
                f"{engine.state.iteration}: lower discriminator_lr or r1_gamma"
            )
        (loss / engine.accumulation_steps).backward()
        if last:
            gradients = [p.grad for p in self.discriminator.parameters() if p.grad is not None]
            self.components["gnorm_D"] = nn.utils.get_total_norm(gradients)
            self.optimizer.step()

    def _judge(self, discriminator: nn.Module, slices: torch.Tensor) -> Features:
        with torch.autocast(slices.device.type, torch.bfloat16, enabled=self.amp):
            found = discriminator(slices)
        return [[part.float() for part in scale] for scale in found]


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """The parameters of the network need no gradient, and get none."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def _accumulation(engine: SupervisedTrainer) -> tuple[bool, bool]:
    """Whether the iteration is the first and the last of those whose gradients are added, as in MONAI's trainer."""
    length = engine.state.epoch_length
    index = (engine.state.iteration - 1) % length
    steps = engine.accumulation_steps
    return index % steps == 0, (index + 1) % steps == 0 or index + 1 == length
