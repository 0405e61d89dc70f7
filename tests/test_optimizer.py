from __future__ import annotations

import math

import pytest
import torch

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.net import MedSegDiff
from scripts.training.losses import MultiTaskLoss
from scripts.training.optimizer import cosine_with_warmup, freeze_all_but, parameter_groups
from test_net import TINY


def test_warmup_rises_from_a_tenth_and_then_follows_the_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = cosine_with_warmup(optimizer, max_epochs=8, warmup_epochs=3)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([0.1, 0.4, 0.7])
    assert rates[3:] == pytest.approx([(1 + math.cos(math.pi * e / 5)) / 2 for e in range(5)])


@pytest.mark.parametrize("warmup_epochs", [0, 8, 9])
def test_warmup_as_long_as_the_training(warmup_epochs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(InputError, match=f"warmup_epochs={warmup_epochs} must be less than max_epochs=8"):
        cosine_with_warmup(optimizer, max_epochs=8, warmup_epochs=warmup_epochs)


def test_norms_and_biases_do_not_decay_and_frozen_parameters_are_left_out():
    network = MedSegDiff(GaussianDiffusion(), **TINY)
    loss = MultiTaskLoss(network.diffusion)
    decayed, free = parameter_groups(network, loss, 0.01)
    names = {id(p): name for module in (network, loss) for name, p in module.named_parameters()}
    assert decayed["weight_decay"] == 0.01
    assert free["weight_decay"] == 0
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    assert "weighting.log_sigma" in {names[id(p)] for p in free["params"]}
    norms = [m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {id(norm.weight) for norm in norms} <= {id(p) for p in free["params"]}

    groups = parameter_groups(network, MultiTaskLoss(network.diffusion, tasks=["grading"]), trainable="^cls_head")
    assert {names[id(p)].split(".")[0] for group in groups for p in group["params"]} == {"cls_head"}


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(InputError, match="head' matches .*the network's parts are .*calibrator.*cls_head.*denoiser"):
        freeze_all_but(MedSegDiff(GaussianDiffusion(), use_cls_head=True, **TINY), "^head")
