from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine

from scripts.config import InputError
from scripts.ema import WeightAverage


def averaged(steps, decay=0.9, warmup_steps=1, every=1, start=None):
    """A weight that is e at iteration e, and the handler that averages it."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.register_buffer("temperature", torch.ones(1))
    model.weight.data.fill_(0.0)
    average = WeightAverage(model, decay, warmup_steps, every)

    def step(engine, batch):
        model.weight.data.fill_(engine.state.iteration)
        model.temperature.fill_(engine.state.iteration)

    engine = Engine(step)
    average.attach(engine)
    if start is not None:
        average.load_state_dict(start[0])
        engine.state.epoch = engine.state.iteration = start[1]
        engine.state.epoch_length, engine.state.max_epochs = 1, steps
    engine.run([0], max_epochs=steps)
    return average, engine


def test_follows_the_formula_after_the_first_step():
    average, _ = averaged(3)  # warmed up at once: the first average is the first weight
    expected = 1.0
    for weight in (2.0, 3.0):
        expected = 0.9 * expected + 0.1 * weight
    assert average.ema_model.weight.item() == pytest.approx(expected)
    assert average.ema_model.temperature.item() == 3
    assert not average.ema_model.training


def test_warm_up_lets_go_of_the_initial_weights():
    """The momentum falls linearly from 1, so that the average has the last weights, not the first, in mind."""
    average, engine = averaged(4, decay=0.99, warmup_steps=5)
    expected = 0.0
    for i, weight in enumerate((1.0, 2.0, 3.0, 4.0)):
        momentum = 1.0 - 0.99 * i / 4
        expected += momentum * (weight - expected)
    assert average.ema_model.weight.item() == pytest.approx(expected)
    assert engine.state.ema_momentum == pytest.approx(1 - 0.99 * 3 / 4)


def test_goes_on_where_it_was():
    whole, _ = averaged(6, warmup_steps=5)
    half, _ = averaged(3, warmup_steps=5)
    resumed, _ = averaged(6, warmup_steps=5, start=(half.state_dict(), 3))
    assert torch.equal(resumed.ema_model.weight, whole.ema_model.weight)


def test_counts_optimiser_steps_when_gradients_are_accumulated():
    model = torch.nn.Linear(1, 1)
    average = WeightAverage(model, 0.9, every=2)
    engine = Engine(lambda engine, batch: None)
    average.attach(engine)
    engine.run(range(4), max_epochs=1)
    assert average.state_dict()["steps"] == 2


def test_frozen_parameters_keep_every_bit():
    model = torch.nn.Linear(50, 50)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average = WeightAverage(model, 0.997, warmup_steps=7)
    engine = Engine(lambda engine, batch: None)
    average.attach(engine)
    engine.run(range(20), max_epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in average.ema_model.state_dict().items())


@pytest.mark.parametrize("decay", [0, 1, 1.5])
def test_bad_decay(decay):
    with pytest.raises(InputError, match="ema_decay="):
        WeightAverage(torch.nn.Linear(1, 1), decay)
