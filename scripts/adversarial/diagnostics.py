"""Can the discriminator tell true slices from made ones? On validation slices, with an alarm."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.data.utils import set_rnd
from monai.engines import SupervisedTrainer
from monai.engines.workflow import Workflow
from monai.networks.utils import eval_mode
from sklearn.metrics import roc_auc_score
from torch import nn

from scripts.adversarial.step import AdversarialStep
from scripts.distributed import gather_from_all
from scripts.report.epoch_table import EpochTable

logger = logging.getLogger(__name__)

UNDECIDED = (0.4, 0.6)  # AUC of a discriminator that cannot tell
PATIENCE = 3  # validations


class DiscriminatorScores:
    """Validation handler: the metrics ``d_auc``, ``d_real`` and ``d_fake`` on slices of the validation subjects.

    ``d_auc`` is the probability that a true slice has a higher score than a made one. The slices are the same in every
    epoch.

    Args:
        step: holds the discriminator.
        network: makes the slices.
        dataloader: gives ``image [B, C, H, W]`` and ``label [B, 1, H, W]``; its sampler has a seed.
        device: of the networks.
        seed: of the slices.
    """

    def __init__(
        self, step: AdversarialStep, network: nn.Module, dataloader: DataLoader, device: torch.device, seed: int
    ) -> None:
        self.step, self.network = step, network
        self.dataloader, self.device, self.seed = dataloader, device, seed

    def attach(self, engine: Workflow) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        set_rnd(self.dataloader.dataset, self.seed)
        pairs: list[tuple[float, float]] = []
        with eval_mode(self.network, self.step.discriminator):
            for batch in self.dataloader:
                image, label = (batch[key].to(self.device) for key in ("image", "label"))
                native = image[:, image.shape[1] // 2, None]
                made = self.network(image).float()
                real, fake = (self.step.scores(part, native).tolist() for part in (label, made))
                pairs += zip(real, fake, strict=True)
        real, fake = torch.tensor(gather_from_all(pairs)).T
        truth = torch.cat([torch.ones_like(real), torch.zeros_like(fake)])
        engine.state.metrics["d_auc"] = float(roc_auc_score(truth, torch.cat([real, fake])))
        engine.state.metrics |= {"d_real": float(real.mean()), "d_fake": float(fake.mean())}


class CollapseAlarm:
    """Training handler that warns if the discriminator could not tell true from made in three validations in a row.

    It reads the epoch table, which a resumed training keeps.

    Args:
        table: has the column ``d_auc``.
        keys: values of the keys of the adversary, for the advice.
    """

    def __init__(self, table: EpochTable, keys: Mapping[str, Any]) -> None:
        self.table = table
        self.keys = dict(keys)

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer, after the epoch table."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        rows = [row for row in self.table.rows if row["split"] == "validation"]
        undecided = [UNDECIDED[0] <= row["d_auc"] <= UNDECIDED[1] for row in rows]
        validated = bool(rows) and rows[-1]["epoch"] == engine.state.epoch
        # once, when it begins
        if validated and undecided[-PATIENCE:] == [True] * PATIENCE and undecided[-PATIENCE - 1 : -PATIENCE] != [True]:
            logger.warning(
                f"epoch {engine.state.epoch}: the discriminator cannot tell true from made slices (d_auc "
                f"{rows[-1]['d_auc']:.2f} in {PATIENCE} validations): {self.advice()}. See docs/discriminator.md"
            )

    def advice(self) -> str:
        """What to change first."""
        if self.keys["r1_gamma"] > 0:
            return f"lower r1_gamma={self.keys['r1_gamma']}, or set it to 0"
        for key, value in {"d_input": "diff", "gan_loss": "hinge"}.items():
            if self.keys[key] != value:
                return f"set {key}={value} (now {self.keys[key]})"
        return f"raise discriminator_lr={self.keys['discriminator_lr']}"
