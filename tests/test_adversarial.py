"""Discriminators, their losses, the training step, and diagnostics, on small slices."""

from __future__ import annotations

import math
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from sklearn.metrics import roc_auc_score
from torch import nn

from conftest import assert_same
from scripts.adversarial import step as step_module
from scripts.adversarial.augmentation import augment
from scripts.adversarial.diagnostics import CollapseAlarm, DiscriminatorScores
from scripts.adversarial.discriminators import build
from scripts.adversarial.losses import GanLoss, feature_matching, gradient_penalty, slice_scores
from scripts.adversarial.step import D_INPUTS, AdversarialStep, d_channels
from scripts.config import InputError, TrainingError
from scripts.distributed import wrap_distributed
from scripts.synthesis.losses import SynthesisLoss
from scripts.synthesis.registration import Registration
from scripts.training.handlers import StopOnNonFiniteLoss
from scripts.training.moving_average import MovingAverage


class Shift(nn.Module):
    """A network with one parameter, which is added to the native slice."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x[:, x.shape[1] // 2, None] + self.value


class Collapsed(nn.Module):
    """A discriminator with one number for every slice: that of the seed, which could not see the difference."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        return [[self.value.expand(len(x), 1, 2, 2)]]


def slices(count=8, side=32, seed=0):
    """Native slices, and true ones: brighter in a square, with stripes."""
    generator = torch.Generator().manual_seed(seed)
    native = torch.randn(count, 1, side, side, generator=generator) * 0.1
    label = native.clone()
    label[..., 8:20, 8:20] += 0.5 * (1 + (torch.arange(12) % 2))
    return {"image": native, "label": label, "subject": ["s"] * count}


def small(d_input="diff", kind="patchgan"):
    torch.manual_seed(1)
    return build(kind, d_channels(d_input), channels=8, layers=2, scales=1)


def adversary(discriminator=None, lr=2e-3, **options):
    discriminator = discriminator or small(options.get("d_input", "diff"))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=lr, betas=(0.5, 0.999))
    return AdversarialStep(discriminator, optimizer, **{"gan_weight": 0.1} | options)


class Batches(torch.utils.data.Dataset):
    """Items of ``length`` batches of four slices."""

    def __init__(self, length, first=0):
        self.batches = [slices(4, seed=first + index) for index in range(length)]

    def __len__(self):
        return 4 * len(self.batches)

    def __getitem__(self, index):
        return {key: value[index % 4] for key, value in self.batches[index // 4].items()}


def targets(batch, device, non_blocking, **_):
    return batch["image"], {"label": batch["label"]}


def l1(pred, target):
    return nn.functional.l1_loss(pred, target["label"])


def trainer(step, network=None, length=4, epochs=1, handlers=(), lr=1e-3, **options):
    network = network or Shift()
    return SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=DataLoader(Batches(length), batch_size=4),
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=lr),
        loss_function=l1,
        prepare_batch=targets,
        iteration_update=step,
        train_handlers=list(handlers),
        decollate=False,
        **options,
    )


# ---- discriminators
@pytest.mark.parametrize("kind", ["patchgan", "resblock"])
def test_a_discriminator_has_logits_on_each_scale(kind):
    found = build(kind, 2, channels=8, layers=2, scales=2)(torch.randn(3, 2, 48, 64))
    assert len(found) == 2
    for features in found:
        assert features[-1].shape[:2] == (3, 1)
        assert len(features) >= 3
    assert found[1][-1].shape[-1] < found[0][-1].shape[-1]
    assert slice_scores(found).shape == (3,)


@pytest.mark.parametrize("kind", ["patchgan", "resblock"])
def test_every_layer_has_spectral_norm(kind):
    network = build(kind, 1, channels=8, layers=2, scales=1)
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert layers
    network(torch.randn(2, 1, 32, 32))
    for layer in layers:
        assert nn.utils.parametrize.is_parametrized(layer, "weight")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "unet"}, "discriminator 'unet' is not one of"),
        ({"kind": "patchgan", "scales": 0}, "scales=0"),
        ({"kind": "resblock", "channels": 12}, "multiple of 8"),
    ],
)
def test_other_discriminators_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build(**{"in_channels": 1} | options)


def test_slices_that_are_too_small_are_refused():
    network = build("patchgan", 1, channels=8, layers=3, scales=2)
    network.check(1, (64, 64))
    assert network.training
    with pytest.raises(InputError, match="slices of 32 x 32 px are too small for the 2 scales"):
        network.check(1, (32, 32))
    assert network.training


# ---- losses
def logits(*values):
    return [[torch.full((2, 1, 3, 3), value)] for value in values]


def test_losses_of_known_logits():
    real, fake = logits(0.5, 2.0), logits(-0.5, 1.0)
    hinge = GanLoss("hinge")
    assert hinge.of_discriminator(real, fake).item() == pytest.approx(((0.5 + 0.5) + (0 + 2)) / 2)
    assert hinge.of_network(fake).item() == pytest.approx(-0.25)
    lsgan = GanLoss("lsgan", label_smoothing=0.1)
    assert lsgan.of_discriminator(real, fake).item() == pytest.approx(((0.16 + 0.25) / 2 + (1.21 + 1) / 2) / 2)
    assert lsgan.of_network(fake).item() == pytest.approx((2.25 + 0) / 2)
    softplus = GanLoss("softplus")
    expected = (
        math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-0.5)) + math.log1p(math.e)
    ) / 2
    assert softplus.of_discriminator(real, fake).item() == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"kind": "wgan"}, {"kind": "hinge", "label_smoothing": 0.7}])
def test_other_losses_are_refused(options):
    with pytest.raises(InputError, match="wgan|label_smoothing"):
        GanLoss(**options)


def test_feature_matching_is_relative():
    real = [[torch.full((2, 4, 3, 3), 2.0), torch.zeros(2, 1, 3, 3)]]
    fake = [[torch.full((2, 4, 3, 3), 3.0), torch.ones(2, 1, 3, 3)]]
    assert feature_matching(real, fake).item() == pytest.approx(0.5)
    larger = [[10 * layer for layer in scale] for scale in (real[0], fake[0])]
    assert feature_matching([larger[0]], [larger[1]]).item() == pytest.approx(0.5)


def test_the_gradient_penalty_of_a_linear_discriminator():
    """The mean over patches of a * x has the gradient a / n in each of n pixels: |.|^2 = a^2 / n."""
    x = torch.randn(3, 1, 4, 4, requires_grad=True)
    assert gradient_penalty([[3 * x]], x).item() == pytest.approx(9 / 16)


# ---- augmentation
def test_all_channels_change_alike_and_the_change_has_a_gradient():
    torch.manual_seed(0)
    image = torch.randn(4, 1, 16, 16, requires_grad=True)
    changed = augment(torch.cat([image, image], dim=1))
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert not torch.equal(changed[:, :1], image)
    assert not torch.equal(augment(image[:1].repeat(2, 1, 1, 1))[0], augment(image[:1].repeat(2, 1, 1, 1))[1])
    changed.sum().backward()
    assert image.grad.abs().sum() > 0


# ---- the step
def test_without_a_discriminator_and_with_weight_0_training_is_the_same():
    networks = [Shift(), Shift()]
    trainer(None, networks[0]).run()
    trainer(adversary(gan_weight=0.0), networks[1]).run()
    assert torch.equal(networks[0].value, networks[1].value)
    assert networks[0].value != 0


def test_the_events_of_monai_in_its_order():
    fired = []
    engine = trainer(adversary(), length=1)
    for event in IterationEvents:
        if event in engine._allowed_events:
            engine.add_event_handler(event, lambda e, name: fired.append(name), event.name)
    engine.run()
    expected = []
    plain = trainer(None, length=1)
    for event in IterationEvents:
        if event in plain._allowed_events:
            plain.add_event_handler(event, lambda e, name: expected.append(name), event.name)
    plain.run()
    assert fired == expected
    assert "LOSS_COMPLETED" in fired


@pytest.mark.parametrize(("length", "accumulation", "steps"), [(4, 2, 2), (5, 2, 3), (3, 1, 3)])
def test_gradients_are_accumulated_as_in_monai(length, accumulation, steps):
    step, count = adversary(gan_weight=0.0), {"network": 0, "discriminator": 0}
    networks = [Shift(), Shift()]
    engine = trainer(step, networks[0], length=length, accumulation_steps=accumulation)
    for name, optimizer in {"network": engine.optimizer, "discriminator": step.optimizer}.items():
        optimizer.register_step_post_hook(lambda *_, name=name: count.update({name: count[name] + 1}))
    engine.run()
    assert count == {"network": steps, "discriminator": steps}
    trainer(None, networks[1], length=length, accumulation_steps=accumulation).run()
    assert torch.equal(networks[0].value, networks[1].value)


def test_the_discriminator_gets_no_gradient_in_the_step_of_the_network():
    """The leak of the seed: gradients of the network's loss, which the optimiser of the discriminator then used."""
    step, seen = adversary(), []
    engine = trainer(step, length=2)
    engine.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED,
        lambda e: seen.append([p.grad for p in step.discriminator.parameters()]),
    )
    engine.run()
    assert len(seen) == 2
    assert all(gradient is None for gradients in seen for gradient in gradients)
    assert all(p.requires_grad for p in step.discriminator.parameters())


@pytest.mark.parametrize("d_input", list(D_INPUTS))
@pytest.mark.parametrize("gan_loss", ["hinge", "lsgan", "softplus"])
def test_every_combination_trains_both(d_input, gan_loss):
    step = adversary(
        d_input=d_input, gan_loss=gan_loss, feature_weight=0.1, r1_gamma=0.1, r1_interval=2, augmented=True
    )
    before = [p.detach().clone() for p in step.discriminator.parameters()]
    network = Shift()
    trainer(step, network).run()
    assert network.value != 0
    assert any(not torch.equal(old, new) for old, new in zip(before, step.discriminator.parameters(), strict=True))
    assert set(step.components) == {"gan", "feature", "d_loss", "d_real", "d_fake", "gnorm_D"}
    assert all(torch.isfinite(value) for value in step.components.values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_the_leak_of_the_seed_put_back(smoothing, weight, monkeypatch):
    """A discriminator that cannot tell, whose optimiser also gets the gradients of the network's loss, stops at c.

    It minimises ((d - 1 + s)^2 + d^2) / 2 + w (d - 1)^2, whose minimum is c = (0.5 (1 - s) + w) / (1 + w): 0.75 for
    s = 0 and w = 1, the 0.749 of the log of the seed. Without the leak it stops at (1 - s) / 2.
    """

    def run():
        step = adversary(
            Collapsed(), lr=0.02, gan_loss="lsgan", gan_weight=weight, label_smoothing=smoothing, d_input="none"
        )
        trainer(step, length=4, epochs=150).run()
        return step.components["d_real"].item(), step.components["d_fake"].item()

    real, fake = run()
    assert real == pytest.approx((1 - smoothing) / 2, abs=0.02)
    monkeypatch.setattr(step_module, "_frozen", lambda network: torch.enable_grad())
    real, fake = run()
    assert real == pytest.approx((0.5 * (1 - smoothing) + weight) / (1 + weight), abs=0.02)
    assert abs(real - fake) < 0.01


def test_hinge_and_diff_tell_true_from_made_slices():
    """After 250 steps against a network that learns, too."""
    step = adversary(build("patchgan", 1, channels=16, layers=2, scales=1), gan_weight=0.01)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    trainer(step, network, length=25, epochs=10).run()
    held_out = slices(32, seed=99)
    with torch.no_grad():
        real = step.scores(held_out["label"], held_out["image"])
        fake = step.scores(network(held_out["image"]), held_out["image"])
    assert real.mean() - fake.mean() > 1
    truth = [1] * 32 + [0] * 32
    assert roc_auc_score(truth, torch.cat([real, fake])) > 0.95


def train_together(rank: int, folder: Path) -> None:
    """One of two processes, each with its own slices; writes its weights."""
    torch.manual_seed(0)
    network, loss = Shift(), SynthesisLoss([1], ssim_weight=0, registration=Registration())
    step = adversary(feature_weight=0.1, r1_gamma=0.1, r1_interval=2)
    optimizer = torch.optim.Adam([*network.parameters(), *loss.parameters()], lr=1e-3)
    SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=DataLoader(Batches(3, first=10 * rank), batch_size=4),
        network=wrap_distributed(network),
        optimizer=optimizer,
        loss_function=loss,
        prepare_batch=targets,
        iteration_update=step,
        decollate=False,
    ).run()
    parts = {"network": network, "discriminator": step.discriminator, "registration": loss}
    torch.save({name: dict(part.named_parameters()) for name, part in parts.items()}, folder / f"{rank}.pt")


def test_two_processes_train_the_same_networks(tmp_path):
    idist.spawn("gloo", train_together, (tmp_path,), nproc_per_node=2)
    assert_same(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)))


def test_warm_up_and_ramp():
    step = adversary(warmup_epochs=2, ramp_epochs=3)
    assert [step.ramp(epoch) for epoch in range(1, 8)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert adversary().ramp(1) == 1
    seen = []
    step = adversary(warmup_epochs=1, ramp_epochs=1, gan_weight=0.5, feature_weight=0.1)
    engine = trainer(step, length=1, epochs=3)

    def check(e):
        terms = sum(step.components.get(name, 0) for name in ("gan", "feature"))
        seen.append("gan" in step.components)
        assert e.state.output["loss"].item() == pytest.approx(
            l1(e.state.output["pred"], e.state.output["label"]).item() + float(terms), abs=1e-6
        )

    engine.add_event_handler(Events.ITERATION_COMPLETED, check)
    engine.run()
    assert seen == [False, True, True]


def test_r1_is_lazy():
    step, seen = adversary(r1_gamma=1.0, r1_interval=3), []
    engine = trainer(step, length=7)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append("r1" in step.components))
    engine.run()
    assert seen == [True, False, False, True, False, False, True]


def test_the_average_follows_the_network_and_amp_gives_float32():
    network = Shift()
    average = MovingAverage(network, 0.5)
    trainer(adversary(amp=True), network, handlers=[average], lr=0.1).run()
    assert 0 < average.network.value.abs() < network.value.abs()
    step = adversary(amp=True)
    assert step.scores(torch.randn(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)).dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_training():
    network = Shift()
    with torch.no_grad():
        network.value.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan"):
        trainer(adversary(), network, handlers=[StopOnNonFiniteLoss()]).run()
    step = adversary(gan_weight=0.0)
    with torch.no_grad():
        next(step.discriminator.parameters()).fill_(float("inf"))
    with pytest.raises(TrainingError, match="the loss of the discriminator is nan .* lower discriminator_lr"):
        trainer(step).run()


def test_the_discriminator_continues_where_it_was():
    one = adversary()
    trainer(one).run()
    other = adversary(build("patchgan", 1, channels=8, layers=2, scales=1))
    other.load_state_dict(one.state_dict())
    image, native = torch.randn(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    one.discriminator.eval(), other.discriminator.eval()
    assert torch.equal(one.scores(image, native), other.scores(image, native))
    assert other.optimizer.state_dict()["state"].keys() == one.optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize("options", [{"d_input": "sum"}, {"gan_weight": -1.0}, {"r1_interval": 0}])
def test_other_options_are_refused(options):
    with pytest.raises(InputError, match="d_input 'sum'|gan_weight=-1.0 must be|r1_interval=0 must be"):
        AdversarialStep(Collapsed(), None, **{"gan_weight": 0.1} | options)


# ---- diagnostics
def test_scores_of_validation_slices():
    step, engine = adversary(Perfect()), Engine(lambda *_: None)
    loader = DataLoader(Batches(2), batch_size=4)
    network = Shift().train()
    DiscriminatorScores(step, network, loader, torch.device("cpu"), 0)(engine)
    assert engine.state.metrics["d_auc"] == 1
    assert engine.state.metrics["d_real"] > engine.state.metrics["d_fake"]
    assert network.training
    with torch.no_grad():
        step.discriminator.weight.zero_()
    DiscriminatorScores(step, network, loader, torch.device("cpu"), 0)(engine)
    assert engine.state.metrics["d_auc"] == 0.5


class Perfect(nn.Module):
    """The mean of what it sees."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return [[self.weight * x.mean(dim=(1, 2, 3), keepdim=True)]]


class Table:
    def __init__(self):
        self.rows = []


KEYS = {"r1_gamma": 0.0, "d_input": "diff", "gan_loss": "hinge", "discriminator_lr": 1e-4}


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({"r1_gamma": 10.0}, "lower r1_gamma=10.0"),
        ({"d_input": "concat"}, "set d_input=diff"),
        ({"gan_loss": "lsgan"}, "set gan_loss=hinge"),
        ({}, "raise discriminator_lr"),
    ],
)
def test_the_alarm_names_the_key_to_change(keys, advice, caplog):
    table, engine = Table(), Engine(lambda *_: None)
    alarm = CollapseAlarm(table, KEYS | keys)
    warned = []
    for epoch, auc in enumerate([0.9, 0.55, 0.45, 0.5, 0.5, 0.8, 0.5, 0.5], start=1):
        table.rows += [{"epoch": epoch, "split": split, "d_auc": auc} for split in ("train", "validation")]
        engine.state.epoch = epoch
        caplog.clear()
        alarm(engine)
        warned.append(advice in caplog.text)
    assert warned == [False, False, False, True, False, False, False, False]
