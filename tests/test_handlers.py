from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset
from monai.engines.utils import IterationEvents
from monai.transforms import RandScaleIntensity

from scripts.config import TrainingError
from scripts.data.caching import SliceSampler
from scripts.training.handlers import EpochSeeds, GradientClipping, StopOnNonFiniteLoss


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
def test_non_finite_gradient_does_not_reach_the_weights(value):
    weight = torch.nn.Parameter(torch.zeros(2))

    def step(engine, batch):
        weight.grad = torch.tensor([1.0, value if engine.state.iteration == 2 else 1.0])
        engine.optimizer.step()

    engine = engine_with(step, [weight])
    GradientClipping(max_norm=1.0).attach(engine)
    with pytest.raises(TrainingError, match=r"the gradient norm is (nan|inf) in epoch 1, iteration 2: lower"):
        engine.run(range(3), max_epochs=1)
    assert weight.isfinite().all()


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
