from __future__ import annotations

import math

import pytest
import torch

from scripts.config import InputError
from scripts.diffusion import GaussianDiffusion
from scripts.losses import MultiTaskLoss
from scripts.net import MedSegDiff
from scripts.optimizer import freeze_all_but, make_lr_scheduler, parameter_groups
from test_net import TINY


def rates(name, epochs=8, metric=None, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_lr_scheduler(name, optimizer, max_epochs=epochs, **kwargs)
    seen = []
    for epoch in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*(() if metric is None else (metric(epoch),)))
    return seen


def test_schedules():
    assert rates("constant") == [1.0] * 8
    assert rates("cosine") == pytest.approx([(1 + math.cos(math.pi * e / 8)) / 2 for e in range(8)])
    cycle = [(1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]
    assert rates("cosine_restarts", restart_epochs=4) == pytest.approx(cycle * 2)


@pytest.mark.parametrize("name", ["constant", "cosine", "cosine_restarts"])
def test_warmup_rises_from_a_tenth_and_then_follows_the_schedule(name):
    warm = rates(name, warmup_epochs=3, restart_epochs=5)
    assert warm[:3] == pytest.approx([0.1, 0.4, 0.7])
    assert warm[3:] == pytest.approx(rates(name, epochs=5, restart_epochs=5))


def test_plateau_halves_the_rate_when_dice_no_longer_rises():
    assert rates("plateau", metric=lambda epoch: epoch, patience=2) == [1.0] * 8
    assert rates("plateau", metric=lambda epoch: min(epoch, 2), patience=2) == [1.0] * 6 + [0.5] * 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "linear"}, "lr_schedule 'linear' is not one of"),
        ({"name": "plateau", "warmup_epochs": 2}, "has no warm-up"),
        ({"name": "cosine", "warmup_epochs": 8}, "warmup_epochs=8 must be less than max_epochs=8"),
    ],
)
def test_bad_schedules(kwargs, message):
    with pytest.raises(InputError, match=message):
        rates(**kwargs)


def test_norms_and_biases_do_not_decay_and_frozen_parameters_are_left_out():
    network = MedSegDiff(GaussianDiffusion(), **TINY)
    loss = MultiTaskLoss(network.diffusion)
    decayed, free = parameter_groups([network, loss], 0.01)
    names = {id(p): name for module in (network, loss) for name, p in module.named_parameters()}
    assert decayed["weight_decay"] == 0.01
    assert free["weight_decay"] == 0
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    assert "weighting.log_sigma" in {names[id(p)] for p in free["params"]}
    norms = [m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {id(norm.weight) for norm in norms} <= {id(p) for p in free["params"]}

    freeze_all_but(network, "^cls_head")
    groups = parameter_groups([network, MultiTaskLoss(network.diffusion, tasks=["grading"])], 0.01)
    assert {names[id(p)].split(".")[0] for group in groups for p in group["params"]} == {"cls_head"}


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(InputError, match="head' matches .*the network's parts are .*calibrator.*cls_head.*denoiser"):
        freeze_all_but(MedSegDiff(GaussianDiffusion(), use_cls_head=True, **TINY), "^head")
