"""What an evaluation or an inference writes: rows of each subject, and tables, plots and pages of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Report:
    """Rows of each subject, on whatever machine it is computed, and what is written of the rows of all subjects."""

    def check(self, item: Mapping[str, Any]) -> None:
        """Raise InputError, before a subject is computed, if nothing can be written of it."""

    def rows_of(self, item: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        """Rows of a computed item, on the grid of the input. May write files of the item.

        In an inference, the rows are kept as JSON.

        Args:
            item: output of :class:`~scripts.sampling.evaluator.VolumeEvaluator`, and the ``order`` of the subject in
                the run, from 0.
        """
        raise NotImplementedError

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows of all subjects, in their order."""
        raise NotImplementedError
