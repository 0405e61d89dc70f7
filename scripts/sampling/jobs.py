"""The subjects of an evaluation or an inference as jobs, which run here or on Dask's workers."""

from __future__ import annotations

import json
import logging
import os
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple

from monai.bundle import ConfigParser
from monai.utils import set_determinism
from tqdm import tqdm

from scripts.cluster import results_of, workers
from scripts.config import InputError, explain, refuse_all, remove_partial, warn_some
from scripts.data.subjects import EmptyFolder, Item
from scripts.sampling.evaluator import VolumeEvaluator
from scripts.sampling.report import Report
from scripts.streams.manifest import Manifest, origin_of
from scripts.streams.storage import Output
from scripts.streams.subjects import name_of

logger = logging.getLogger(__name__)

WEIGHTS = ("ckpt_path", "onnx_dir")  # keys of the files that hold weights
LOCK = threading.Lock()  # a worker with several threads has one network


class Run(NamedTuple):
    """What every worker has to know: enough to build the engine of the run."""

    config: str  # JSON
    group: str  # of the keys evaluator and reports: "" or "validate::"
    origin: str  # see origin_of
    folder: str  # of the command, to which paths are relative


class Engine(NamedTuple):
    """What computes a subject."""

    evaluator: VolumeEvaluator
    reports: Sequence[Report]
    opened: Callable[[Any], AbstractContextManager[tuple[Item, dict[str, Any]]]]  # the item, states of its images
    output: Output
    manifest: Manifest | None


class Result(NamedTuple):
    """What became of a subject: rows of each report, or a reason why there are none."""

    order: int
    rows: list[list[dict[str, Any]]]
    error: str | None = None
    empty: bool = False  # a folder without a volume


_engine: dict[Run, Engine] = {}  # of the last run; kept by the worker's process


def evaluate_subjects(parser: ConfigParser, items: Sequence[Item]) -> None:
    """Compute the reports ``validate::reports`` of all items, with the workers of ``scheduler``.

    Raises:
        InputError: for the first subject that cannot be computed.
    """
    run = _start(parser, "validate::")
    found: dict[int, list[list[dict[str, Any]]]] = {}
    with closing(_results(run, parser.get_parsed_content("scheduler"), list(enumerate(items)))) as results:
        for result in results:
            if result.error is not None:
                raise InputError(result.error)
            found[result.order] = result.rows
    _write(_engine[run].reports, [found[order] for order in sorted(found)])


def infer_subjects(parser: ConfigParser) -> None:
    """Compute all subjects of ``data`` that are not finished yet, then write the reports ``reports`` of all.

    A subject that cannot be computed does not stop the others.

    Raises:
        InputError: at the end, naming the subjects that could not be computed.
    """
    run, data = _start(parser, ""), parser.get_parsed_content("data")
    reports, output, manifest = _engine[run].reports, _engine[run].output, _engine[run].manifest
    assert manifest is not None
    finished = manifest.finished(data.names, data.is_unchanged)
    waiting = [order for order, name in enumerate(data.names) if name not in finished]
    if len(waiting) < len(data):
        logger.info(f"{len(data) - len(waiting)} of {len(data)} subjects are finished already")
    if waiting:
        output.check_writable()
    errors, empty = [], []
    jobs = [(order, data.sources[order]) for order in waiting]
    try:
        with closing(_results(run, parser.get_parsed_content("scheduler"), jobs)) as results:
            for result in results:
                if result.error is not None:
                    logger.error(result.error)  # now, and all together at the end
                    errors.append((result.order, result.error))
                empty += [data.names[result.order]] if result.empty else []
    finally:  # also of an interrupted run
        remove_partial(output.folder)
        records = manifest.records(data.names)
        if records.rows and not records.are_written():
            _write(reports, records.rows)
            output.send()
            records.set_written()
    warn_some("folders hold no volume and are left out", sorted(empty))
    refuse_all([error for _, error in sorted(errors)])


def _start(parser: ConfigParser, group: str) -> Run:
    """The run of a configuration, whose engine is ready in this process."""
    config = {key: value for key, value in parser.get().items() if key != ConfigParser.meta_key}
    weights = [parser.get_parsed_content(key) for key in WEIGHTS if key in config]
    run = Run(json.dumps(config, default=str), group, origin_of(config, weights), os.getcwd())
    _engine.clear()
    _engine[run] = _engine_of(parser, run)
    return run


def _engine_of(parser: ConfigParser, run: Run) -> Engine:
    value, output = parser.get_parsed_content, Output(parser.get_parsed_content("output_dir"))
    if output.store is not None:
        parser["output_dir"] = str(output.folder)
    evaluator, reports = value(f"{run.group}evaluator"), value(f"{run.group}reports")
    if run.group:
        return Engine(evaluator, reports, lambda item: nullcontext((item, {})), output, None)
    return Engine(evaluator, reports, value("data").opened, output, Manifest(output.place("manifest"), run.origin))


def _results(run: Run, scheduler: str | None, jobs: Sequence[tuple[int, Any]]) -> Generator[Result]:
    """Results of the jobs, as they finish. A progress bar counts them."""
    if scheduler is None:
        yield from tqdm((compute(run, *job) for job in jobs), "Subjects", len(jobs), disable=None)
    elif jobs:
        with workers(scheduler) as client:
            for index, killed, result in tqdm(
                results_of(client, compute, ((run, *job) for job in jobs)), "Subjects", len(jobs), disable=None
            ):
                order, source = jobs[index]
                # the error is Dask's: compute returns its own
                yield Result(order, [], f"subject '{name_of(source)}': {killed}") if killed else result


def compute(run: Run, order: int, source: Any) -> Result:
    """Compute a subject in this process.

    Args:
        run: that it belongs to.
        order: number of the subject in the run.
        source: what the engine opens.
    """
    with LOCK:
        try:
            return Result(order, _compute(_ready(run), order, source))
        except EmptyFolder:
            return Result(order, [], empty=True)
        except Exception as error:
            name, known = name_of(source), explain(error)
            if known is None:
                logger.error(f"subject '{name}':\n{traceback.format_exc()}")
            text = known or _first_cause(error)
            return Result(order, [], text if f"'{name}'" in text else f"subject '{name}': {text}")


def _first_cause(error: BaseException) -> str:
    """One line for the error that MONAI's transforms hide: as a cause, or at the end of a traceback in a message."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {error}"


def _ready(run: Run) -> Engine:
    """The engine of the run. It is built once in a process."""
    if run not in _engine:
        os.chdir(run.folder)
        parser = ConfigParser(json.loads(run.config))
        set_determinism(parser.get_parsed_content("seed"))
        _engine.clear()
        _engine[run] = _engine_of(parser, run)
    return _engine[run]


def _compute(engine: Engine, order: int, source: Any) -> list[list[dict[str, Any]]]:
    with engine.opened(source) as (item, images):
        for report in engine.reports:
            report.check(item)
        output = engine.evaluator.run_on(item) | {"order": order}
        rows = [list(report.rows_of(output)) for report in engine.reports]
    if engine.manifest is None:
        return rows
    engine.output.send()
    engine.manifest.write(item["subject"], images, rows)
    return []


def _write(reports: Sequence[Report], subjects: Iterable[list[list[dict[str, Any]]]]) -> None:
    """Write the reports of the rows of all subjects."""
    for report, found in zip(reports, zip(*subjects, strict=True), strict=True):
        report.write([row for rows in found for row in rows])
