"""The decay that is told, against what one step with decay and one without do to the weights."""

import copy
import gc
import math
import random
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

import weightdyn as wd
from weightdyn.record import decay as module
from weightdyn.record.decay import Decay
from weightdyn.record.optimizers import coupled_decay, law_of, own_step, skipped, update_counts

STEPS = (1, 2, 4, 7, 11)
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


# --- a short training, which can be made again ---------------------------------------------------------------


def model_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def give_gradients(model, t):
    generator = torch.Generator().manual_seed(100 + t)
    x, y = (torch.randn(8, 12, generator=generator).to(next(model.parameters()).dtype) for _ in range(2))
    model.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    return loss


def set_lr(optimizer, t):
    """A cosine; of those that make their own rate it stays None."""
    for group in optimizer.param_groups:
        base = group.setdefault("base_lr", None if group["lr"] is None else float(group["lr"]))
        if base is not None:
            lr = base * (0.3 + 0.7 * math.cos(t / 8))
            group["lr"] = lr if not isinstance(group["lr"], torch.Tensor) else group["lr"].fill_(lr)


def no_decay(optimizer):
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0


def weights(parameters):
    return [p.detach().double().clone() for p in parameters]


def train(make, until, dtype=torch.float32, asked=(), without=None, each=None, only=lambda p: True):
    """Train until an update; what was told of some updates, and the weights before and after these.

    The update `without` is made with its decay switched off by the function `off`.
    """
    model = model_of(dtype)
    parameters = [p for p in model.parameters() if only(p)]
    optimizer = make(parameters)
    if hasattr(optimizer, "train"):
        optimizer.train()
    decay = Decay(optimizer) if asked else None
    told, states = {}, {}
    for t in range(1, until + 1):
        give_gradients(model, t)
        set_lr(optimizer, t)
        if t == without:
            no_decay(optimizer)
        before = weights(parameters)
        if decay is not None and t in asked:
            decay.ask(parameters, t)
        optimizer.step()
        if decay is not None and t in asked:
            told[t] = decay.acted(parameters, t)
        states[t] = before, weights(parameters)
        if each is not None:
            each(optimizer, t)
    return states, told, decay, optimizer


def truth(make, dtype=torch.float64, steps=STEPS, only=lambda p: True):
    """ηλ of each tensor at some updates, by making each again without decay; and what of it is not along w."""
    states, *_ = train(make, max(steps), dtype, only=only)
    found = {}
    for t in steps:
        others, *_ = train(make, t, dtype, without=t, only=only)
        found[t] = []
        for w, after, plain in zip(*states[t], others[t][1], strict=True):
            product = float(((plain - after) * w).sum() / (w * w).sum())
            rest = float((plain - after - product * w).norm()) / (float((plain - after).norm()) or 1)
            found[t].append((product, rest))
    return found


def assert_told(make, rtol=1e-3, dtype=torch.float64, how="table", only=lambda p: True):
    _, told, decay, _ = train(make, max(STEPS), asked=STEPS, only=only)
    assert decay.told == how
    assert decay.reason is None
    true = truth(make, dtype, only=only)
    for t in STEPS:
        for acting, (product, _) in zip(told[t], true[t], strict=True):
            assert float(acting.lr) * acting.weight_decay == pytest.approx(product, rel=rtol, abs=1e-9 * 1e-2)


# --- every optimizer -----------------------------------------------------------------------------------------


def of(path, **options):
    package, name = path.rsplit(".", 1)

    def make(parameters):
        kind = getattr(pytest.importorskip(package), name)
        return kind(parameters, **copy.deepcopy({**SETTINGS, **options}))

    return make


def is_matrix(p):
    return p.ndim == 2


DECOUPLED = {
    "adamw": of("torch.optim.AdamW"),
    "adamw, amsgrad, a tensor for lr": of("torch.optim.AdamW", amsgrad=True, lr=torch.tensor(1e-2)),
    "adam": of("torch.optim.Adam", decoupled_weight_decay=True),
    "nadam": of("torch.optim.NAdam", decoupled_weight_decay=True),
    "radam": of("torch.optim.RAdam", decoupled_weight_decay=True),
    "muon": of("torch.optim.Muon"),
    "adafactor": of("torch.optim.Adafactor"),
    "adafactor, foreach": of("torch.optim.Adafactor", foreach=True),
    "schedule-free adamw": of("schedulefree.AdamWScheduleFree"),
    "schedule-free adamw, warmup": of(
        "schedulefree.AdamWScheduleFree", warmup_steps=6, r=1.0, weight_lr_power=1.0, foreach=False
    ),
    "schedule-free radam": of("schedulefree.RAdamScheduleFree"),
    "schedule-free radam, loud": of(
        "schedulefree.RAdamScheduleFree", silent_sgd_phase=False, betas=(0.9, 0.9)
    ),
    "schedule-free sgd": of("schedulefree.SGDScheduleFree", warmup_steps=3, lr=0.1),
    "schedule-free adamw, paper": of("schedulefree.AdamWScheduleFreePaper"),
    "schedule-free adamw, reference": of("schedulefree.AdamWScheduleFreeReference"),
    "schedule-free sgd, reference": of("schedulefree.SGDScheduleFreeReference"),
    "lion": of("lion_pytorch.Lion"),
    "lion, decoupled": of("lion_pytorch.Lion", decoupled_weight_decay=True, weight_decay=1e-3),
    "lion, foreach": of("lion_pytorch.foreach.Lion"),
    "hf adafactor": of("transformers.optimization.Adafactor", relative_step=False, scale_parameter=False),
    "hf adafactor, scaled": of("transformers.optimization.Adafactor", relative_step=False, beta1=0.9),
    "hf adafactor, lr=None": of("transformers.optimization.Adafactor", lr=None),
    "hf adafactor, warmup": of("transformers.optimization.Adafactor", lr=None, warmup_init=True),
}
IN_FLOAT32 = {  # inside, whatever the weights are
    **{f"torchao {name}": of(f"torchao.optim.{name}") for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")},
    **{
        f"bitsandbytes {name}": of(
            f"bitsandbytes.optim.{name}", **({"min_8bit_size": 64} if "8" in name else {})
        )
        for name in ("AdamW", "AdamW8bit", "Adam", "Adam8bit", "LAMB", "LAMB8bit", "AdEMAMix", "AdEMAMix8bit")
    },
    "bitsandbytes Lion": of("bitsandbytes.optim.Lion"),
    "bitsandbytes Lion8bit": of("bitsandbytes.optim.Lion8bit", min_8bit_size=64),
}
COUPLED = {
    **{
        name: of(f"torch.optim.{name}")
        for name in ("Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta")
    },
    "SGD": of("torch.optim.SGD", momentum=0.9, nesterov=True),
    "ASGD": of("torch.optim.ASGD", lambd=0.0),
    **{f"torchao {name}": of(f"torchao.optim.{name}") for name in ("Adam8bit", "Adam4bit", "AdamFp8")},
    **{
        f"bitsandbytes {name}": of(
            f"bitsandbytes.optim.{name}", **({"min_8bit_size": 64} if "8" in name else {})
        )
        for name in ("RMSprop", "RMSprop8bit", "Adagrad", "Adagrad8bit")
    },
    "bitsandbytes SGD": of("bitsandbytes.optim.SGD", momentum=0.9),
    "bitsandbytes LARS": of("bitsandbytes.optim.LARS", momentum=0.9),
}

quiet = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture(autouse=True)
def _eager(request):
    """torchao compiles its step; nothing of that is meant here."""
    if "torchao" in request.node.name:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@quiet
@pytest.mark.parametrize("name", DECOUPLED)
def test_the_law_of_an_optimizer_is_what_its_steps_do(name):
    assert_told(DECOUPLED[name], only=is_matrix if name == "muon" else lambda p: True)


@quiet
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_the_law_of_an_8_bit_optimizer_is_what_its_steps_do(name):
    assert_told(IN_FLOAT32[name], dtype=torch.float32)


@quiet
@pytest.mark.parametrize("name", COUPLED)
def test_a_decay_in_the_gradient_is_a_part_of_u(name):
    make = COUPLED[name]
    _, told, decay, optimizer = train(make, max(STEPS), asked=STEPS)
    assert decay.told == "table"
    assert {acting.weight_decay for t in STEPS for acting in told[t]} == {0.0}
    assert coupled_decay(optimizer, optimizer.param_groups[0]) == 0.1
    # With decay the gradient is another one: what it does is in momentum or in a norm, or is exactly ηλw (SGD).
    true = truth(make, torch.float32 if " " in name else torch.float64)
    assert any(rest > 0.01 for each in true.values() for _, rest in each) or "SGD" in name


def test_rprop_has_no_decay():
    _, told, decay, _ = train(lambda p: torch.optim.Rprop(p, lr=1e-2), 4, asked=STEPS)
    assert (decay.told, {acting.weight_decay for acting in told[4]}) == ("table", {0.0})


def test_asgd_decays_by_a_rate_of_its_own_besides():
    p = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.ASGD([p], lr=0.1, lambd=0.5)
    decay = Decay(optimizer)
    for t in range(1, 6):
        optimizer.param_groups[0]["lr"] = 0.1 * t
        p.grad = torch.zeros(1)  # so that w' = (1 − lambd·η)w, with the η of the update before
        w = p.item()
        decay.ask([p], t)
        optimizer.step()
        ((lr, weight_decay),) = decay.acted([p], t)
        assert 1 - lr * weight_decay == pytest.approx(p.item() / w, rel=1e-6)


@quiet
def test_what_is_not_along_the_weights_has_no_number():
    pytest.importorskip("schedulefree")
    z = of("schedulefree.AdamWScheduleFreeReference", decay_at_z=True)
    _, told, decay, _ = train(z, 4, asked=STEPS)
    assert all(math.isnan(acting.weight_decay) for t in told for acting in told[t])
    assert "decays z" in decay.reason
    assert "weight_decay=" in decay.reason


@quiet
def test_a_cautious_decay_has_no_number():
    pytest.importorskip("lion_pytorch")
    cautious = of("lion_pytorch.cautious_lion.Lion", cautious_wd=True)
    _, told, decay, _ = train(cautious, 4, asked=STEPS)
    assert all(math.isnan(acting.weight_decay) for t in told for acting in told[t])
    assert "some of the weights" in decay.reason
    assert_told(of("lion_pytorch.cautious_lion.Lion"))


@quiet
def test_schedule_free_with_a_closure_has_no_number():
    free = pytest.importorskip("schedulefree")
    for kind in ("AdamW", "RAdam", "SGD"):
        p = nn.Parameter(torch.ones(3))
        optimizer = getattr(free, f"{kind}ScheduleFreeClosure")([p], lr=0.1, weight_decay=0.1)
        decay = Decay(optimizer)
        assert math.isnan(decay.acted([p], 1)[0].weight_decay)
        assert "its weights are x" in decay.reason
        optimizer.param_groups[0]["weight_decay"] = 0
        assert Decay(optimizer).acted([p], 1)[0].weight_decay == 0


@quiet
def test_what_bitsandbytes_overrides_of_one_tensor_goes_before_the_group():
    bnb = pytest.importorskip("bitsandbytes")
    p, q = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64))
    manager = bnb.optim.GlobalOptimManager.get_instance()
    optimizer = bnb.optim.AdamW([p, q], lr=1e-2, weight_decay=0.1)
    try:
        manager.override_config(q, key_value_dict={"lr": 0.02, "weight_decay": 0.5})
        decay = Decay(optimizer)
        p.grad, q.grad = torch.zeros(64), torch.zeros(64)
        before = p.detach().clone(), q.detach().clone()
        optimizer.step()
        for w, after, (lr, weight_decay) in zip(before, (p, q), decay.acted([p, q], 1), strict=True):
            torch.testing.assert_close(after.detach(), w * (1 - lr * weight_decay))
        assert decay.acted([p, q], 1) == [(1e-2, 0.1), (0.02, 0.5)]
    finally:
        manager.initialize()


@quiet
def test_weights_that_bitsandbytes_leaves_alone_are_not_told_by_its_table():
    bnb = pytest.importorskip("bitsandbytes")
    p = nn.Parameter(torch.randn(64))
    optimizer = bnb.optim.AdamW([p])
    assert Decay(optimizer).told == "table"
    optimizer.args.skip_zeros = True
    assert Decay(optimizer).told == "twins"


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit"])
def test_torchaos_quantized_states_and_random_rounding_change_no_decay(kind, dtype, monkeypatch):
    optim = pytest.importorskip("torchao.optim")

    def ends(law, ask):
        monkeypatch.setattr(module, "law_of", law)
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(64, 128).to(dtype))
        optimizer = getattr(optim, kind)([p], lr=1e-2, weight_decay=0.1, bf16_stochastic_round=True)
        decay, told = Decay(optimizer), []
        with torch.compiler.set_stance("force_eager"):
            for t in (1, 2, 3):
                p.grad = torch.randn(64, 128).to(dtype)
                if ask:
                    decay.ask([p], t)
                optimizer.step()
                told += decay.acted([p], t) if ask else []
        assert type(optimizer.state[p]["exp_avg"]) is not torch.Tensor
        return p.detach(), torch.rand(1), [acting.weight_decay for acting in told]

    plain, after, none = ends(law_of, ask=False)
    for law in (law_of, lambda optimizer: None):
        weights, random_number, told = ends(law, ask=True)
        assert torch.equal(weights, plain)
        assert torch.equal(random_number, after)
        want = 0.1 if kind.startswith("AdamW") else 0.0 if law is law_of else math.nan
        assert none == []
        assert told == pytest.approx([want] * 3, rel=1e-3, nan_ok=True)


# --- optimizers that nobody knows ----------------------------------------------------------------------------


class Plain(torch.optim.Optimizer):
    """Momentum, and a decay that `decayed` makes; the parent of those here."""

    def __init__(self, params, lr=1e-2, weight_decay=0.1, **more):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **more})

    def decayed(self, p, group):
        return p * (1 - group["lr"] * group["weight_decay"])

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.lerp_(p.grad, 0.1)
                    p.copy_(self.decayed(p, group) - group["lr"] * m)


class Decoupled(torch.optim.AdamW):
    """AdamW whose decay is λη/η₀, η₀ the rate it was made with: as Composer's."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(
                        step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                    )
                state["step"] += 1
                beta1, beta2 = group["betas"]
                p.mul_(1 - group["lr"] / group["initial_lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))).sqrt()
                u = state["exp_avg"] / (1 - beta1 ** float(state["step"])) / (root + group["eps"])
                p.sub_(group["lr"] * u)


class SkipStep(torch.optim.Optimizer):
    """AdamW with a factor of 0 or 1 on all that a step changes, by whether the loss stands out: as OLMo-core's."""

    def __init__(self, params, lr=1e-2, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.losses = []

    @property
    def latest_loss(self):
        return self.losses[-1]

    @latest_loss.setter
    def latest_loss(self, loss):
        self.losses = [*self.losses, loss][-8:]

    def factor(self):
        if len(self.losses) < 4:
            return torch.tensor(1.0)
        std, mean = torch.std_mean(torch.stack(self.losses[:-1]))
        return ((self.losses[-1] - mean) <= 6 * std).float()

    @torch.no_grad()
    def step(self, closure=None):
        factor = self.factor()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(
                        step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                    )
                state["step"].add_(factor)
                p.mul_(1 - factor * group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, float(factor) * 0.1)
                state["exp_avg_sq"].lerp_(p.grad**2, float(factor) * 0.05)
                m = state["exp_avg"] / (1 - 0.9 ** state["step"])
                p.sub_(
                    factor
                    * group["lr"]
                    * m
                    / ((state["exp_avg_sq"] / (1 - 0.95 ** state["step"])).sqrt() + 1e-8)
                )


class ByRms(Plain):
    def decayed(self, p, group):
        return p * (1 - group["lr"] * group["weight_decay"] * p.pow(2).mean().sqrt())


class After(Plain):
    """It decays what the step has left, in float32 only."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                assert p.dtype == torch.float32
                p.sub_(group["lr"] * p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"])


class Inside(Plain):
    """It computes in float32, whatever the type of the weights is."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                w = p.float()
                p.copy_(w - group["lr"] * group["weight_decay"] * w - group["lr"] * p.grad.float())


class Spelled(torch.optim.Optimizer):
    """Its decay is `wd`, a number for all groups."""

    def __init__(self, params, lr=1e-2, wd=0.1):
        super().__init__(params, {"lr": lr})
        self.wd = wd

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad.sign() + self.wd * p))


class Busy(Plain):
    """It keeps what it can: counts, lists and buffers, of its own and of the group, and random numbers."""

    def __init__(self, params, **options):
        super().__init__(params, k=0, history=[], **options)
        self.calls = [0]
        self.total = torch.zeros(3)
        self.seen = {}
        self.myself = self.count

    def count(self):
        self.calls[0] += 1

    @torch.no_grad()
    def step(self, closure=None):
        self.myself()
        self.total += 1
        for group in self.param_groups:
            group["k"] += 1
            group["history"].append(random.random() + np.random.rand())  # noqa: NPY002
            for p in group["params"]:
                self.seen[p] = self.seen.get(p, 0) + 1
                noise = torch.rand_like(p) * 1e-3 * group["history"][-1]
                p.copy_(self.decayed(p, group) - group["lr"] * (p.grad + noise))


UNKNOWN = {
    "Plain": Plain,
    "Decoupled": lambda p: Decoupled(p, lr=1e-2, weight_decay=1e-3),
    "ByRms": ByRms,
    "Busy": Busy,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_twins_tell_the_decay_of_an_unknown_optimizer(name):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    make = UNKNOWN[name]
    if name == "Busy":  # its noise is not the same when the training is made again
        _, told, decay, _ = train(make, max(STEPS), asked=STEPS)
        assert decay.reason is None
        assert {round(acting.weight_decay, 9) for t in told for acting in told[t]} == {0.1}
        return
    assert_told(make, how="twins")


@pytest.mark.parametrize("make", [After, Inside, lambda p: Inside(p, weight_decay=1e-4)])
def test_twins_tell_a_decay_that_rounding_hides(make):
    _, told, decay, _ = train(make, max(STEPS), asked=STEPS)
    assert decay.reason is None
    for t in STEPS:
        for acting in told[t]:
            want = 0.1 if acting.weight_decay > 0.01 else 1e-4
            assert acting.weight_decay == pytest.approx(want, rel=1e-3)


def test_a_decay_by_another_name_is_found():
    _, told, decay, _ = train(Spelled, 4, asked=STEPS)
    assert decay.reason is None
    assert [acting.weight_decay for acting in told[4]] == pytest.approx([0.1] * 4, rel=1e-6)


@quiet
@pytest.mark.parametrize(
    "name", [name for name in DECOUPLED if "lr=None" not in name and "hf adafactor, w" not in name]
)
def test_twins_agree_with_the_laws(name, monkeypatch):
    monkeypatch.setattr(module, "law_of", lambda optimizer: None)
    assert_told(DECOUPLED[name], how="twins", only=is_matrix if name == "muon" else lambda p: True)


def test_a_skipped_step_is_seen_and_decays_nothing():
    model = model_of()
    parameters = list(model.parameters())
    optimizer = SkipStep(parameters)
    decay = Decay(optimizer)
    for t in range(1, 9):
        loss = give_gradients(model, t)
        optimizer.latest_loss = loss.detach() * (1e6 if t == 6 else 1)
        counts = update_counts(optimizer, parameters)
        before = weights(parameters)
        decay.ask(parameters, t)
        optimizer.step()
        assert skipped(optimizer, parameters, counts) is (t == 6)
        told = decay.acted(parameters, t)
        if t == 6:
            assert all(torch.equal(w, now) for w, now in zip(before, weights(parameters), strict=True))
            assert {acting.weight_decay for acting in told} == {0.0}
            optimizer.losses.pop()
        else:
            assert [acting.weight_decay for acting in told] == pytest.approx([0.1] * 4, rel=1e-3)
    assert decay.reason is None


def test_a_subclass_that_calls_the_step_of_its_class_is_asked():
    class Mine(torch.optim.AdamW):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(1 - group["lr"] * group["weight_decay"])  # decays twice
            return super().step(closure)

    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # torch hooks the step of its class
    make = lambda p: Mine(p, **SETTINGS)  # noqa: E731
    assert own_step(make([nn.Parameter(torch.ones(1))]))
    assert_told(make, how="twins")


# --- no number is better than a wrong one --------------------------------------------------------------------


class CoupledAdam(Plain):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad + group["weight_decay"] * p
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.lerp_(g**2, 0.1)
                p.sub_(group["lr"] * g / (v.sqrt() + 1e-8))


class Lasso(Plain):
    def decayed(self, p, group):
        return p - group["lr"] * group["weight_decay"] * p.sign()


class Sharpness(Plain):
    """It moves the weights, asks for their gradient there, and goes back."""

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p in parameters:
            p.add_(0.05)
        with torch.enable_grad():
            closure()
        for p in parameters:
            p.sub_(0.05)
        super().step()


class Searches(Plain):
    """It asks for the gradient twice, there and where it would go."""

    @torch.no_grad()
    def step(self, closure=None):
        for _ in range(2):
            super().step(closure)


class Insists(Plain):
    def step(self, closure):
        super().step(closure)


class Clips(Plain):
    """The gradient's norm over all tensors is part of each tensor's step."""

    @torch.no_grad()
    def step(self, closure=None):
        everything = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in everything]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.decayed(p, group) - group["lr"] * p.grad / norm)


class Frees(Plain):
    freed = 0

    def __del__(self):
        Frees.freed += 1


class Held(Plain):
    def __init__(self, params):
        super().__init__(params)
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=0.1)


class Constant(Plain):
    """It decays at whatever rate."""

    def decayed(self, p, group):
        return p * (1 - group["weight_decay"])


class Nameless(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "decay": 0.1, "momentum_decay": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["decay"])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (CoupledAdam, "not proportional to the weights"),
        (Lasso, "not proportional to the weights"),
        (Insists, "its step needs a closure"),
        (Frees, "frees what it holds"),
        (Held, "another optimizer that it holds"),
        (lambda p: Constant(p, lr=0.0), "at a learning rate of 0"),
        (Nameless, "its setting 'decay'"),
    ],
)
def test_where_twins_cannot_tell_there_is_a_reason(make, why):
    model = model_of()
    parameters = list(model.parameters())
    optimizer = make(parameters)
    decay = Decay(optimizer)
    for t in (1, 2, 3):
        give_gradients(model, t)
        decay.ask(parameters, t)
        optimizer.step(*([lambda: None] if make is Insists else []))
        assert all(math.isnan(acting.weight_decay) for acting in decay.acted(parameters, t))
    assert type(optimizer).__name__ in decay.reason
    assert why in decay.reason
    assert "weight_decay=" in decay.reason
    if make is Frees:
        assert Frees.freed == 0


def test_a_twin_that_makes_another_step_tells_nothing():
    model = model_of()
    parameters = list(model.parameters())
    optimizer = Clips(parameters)
    decay = Decay(optimizer)
    for t, asked in ((1, parameters), (2, parameters), (3, parameters[:2])):
        give_gradients(model, t)
        decay.ask(asked, t)
        optimizer.step()
        told = [acting.weight_decay for acting in decay.acted(asked, t)]
        if t < 3:  # all of its tensors were asked together
            assert told == pytest.approx([0.1] * 4, rel=1e-6)
            assert decay.reason is None
        else:
            assert all(map(math.isnan, told))
            assert "made another step" in decay.reason


@pytest.mark.parametrize("make", [Plain, Spelled])
def test_a_decay_that_a_twin_does_not_see_is_noticed(make):
    # As where the question comes in the midst of a step. Of Spelled's, by the sign, it is 3 % of what moves.
    model = model_of()
    parameters = list(model.parameters())
    decay = Decay(optimizer := make(parameters))
    give_gradients(model, 1)
    decay.ask(parameters, 1)
    optimizer.step()
    with torch.no_grad():
        for p in parameters:
            p.mul_(1 - 1e-3)
    assert all(math.isnan(acting.weight_decay) for acting in decay.acted(parameters, 1))
    assert "made another step" in decay.reason


def test_a_decay_that_no_setting_switches_off_is_not_taken_for_none():
    class Cached(Plain):
        def __init__(self, params):
            super().__init__(params)
            self._shrink_by = 0.1

        def decayed(self, p, group):
            return p * (1 - group["lr"] * self._shrink_by)

    class Unused(Plain):
        def decayed(self, p, group):
            return p

    for make, number in ((Cached, math.nan), (Unused, 0.0)):
        _, told, decay, _ = train(make, 3, asked=STEPS)
        assert told[2][0].weight_decay == pytest.approx(number, nan_ok=True)
        assert ("does not switch off" in (decay.reason or "")) is math.isnan(number)


def test_weights_that_a_step_moves_before_its_closure_have_no_number():
    for make, moved in ((Sharpness, True), (Searches, True), (Plain, False)):
        model = model_of()
        parameters = list(model.parameters())
        optimizer = make(parameters)
        decay = Decay(optimizer)
        decay.note(parameters)

        def closure(model=model, decay=decay, parameters=parameters):
            loss = give_gradients(model, 1)
            decay.ask(parameters, 1)
            return loss

        optimizer.step(closure)
        told = decay.acted(parameters, 1)
        if moved:
            assert all(math.isnan(acting.weight_decay) for acting in told)
            assert "before its closure" in decay.reason
        else:
            assert [acting.weight_decay for acting in told] == pytest.approx([0.1] * 4, rel=1e-6)


def test_a_step_that_nobody_was_asked_of_has_no_number():
    p = nn.Parameter(torch.ones(3))
    optimizer = Plain([p])
    decay = Decay(optimizer)
    p.grad = torch.ones(3)
    optimizer.step()
    assert math.isnan(decay.acted([p], 1)[0].weight_decay)
    assert "the gradients were not there" in decay.reason


def test_no_rate_no_number():
    class Rateless(Plain):
        def __init__(self, params):
            super().__init__(params)
            del self.param_groups[0]["lr"]

        def decayed(self, p, group):
            group["lr"] = 0.1
            decayed = super().decayed(p, group)
            del group["lr"]
            return decayed

        def step(self, closure=None):
            self.param_groups[0]["lr"] = 0.1
            for p in self.param_groups[0]["params"]:
                p.data.mul_(0.9)
            del self.param_groups[0]["lr"]

    p = nn.Parameter(torch.ones(3))
    decay = Decay(optimizer := Rateless([p]))
    p.grad = torch.ones(3)
    decay.ask([p], 1)
    optimizer.step()
    lr, weight_decay = decay.acted([p], 1)[0]
    assert math.isnan(lr)
    assert math.isnan(weight_decay) or weight_decay == 0


def test_a_step_that_communicates_is_not_made_by_one_process_alone(tmp_path):
    class Shares(Plain):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    dist.all_reduce(p.grad)
            super().step()

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for make, refused in ((Shares, True), (Plain, False)):
            p = nn.Parameter(torch.randn(80))
            p.grad = torch.ones(80)
            decay = Decay(optimizer := make([p]))
            decay.ask([p], 1)
            optimizer.step()
            assert math.isnan(decay.acted([p], 1)[0].weight_decay) is refused
            assert ("communicates" in (decay.reason or "")) is refused

        mesh = dist.init_device_mesh("cpu", (1,))
        for make, weight_decay in ((Plain, math.nan), (torch.optim.AdamW, 0.01)):
            p = nn.Parameter(distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)]))
            p.grad = torch.ones_like(p)
            decay = Decay(optimizer := make([p]))
            decay.ask([p], 1)
            optimizer.step()
            assert decay.acted([p], 1)[0].weight_decay == pytest.approx(weight_decay, nan_ok=True)
            assert ("DTensor" in (decay.reason or "")) is math.isnan(weight_decay)
    finally:
        dist.destroy_process_group()


# --- groups and tensors --------------------------------------------------------------------------------------


class Counts(Plain):
    steps: ClassVar[list] = []

    def step(self, closure=None):
        Counts.steps.append(sum(len(group["params"]) for group in self.param_groups))
        super().step(closure)


def test_all_groups_are_one_pair_of_twins_of_a_few_tensors():
    Counts.steps = []
    model = nn.Sequential(*(nn.Linear(8 * n, 8) for n in range(9, 1, -1)))
    matrices, biases = [each.weight for each in model], [each.bias for each in model]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.3}]
    optimizer = Counts(groups)
    parameters = [*matrices, *biases]
    decay = Decay(optimizer)
    made = []
    for t in range(1, 8):
        for p in parameters:
            p.grad = torch.randn_like(p)
        Counts.steps.clear()
        decay.ask(parameters, t)
        made.append([*Counts.steps])
        optimizer.step()
        told = [acting.weight_decay for acting in decay.acted(parameters, t)]
        assert told == pytest.approx([0.1] * 8 + [0.3] * 8, rel=1e-6)
    every, few = [16, 16], [4, 4]  # the smallest that tells of each group, and another in turn
    assert made == [every, every, few, every, few, few, few]


def test_tensors_that_come_to_decay_differently_are_each_asked_from_then_on():
    class Late(Plain):
        """From its fifth update on it decays by rms."""

        def decayed(self, p, group):
            later = self.state[p].setdefault("late", 0) >= 4
            self.state[p]["late"] += 1
            return p * (1 - group["lr"] * group["weight_decay"] * (p.pow(2).mean().sqrt() if later else 1))

    model = model_of()
    parameters = list(model.parameters())
    decay = Decay(optimizer := Late(parameters))
    for t in range(1, 8):
        give_gradients(model, t)
        rms = [float(p.detach().pow(2).mean().sqrt()) for p in parameters]
        decay.ask(parameters, t)
        optimizer.step()
        told = [acting.weight_decay for acting in decay.acted(parameters, t)]
        assert told == pytest.approx([0.1 * (each if t > 4 else 1) for each in rms], rel=1e-5)


def test_groups_that_change_are_asked_anew():
    p, q, r = (nn.Parameter(torch.randn(n)) for n in (70, 80, 90))
    optimizer = Plain([p, q])
    decay = Decay(optimizer)
    for t, now in ((1, [p, q]), (2, [p, q]), (3, [q, r]), (4, [r]), (5, [q])):
        optimizer.param_groups[0]["params"] = now
        optimizer.param_groups[0]["weight_decay"] = 0.1 * t
        for each in now:
            each.grad = torch.randn_like(each)
        decay.ask(now, t)
        optimizer.step()
        assert [acting.weight_decay for acting in decay.acted(now, t)] == pytest.approx([0.1 * t] * len(now))
    assert decay.reason is None


def test_a_tensor_that_is_too_large_is_told_by_the_others(monkeypatch):
    for name, size in (("_TOGETHER", 1 << 8), ("_LARGE", 1 << 5)):  # one by one; then the biases alone
        monkeypatch.setattr(module, name, size)
        _, told, decay, _ = train(Plain, 3, asked=STEPS)
        assert [acting.weight_decay for acting in told[2]] == pytest.approx([0.1] * 4, rel=1e-6)
        assert decay.reason is None
    _, told, decay, _ = train(ByRms, 3, asked=STEPS)
    assert [math.isnan(acting.weight_decay) for acting in told[2]] == [True, False, True, False]
    assert "too large to be asked" in decay.reason
    _, told, decay, _ = train(Plain, 3, asked=STEPS, only=is_matrix)  # there is no other
    assert [acting.weight_decay for acting in told[2]] == pytest.approx([0.1] * 2, rel=1e-3)
    assert decay.reason is None


def test_what_is_kept_outside_of_the_state_is_not_copied_where_it_is_much(monkeypatch):
    class Flat(Plain):
        def __init__(self, params):
            super().__init__(params)
            self.buffers = {"m": [torch.zeros(100)]}

    for size, told in ((1 << 8, 0.1), (1 << 6, math.nan)):
        monkeypatch.setattr(module, "_LARGE", size)
        p = nn.Parameter(torch.randn(70))
        p.grad = torch.randn(70)
        decay = Decay(optimizer := Flat([p]))
        decay.ask([p], 1)
        optimizer.step()
        assert decay.acted([p], 1)[0].weight_decay == pytest.approx(told, nan_ok=True)
        assert ("outside of its state" in (decay.reason or "")) is math.isnan(told)


def test_a_group_without_decay_is_not_asked():
    Counts.steps = []
    p, q = nn.Parameter(torch.randn(70)), nn.Parameter(torch.randn(70))
    optimizer = Counts([{"params": [p]}, {"params": [q], "weight_decay": 0.0}])
    p.grad, q.grad = torch.randn(70), torch.randn(70)
    decay = Decay(optimizer)
    decay.ask([p, q], 1)
    assert Counts.steps == [1, 1]
    optimizer.step()
    assert [acting.weight_decay for acting in decay.acted([p, q], 1)] == pytest.approx([0.1, 0.0])
    optimizer.param_groups[0]["weight_decay"] = 0
    Counts.steps.clear()
    decay.ask([p, q], 2)
    assert Counts.steps == []
    assert [acting.weight_decay for acting in decay.acted([p, q], 2)] == [0.0, 0.0]


def test_weights_of_zero_and_tensors_without_a_gradient_ask_nobody():
    p, q, r = nn.Parameter(torch.zeros(70)), nn.Parameter(torch.randn(80)), nn.Parameter(torch.randn(90))
    optimizer = Plain([p, q, r])
    p.grad, q.grad = torch.randn(70), torch.randn(80)
    decay = Decay(optimizer)
    decay.ask([p, q, r], 1)
    optimizer.step()
    told = decay.acted([p, q], 1)
    assert [acting.weight_decay for acting in told] == pytest.approx([0.1, 0.1])
    assert decay.reason is None


def test_a_rate_of_zero_decays_nothing():
    _, told, decay, _ = train(lambda p: Plain(p, lr=0.0), 3, asked=STEPS)
    assert {acting for t in told for acting in told[t]} == {(0.0, 0.0)}
    assert decay.reason is None


def test_weights_of_bfloat16_are_asked_in_float64():
    _, told, decay, _ = train(Plain, max(STEPS), torch.bfloat16, asked=STEPS)
    assert decay.reason is None
    assert [acting.weight_decay for t in STEPS for acting in told[t]] == pytest.approx([0.1] * 20, rel=1e-6)


# --- nothing is left behind ----------------------------------------------------------------------------------


def left_of(optimizer):
    """What a training goes on from, as tensors and as text."""
    leaves = tree_leaves(
        (optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]])
    )
    own = [value for name, value in vars(optimizer).items() if name in ("calls", "total", "losses")]
    numbers = np.random.get_state()[1]  # noqa: NPY002
    tensors = [each.detach().float() for each in leaves if isinstance(each, torch.Tensor)]
    rest = [each for each in leaves if not isinstance(each, torch.Tensor)]
    return [*tensors, torch.get_rng_state()], str(
        (rest, own, sorted(vars(optimizer)), random.getstate(), numbers.tolist())
    )


EVERY = {
    **DECOUPLED,
    **IN_FLOAT32,
    **COUPLED,
    **UNKNOWN,
    "After": After,
    "Inside": Inside,
    "CoupledAdam": CoupledAdam,
}


@quiet
@pytest.mark.parametrize("name", EVERY)
def test_questions_change_nothing_of_a_training(name, monkeypatch):
    monkeypatch.setattr(module, "law_of", lambda optimizer: None)  # ask those that are known as well
    only = is_matrix if name == "muon" else lambda p: True
    ends = []
    for asked in ((), STEPS):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        *_, optimizer = train(EVERY[name], 8, asked=asked, only=only)
        ends.append(left_of(optimizer))
    (tensors, text), (others, other) = ends
    assert text == other
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, others, strict=True))


def test_twins_call_no_hook_and_no_scheduler_counts_their_steps():
    calls = []
    model = model_of()
    parameters = list(model.parameters())

    class Doubly(Plain):
        def step(self, closure=None):
            return super().step(closure)

    optimizers = [Plain(parameters), Doubly(parameters)]  # torch hooks the steps of both classes
    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, lambda t: 1 / (t + 1)) for each in optimizers]
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("before any"))
    try:
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            assert "step" in vars(optimizer)  # the scheduler's own, that counts
            optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
            optimizer.register_step_post_hook(lambda *_: calls.append("after"))
            decay = Decay(optimizer)
            for t in (1, 2):
                give_gradients(model, t)
                calls.clear()
                decay.ask(parameters, t)
                assert calls == []
                optimizer.step()
                assert "before any" in calls
                lr, weight_decay = decay.acted(parameters, t)[0]
                assert (lr, weight_decay) == pytest.approx((1e-2 / t, 0.1), rel=1e-6)
                scheduler.step()
    finally:
        handle.remove()


def test_twins_are_no_steps_in_a_profile():
    model = model_of()
    parameters = list(model.parameters())
    optimizer = Plain(parameters)
    decay = Decay(optimizer)
    give_gradients(model, 1)
    with torch.profiler.profile() as profile:
        decay.ask(parameters, 1)
        optimizer.step()
    assert sum(event.count for event in profile.key_averages() if "Optimizer.step" in event.key) == 1


def test_a_twin_does_not_reach_the_tensors_that_it_has_not():
    class Reaches(Plain):
        def __init__(self, params):
            super().__init__(params)
            self.everything = {"list": [*self.param_groups[0]["params"]]}

        def step(self, closure=None):
            super().step(closure)
            for p in self.everything["list"]:
                p.data.mul_(0.5)

    model = model_of()
    parameters = list(model.parameters())
    decay = Decay(Reaches(parameters))
    give_gradients(model, 1)
    before = weights(parameters)
    for asked in (parameters, parameters[:1], parameters[1:]):
        decay.ask(asked, 1)
    assert all(torch.equal(w, now) for w, now in zip(before, weights(parameters), strict=True))


def test_no_twin_outlives_its_question():
    made = []

    class Watched(Plain):
        def step(self, closure=None):
            made.append(weakref.ref(self))
            super().step(closure)

    model = model_of()
    parameters = list(model.parameters())
    optimizer = Watched(parameters)
    decay = Decay(optimizer)
    give_gradients(model, 1)
    decay.ask(parameters, 1)
    gc.collect()
    assert made
    assert not any(each() for each in made)


# --- in the log ----------------------------------------------------------------------------------------------


LOGGED = ["schedule-free adamw, warmup", "lion, decoupled", "hf adafactor, lr=None", "hf adafactor, scaled"]
LOGGED += ["torchao AdamW8bit", "bitsandbytes AdamW8bit", "Decoupled", "ByRms"]


@quiet
@pytest.mark.parametrize("name", LOGGED)
def test_the_decay_in_the_log_is_what_the_steps_do(name):
    make = EVERY[name]
    logs = []

    def attached(parameters):
        optimizer = make(parameters)
        logs.append(wd.ForceLogger(optimizer, list(zip("abcd", parameters, strict=True)), drift=False))
        return optimizer

    states, *_ = train(attached, max(STEPS))
    with logs[0] as log:
        table = log.run.forces().set_index(["step", "tensor"])
        true = truth(make, torch.float32 if " Adam" in name else torch.float64)
        for t in STEPS:
            for tensor, (product, _), w, after in zip("abcd", true[t], *states[t], strict=True):
                row = table.loc[t, tensor]
                assert row["lr"] * row["weight_decay"] == pytest.approx(product, rel=1e-3)
                assert row["decay"] == pytest.approx(
                    -(2 * product - product**2) * float((w**2).sum()), rel=1e-3
                )
                change = float((after**2).sum() - (w**2).sum())
                assert row[["alignment", "injection", "decay"]].sum() == pytest.approx(change, abs=1e-9)
        assert "no_decay" not in log.run.info


def test_a_skipped_step_is_no_update_of_the_log():
    model = model_of()
    optimizer = SkipStep(model.parameters())
    with wd.ForceLogger(optimizer, model, drift=False) as log:
        for t in range(1, 9):
            loss = give_gradients(model, t)
            optimizer.latest_loss = loss.detach() * (1e6 if t == 6 else 1)
            optimizer.step()
            if t == 6:
                optimizer.losses.pop()
        assert log.step == 7
        assert log.run.forces().groupby("step").size().tolist() == [4] * 7


def test_a_decay_that_is_not_known_leaves_no_force_in_the_log_and_a_word():
    model = model_of()
    optimizer = CoupledAdam(model.parameters())
    with wd.ForceLogger(optimizer, model, drift=False) as log:
        give_gradients(model, 1)
        with pytest.warns(
            RuntimeWarning, match=r"not proportional to the weights .* weight_decay=0 counts it"
        ):
            optimizer.step()
        assert log.latest()[["weight_decay", "alignment", "decay"]].isna().all(axis=None)


# --- what is given -------------------------------------------------------------------------------------------


def test_what_is_given_goes_before_what_is_known():
    p = nn.Parameter(torch.ones(2))
    for make in (torch.optim.AdamW, Plain, CoupledAdam):
        optimizer = make([p], lr=0.5, weight_decay=0.1)
        decay = Decay(optimizer, 0.25)
        decay.ask([p], 1)
        assert (decay.told, decay.acted([p], 1), decay.reason) == ("given", [(0.5, 0.25)], None)
        decay = Decay(optimizer, lambda group, step: group["weight_decay"] / step)
        assert decay.acted([p], 4) == [(0.5, 0.025)]


@pytest.mark.parametrize("wrong", ["0.1", math.nan, [0.1], True])
def test_a_given_decay_that_is_no_number_is_refused(wrong):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises((TypeError, ValueError), match="weight_decay must be a number"):
        Decay(torch.optim.AdamW([p]), wrong)
    with pytest.raises((TypeError, ValueError), match=r"weight_decay\(group, step\) must be a number"):
        Decay(torch.optim.AdamW([p]), lambda group, step: wrong).acted([p], 1)
