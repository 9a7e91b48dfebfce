"""Whatever the optimizer is, the log has the decay that acted, or NaN and the reason."""

import numpy as np
import pytest
import torch
from torch import nn

import weightdyn as wd


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))


def give_gradients(model, t):
    generator = torch.Generator().manual_seed(t)
    model.zero_grad()
    (model(torch.randn(8, 12, generator=generator)) - 1).square().mean().backward()


class Decoupled(torch.optim.Optimizer):
    """Signs of momentum, and a decay by λ·η/η₀, as fully decoupled optimizers have it."""

    def __init__(self, params, lr=1e-2, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "initial_lr": lr, "weight_decay": weight_decay})

    def decay(self, p, group):
        p.mul_(1 - group["lr"] / group["initial_lr"] * group["weight_decay"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                self.decay(p, group)
                m.lerp_(p.grad, 0.1)
                p.sub_(group["lr"] * m.sign())


class InTheGradient(Decoupled):
    """The same with the decay in the gradient, and so under a sign."""

    def decay(self, p, group):
        p.grad.add_(p, alpha=group["weight_decay"])


class Skipping(torch.optim.Optimizer):
    """AdamW whose step is multiplied by 0 where its gradients are far too large; its count stays then."""

    def __init__(self, params, lr=1e-2, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.latest = 1.0

    @torch.no_grad()
    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        factor = (torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])) < 1e3).float()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), m=torch.zeros_like(p), v=torch.zeros_like(p))
                p.mul_(1 - factor * group["lr"] * group["weight_decay"])
                state["step"] += factor
                state["m"].lerp_(p.grad, 0.1 * factor)
                state["v"].lerp_(p.grad.square(), 0.05 * factor)
                m = state["m"] / (1 - 0.9 ** state["step"])
                v = state["v"] / (1 - 0.95 ** state["step"])
                p.sub_(factor * group["lr"] * torch.nan_to_num(m / (v.sqrt() + 1e-8)))


class Calling(torch.optim.AdamW):
    """A step that calls that of its class, under which torch's hooks fire twice."""

    def step(self, closure=None):
        return super().step(closure)


def of(path, **options):
    package, name = path.rsplit(".", 1)
    return lambda parameters: getattr(pytest.importorskip(package), name)(parameters, **options)


SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
OPTIMIZERS = {
    "AdamW": of("torch.optim.AdamW", **SETTINGS),
    "a step that calls that of AdamW": lambda parameters: Calling(parameters, **SETTINGS),
    "NAdam, decoupled": of("torch.optim.NAdam", decoupled_weight_decay=True, **SETTINGS),
    "Adafactor": of("torch.optim.Adafactor", **SETTINGS),
    "transformers' Adafactor": of("transformers.optimization.Adafactor", lr=None, weight_decay=0.1),
    "schedule-free": of("schedulefree.AdamWScheduleFree", **SETTINGS),
    "Lion": of("lion_pytorch.Lion", **SETTINGS),
    "Lion, decoupled": of("lion_pytorch.Lion", decoupled_weight_decay=True, lr=1e-2, weight_decay=1e-3),
    "8 bit": of("bitsandbytes.optim.AdamW8bit", min_8bit_size=64, **SETTINGS),
    "fully decoupled": lambda parameters: Decoupled(parameters, lr=1e-2, weight_decay=1e-3),
    "skipping": lambda parameters: Skipping(parameters, **SETTINGS),
}


def train(make, until, without=None, **options):
    """Train and log; the weights before and after each update. One is made without decay, if told so."""
    model = mlp()
    optimizer = make(list(model.parameters()))
    if hasattr(optimizer, "train"):
        optimizer.train()
    weights = []
    with wd.ForceLogger(optimizer, model, **options) as log:
        for t in range(1, until + 1):
            give_gradients(model, t)
            for group in optimizer.param_groups:
                if group["lr"] is not None:
                    group["lr"] = 1e-2 * (1 - t / 20)
                if t == without:
                    group["weight_decay"] = 0.0
            before = [p.detach().double().clone() for p in model.parameters()]
            optimizer.step()
            weights.append((before, [p.detach().double().clone() for p in model.parameters()]))
    return log.run, weights, [name for name, _ in model.named_parameters()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_logged_decay_is_what_one_step_with_it_and_one_without_differ_by(name):
    steps = (2, 4, 6, 8, 10)
    run, weights, names = train(OPTIMIZERS[name], 10, every=lambda t: t in steps)
    rows = run.forces().set_index(["step", "tensor"])
    assert len(rows) == len(steps) * len(names)
    assert "no_decay" not in run.info
    for t in steps:
        _, others, _ = train(OPTIMIZERS[name], t, without=t)
        for label, w, after, bare in zip(names, *weights[t - 1], others[t - 1][1], strict=True):
            norm_sq, row = float(w.square().sum()), rows.loc[t, label]
            product = float((bare - after).mul(w).sum()) / norm_sq
            assert row.lr * row.weight_decay == pytest.approx(product, rel=1e-3, abs=2e-7)
            assert row.decay == pytest.approx(
                -(2 * product - product**2) * norm_sq, rel=1e-3, abs=4e-7 * norm_sq
            )
            change = float(after.square().sum()) - norm_sq
            assert row.alignment + row.injection + row.decay == pytest.approx(
                change, rel=1e-3, abs=1e-5 * norm_sq
            )


def test_where_the_decay_cannot_be_told_there_is_no_number_but_the_reason():
    model = mlp()
    optimizer = InTheGradient(model.parameters())
    log = wd.ForceLogger(optimizer, model)
    give_gradients(model, 0)
    with pytest.warns(RuntimeWarning, match="λ is not known.*not proportional to the weights.*weight_decay="):
        optimizer.step()
    for t in range(1, 3):  # and once only
        give_gradients(model, t)
        optimizer.step()
    log.close()
    rows = log.run.forces()
    told = rows["weight_decay"].notna()  # where no sign changed, the decay did nothing
    assert (rows.loc[told, "weight_decay"] == 0).all()
    assert told.sum() <= 4
    assert rows.loc[~told, ["alignment", "injection", "decay", "drift", "memory"]].isna().all(axis=None)
    assert np.isfinite(rows[["norm_sq", "norm_sq_after", "lr"]]).all(axis=None)
    assert "not proportional" in log.run.info["no_decay"]
    assert "not proportional" in repr(log.run)


def test_the_decay_that_the_user_names_is_the_one_that_counts():
    tables = []
    for weight_decay in (None, 0.0, lambda group, step: group["weight_decay"] / group["initial_lr"]):
        model = mlp()
        optimizer = Decoupled(model.parameters(), lr=1e-2, weight_decay=1e-3)
        with wd.ForceLogger(optimizer, model, weight_decay=weight_decay) as log:
            for t in range(4):
                optimizer.param_groups[0]["lr"] = 1e-2 / (t + 1)
                give_gradients(model, t)
                optimizer.step()
        tables.append(log.run.forces())
        assert log.run.info["decay"] == ("twins" if weight_decay is None else "given")
    asked, none, told = tables
    np.testing.assert_allclose(asked["weight_decay"], 0.1, rtol=1e-3)
    np.testing.assert_allclose(told["weight_decay"], 0.1, rtol=1e-12)
    assert (none["decay"] == 0).all()
    for name in ("alignment", "injection", "decay"):
        np.testing.assert_allclose(asked[name], told[name], rtol=2e-2, atol=1e-6)


def test_a_step_that_skips_itself_is_no_update():
    model = mlp()
    optimizer = Skipping(model.parameters())
    with wd.ForceLogger(optimizer, model) as log:
        for t in range(1, 7):
            give_gradients(model, t)
            if t in (1, 4):
                model[0].weight.grad[0, 0] = 1e6
            optimizer.step()
    assert log.step == 4
    assert log.run.forces()["step"].value_counts().to_dict() == dict.fromkeys(range(1, 5), 4)


def test_hooks_that_fire_twice_count_one_update():
    model = mlp()
    optimizer = Calling(model.parameters(), lr=1e-2)
    wd.ForceLogger(
        torch.optim.AdamW(model.parameters()), model
    )  # by which torch has put hooks into the parent
    with wd.ForceLogger(optimizer, model) as log:
        for t in range(5):
            give_gradients(model, t)
            optimizer.step()
    assert log.step == 5
    assert log.run.forces()["step"].value_counts().to_dict() == dict.fromkeys(range(1, 6), 4)


def test_what_the_run_says_of_its_sources():
    for make, source in (
        (torch.optim.AdamW, "moments"),
        (torch.optim.SGD, "displacement"),
        (Decoupled, "displacement"),
        (Calling, "displacement"),
    ):
        model = mlp()
        log = wd.ForceLogger(make(model.parameters()), model)
        with pytest.warns(RuntimeWarning, match="no update"):
            log.close()
        assert log.run.info["source"] == source
        assert source in repr(log.run)
