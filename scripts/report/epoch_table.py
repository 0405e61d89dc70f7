"""The epoch table: scores and losses of every epoch on the console, as CSV, in TensorBoard and as curves."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from ignite.metrics import Metric
from monai.engines import SupervisedTrainer
from monai.engines.workflow import Workflow
from monai.handlers import MLFlowHandler
from torch.utils.tensorboard import SummaryWriter

from scripts.config import atomic_path
from scripts.distributed import gather_from_all
from scripts.report.plots import plot_learning_curves

logger = logging.getLogger(__name__)

KEYS = ("epoch", "split")
TIMING = ("learning_rate", "seconds")
FIRST_DRAWING = 10  # seconds of training before the curves are drawn; shorter trainings draw them at the end


class AverageLosses(Metric):
    """Epoch mean of each loss component, over the iterations that have it.

    Args:
        output_transform: engine output to pairs of name and value (ignite treats a mapping as y_pred and y).
    """

    def reset(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def update(self, output: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, value in output:
            self.values[name].append(value)  # as a tensor: a Python number would wait for the GPU

    def compute(self) -> dict[str, float]:
        values = gather_from_all([(name, float(value)) for name, column in self.values.items() for value in column])
        names = list(dict.fromkeys(name for name, _ in values))
        return {name: float(np.mean([value for other, value in values if other == name])) for name in names}


class EpochTable:
    """Handler that writes one row per epoch and split, from the metrics of the trainer and of the evaluator.

    The table does not know the task: its columns, curves and current values are arguments. The CSV is replaced in one
    step. A missing score is an empty cell.

    Args:
        evaluator: validation engine; its row is written in the epochs in which it ran.
        output_dir: folder of ``metrics.csv``, ``learning_curves.png`` and ``tensorboard/``.
        columns: names of metrics and values, in their order.
        panels: title of each curve plot and the columns that it shows.
        values: function that returns current values other than metrics, such as the weights of the loss.
        healthy: by title of a plot, the range that is shaded.
    """

    def __init__(
        self,
        evaluator: Workflow,
        output_dir: str,
        columns: Sequence[str],
        panels: Mapping[str, Sequence[str]],
        values: Callable[[], Mapping[str, float]] = dict,
        healthy: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.evaluator = evaluator
        self.output_dir = Path(output_dir)
        self.columns = [*KEYS, *columns, *TIMING]
        self.panels = dict(panels)
        self.values = values
        self.healthy = dict(healthy or {})
        self.rows: list[dict] = []
        self.tracker: MLFlowHandler | None = None

    def track(self, handlers: Sequence[Any], files: Sequence[Path]) -> None:
        """Send rows and files to the first of MONAI's MLFlow handlers, which ``--tracking mlflow`` adds to ours.

        On their own these handlers expect decollated output, and log training and validation under the same names.
        """
        trackers = [handler for handler in handlers if isinstance(handler, MLFlowHandler)]
        for tracker in trackers:
            tracker.iteration_logger = tracker.epoch_logger = lambda engine: None
        if trackers:
            self.tracker = trackers[0]
            self.tracker.artifacts = (*self.tracker.artifacts, *files)

    def state_dict(self) -> dict[str, list]:
        """The rows so far, for a training that is resumed."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Continue after the rows of :meth:`state_dict`."""
        self.rows = list(state["rows"])

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to the trainer, after the handler that validates."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    @idist.one_rank_only()
    def started(self, engine: SupervisedTrainer) -> None:
        self.next_drawing, self.max_epochs = time.monotonic() + FIRST_DRAWING, engine.state.max_epochs
        # an interrupted run may have logged epochs after its last checkpoint; they are logged again
        self.writer = SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=engine.state.epoch + 1)

    def epoch_started(self, engine: SupervisedTrainer) -> None:
        self.start = time.monotonic()
        self.learning_rate = engine.optimizer.param_groups[0]["lr"]  # the scheduler steps before the epoch completes

    @idist.one_rank_only()
    def epoch_completed(self, engine: SupervisedTrainer) -> None:
        epoch = engine.state.epoch
        shared = {"epoch": epoch, **self.values()}
        shared |= {"learning_rate": self.learning_rate, "seconds": time.monotonic() - self.start}
        new = [engine.state.metrics | shared | {"split": "train"}]
        if self.evaluator.state.epoch == epoch:
            new.append(self.evaluator.state.metrics | shared | {"split": "validation"})
        self.rows += [{column: row.get(column, float("nan")) for column in self.columns} for row in new]
        self._write(self.rows[-len(new) :])

    @idist.one_rank_only()
    def completed(self, engine: SupervisedTrainer) -> None:
        self.writer.close()

    def _write(self, new: Sequence[Mapping]) -> None:
        logger.info("\n" + format_rows(new))
        for row in new:
            scores = {f"{name}/{row['split']}": row[name] for name in self.columns[2:] if not np.isnan(row[name])}
            for name, value in scores.items():
                self.writer.add_scalar(name, value, row["epoch"])
            if self.tracker is not None:
                self.tracker._log_metrics(scores, row["epoch"])
        table = pd.DataFrame(self.rows, columns=self.columns)
        with atomic_path(self.output_dir / "metrics.csv") as path:
            table.to_csv(path, index=False, float_format="%.6g")
        if time.monotonic() >= self.next_drawing or new[0]["epoch"] == self.max_epochs:
            self._draw(table)

    def _draw(self, table: pd.DataFrame) -> None:
        """Draw the curves, and not again before 100 times the duration of this drawing has passed."""
        start = time.monotonic()
        shared = [*self.values(), "learning_rate"]
        plot_learning_curves(table, self.panels, shared, self.output_dir / "learning_curves.png", self.healthy)
        self.next_drawing = time.monotonic() + 100 * (time.monotonic() - start)


def format_rows(rows: Sequence[Mapping]) -> str:
    """Rows of the epoch table as aligned text; an undefined score is a dash."""
    table = pd.DataFrame(rows).astype({"epoch": int}).set_index(list(KEYS)).dropna(axis="columns", how="all")
    return table.to_string(float_format=lambda value: f"{value:.3g}" if value < 1e-2 else f"{value:.3f}", na_rep="-")
