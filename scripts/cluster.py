"""Workers for jobs that are independent of each other, on this machine or on others, by Dask."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

from tqdm import tqdm

from scripts.config import InputError, TrainingError

WAITING = 1000  # jobs that the scheduler knows: it slows down with many
WAIT = "10s"  # for the answer of a scheduler
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextlib.contextmanager
def workers(scheduler: str | None, processes: int = 1) -> Iterator[Any]:
    """A ``distributed.Client`` whose workers run one job at a time.

    On this machine they are threads: a job starts a process of its own. A job of another machine's worker that dies is
    given to another worker. When the fourth worker dies of it, it counts as failed.

    Args:
        scheduler: address of a Dask scheduler, such as ``tcp://host:8786``; None starts workers on this machine.
        processes: number of these workers; with a scheduler, of those on each machine.

    Raises:
        InputError: if Dask is not installed, no scheduler answers, or ``processes`` is not positive.
    """
    try:
        from distributed import Client, LocalCluster  # imported here because it is an extra
    except ImportError as error:
        raise InputError("jobs are run by Dask, which is not installed: pip install 'distributed>=2026.8'") from error
    if not isinstance(processes, int) or processes < 1:
        raise InputError(f"processes={processes!r} must be a whole number, 1 or more")
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            address = "127.0.0.1:0"  # of the dashboard; the default is open to the network
            cluster: Any = stack.enter_context(
                LocalCluster(n_workers=processes, threads_per_worker=1, processes=False, dashboard_address=address)
            )
        try:
            client = Client(cluster if scheduler is None else scheduler, timeout=WAIT)
        except (OSError, TypeError, ValueError) as error:
            raise InputError(
                f"scheduler '{scheduler}' does not answer: {error}; start one with dask scheduler"
            ) from error
        yield stack.enter_context(client)


def run_all(client: Any, function: Callable[..., None], jobs: Sequence[tuple]) -> list[Exception | None]:
    """Run ``function(*job)`` for all jobs. Return the exception of each that failed, in their order.

    A progress bar shows how many are done.
    """
    errors: list[Exception | None] = [None] * len(jobs)
    name = function.__name__.strip("_")
    for index, error, _ in tqdm(results_of(client, function, jobs), name, len(jobs), disable=None):
        errors[index] = error
    return errors


def results_of(
    client: Any, function: Callable[..., Any], jobs: Iterable[tuple]
) -> Iterator[tuple[int, Exception | None, Any]]:
    """Run ``function(*job)`` for all jobs: the number of each job, its exception and its result, as they finish.

    Raises:
        TrainingError: if the scheduler is lost.
    """
    from distributed import as_completed

    numbers, rest = {}, enumerate(jobs)

    def submit(index: int, job: tuple) -> Any:
        future = client.submit(function, *job, pure=False)
        numbers[future.key] = index
        return future

    running = as_completed([submit(*job) for job in itertools.islice(rest, WAITING)])
    for future in running:
        error, result = _outcome(future)
        yield numbers.pop(future.key), error, result
        running.update([submit(*job) for job in itertools.islice(rest, 1)])


def _outcome(future: Any) -> tuple[Exception | None, Any]:
    """Exception and result of a finished future. Those of a lost scheduler are cancelled, or cannot be fetched."""
    try:
        error = future.exception()  # None if it is cancelled
        return error, None if error else future.result()
    except (OSError, CancelledError) as lost:
        message = "the scheduler was lost; start it and the run again: what is finished is kept"
        raise TrainingError(message) from lost


def end_with_parent() -> None:
    """Let the calling process be killed when the one that started it ends; for ``preexec_fn``, on Linux alone.

    Otherwise the program that a killed worker started would go on beside the one that takes up its job.
    """
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
