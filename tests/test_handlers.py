from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines.utils import IterationEvents
from monai.transforms import RandScaleIntensity

from scripts.config import TrainingError
from scripts.dataset import SliceSampler
from scripts.diffusion import GaussianDiffusion
from scripts.handlers import (
    EarlyStopping,
    EpochSeeds,
    EpochTable,
    GradientClipping,
    GradientCosine,
    StopOnNonFiniteLoss,
    format_rows,
)
from scripts.losses import MultiTaskLoss
from scripts.net import MedSegDiff
from test_net import TINY, randomise


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


def test_accumulated_gradients_are_clipped_once_a_step():
    weight = torch.nn.Parameter(torch.zeros(1))

    def step(engine, batch):
        weight.grad = torch.full((1,), 2.0)
        if engine.state.iteration % 2 == 0:
            engine.optimizer.step()

    engine = engine_with(step, [weight])
    clipping = GradientClipping(max_norm=1.0)
    clipping.attach(engine)
    engine.run(range(4), max_epochs=1)
    assert len(clipping.norms) == 2


def shared_features(sign):
    """A network whose task losses are its bottleneck's sum and ``sign`` times the half of it."""
    network = randomise(MedSegDiff(GaussianDiffusion(), **TINY))
    loss = MultiTaskLoss(network.diffusion)
    cosine = GradientCosine(network, loss, every=1)
    network(torch.randn(2, 4, 16, 16), torch.randn(2, 1, 16, 16), torch.tensor([3, 9]))
    loss.task_losses = {"segmentation": cosine.features.sum(), "grading": sign * cosine.features[:1].sum() / 2}
    return network, cosine


@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_cosine_at_the_bottleneck(sign):
    network, cosine = shared_features(sign)
    engine = engine_with(lambda engine, batch: engine.fire_event(IterationEvents.LOSS_COMPLETED), network.parameters())
    cosine.attach(engine)
    engine.run([0], max_epochs=1)
    assert engine.state.metrics["gradient_cosine"] == pytest.approx(sign, abs=1e-5)
    assert all(parameter.grad is None for parameter in network.parameters())  # it only looks


def test_gradient_cosine_without_two_tasks_is_undefined():
    network, cosine = shared_features(1)
    del cosine.loss.task_losses["grading"]
    engine = engine_with(lambda engine, batch: engine.fire_event(IterationEvents.LOSS_COMPLETED), network.parameters())
    cosine.attach(engine)
    engine.run([0], max_epochs=1)
    assert math.isnan(engine.state.metrics["gradient_cosine"])


def test_early_stopping_counts_epochs_since_the_best():
    evaluator = SimpleNamespace(state=SimpleNamespace(best_metric_epoch=-1))

    def step(engine, batch):
        if engine.state.epoch in (2, 4):
            evaluator.state.best_metric_epoch = engine.state.epoch

    engine = engine_with(step, [torch.nn.Parameter(torch.zeros(1))])
    EarlyStopping(evaluator, patience=3).attach(engine)
    engine.run([0], max_epochs=20)
    assert engine.state.epoch == 7
    engine.run([0], max_epochs=20)  # resumed
    assert engine.state.epoch == 7


def test_random_numbers_depend_on_seed_and_epoch_alone():
    def drawn(seed, first_epoch):
        numbers = []
        dataset = Dataset([1.0], RandScaleIntensity(factors=1.0, prob=1.0))
        loader = DataLoader(dataset, sampler=SliceSampler(dataset, 1, 0))

        def step(engine, batch):
            sampled = dataset.transform(torch.ones(1)).item()
            numbers.append((torch.rand(1).item(), np.random.rand(), sampled, loader.sampler.seed))

        engine = engine_with(step, [torch.nn.Parameter(torch.zeros(1))])
        EpochSeeds(loader, seed).attach(engine)
        engine.state.epoch = engine.state.iteration = first_epoch
        engine.state.epoch_length, engine.state.max_epochs = 1, 3
        engine.run([0], max_epochs=3)
        return numbers

    whole = drawn(0, 0)
    assert drawn(0, 1) == whole[1:]
    assert len(set(whole)) == 3
    assert not set(drawn(1, 0)) & set(whole)


def test_curves_are_drawn_rarely_and_at_the_end(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("scripts.handlers.plot_learning_curves", lambda table, file: drawn.append(len(table)))
    evaluator = SimpleNamespace(state=SimpleNamespace(epoch=0, metrics={}))
    engine = engine_with(lambda engine, batch: None, [torch.nn.Parameter(torch.zeros(1))])
    table = EpochTable(evaluator, MultiTaskLoss(GaussianDiffusion()), [1.0, 1.0], str(tmp_path))
    table.attach(engine)
    engine.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: setattr(table, "next_drawing", math.inf))
    engine.run([0], max_epochs=5)
    assert drawn == [1, 5]
