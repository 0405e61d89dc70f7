from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents

from scripts.config import TrainingError
from scripts.diffusion import GaussianDiffusion
from scripts.handlers import EpochTable, GradientClipping, StopOnNonFiniteLoss, format_rows
from scripts.losses import MultiTaskLoss


def engine_with(step, parameters):
    engine = Engine(step)
    engine.register_events(*IterationEvents)
    engine.scaler = None
    engine.optimizer = torch.optim.SGD(parameters, lr=0.1)
    return engine


def test_gradient_is_clipped_and_its_norm_logged():
    weight = torch.nn.Parameter(torch.zeros(4))
    clipped = []

    def step(engine, batch):
        weight.grad = torch.full((4,), float(batch))
        engine.optimizer.step()
        clipped.append(weight.grad.norm().item())

    engine = engine_with(step, [weight])
    GradientClipping(max_norm=1.0).attach(engine)
    engine.run([0.25, 5.0], max_epochs=1)
    assert clipped == pytest.approx([0.5, 1.0], rel=1e-4)
    assert engine.state.metrics["grad_norm"] == pytest.approx((0.5 + 10.0) / 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_names_the_subjects(value):
    def step(engine, batch):
        engine.state.output = {"loss": torch.tensor(value if "s2" in batch["subject"] else 1.0)}
        engine.fire_event(IterationEvents.LOSS_COMPLETED)

    engine = engine_with(step, [torch.nn.Parameter(torch.zeros(1))])
    StopOnNonFiniteLoss().attach(engine)
    batches = [{"subject": ["s1", "s1"]}, {"subject": ["s3", "s2"]}]
    with pytest.raises(TrainingError, match=r"epoch 1, iteration 2, .*\['s2', 's3'\]"):
        engine.run(batches, max_epochs=1)


def test_epoch_table_files(tmp_path, caplog):
    def step(engine, batch):
        engine.state.metrics |= {"dice": engine.state.epoch / 10, "L_seg": 0.5, "auc": float("nan")}
        if engine.state.epoch == 2:  # validation runs every second epoch
            evaluator.state.epoch = 2
            evaluator.state.metrics = {"dice": 0.15, "auc": 0.8}

    evaluator = SimpleNamespace(state=SimpleNamespace(epoch=0, metrics={}))
    engine = engine_with(step, [torch.nn.Parameter(torch.zeros(1))])
    loss = MultiTaskLoss(GaussianDiffusion())
    EpochTable(evaluator, loss, [2.4276, 0.6297], str(tmp_path)).attach(engine)
    with caplog.at_level("INFO"):
        engine.run([0], max_epochs=3)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table.columns) == list(EpochTable.COLUMNS)
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
