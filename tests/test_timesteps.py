from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from scripts.config import InputError
from scripts.timesteps import STRATEGIES, TimestepSampler


def drawn(strategy, steps=1000, num=20_000):
    torch.manual_seed(0)
    return TimestepSampler(strategy, steps)(num).float()


def test_densities():
    uniform, high_noise, terminal = (drawn(name) for name in ("uniform", "high_noise", "terminal"))
    assert uniform.mean().item() == pytest.approx(499.5, abs=10)
    assert high_noise.mean().item() == pytest.approx(666, abs=10)  # 2/3 T for a density in proportion to t
    assert (terminal == 999).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert terminal[terminal < 999].mean().item() == pytest.approx(499, abs=10)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_few_timesteps(strategy, steps):
    timesteps = drawn(strategy, steps)
    assert set(timesteps.tolist()) == set(range(steps))


def test_unknown_strategy():
    with pytest.raises(InputError, match="timestep_sampling 'cosine'"):
        TimestepSampler("cosine", 10)


def test_importance_goes_where_the_loss_is():
    sampler = TimestepSampler("importance", 1000)
    label = torch.ones(4, 1, 2, 2)
    logits = torch.tensor([-5.0, 5.0, 5.0, 5.0]).reshape(4, 1, 1, 1).expand_as(label)  # wrong at t = 999 only
    targets = {"label": label, "timesteps": torch.tensor([999, 0, 450, 850])}
    engine = SimpleNamespace(state=SimpleNamespace(output={"pred": (logits, None, None), "label": targets}))
    for _ in range(50):
        sampler.iteration_completed(engine)
    torch.manual_seed(0)
    timesteps = sampler(20_000)
    late, early = (timesteps >= 900).float().mean(), (timesteps < 100).float().mean()
    assert late > 20 * early > 0
    # ranges of which nothing was heard keep their first weight
    assert sampler.weight[250] == 1


@pytest.mark.parametrize(("strategy", "listens"), [("importance", 1), ("terminal", 0)])
def test_only_importance_listens(strategy, listens):
    added = []
    TimestepSampler(strategy, 10).attach(SimpleNamespace(add_event_handler=lambda *args: added.append(args)))
    assert len(added) == listens
