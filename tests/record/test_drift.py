"""Drift, memory and signal that ForceLogger measures, against a float64 loop that keeps w, g, m and v."""

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import weightdyn as wd

pytestmark = pytest.mark.filterwarnings("ignore:.*adds weight_decay")

PARTS = ["drift", "memory", "memory_null", "signal"]


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.LayerNorm(10), nn.Linear(10, 3)).to(dtype)


def loss_of(model, t):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t)).to(next(model.parameters()).dtype)
    return (model(x).square().mean(-1) - 1).square().mean()


class Loop:
    """Each update of an optimizer again in float64: torch gives it the weights and the gradients, and no more.

    The momentum of update t is a row of weights of the gradients 1 … t; what it remembers of white noise is the sum
    over all pairs of updates.
    """

    def __init__(self, optimizer, names, stored=False, parts=None):
        self.optimizer, self.names, self.rows = optimizer, names, []
        self.stored = stored  # m and v as the optimizer keeps them, where its type rounds them
        self.parts = parts or {}
        self.past = {p: [] for p in names}  # η, 1 − ηλ, weights of the gradients
        self.kept = {p: {} for p in names}

    def step(self, t, step=None, scale=1.0, moved=True, grads=None):
        given = grads or {p: p.grad for p in self.names}
        old = {
            p: (p.detach().double().clone(), given[p].to_dense().double().clone() / scale)
            for p in self.names
            if given[p] is not None
        }
        groups = {p: dict(group) for group in self.optimizer.param_groups for p in group["params"]}
        (step or self.optimizer.step)()
        for p, (w, g) in old.items() if moved else ():
            self.row(t, p, w, g, groups[p])

    def row(self, t, p, w, g, group):
        lr, decay, kept, past = float(group["lr"]), float(group["weight_decay"]), self.kept[p], self.past[p]
        kind = type(self.optimizer).__name__
        g = -g if group.get("maximize") else g
        if not group.get("decoupled_weight_decay", kind == "AdamW"):
            g, decay = g + decay * w, 0.0
        count = len(past) + 1
        fresh = np.eye(count)[-1]
        before = np.append(kept.get("of_m", []), 0.0)
        if kind == "SGD":
            mu, taken = group["momentum"], 1 - group["dampening"] if past and group["momentum"] else 1.0
            m, of_m, below = mu * kept.get("m", 0) + taken * g, mu * before + taken * fresh, 1.0
            nesterov = group["nesterov"]
            u, of_u = (g + mu * m, fresh + mu * of_m) if nesterov else (m, of_m)
        else:
            (beta1, beta2), eps = map(float, group["betas"]), group["eps"]
            m = beta1 * kept.get("m", 0) + (1 - beta1) * g
            v = beta2 * kept.get("v", 0) + (1 - beta2) * g * g
            if self.stored:
                m, v = (self.optimizer.state[p][key].double() for key in ("exp_avg", "exp_avg_sq"))
            of_m = beta1 * before + (1 - beta1) * fresh
            kept["v"] = v
            if group.get("amsgrad"):
                kept["top"] = v = torch.maximum(v, kept.get("top", torch.zeros_like(v)))
            below = (v / (1 - beta2**count)).sqrt() + eps
            if kind == "NAdam":
                now, then = (
                    beta1 * (1 - 0.5 * 0.96 ** (s * group["momentum_decay"])) for s in (count, count + 1)
                )
                kept["product"] = kept.get("product", 1.0) * now
                on_g, on_m = (1 - now) / (1 - kept["product"]), then / (1 - kept["product"] * then)
                u, of_u = (on_g * g + on_m * m) / below, on_g * fresh + on_m * of_m
            else:
                u, of_u = m / (1 - beta1**count) / below, of_m / (1 - beta1**count)
        kept["m"], kept["of_m"] = m, of_m
        g = g * of_u.sum() / below  # as if all of u were made of it
        own = of_u[-1] / of_u.sum()
        remembered, between = 0.0, 1.0
        for eta, shrink, weights in reversed(past):
            remembered += eta * between * (weights @ of_u[: len(weights)]) / (of_u @ of_u)
            between *= shrink
        past.append((lr, 1 - lr * decay, of_u))
        for label, part in self.parts.get(self.names[p], [(self.names[p], lambda x: x)]):
            self.enter(t, label, part(w), part(u), part(g), part(p.detach()), own, remembered, lr, decay)

    def enter(self, t, label, w, u, g, after, own, remembered, lr, decay):
        shrink = 1 - lr * decay
        alignment, drift = (float(-2 * lr * shrink * (w * x).sum()) for x in (u, g))
        u_sq = float((u * u).sum())
        self.rows.append({
            "step": t, "tensor": label, "ndim": w.ndim,
            "alignment": alignment, "injection": lr**2 * u_sq,
            "decay": float(-(2 * lr * decay - lr**2 * decay**2) * (w * w).sum()),
            "norm_sq": float((w * w).sum()),
            "norm_sq_after": float(after.double().square().sum()),
            "drift": drift, "memory": alignment - drift, "fresh": own,
            "memory_null": 2 * lr * shrink * remembered * u_sq,
            "signal": math.nan if own == 1 else lr**2 * float(((u - own * g) / (1 - own) * g).sum()),
            "dot_wg": float((w * g).sum()), "dot_ug": float((u * g).sum()), "g_sq": float((g * g).sum()),
        })  # fmt: skip

    def table(self):
        return pd.DataFrame(self.rows)


def agree(got, want, matrices=1e-4, others=1e-3, counted=True):
    """Forces within a fraction of their row's budget, products within one of what bounds them.

    What needs the number of the tensor's own updates is left out where not all are `counted`.
    """
    both = got.astype({"tensor": str}).merge(want, on=["step", "tensor"], suffixes=("", "_want"))
    assert len(both) == len(want) == len(got)
    limit = np.where(both["ndim"] >= 2, matrices, others)
    wanted = both[[f"{name}_want" for name in ("drift", "memory", "injection", "decay")]]
    budget = wanted.abs().sum(axis=1)
    g_sq, u_sq = both["g_sq_want"], both["injection_want"] / both["lr"] ** 2
    bounds = {
        **dict.fromkeys(("alignment", "drift", "memory", "injection", "decay"), budget),
        "dot_ug": np.sqrt(u_sq * g_sq),
        "g_sq": g_sq,
    }
    if counted:
        bounds["fresh"] = 1.0
        bounds["signal"] = both["lr"] ** 2 * (np.sqrt(u_sq * g_sq) + g_sq) / (1 - both["fresh_want"])
        bounds["memory_null"] = both["memory_null_want"].abs() + both["injection_want"]
    for name, bound in bounds.items():
        error = (both[name] - both[f"{name}_want"]).abs()
        missing = both[name].isna() | both[f"{name}_want"].isna()
        # The first update has no momentum, hence no signal.
        assert (missing == ((both["fresh_want"] == 1) if name == "signal" else False)).all(), name
        assert (error <= limit * bound)[~missing].all(), (name, (error / (limit * bound)).max())


def names_of(model):
    return {p: name for name, p in model.named_parameters()}


def record(model, optimizer, updates=8, after=lambda: None, **options):
    """Train beside the loop; the table of the log, and the loop's."""
    loop = Loop(optimizer, names_of(model))
    with wd.ForceLogger(optimizer, model, **options) as logger:
        for t in range(1, updates + 1):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            loop.step(t)
            after()
    return logger.run.forces(), loop.table()


ADAMS = {
    "single-tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True},
    "fused-amsgrad": {"amsgrad": True, "fused": True},
    "maximize": {"maximize": True},
    "fused-maximize": {"maximize": True, "fused": True},
    "lr-tensor": {"lr": torch.tensor(1e-2), "foreach": False},
    "betas": {"betas": (0.5, 0.6), "eps": 1e-3},
    "no-momentum": {"betas": (0.0, 0.95)},
    "no-decay": {"weight_decay": 0.0},
    "strong-decay": {"lr": 0.5, "weight_decay": 0.9},
    "rapid-decay": {"lr": 0.5, "weight_decay": 1.8},
}


@pytest.mark.parametrize("source", ["moments", "displacement"])
@pytest.mark.parametrize("drift", [True, "before"])
@pytest.mark.parametrize("options", ADAMS.values(), ids=ADAMS)
@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_products_of_every_adam_agree_with_the_loop(kind, options, drift, source):
    model = mlp(torch.float64 if source == "displacement" else torch.float32)
    settings = {"lr": 1e-2, "weight_decay": 0.2, **options}
    optimizer = getattr(torch.optim, kind)(model.parameters(), **settings)
    agree(*record(model, optimizer, drift=drift, source=source))


def test_groups_have_their_own_rates_decays_and_betas():
    model = mlp()
    groups = [
        {"params": [model[0].weight], "lr": 1e-2, "weight_decay": 0.3, "betas": (0.8, 0.9)},
        {"params": [model[0].bias, model[2].weight], "lr": 1e-3, "betas": (0.0, 0.9)},
        {"params": [model[3].weight, model[3].bias, model[2].bias], "weight_decay": 0.0, "eps": 1e-4},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (n + 1) / 10)
    agree(*record(model, optimizer, updates=12, after=schedule.step))


SGDS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True, "foreach": False},
    "nesterov-foreach": {"momentum": 0.9, "nesterov": True, "foreach": True, "drift": "before"},
    "nesterov-fused": {"momentum": 0.9, "nesterov": True, "fused": True},
    "coupled-decay": {"momentum": 0.9, "weight_decay": 0.2},
    "coupled-nesterov": {"momentum": 0.9, "weight_decay": 0.2, "nesterov": True, "foreach": False},
    "maximize": {"momentum": 0.9, "weight_decay": 0.2, "maximize": True},
    "lr-tensor": {"momentum": 0.9, "lr": torch.tensor(1e-2)},
}


@pytest.mark.parametrize("options", SGDS.values(), ids=SGDS)
def test_products_of_sgd_agree_with_the_loop(options):
    model = mlp(torch.float64)
    options = {"lr": 1e-2, **options}
    drift = options.pop("drift", True)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    agree(*record(model, optimizer, source="displacement", drift=drift), matrices=1e-7, others=1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"decoupled_weight_decay": True}, {"foreach": False}, {"maximize": True}]
)
@pytest.mark.parametrize("drift", [True, "before"])
def test_products_of_nadam_agree_with_the_loop(options, drift):
    model = mlp(torch.float64)
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-2, weight_decay=0.2, **options)
    # The product of its µ is kept in float32.
    agree(*record(model, optimizer, source="displacement", drift=drift, updates=20), matrices=1e-6)


@pytest.mark.parametrize("source", ["moments", "displacement"])
@pytest.mark.parametrize("drift", [True, "before"])
def test_a_fused_step_under_a_grad_scaler_and_clipping(drift, source):
    for unscale, kind in [(False, {"fused": True}), (True, {"fused": True}), (False, {}), (True, {})]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.2, **kind)
        loop = Loop(optimizer, names_of(model))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        with wd.ForceLogger(optimizer, model, drift=drift, source=source) as logger:
            t = 0
            for i in range(1, 11):
                optimizer.zero_grad()
                skipped = i in (1, 5)
                scale = scaler.get_scale()
                scaler.scale(loss_of(model, i) * (math.inf if skipped else 1)).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                t += not skipped
                loop.step(
                    t, lambda s=scaler, o=optimizer: s.step(o), 1.0 if unscale else scale, moved=not skipped
                )
                scaler.update()
        table = logger.run.forces()
        agree(table, loop.table())
        assert table["drift"].notna().all()


def test_a_fused_optimizer_with_an_init_of_its_own_is_logged_under_a_grad_scaler():
    class Mine(torch.optim.AdamW):
        def __init__(self, model):
            super().__init__(model.parameters(), lr=1e-2, fused=True)

    tables = []
    for make in (Mine, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)):
        model = mlp()
        optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=64.0)
        with wd.ForceLogger(optimizer, model) as logger:
            for t in range(3):
                scaler.scale(loss_of(model, t)).backward()
                scaler.step(optimizer)
                scaler.update()
        tables.append(logger.run.forces())
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.filterwarnings("ignore")  # of torch's own
def test_a_compiled_step_is_logged_as_a_plain_one():
    tables = []
    for compiled in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2)

        def step(optimizer=optimizer):
            optimizer.step()

        call = torch.compile(step, backend="eager") if compiled else step
        with wd.ForceLogger(optimizer, model) as logger:
            for t in range(4):
                optimizer.zero_grad()
                loss_of(model, t).backward()
                call()
        tables.append(logger.run.forces()[["step", "tensor", "alignment", *PARTS]])
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-6)


def test_with_the_weights_after_the_step_nothing_is_said_of_drift_and_memory():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with wd.ForceLogger(optimizer, model) as logger:
        for t in range(3):
            loss_of(model, t).backward()
            optimizer.step()
    before, after = logger.run.forces(), logger.run.forces(at="after")
    assert before["drift"].notna().all()
    assert after[["drift", "memory", "memory_null"]].isna().all(axis=None)
    pd.testing.assert_series_equal(after["signal"], before["signal"])
    with pytest.raises(ValueError, match=r'has no drift: .*told with at="before"'):
        wd.budget(after, kind="drift")


def test_the_clipped_gradient_is_the_one_that_acts():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loop = Loop(optimizer, names_of(model))
    with wd.ForceLogger(optimizer, model) as logger:
        for t in range(1, 9):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            assert nn.utils.clip_grad_norm_(model.parameters(), 0.05 / t) > 0.05 / t
            loop.step(t)
    agree(logger.run.forces(), loop.table())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("drift", [True, "before"])
def test_other_types_of_weights(dtype, kind, drift):
    p = nn.Parameter(torch.randn(60, 40, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = torch.optim.AdamW(
        [("p", p)], lr=1e-2, weight_decay=0.125, eps=1e-4, betas=(0.9, 0.95), **kind
    )
    # A fused step rounds the moments when it has used them.
    loop = Loop(optimizer, {p: "p"}, stored="fused" not in kind)
    with wd.ForceLogger(optimizer, drift=drift) as logger:
        for t in range(1, 8):
            p.grad = torch.randn(60, 40, generator=torch.Generator().manual_seed(t)).to(dtype)
            loop.step(t)
    agree(logger.run.forces(), loop.table(), matrices=1e-9 if dtype == torch.float64 else 4e-3)


def test_views_have_the_parts_of_the_whole():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def part(i):  # (heads, 3, head_dim) rows
        return lambda x: x.reshape(4, 3, 8, -1)[:, i].reshape(32, -1)

    fused = [name for name in names_of(model).values() if "query_key_value.weight" in name]
    parts = {name: [(f"{name}[{each}]", part(i)) for i, each in enumerate("qkv")] for name in fused}
    loop = Loop(optimizer, names_of(model), parts=parts)
    with wd.ForceLogger(optimizer, model) as logger:
        for t in range(1, 6):
            optimizer.zero_grad()
            batch = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(t))
            model(input_ids=batch, labels=batch).loss.backward()
            loop.step(t)
    agree(logger.run.forces(), loop.table())


@pytest.mark.parametrize("drift", [True, "before"])
@pytest.mark.parametrize("source", ["moments", "displacement"])
def test_parameters_of_no_and_one_dimension_and_large_ones_in_pieces(drift, source):
    torch.manual_seed(0)
    wide = torch.float64 if source == "displacement" else torch.float32
    made = {"s": (), "b": (7,), "one": (1,), "m": (300, 400), "t": (40, 3, 5, 5)}
    params = {name: nn.Parameter(torch.randn(shape).to(wide)) for name, shape in made.items()}
    params["turned"] = nn.Parameter(torch.randn(400, 301).to(wide).T)
    optimizer = torch.optim.AdamW(params.items(), lr=1e-2)
    loop = Loop(optimizer, {p: name for name, p in params.items()})
    with wd.ForceLogger(optimizer, drift=drift, source=source) as logger:
        for t in range(1, 5):
            for p in params.values():
                p.grad = torch.randn(p.shape).to(wide)
            loop.step(t)
    agree(logger.run.forces(), loop.table(), others=1e-4)


def test_gradients_of_any_layout_and_type_are_read_as_the_step_reads_them():
    torch.manual_seed(0)
    shape = (300, 280)
    layouts = {
        "expanded": lambda: torch.randn(1, 280).expand(300, 280),
        "number": lambda: torch.randn(()).expand(300, 280),
        "turned": lambda: torch.randn(280, 300).T,
        "strided": lambda: torch.randn(600, 560)[::2, ::2],
        "part": lambda: torch.randn(3, 300, 280)[1],
    }
    params = {name: nn.Parameter(torch.randn(shape)) for name in layouts}
    optimizer = torch.optim.AdamW(params.items(), lr=1e-2)
    loop = Loop(optimizer, {p: name for name, p in params.items()})
    with wd.ForceLogger(optimizer) as logger:
        for t in range(1, 4):
            for name, p in params.items():
                p.grad = layouts[name]()
            loop.step(t)
    agree(logger.run.forces(), loop.table())


@pytest.mark.parametrize("drift", [True, "before"])
@pytest.mark.parametrize("kind", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_parameters_without_gradient_in_some_updates(kind, drift):
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.randn(9, 8)), nn.Parameter(torch.randn(9, 8))
    optimizer = torch.optim.AdamW([("p", p), ("q", q)], lr=1e-2, **kind)
    loop = Loop(optimizer, {p: "p", q: "q"})
    with wd.ForceLogger(optimizer, drift=drift) as logger:
        for t in range(1, 121):
            p.grad, q.grad = torch.randn(9, 8), torch.randn(9, 8) if t % 3 else None
            loop.step(t)
    table, want = logger.run.forces(), loop.table()
    agree(table, want, counted=False)
    both = table.astype({"tensor": str}).merge(want, on=["step", "tensor"])
    known = both["memory_null_x"].notna()
    # Its count is another than the group's until nobody can tell: never a wrong number, at last a right one.
    assert known[both["tensor"] == "p"].all()
    np.testing.assert_allclose(both["memory_null_x"][known], both["memory_null_y"][known], rtol=0.02)
    assert known[both["step"] > 100].all()


# --- momentum that has not had the same updates everywhere ------------------------------------------------------


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "adamw-coupled-groups": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.8}),
    "nesterov": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.8, "nesterov": True, "foreach": False}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2, "weight_decay": 0.1}),
}


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_tensor_is_followed_through_its_own_updates(kind, options):
    torch.manual_seed(0)
    params = {name: nn.Parameter(torch.randn(9, 8, dtype=torch.float64)) for name in "pqrs"}
    given = {"p": lambda t: True, "q": lambda t: t % 3, "r": lambda t: t > 20, "s": lambda t: t < 5 or t > 15}
    optimizer = kind(list(params.items()), **options)
    loop = Loop(optimizer, {p: name for name, p in params.items()})
    with wd.ForceLogger(optimizer, source="displacement") as logger:
        for t in range(1, 41):
            for name, p in params.items():
                p.grad = torch.randn(9, 8, dtype=torch.float64) if given[name](t) else None
            optimizer.param_groups[0]["lr"] = 1e-2 * (1.5 + math.sin(t))
            loop.step(t)
    agree(logger.run.forces(), loop.table(), matrices=1e-6)


def test_betas_and_rates_that_cycle_and_a_group_that_comes_later():
    model, late = mlp(), nn.Parameter(torch.randn(5, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=40)
    loop = Loop(optimizer, names_of(model) | {late: "late"})
    with wd.ForceLogger(optimizer, [*model.named_parameters(), ("late", late)], every=5) as logger:
        for t in range(1, 36):
            if t == 13:
                optimizer.add_param_group({"params": [late], "betas": (0.8, 0.9)})
            optimizer.zero_grad()
            (loss_of(model, t) + (late.square() * t).mean() * (t >= 13)).backward()
            if t < 13:
                late.grad = None
            loop.step(t)
            if t < 12:
                schedule.step()
                assert optimizer.param_groups[0]["betas"][0] != 0.9
    want = loop.table()
    agree(logger.run.forces(), want[want["step"] % 5 == 0])


def test_every_fifth_update_has_the_numbers_of_every_update():
    tables = []
    for every in (1, 5):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (n + 1) / 20)
        with wd.ForceLogger(optimizer, model, every=every) as logger:
            for t in range(1, 21):
                optimizer.zero_grad()
                loss_of(model, t).backward()
                optimizer.step()
                schedule.step()
        tables.append(logger.run.forces())
    everything, fifth = tables
    want = everything[everything["step"] % 5 == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(fifth, want)


def test_without_drift_its_columns_are_missing_and_the_others_stay():
    tables = []
    for drift in (True, False):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        tables.append(record(model, optimizer, drift=drift)[0])
    with_drift, without = tables
    gone = [*PARTS, "dot_wg", "dot_ug", "g_sq", "fresh", "lr_memory"]
    assert without[gone].isna().all(axis=None)
    rest = [name for name in without if name not in gone]
    pd.testing.assert_frame_equal(without[rest], with_drift[rest])


# --- a run that is resumed --------------------------------------------------------------------------------------


def run_to(updates, out, start=0, saved=None, every=1, attach=0, drift=True):
    """Train with η that changes in every update; the state to go on from, and the loop's rows."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if saved is not None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    logger: Any = None
    for t in range(start + 1, updates + 1):
        if t == start + 1 + attach:
            logger = wd.ForceLogger(optimizer, model, out=out, every=every, drift=drift)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1.5 + math.sin(t))
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
    logger.close()
    return model.state_dict(), optimizer.state_dict()


def compare_memory(got, want, rtol):
    both = got.merge(want, on=["step", "tensor"], suffixes=("", "_want"))
    assert len(both) == len(got)
    known = both["memory_null"].notna()
    np.testing.assert_allclose(both["memory_null"][known], both["memory_null_want"][known], rtol=rtol)
    np.testing.assert_allclose(both["fresh"], both["fresh_want"], rtol=1e-9)
    np.testing.assert_allclose(both["drift"], both["drift_want"], rtol=1e-9)
    return both["step"][known]


def test_a_resumed_run_goes_on_to_remember_where_the_log_tells_it(tmp_path):
    run_to(80, tmp_path / "whole")
    want = wd.RunLog(tmp_path / "whole").forces()
    for every, rtol in ((1, 1e-9), (7, 0.05)):
        out = tmp_path / f"every-{every}"
        saved = run_to(20, out, every=every)
        run_to(80, out, start=20, saved=saved, every=every)
        known = compare_memory(wd.RunLog(out).forces(), want, rtol)
        if every == 1:
            assert sorted(set(known)) == list(range(1, 81))
        else:  # update 20 is not in the log: not known until it is forgotten
            assert sorted(set(known)) == [7, 14, 70, 77]


def test_a_logger_that_came_late_says_nothing_of_what_it_did_not_see_also_after_a_resume(tmp_path):
    run_to(120, tmp_path / "whole")
    want = wd.RunLog(tmp_path / "whole").forces()
    out = tmp_path / "late"
    saved = run_to(30, out, attach=10)
    run_to(120, out, start=30, saved=saved)
    known = compare_memory(wd.RunLog(out).forces(), want, 0.05)
    assert set(range(80, 121)) <= set(known) <= set(range(53, 121))


def test_momentum_that_somebody_resets_is_young_again():
    p = nn.Parameter(torch.randn(20, 10))
    optimizer = torch.optim.AdamW([("p", p)], lr=1e-2)
    loop = Loop(optimizer, {p: "p"})
    with wd.ForceLogger(optimizer) as logger:
        for t in range(1, 21):
            if t == 13:
                optimizer.state.clear()
                loop.past[p].clear()
                loop.kept[p].clear()
            p.grad = torch.randn(20, 10)
            loop.step(t)
    agree(logger.run.forces(), loop.table())


def test_sgd_does_not_count_its_updates_and_is_told_or_waited_for():
    def train(attach, **options):
        model = mlp(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.8)
        for t in range(1, 61):
            if t == attach + 1:
                logger = wd.ForceLogger(optimizer, model, source="displacement", **options)
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()
        logger.close()
        return logger.run.forces()

    want = train(0)
    told = train(5, start_step=5)
    np.testing.assert_allclose(told["drift"], want.loc[want["step"] > 5, "drift"], rtol=1e-9)
    waited = train(5)
    known = waited["drift"].notna()
    assert set(waited["step"][known]) == set(range(21, 56))  # 0.8²¹ < 1 %
    later = want[want["step"] > 5].reset_index(drop=True)
    np.testing.assert_allclose(waited["drift"][known], later["drift"][known], rtol=0.01)


# --- gradients that are gone after the step ---------------------------------------------------------------------


def clears(optimizer, how):
    """Let a hook that is older than the logger's, or the step itself, clear or write to the gradients."""
    if how == "hook, freed":
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad(set_to_none=True))
    elif how == "hook, zeroed":
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad(set_to_none=False))
    elif how == "hook, scaled":
        optimizer.register_step_post_hook(
            lambda *_: [p.grad.mul_(0.5) for group in optimizer.param_groups for p in group["params"]]
        )
    elif how == "hook, replaced":

        def replace(*_):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)

        optimizer.register_step_post_hook(replace)


GONE = ["hook, freed", "hook, zeroed", "hook, scaled", "hook, replaced", "nesterov", "nesterov, closure"]


@pytest.mark.parametrize("drift", [True, "before"])
@pytest.mark.parametrize("how", GONE)
@pytest.mark.parametrize("source", ["moments", "displacement"])
def test_a_gradient_that_the_step_leaves_changed_is_missing_or_read_before(how, drift, source):
    if how.startswith("nesterov") and source == "moments":
        pytest.skip("Adam writes into no gradient")
    model = mlp(torch.float64)
    if how.startswith("nesterov"):  # torch's foreach step makes its update in the place of the gradients
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True, foreach=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clears(optimizer, how)
    loop = Loop(optimizer, names_of(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with wd.ForceLogger(optimizer, model, drift=drift, source=source) as logger:
            for t in range(1, 6):
                optimizer.zero_grad()
                loss = loss_of(model, t)
                loss.backward()
                closure = how.endswith("closure")
                loop.step(t, (lambda loss=loss: optimizer.step(lambda: loss)) if closure else None)
    table = logger.run.forces()
    told = [
        str(each.message) for each in caught if "freed or written to inside the step" in str(each.message)
    ]
    if drift == "before" or how.startswith("hook"):  # what the step left is read before other hooks change it
        agree(table, loop.table(), matrices=1e-6)
        assert not told
    else:
        assert table[["drift", "memory", "signal"]].isna().all(axis=None)
        assert table[["alignment", "injection", "memory_null"]].notna().all(axis=None)
        assert len(told) == 1
        assert 'drift="before"' in told[0]


@pytest.mark.parametrize("drift", [True, "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("named", [True, False])
def test_a_closure_makes_the_gradients_inside_the_step(drift, dtype, named):
    model = mlp(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.125)
    loop, t = Loop(optimizer, names_of(model), stored=True), 0
    given = {}

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        given.update((p, p.grad.clone()) for p in model.parameters())
        return loss

    with wd.ForceLogger(optimizer, model, drift=drift, every=2) as logger:
        for t in range(1, 7):
            closure()  # so that the loop knows them
            step = (lambda: optimizer.step(closure=closure)) if named else (lambda: optimizer.step(closure))
            optimizer.zero_grad()
            loop.step(t, step, grads=dict(given))
    want = loop.table()
    exact = dtype == torch.float32
    agree(logger.run.forces(), want[want["step"] % 2 == 0], *((1e-4, 1e-3) if exact else (1e-2, 2e-2)))


def test_an_optimizer_in_the_backward_pass_is_logged_by_a_logger_of_its_own():
    model = mlp()
    optimizers = {p: torch.optim.AdamW([(name, p)], lr=1e-2) for name, p in model.named_parameters()}
    loops = {p: Loop(optimizer, {p: names_of(model)[p]}) for p, optimizer in optimizers.items()}
    t = 0

    def step(p):
        loops[p].step(t)
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    loggers = [wd.ForceLogger(optimizer) for optimizer in optimizers.values()]
    for t in range(1, 6):
        loss_of(model, t).backward()
    for logger, loop in zip(loggers, loops.values(), strict=True):
        logger.close()
        agree(logger.run.forces(), loop.table())


def test_a_hook_that_changes_the_gradients_before_the_step_is_not_overlooked():
    for change, known in [("in place", False), ("behind torch", True), ("in place, older", True)]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loop, acted = Loop(optimizer, names_of(model)), {}

        def clip(*_, change=change, model=model, acted=acted):
            for p in model.parameters():
                (p.grad.data if change == "behind torch" else p.grad).mul_(0.5)
                acted[p] = p.grad.clone()

        if change.endswith("older"):
            optimizer.register_step_pre_hook(clip)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*freed or written to")
            with wd.ForceLogger(optimizer, model) as logger:
                if not change.endswith("older"):
                    optimizer.register_step_pre_hook(clip)
                for t in range(1, 5):
                    optimizer.zero_grad()
                    loss_of(model, t).backward()
                    halves = {p: p.grad / 2 for p in model.parameters()}
                    loop.step(t, grads=halves)
        table = logger.run.forces()
        if known:
            agree(table, loop.table())
        else:
            assert table["drift"].isna().all(), change


@pytest.mark.parametrize("drift", [True, "before"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradients_are_read_like_dense_ones(drift, momentum):
    torch.manual_seed(0)
    embed = nn.Embedding(30, 8, sparse=True, dtype=torch.float64)
    optimizer = torch.optim.SGD(embed.parameters(), lr=0.1, momentum=momentum)
    loop = Loop(optimizer, {embed.weight: "weight"})
    with wd.ForceLogger(optimizer, embed, source="displacement", drift=drift) as logger:
        for t in range(1, 6):
            optimizer.zero_grad()
            ids = torch.randint(0, 30, (40,), generator=torch.Generator().manual_seed(t))
            embed(ids).square().sum().backward()
            assert embed.weight.grad.is_sparse
            loop.step(t)
    agree(logger.run.forces(), loop.table(), matrices=1e-9)


def test_gradients_of_another_type_than_the_weights():
    torch.manual_seed(0)
    params = {name: nn.Parameter(torch.randn(30, 20)) for name in ("half", "single", "large")}
    params["large"] = nn.Parameter(torch.randn(300, 400))
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch wants the gradient to have the type of the weights")
    optimizer = torch.optim.SGD(params.items(), lr=0.1)
    loop = Loop(optimizer, {p: name for name, p in params.items()})
    with wd.ForceLogger(optimizer, source="displacement") as logger:
        for t in range(1, 4):
            for name, p in params.items():
                p.grad_dtype = None
                p.grad = torch.randn(p.shape).to(torch.float64 if name == "single" else torch.bfloat16)
            loop.step(t)
    table = logger.run.forces()
    np.testing.assert_allclose(table["g_sq"], loop.table()["g_sq"], rtol=1e-9)
    agree(table, loop.table())


UNTOLD = ["RMSprop", "Adagrad", "RAdam", "Adamax", "Rprop"]


@pytest.mark.parametrize("kind", [*UNTOLD, "Muon", "Lion", "subclass"])
def test_where_u_is_not_linear_in_the_gradients_the_run_says_so(kind):
    class Lion(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1e-3, "weight_decay": 0.0})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad.sign())

    class Mine(torch.optim.AdamW):
        def step(self, closure=None):  # pyright: ignore
            super().step(closure)
            self.zero_grad()

    params = [nn.Parameter(torch.randn(6, 5))]
    if kind == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    made = {"Lion": Lion, "subclass": Mine}.get(kind) or getattr(torch.optim, kind)
    optimizer = made(params)
    with wd.ForceLogger(optimizer, source="displacement") as logger:
        for _ in range(3):
            params[0].grad = torch.randn(6, 5)
            optimizer.step()
    table = logger.run.forces()
    assert sorted(table["step"]) == [1, 2, 3]
    assert table[["drift", "memory", "signal", "memory_null"]].isna().all(axis=None)
    assert table["alignment"].notna().all()
    why = "has a step() of its own" if kind == "subclass" else "is not known to make u a linear function"
    assert why in logger.run.info["no_drift"]


def test_betas_that_are_tensors():
    model = mlp()
    betas = torch.tensor(0.8), torch.tensor(0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), betas=betas, foreach=False)  # type: ignore[arg-type]
    agree(*record(model, optimizer))


def test_a_decay_that_erases_the_weights_leaves_what_is_known():
    model = mlp(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=2.0)
    got, want = record(model, optimizer)
    agree(got, want)
    assert got["drift"].notna().all()


def test_a_gradient_that_is_not_finite_spoils_its_own_row_only():
    params = {name: nn.Parameter(torch.randn(6, 5)) for name in "pq"}
    optimizer = torch.optim.AdamW(params.items(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has NaN or inf")
        with wd.ForceLogger(optimizer) as logger:
            for t in range(3):
                for p in params.values():
                    p.grad = torch.randn(6, 5)
                if t == 1:
                    params["p"].grad[0, 0] = math.nan
                optimizer.step()
    table = logger.run.forces().set_index(["tensor", "step"])
    assert np.isfinite(table.loc["q", ["drift", "memory"]]).all(axis=None)
    assert table.loc["p", "drift"].isna().tolist() == [False, True, True]


# --- pure noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_noise_that_knows_nothing_of_the_weights_has_memory_as_theory_says_and_no_drift(beta1, beta2):
    rng = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.randn(100, 100, generator=rng) * 0.02)
    optimizer = torch.optim.AdamW([("p", p)], lr=1e-3, betas=(beta1, beta2), weight_decay=0.1)
    with wd.ForceLogger(optimizer) as logger:
        for t in range(1, 801):
            p.grad = torch.randn(100, 100, generator=rng)
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1, t / 100) * (1 + 0.5 * math.sin(t / 50))
            optimizer.step()
    rows = wd.smooth(logger.run, windows=4)
    assert (rows["drift"].abs() <= 3 * rows["drift_se"]).all()
    assert (rows["drift_se"] < 0.1 * (rows["injection"] + rows["memory"])).all()
    whole = wd.smooth(logger.run, windows=1).iloc[0]
    if beta1 == 0:
        assert rows["kappa"].isna().all()
        np.testing.assert_allclose(whole["memory"], 0, atol=0.02 * whole["injection"])
    else:
        assert whole["kappa"] == pytest.approx(1, abs=0.03)
    # Diffusion is a random walk of steps η: each gradient moves the weights by ηg/√v in the end, whatever β₁ is.
    table = logger.run.forces()
    table = table[table["step"] > 200]
    walk = (table["lr"] ** 2).mean() * p.numel()
    moved = (table["injection"] + table["memory"]).mean()
    assert moved == pytest.approx(walk, rel=0.05)


def test_the_variance_that_holds_the_fresh_gradient_hides_little_of_a_mean_gradient():
    # w stays a row of ones, so that ⟨w,u⟩ and ⟨w,g̃⟩ are what the two hold of the mean gradient 0.3.
    rng = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.ones(200, 200))
    optimizer = torch.optim.AdamW([("p", p)], lr=1e-12, betas=(0.9, 0.95), weight_decay=0.0)
    with wd.ForceLogger(optimizer) as logger:
        for _ in range(400):
            p.grad = 0.3 + torch.randn(p.shape, generator=rng)
            optimizer.step()
    table = logger.run.forces()[160:]
    # (1−β₂)·(1 − (1−β₁)/(1−β₁β₂)) = 1.55 % to first order
    assert table["dot_wg"].sum() / table["dot_wu"].sum() - 1 == pytest.approx(-0.0155, abs=0.006)


def behind_a_norm(kind, **options):
    """Train a tensor whose scale its loss does not see, on targets that are noise."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=False)
    optimizer = kind(layer.parameters(), lr=1e-3, **options)
    with wd.ForceLogger(optimizer, layer, source="displacement") as logger:
        for t in range(1, 401):
            optimizer.zero_grad()
            rng = torch.Generator().manual_seed(t)
            x, y = torch.randn(16, 40, generator=rng), torch.randn(16, 30, generator=rng)
            (layer(x) / layer.weight.norm() - y).square().mean().backward()
            w, g = layer.weight.detach(), layer.weight.grad
            assert abs(float((w * g).sum() / w.norm() / g.norm())) < 1e-6
            optimizer.step()
    return logger.run


def test_a_scale_invariant_tensor_has_no_drift():
    table = behind_a_norm(torch.optim.SGD, momentum=0.9).forces()
    assert (table["drift"].abs() < 5e-4 * table["alignment"].abs().mean()).all()
    rows = wd.smooth(behind_a_norm(torch.optim.AdamW, betas=(0.9, 0.95)), windows=4)
    assert (rows["drift"].abs() <= 3 * rows["drift_se"]).all()
    assert (rows["drift_se"] < 0.1 * rows["memory"]).all()
