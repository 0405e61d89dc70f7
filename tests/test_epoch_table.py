from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine, Events
from test_handlers import engine_with

from scripts.diffusion.schedule import GaussianDiffusion
from scripts.report.epoch_table import AverageLosses, EpochTable, format_rows
from scripts.report.metrics import EPOCH_PANELS, epoch_columns, epoch_values
from scripts.report.plots import plot_learning_curves
from scripts.training.losses import MultiTaskLoss

GRADES = {"LGG": 0, "HGG": 1}


def epoch_table(evaluator, loss, alpha, folder):
    values = lambda: epoch_values(loss, alpha, GRADES)  # noqa: E731
    return EpochTable(evaluator, str(folder), epoch_columns(GRADES), EPOCH_PANELS, values)


def test_epoch_table_files(tmp_path, caplog):
    def step(engine, batch):
        engine.state.metrics |= {"dice": engine.state.epoch / 10, "L_seg": 0.5, "auc": float("nan")}
        if engine.state.epoch == 2:  # validation runs every second epoch
            evaluator.state.epoch = 2
            evaluator.state.metrics = {"dice": 0.15, "auc": 0.8}

    evaluator = Engine(lambda engine, batch: None)
    engine = engine_with(step, [torch.nn.Parameter(torch.zeros(1))])
    loss = MultiTaskLoss(GaussianDiffusion())
    table = epoch_table(evaluator, loss, [2.4276, 0.6297], tmp_path)
    table.attach(engine)
    with caplog.at_level("INFO"):
        engine.run([0], max_epochs=3)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table.columns) == ["epoch", "split", *epoch_columns(GRADES), "learning_rate", "seconds"]
    assert list(zip(table["epoch"], table["split"], strict=True)) == [
        (1, "train"),
        (2, "train"),
        (2, "validation"),
        (3, "train"),
    ]
    assert table["dice"].tolist() == [0.1, 0.2, 0.15, 0.3]
    assert (table["alpha_LGG"] == 2.4276).all()
    assert table["sigma_seg"].tolist() == pytest.approx([1.0] * 4)
    assert (table["learning_rate"] == 0.1).all()
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())
    assert "validation" in caplog.text


def test_console_rows_show_undefined_as_a_dash():
    rows = [
        {"epoch": 1, "split": "train", "dice": 0.5, "auc": float("nan")},
        {"epoch": 1, "split": "validation", "dice": 0.4, "auc": 0.9},
    ]
    text = format_rows(rows)
    assert "0.500" in text
    assert " - " in text or text.splitlines()[2].endswith("-")


def test_columns_of_another_task(tmp_path):
    """The table also works for a task other than segmentation and grading."""

    def step(engine, batch):
        engine.state.metrics |= {"psnr": 20.0 + engine.state.epoch}

    evaluator = Engine(lambda engine, batch: None)
    engine = engine_with(step, [torch.nn.Parameter(torch.zeros(1))])
    EpochTable(evaluator, str(tmp_path), ["psnr"], {"PSNR (dB)": ["psnr"]}).attach(engine)
    engine.run([0], max_epochs=2)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table.columns) == ["epoch", "split", "psnr", "learning_rate", "seconds"]
    assert table["psnr"].tolist() == [21.0, 22.0]


def test_plots_without_values_are_left_out(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("scripts.report.plots._save", lambda figure, file: figures.append(figure))
    rows = [{"epoch": 1, "split": split, "loss": 1.0, "auc": np.nan, "d_auc": 0.7} for split in ("train", "validation")]
    panels = {"losses": ["loss", "auc"], "grading": ["auc"], "AUC": ["d_auc"]}
    healthy = {"AUC": [0.6, 1.0], "grading": [0, 1]}
    plot_learning_curves(pd.DataFrame(rows), panels, [], tmp_path / "a.png", healthy)
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["losses", "AUC"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert [len(axes.patches) for axes in figure.axes] == [0, 1]
    nothing = pd.DataFrame([{"epoch": 1, "split": "train", "loss": np.nan, "auc": np.nan, "d_auc": np.nan}])
    plot_learning_curves(nothing, panels, [], tmp_path / "b.png", healthy)
    assert len(figures) == 1


def test_curves_are_drawn_rarely_and_at_the_end(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "scripts.report.epoch_table.plot_learning_curves", lambda table, *rest: drawn.append(len(table))
    )
    evaluator = Engine(lambda engine, batch: None)
    engine = engine_with(lambda engine, batch: None, [torch.nn.Parameter(torch.zeros(1))])
    table = epoch_table(evaluator, MultiTaskLoss(GaussianDiffusion()), [1.0, 1.0], tmp_path)
    table.attach(engine)
    # as if the first drawing were due in the second epoch, and had taken long
    engine.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: setattr(table, "next_drawing", 0.0))
    engine.add_event_handler(Events.EPOCH_STARTED(once=3), lambda: setattr(table, "next_drawing", math.inf))
    engine.run([0], max_epochs=5)
    assert drawn == [2, 5]


def test_losses_average_over_the_iterations_that_have_them():
    metric = AverageLosses()
    metric.update({"L_seg": torch.tensor(1.0), "L_cls": torch.tensor(4.0)}.items())
    metric.update({"L_seg": torch.tensor(3.0)}.items())
    assert metric.compute() == {"L_seg": 2.0, "L_cls": 4.0}
