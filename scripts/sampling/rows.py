"""A handler of an evaluator that collects rows of the items of all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ignite.engine import Events
from monai.engines.workflow import Workflow

from scripts.distributed import gather_from_all


class RowsHandler:
    """Collects the rows of each item, and writes them at the end. A subclass says what the rows are."""

    write_each = False  # also write after each iteration the rows so far, in case the run is interrupted

    def attach(self, engine: Workflow) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Workflow) -> None:
        self.rows: list[dict[str, Any]] = []

    def iteration_completed(self, engine: Workflow) -> None:
        for item in engine.state.output:
            self.rows += self.rows_of(item)
        if self.write_each:
            self.write(self.rows)

    def completed(self, engine: Workflow) -> None:
        self.write(gather_from_all(self.rows))

    def rows_of(self, item: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        """Rows of an item, on the grid of the input. May write files of the item."""
        raise NotImplementedError

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows. Every process calls it; one of them must write."""
        raise NotImplementedError
