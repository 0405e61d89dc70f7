"""What Dask's workers cannot run; what they do is in acceptance/test_cluster.py."""

from __future__ import annotations

import pytest

from scripts.cluster import workers
from scripts.config import InputError


@pytest.mark.parametrize(
    ("scheduler", "processes", "message"),
    [
        (None, 0, "processes=0 must be a whole number, 1 or more"),
        (None, "2", "processes='2' must be"),
        ("nowhere", 1, "scheduler 'nowhere' does not answer"),
    ],
)
def test_what_cannot_run_is_refused(scheduler, processes, message):
    with pytest.raises(InputError, match=message), workers(scheduler, processes):
        raise AssertionError("it runs")
