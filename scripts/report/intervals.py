"""Bootstrap intervals over patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import bootstrap


def with_intervals(
    statistic: Callable[[np.ndarray], Mapping[str, float]],
    patients: Sequence[str],
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, float | None]]:
    """Named statistics of a table, each with its 95 % bootstrap interval (percentile method).

    Patients are drawn with replacement, each with all of its rows (the cluster bootstrap; Field and Welsh, JRSS B
    2007): the rows of a patient are alike, and drawing rows would give intervals that are too narrow.

    Undefined values are None; resamples in which a statistic is undefined (one class only) are left out for it.

    Args:
        statistic: from numbers of rows to values by name.
        patients: patient of each row.
        seed: of the bootstrap.
        resamples: number of draws.
    """
    groups = np.unique(np.asarray(patients, dtype=str), return_inverse=True)[1]
    rows = [np.flatnonzero(groups == group) for group in range(groups.max(initial=-1) + 1)]
    values = statistic(np.arange(len(groups)))
    intervals = np.full((len(values), 2), np.nan)
    if len(rows) > 1:
        drawn = bootstrap(
            (np.arange(len(rows)),),
            lambda sample: np.array(list(statistic(np.concatenate([rows[i] for i in sample])).values())),
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
