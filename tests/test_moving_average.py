from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine

from scripts.config import InputError
from scripts.training.moving_average import MovingAverage


def averaged(steps, decay=0.9, accumulation=1, start=None):
    """Moving average of a weight that is set to i at iteration i."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.register_buffer("temperature", torch.ones(1))
    average = MovingAverage(model, decay)

    def step(engine, batch):
        model.weight.data.fill_(engine.state.iteration)
        model.temperature.fill_(engine.state.iteration)
        if engine.state.iteration % accumulation == 0:
            engine.optimizer.step()

    engine = Engine(step)
    engine.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    average.attach(engine)
    if start is not None:
        average.load_state_dict(start[0])
        engine.state.epoch = engine.state.iteration = start[1]
        engine.state.epoch_length, engine.state.max_epochs = 1, steps
    engine.run([0], max_epochs=steps)
    return average


def test_follows_the_formula_after_the_first_step():
    average = averaged(3)
    expected = 1.0  # the average starts with the first weight
    for weight in (2.0, 3.0):
        expected = 0.9 * expected + 0.1 * weight
    assert average.network.weight.item() == pytest.approx(expected)
    assert average.network.temperature.item() == 3


def test_continues_where_it_was():
    whole, half = averaged(6), averaged(3)
    resumed = averaged(6, start=(half.state_dict(), 3))
    assert torch.equal(resumed.network.weight, whole.network.weight)


@pytest.mark.parametrize(("accumulation", "updates"), [(1, 12), (2, 6), (5, 2)])
def test_counts_the_steps_of_the_optimiser(accumulation, updates):
    assert averaged(12, accumulation=accumulation).average.n_averaged == updates


def test_frozen_parameters_keep_every_bit():
    model = torch.nn.Linear(50, 50)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average = MovingAverage(model, 0.997)
    engine = Engine(lambda engine, batch: engine.optimizer.step())
    engine.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average.attach(engine)
    engine.run(range(20), max_epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in average.network.state_dict().items())


@pytest.mark.parametrize("decay", [0, 1, 1.5, "0.9"])
def test_bad_decay(decay):
    with pytest.raises(InputError, match="ema::decay="):
        MovingAverage(torch.nn.Linear(1, 1), decay)
