"""MONAI's evaluation engine for whole volumes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from torch import nn

from scripts.distributed import broadcast_buffers


class VolumePredictor(Protocol):
    """What the evaluator expects of an inferer."""

    def predict(self, inputs: torch.Tensor, network: nn.Module) -> dict[str, torch.Tensor]:
        """Outputs by name for volumes ``[B, M, H, W, S]``."""


class VolumeEvaluator(SupervisedEvaluator):
    """MONAI's evaluator for an inferer with several outputs.

    The output of an iteration holds ``image [B, M, H, W, S]``, the outputs of :meth:`VolumePredictor.predict`, and
    ``subject`` and (if there are) ``modalities``, ``grade``, ``label [B, R, H', W', S']`` and ``annotations`` of the
    batch, on the input's grid.
    """

    inferer: VolumePredictor  # type: ignore[assignment]

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Evaluate. All processes use the buffers of the first process, whose network is saved."""
        broadcast_buffers(self.network)
        super().run(global_epoch)

    def run_on(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The postprocessed output for one item of the data set instead of all."""
        self.logger.setLevel(logging.CRITICAL)  # ignite logs three lines for each run, and errors that it raises, too
        self.data_loader.dataset.data = [item]  # type: ignore[union-attr]
        self.state.epoch_length = 1
        self.state.output = None
        self.run()
        if self.state.output is None:  # ignite does not run after a run that failed, but once more
            self.run()
        (output,) = self.state.output
        return output

    def _iteration(self, engine: VolumeEvaluator, batchdata: dict) -> dict:  # type: ignore[override]
        device = engine.state.device
        image = batchdata["image"].to(device, non_blocking=engine.non_blocking)
        engine.state.output = {"image": image}
        # MONAI's evaluator autocasts for "cuda" on any device
        autocast = (
            torch.autocast(torch.device(device).type, **engine.amp_kwargs) if engine.amp else contextlib.nullcontext()
        )
        with engine.mode(engine.network), autocast:
            engine.state.output |= engine.inferer.predict(image, engine.network)  # type: ignore[arg-type]
        engine.state.output |= {key: batchdata[key] for key in ("subject", "modalities") if key in batchdata}
        for key in ("grade", "label", "annotations"):
            if isinstance(batchdata.get(key), torch.Tensor):  # the label is not loaded in inference
                engine.state.output[key] = batchdata[key].to(device)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output
