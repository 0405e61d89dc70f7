"""Bootstrap intervals over subjects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import bootstrap


def with_intervals(
    statistic: Callable[..., Mapping[str, float]],
    *columns: Sequence[float] | np.ndarray,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, float | None]]:
    """Named statistics of paired columns, each with its 95 % bootstrap interval over subjects (percentile method).

    Undefined values are None; resamples in which a statistic is undefined (one class only) are left out for it.
    """
    values = statistic(*map(np.asarray, columns))
    intervals = np.full((len(values), 2), np.nan)
    if len(columns[0]) > 1:
        drawn = bootstrap(
            columns,
            lambda *sample: np.array(list(statistic(*sample).values())),
            paired=True,
            vectorized=False,
            n_resamples=resamples,
            method="percentile",
            rng=seed,
        ).bootstrap_distribution
        for i, value in enumerate(values.values()):
            if not np.isnan(value):
                intervals[i] = np.nanpercentile(drawn[i], [2.5, 97.5])
    return {
        name: {key: None if np.isnan(x) else float(x) for key, x in zip(("value", "low", "high"), row, strict=True)}
        for name, row in zip(values, np.column_stack([list(values.values()), intervals]), strict=True)
    }
