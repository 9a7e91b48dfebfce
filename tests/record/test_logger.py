"""ForceLogger on real torch optimizers, against a float64 loop that clones the weights before each step."""

import gc
import json
import math
import pickle
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import weightdyn as wd

FORCES = ["alignment", "injection", "decay"]


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens(seed):
    return torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(seed))


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.LayerNorm(10), nn.Linear(10, 3)).to(dtype)


def loss_of(model, t):
    rng = torch.Generator().manual_seed(t)
    x = torch.randn(8, 6, generator=rng).to(next(model.parameters()).dtype)
    return (model(x).square().mean(-1) - 1).square().mean()


def train(model, optimizer, updates, start=0, after=None):
    for t in range(start + 1, start + updates + 1):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
        if after is not None:
            after(t)


class Loop:
    """The forces of an optimizer's steps, from float64 copies of the weights before each."""

    def __init__(self, optimizer, names):
        self.optimizer, self.names, self.rows = optimizer, names, []
        self.has_gradient = lambda p: p.grad is not None

    def step(self, t, step=None):
        old = {p: p.detach().double().clone() for p in self.names}
        (step or self.optimizer.step)()
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not self.has_gradient(p):
                    continue
                state = self.optimizer.state[p]
                lr, decay, count = float(group["lr"]), group["weight_decay"], float(state["step"])
                decay = decay if group["decoupled_weight_decay"] else 0.0
                top = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
                m_hat = state["exp_avg"].double() / (1 - group["betas"][0] ** count)
                v_hat = top.double() / (1 - group["betas"][1] ** count)
                u, w = m_hat / (v_hat.sqrt() + group["eps"]), old[p]
                self.rows.append({
                    "step": t,
                    "tensor": self.names[p],
                    "alignment": float(-2 * lr * (1 - lr * decay) * (w * u).sum()),
                    "injection": float(lr**2 * (u * u).sum()),
                    "decay": float(-(2 * lr * decay - lr**2 * decay**2) * (w * w).sum()),
                    "norm_sq": float((w * w).sum()),
                    "norm_sq_after": float(p.detach().double().square().sum()),
                    "ndim": p.ndim,
                })  # fmt: skip

    def table(self):
        return pd.DataFrame(self.rows)


def agree(got, want, matrices=1e-4, others=1e-3):
    """Every force within a fraction of |alignment| + |injection| + |decay| of its row."""
    both = got.astype({"tensor": str}).merge(want, on=["step", "tensor"], suffixes=("", "_want"))
    assert len(both) == len(want) == len(got)
    budget = sum(both[f"{name}_want"].abs() for name in FORCES)
    limit = np.where(both["ndim"] >= 2, matrices, others) * budget
    for name in FORCES:
        assert ((both[name] - both[f"{name}_want"]).abs() <= limit).all(), name
    for name in ("norm_sq", "norm_sq_after"):  # a bias that starts at 0 is found from what it became
        assert ((both[name] - both[f"{name}_want"]).abs() <= 1e-6 * both["norm_sq_after_want"]).all(), name


@pytest.mark.parametrize("kind", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("make", [neox, llama])
def test_forces_of_a_language_model_agree_with_the_loop_over_50_updates(make, kind):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, **kind)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 10))
    loop = Loop(optimizer, {p: name for name, p in model.named_parameters()})
    with wd.ForceLogger(optimizer, model, views=False) as logger:
        for t in range(1, 51):
            optimizer.zero_grad()
            batch = tokens(t)
            model(input_ids=batch, labels=batch).loss.backward()
            loop.step(t)
            schedule.step()
    agree(logger.run.forces(), loop.table())
    assert (wd.closure(logger.run)["closure"] < 1e-3).all()


def test_views_of_fused_tensors_are_the_parts_of_the_whole():
    torch.manual_seed(0)
    model = neox()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    loggers = [wd.ForceLogger(optimizer, model, views=views) for views in (True, False, "head")]
    batch = tokens(0)
    model(input_ids=batch, labels=batch).loss.backward()
    before = model.gpt_neox.layers[1].attention.query_key_value.weight.detach().clone()
    optimizer.step()
    parts, whole, heads = (logger.run.forces() for logger in loggers)
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    # (heads, 3, head_dim) rows: q of head h stands in rows 24h … 24h + 8
    k = before.view(4, 3, 8, 32)[:, 1]
    by_name = parts.set_index("tensor")
    assert by_name.loc[f"{name}[k]", "norm_sq"] == pytest.approx(float(k.double().square().sum()), rel=1e-6)
    assert by_name.loc[f"{name}[k]", ["component", "role"]].tolist() == ["k", "selection"]
    assert by_name.loc[f"{name}[k]", "layer"] == 1
    head = heads.set_index("tensor").loc[f"{name}[k.2]", "norm_sq"]
    assert head == pytest.approx(float(k[2].double().square().sum()), rel=1e-6)
    for table in (parts, heads):
        mine = table[table["tensor"].str.startswith(name)]
        assert mine["numel"].sum() == before.numel()
        for force in FORCES:
            assert mine[force].sum() == pytest.approx(whole.set_index("tensor").loc[name, force], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"maximize": True},
        {"lr": torch.tensor(1e-2), "foreach": False},
        {"eps": 1e-3, "betas": (0.5, 0.6)},
        {"weight_decay": 0.0},
        {"fused": True, "amsgrad": True},
    ],
    ids=lambda o: "-".join(o),
)
def test_every_option_of_adamw(options, dtype):
    model = mlp(dtype)
    settings = {"lr": 1e-2, "weight_decay": 0.2, **options}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    loop = Loop(optimizer, {p: name for name, p in model.named_parameters()})
    with wd.ForceLogger(optimizer, model) as logger:
        for t in range(1, 6):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            loop.step(t)
    agree(logger.run.forces(), loop.table(), matrices=2e-5)


def test_adam_with_decoupled_or_no_decay_and_with_several_groups():
    model = mlp()
    groups = [
        {"params": [model[0].weight], "lr": 1e-2, "weight_decay": 0.3, "betas": (0.8, 0.9)},
        {"params": [model[0].bias, model[2].weight], "lr": 1e-3},
        {"params": [model[3].weight, model[3].bias, model[2].bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.Adam(groups, lr=5e-3, weight_decay=0.1, decoupled_weight_decay=True)
    loop = Loop(optimizer, {p: name for name, p in model.named_parameters()})
    with wd.ForceLogger(optimizer, model) as logger:
        for t in range(1, 8):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            loop.step(t)
    table = logger.run.forces()
    agree(table, loop.table(), matrices=2e-5)
    assert table.groupby("tensor", observed=True)["weight_decay"].first()["0.weight"] == 0.3


def test_adam_that_puts_decay_into_the_gradient_is_logged_with_a_word_of_warning():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1)
    with pytest.warns(UserWarning, match=r"Adam adds weight_decay=0.1 to the gradient"):
        logger = wd.ForceLogger(optimizer, model)
    train(model, optimizer, 3)
    table = logger.run.forces()
    assert (table["decay"] == 0).all()
    assert wd.closure(table)["closure"].max() < 1e-4  # the forces still sum to the change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["plain", "closure", "amsgrad", "coupled"])
def test_updates_that_rounding_swallows_do_not_bias_the_forces(dtype, how):
    # A step of 1e-4 is far below the spacing of bfloat16 at 1: many weights do not move at all.
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(300, 200).to(dtype))
    settings = {"amsgrad": True, "eps": 1e-4} if how == "amsgrad" else {"eps": 1e-4}
    make = torch.optim.Adam if how == "coupled" else torch.optim.AdamW
    # A decay that every type holds exactly: torch rounds a coupled one to the type of the weights.
    optimizer = make([("p", p)], lr=1e-4, weight_decay=0.125, foreach=False, **settings)
    loop = Loop(optimizer, {p: "p"})
    gradient = torch.randn(300, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if how == "coupled" else "error", UserWarning)
        logger = wd.ForceLogger(optimizer, audit_every=2)
    with logger:
        for t in range(1, 7):
            p.grad = (gradient + torch.randn(300, 200)).to(dtype)
            closure = (lambda: torch.zeros(())) if how == "closure" else None
            loop.step(t, lambda closure=closure: optimizer.step(closure) if closure else optimizer.step())
    table, want = logger.run.forces(), loop.table()
    agree(table, want, matrices=4e-3)  # the moments themselves are rounded
    # The residual is what the update should have moved and rounding kept.
    lost = (want["norm_sq_after"] - want["norm_sq"]) - sum(want[name] for name in FORCES)
    audited = table["step"] % 2 == 0
    assert table.loc[~audited, "residual"].isna().all()
    budget = sum(want[name].abs() for name in FORCES)
    np.testing.assert_allclose(table["residual"][audited], lost[audited], atol=4e-3 * budget.max())
    assert (lost.abs() > 0.1 * budget).all()


def test_audit_measures_the_norm_before_and_fp32_leaves_only_rounding():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with wd.ForceLogger(optimizer, model, every=3, audit_every=4) as logger:
        train(model, optimizer, 12)
    table = logger.run.forces()
    assert sorted(table["step"].unique()) == [3, 4, 6, 8, 9, 12]  # an audit is logged
    audited = table[table["step"] % 4 == 0]
    assert audited["residual"].notna().all()
    assert (audited["residual"].abs() < 1e-5 * audited["norm_sq"]).all()
    assert table[table["step"] % 4 != 0]["residual"].isna().all()


def test_parameters_that_are_frozen_tied_or_without_gradient_have_rows_only_where_they_moved():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 6, bias=False)
            self.head = nn.Linear(6, 6, bias=False)
            self.head.weight = self.embed.weight
            self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)
            self.sometimes = nn.Linear(6, 6, bias=False)

        def forward(self, x, t):
            y = self.frozen(self.head(self.embed(x)))
            return self.sometimes(y) if t % 3 == 0 else y

    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loop = Loop(optimizer, {p: name for name, p in model.named_parameters()})
    with wd.ForceLogger(optimizer, model) as logger:
        for t in range(1, 10):
            optimizer.zero_grad(set_to_none=True)
            model(torch.ones(2, 6), t).square().sum().backward()
            loop.step(t)
    table = logger.run.forces()
    agree(table, loop.table(), matrices=2e-5)
    steps = table.groupby("tensor", observed=True)["step"].apply(list)
    assert list(steps.index) == ["embed.weight", "sometimes.weight"]
    assert steps["embed.weight"] == list(range(1, 10))
    assert steps["sometimes.weight"] == [3, 6, 9]


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_that_the_grad_scaler_skips_leaves_no_row(kind, every):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with wd.ForceLogger(optimizer, model, every=every) as logger:
        for t in range(1, 9):
            optimizer.zero_grad()
            loss = loss_of(model, t) * (math.inf if t in (1, 4) else 1)
            scaler.scale(loss).backward()
            before = model[0].weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, model[0].weight) == (t in (1, 4))
    table = logger.run.forces()
    assert sorted(table["step"].unique()) == list(range(every, 7, every))
    assert np.isfinite(table[FORCES]).all(axis=None)


def test_scaled_low_precision_gradients_are_unscaled():
    p = nn.Parameter(torch.linspace(-1, 1, 400).view(20, 20).to(torch.bfloat16))
    optimizer = torch.optim.AdamW([p], lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop = Loop(optimizer, {p: "group0.0(20x20)"})
    with wd.ForceLogger(optimizer) as logger:
        for t in range(1, 4):
            optimizer.zero_grad()
            scaler.scale((p.float() * t - 1).square().sum()).backward()
            loop.step(t, lambda: scaler.step(optimizer))
            scaler.update()
    agree(logger.run.forces(), loop.table(), matrices=6e-3)


def test_every_may_be_a_function_and_unlogged_steps_cost_no_rows():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with wd.ForceLogger(optimizer, model, every=lambda t: t & (t - 1) == 0, tensors="weight$") as logger:
        train(model, optimizer, 20)
    table = logger.run.forces()
    assert sorted(table["step"].unique()) == [1, 2, 4, 8, 16]
    assert set(table["tensor"]) == {"0.weight", "2.weight", "3.weight"}


def test_logging_does_not_change_the_training():
    weights = []
    for logged in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if logged:
            logger = wd.ForceLogger(optimizer, model, audit_every=2, weibull_every=3)
        train(model, optimizer, 10)
        weights.append([p.detach().clone() for p in model.parameters()])
    logger.close()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_latest_table_is_empty_before_the_first_row():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with wd.ForceLogger(optimizer, model, every=3) as logger:
        train(model, optimizer, 2)
        assert len(logger.latest()) == 0
        assert set(FORCES) <= set(logger.latest())
        train(model, optimizer, 2, start=2)
        assert set(logger.latest()["step"]) == {3}


def test_steps_without_any_gradient_are_not_updates():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with wd.ForceLogger(optimizer, model) as logger:
        train(model, optimizer, 2)
        optimizer.zero_grad()
        optimizer.step()
        train(model, optimizer, 1, start=2)
        assert logger.step == 3
    assert sorted(logger.run.forces()["step"].unique()) == [1, 2, 3]


@pytest.mark.parametrize("source", ["moments", "displacement"])
def test_gradients_that_another_hook_clears_do_not_hide_the_update(source):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.2)
    optimizer.register_step_post_hook(lambda o, args, kwargs: o.zero_grad())
    loop = Loop(optimizer, {p: name for name, p in model.named_parameters()})
    loop.has_gradient = lambda p: True
    with wd.ForceLogger(optimizer, model, source=source) as logger:
        for t in range(1, 4):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            loop.step(t)
    table = logger.run.forces()
    assert len(table) == 3 * 6
    assert table["drift"].notna().all()
    agree(table, loop.table())


@pytest.mark.parametrize("product", [1.0, 1 - 1e-6, 0.999, 0.6, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_that_erases_the_weights_has_the_forces_of_the_loop(product, dtype):
    # At ηλ = 1 nothing of w is left in w', so the products before the step cannot come from those after it.
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(40, 30).to(dtype))
    q = nn.Parameter(torch.randn(40, 30).to(dtype))
    groups = [
        {"params": [("p", p)], "weight_decay": product / 0.5},
        {"params": [("q", q)], "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    loop = Loop(optimizer, {p: "p", q: "q"})
    with wd.ForceLogger(optimizer) as logger:
        for t in range(1, 5):
            p.grad, q.grad = torch.randn(40, 30).to(dtype), torch.randn(40, 30).to(dtype)
            loop.step(t)
    table = logger.run.forces()
    agree(table, loop.table(), matrices=1e-6)
    want = loop.table()
    np.testing.assert_allclose(table["norm_sq"], want["norm_sq"], rtol=1e-6)


def test_where_the_device_alone_knows_the_rate_erased_weights_are_nan_and_the_log_says_why(monkeypatch):
    for module in ("watch", "optimizers"):
        monkeypatch.setattr(
            f"weightdyn.record.{module}.is_remote", lambda number: isinstance(number, torch.Tensor)
        )
    p = nn.Parameter(torch.randn(40, 30))
    optimizer = torch.optim.AdamW([("p", p)], lr=torch.tensor(0.5), weight_decay=2.0, foreach=False)
    p.grad = torch.randn(40, 30)
    logger = wd.ForceLogger(optimizer)
    optimizer.step()
    with pytest.warns(RuntimeWarning) as caught:
        row = logger.latest().iloc[0]
    assert [("ηλ = 1" in str(each.message)) for each in caught] == [True]  # and no word of divergence
    assert row[["norm_sq", "alignment", "decay"]].isna().all()
    u = optimizer.state[p]["exp_avg"] / 0.1 / ((optimizer.state[p]["exp_avg_sq"] / 0.001).sqrt() + 1e-8)
    assert row["injection"] == pytest.approx(float(0.25 * u.double().square().sum()), rel=1e-5)
    assert row["norm_sq_after"] == pytest.approx(float(p.detach().double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_rows_go_on_when_the_float32_count_of_updates_stops(kind, tmp_path):
    # 2²⁴ + 1 is rounded to 2²⁴: torch's own count, and its t, stay there.
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.2, **kind)
    train(model, optimizer, 1)
    for state in optimizer.state.values():
        state["step"].fill_(2**24 - 2)
    loop = Loop(optimizer, {p: name for name, p in model.named_parameters()})
    with wd.ForceLogger(optimizer, model, out=tmp_path) as logger:
        for t in range(2**24 - 1, 2**24 + 4):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            if t == 2**24 + 2:
                model[0].weight.grad = None  # rests, and has no row
            loop.step(t)
        assert logger.step == 2**24 + 3
        saved = optimizer.state_dict(), logger.state_dict()
    table = logger.run.forces()
    assert table.groupby("step").size().to_dict() == dict(
        zip(range(2**24 - 1, 2**24 + 4), [6, 6, 6, 5, 6], strict=True)
    )
    agree(table, loop.table())

    # The optimizer's state alone does not tell where it stands; the logger's own does.
    again = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.2, **kind)
    logger = wd.ForceLogger(again, model, out=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"counts its updates in float32, which ends at 16,777,216"):
        again.load_state_dict(saved[0])
    logger.load_state_dict(saved[1])
    train(model, again, 1, start=2**24 + 3)
    logger.close()
    assert wd.RunLog(tmp_path).forces()["step"].unique().tolist() == list(range(2**24 - 1, 2**24 + 5))


def test_heads_are_found_through_a_wrapper_and_missed_ones_are_told():
    model = neox()
    wrapper = nn.Module()  # DistributedDataParallel has the model as .module, and no .config
    wrapper.module = model
    optimizer = torch.optim.AdamW(wrapper.parameters())
    logger = wd.ForceLogger(optimizer, wrapper)
    assert "gpt_neox.layers.0.attention.query_key_value.weight[q]" in logger.run.info["tensors"]
    named = torch.optim.AdamW(wrapper.named_parameters())
    with pytest.warns(RuntimeWarning, match="query_key_value.weight stay together: pass config="):
        logger = wd.ForceLogger(named)
    assert "gpt_neox.layers.0.attention.query_key_value.weight" in logger.run.info["tensors"]


def test_a_module_that_is_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.ones(2, 2))
    logger = wd.ForceLogger(torch.optim.AdamW(model.parameters()), model)
    assert list(logger.run.info["tensors"]) == ["weight", "module.weight"]


def test_names_come_from_the_model_the_pairs_the_optimizer_or_the_shapes():
    model = mlp()
    names = [name for name, _ in model.named_parameters()]
    plain = torch.optim.AdamW(model.parameters())
    named = torch.optim.AdamW(model.named_parameters())
    wrapped = nn.Module()
    wrapped.module = model
    for optimizer, params in (
        (plain, model),
        (plain, model.named_parameters()),
        (named, None),
        (plain, wrapped),
    ):
        logger = wd.ForceLogger(optimizer, params)
        assert list(logger.run.info["tensors"]) == names
    logger = wd.ForceLogger(plain)
    assert list(logger.run.info["tensors"])[:2] == ["group0.0(10x6)", "group0.1(10)"]


def test_a_group_added_in_mid_run_is_logged_from_then_on():
    model = mlp()
    optimizer = torch.optim.AdamW([model[0].weight], lr=1e-2)
    with wd.ForceLogger(optimizer, model) as logger:
        train(model, optimizer, 2)
        optimizer.add_param_group({"params": [model[3].weight], "lr": 1e-3})
        train(model, optimizer, 2, start=2)
    steps = logger.run.forces().groupby("tensor", observed=True)["step"].apply(list)
    assert steps.to_dict() == {"0.weight": [1, 2, 3, 4], "3.weight": [3, 4]}


def test_a_state_dict_loaded_in_mid_run_moves_the_count_and_rewrites_what_follows():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with wd.ForceLogger(optimizer, model) as logger:
        train(model, optimizer, 4)
        saved = {key: value.clone() for key, value in model.state_dict().items()}, optimizer.state_dict()
        saved = saved[0], torch.load(_saved(saved[1]), weights_only=True)
        train(model, optimizer, 4, start=4)
        straight = logger.run.forces()
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        assert logger.step == 4
        train(model, optimizer, 3, start=4)
    table = logger.run.forces()
    assert table["step"].max() == 7
    assert not table.duplicated(["step", "tensor"]).any()
    pd.testing.assert_frame_equal(table, straight[straight["step"] <= 7], check_exact=False, rtol=1e-6)


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_new_optimizer_goes_on_counting_where_it_is_told(tmp_path):
    model = mlp()
    for start in (0, 3):
        optimizer = torch.optim.AdamW(model.parameters())
        with wd.ForceLogger(optimizer, model, out=tmp_path / "run", start_step=start or None):
            train(model, optimizer, 3, start=start)
    table = wd.RunLog(tmp_path / "run").forces()
    assert sorted(table["step"].unique()) == [1, 2, 3, 4, 5, 6]
    optimizer = torch.optim.AdamW(model.parameters())
    logger = wd.ForceLogger(optimizer, model, out=tmp_path / "run")
    with pytest.raises(
        FileExistsError, match=r"1–6: .*start_step= the step of the checkpoint that you loaded"
    ):
        train(model, optimizer, 1)
    logger.close()
    assert wd.RunLog(tmp_path / "run").forces().equals(table)  # nothing was lost


def test_two_loggers_in_one_process_and_two_on_one_optimizer(tmp_path):
    model = mlp()
    first = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    second = torch.optim.SGD(model[3].parameters(), lr=1e-2)
    a = wd.ForceLogger(first, model, out=tmp_path / "a")
    b = wd.ForceLogger(second, model, out=tmp_path / "b", source="displacement")
    c = wd.ForceLogger(first, model, every=2)
    for t in range(1, 5):
        model.zero_grad()
        loss_of(model, t).backward()
        first.step()
        second.step()
    for logger in (a, b, c):
        logger.close()
    assert set(a.run.forces()["tensor"]) == {"0.weight", "0.bias"}
    assert set(b.run.forces()["tensor"]) == {"3.weight", "3.bias"}
    assert sorted(c.run.forces()["step"].unique()) == [2, 4]
    pd.testing.assert_frame_equal(
        c.run.forces()[FORCES], a.run.forces().query("step % 2 == 0")[FORCES].reset_index(drop=True)
    )


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, written plainly: an optimizer that weightdyn has never heard of."""

    def __init__(self, params, lr, weight_decay, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.lerp(p.grad, m, group["betas"][0]).sign())
                m.lerp_(p.grad, 1 - group["betas"][1])


@pytest.mark.parametrize("kind", ["lion", "muon", "sgd", "adamw"])
def test_displacement_logs_any_optimizer_with_decoupled_decay(kind):
    model = mlp()
    matrices = [("0.weight", model[0].weight), ("3.weight", model[3].weight)]
    optimizer = {
        "lion": lambda: Lion(matrices, lr=1e-3, weight_decay=0.5),
        "muon": lambda: torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.5),
        "sgd": lambda: torch.optim.SGD(matrices, lr=1e-2, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(matrices, lr=1e-2, weight_decay=0.5),
    }[kind]()
    with wd.ForceLogger(optimizer, source="displacement", drift=kind in ("sgd", "adamw")) as logger:
        for t in range(1, 8):
            model.zero_grad()
            loss_of(model, t).backward()
            old = {name: p.detach().double().clone() for name, p in matrices}
            optimizer.step()
            now = logger.latest().set_index("tensor")
            lr, decay = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]
            for name, p in matrices:
                w, after = old[name], p.detach().double()
                u = ((1 - lr * decay) * w - after) / lr
                want = [-2 * lr * (1 - lr * decay) * (w * u).sum(), lr**2 * (u * u).sum()]
                want += [-(2 * lr * decay - (lr * decay) ** 2) * (w * w).sum()]
                np.testing.assert_allclose(
                    now.loc[name, FORCES].astype(float), [float(x) for x in want], rtol=1e-9
                )
                change = float((after**2).sum() - (w**2).sum())
                assert now.loc[name, FORCES].sum() == pytest.approx(change, abs=1e-12)
                if kind == "lion":
                    assert now.loc[name, "injection"] == pytest.approx(lr**2 * p.numel(), rel=1e-4)


def test_displacement_of_adamw_equals_its_moments():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    a, b = wd.ForceLogger(optimizer, model), wd.ForceLogger(optimizer, model, source="displacement")
    train(model, optimizer, 5)
    a, b = a.run.forces(), b.run.forces()
    scale = a[FORCES].abs().sum(axis=1)
    for name in FORCES:
        assert ((a[name] - b[name]).abs() < 1e-4 * scale).all()


def test_nan_is_recorded_and_flagged_once_and_training_goes_on():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    logger = wd.ForceLogger(optimizer, model)

    def go_on():
        for t in range(1, 6):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            if t == 3:
                model[0].weight.grad[0, 0] = math.nan
            optimizer.step()
            logger.flush()

    with pytest.warns(RuntimeWarning, match="NaN or inf at update 3") as caught:
        go_on()
    assert len(caught) == 1
    table = logger.run.forces()
    assert table["step"].max() == 5
    bad = table[table["alignment"].isna()]
    assert bad["step"].min() == 3
    assert logger.run.info["flags"]["first_non_finite"] == {"step": 3, "tensor": "0.weight"}


def test_weibull_fits_start_with_the_initial_weights():
    torch.manual_seed(0)
    model = nn.Linear(300, 200)
    nn.init.normal_(model.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with wd.ForceLogger(optimizer, model, weibull_every=2) as logger:
        for t in range(1, 5):
            optimizer.zero_grad()
            model(torch.randn(4, 300, generator=torch.Generator().manual_seed(t))).square().sum().backward()
            optimizer.step()
    fits = logger.run.weibull()
    assert fits["step"].tolist() == [0, 2, 4]  # the matrix; a bias has no law to fit
    assert fits["k"][0] == pytest.approx(1.20543, abs=0.02)
    assert fits["lam"][0] == pytest.approx(0.88749 * 0.02, rel=0.01)
    assert fits["n"].tolist() == [60_000] * 3


def test_snapshots_hold_weights_and_moments(tmp_path):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with wd.ForceLogger(optimizer, model, out=tmp_path, snapshot_every=2, tensors="0.weight"):
        train(model, optimizer, 2)
        w, state = model[0].weight.detach().clone(), optimizer.state[model[0].weight]
        m, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        train(model, optimizer, 1, start=2)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-000002.safetensors"]
    stored = load_file(tmp_path / "snapshots" / "step-000002.safetensors")
    assert set(stored) == {"0.weight", "0.weight.exp_avg", "0.weight.exp_avg_sq"}
    for name, value in (("0.weight", w), ("0.weight.exp_avg", m), ("0.weight.exp_avg_sq", v)):
        assert torch.equal(stored[name], value)


def facts_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["tensors"])


def test_a_snapshot_says_which_decay_acted_and_nothing_where_it_cannot(tmp_path):
    class ByShare(torch.optim.Optimizer):  # decays by λη/η₀
        def __init__(self, params):
            super().__init__(params, {"lr": 0.01, "initial_lr": 0.01, "weight_decay": 1e-3})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] / group["initial_lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * p.grad)

    model = mlp()
    with wd.ForceLogger(
        optimizer := ByShare(model.parameters()), model, every=2, out=tmp_path, snapshot_every=1
    ):
        train(model, optimizer, 2)
    first, second = (facts_of(path) for path in sorted((tmp_path / "snapshots").iterdir()))
    assert {fact["weight_decay"] for fact in first.values()} == {None}  # nobody was asked
    assert {fact["lr"] for fact in first.values()} == {0.01}
    for fact in second.values():
        assert fact["weight_decay"] == pytest.approx(0.1, rel=1e-3)


def test_a_snapshot_of_an_optimizer_that_names_no_rate_ends_no_training(tmp_path):
    from transformers.optimization import Adafactor

    model = mlp()
    optimizer = Adafactor(model.parameters(), lr=None, weight_decay=0.1)
    with wd.ForceLogger(optimizer, model, every=2, out=tmp_path, snapshot_every=1) as logger:
        train(model, optimizer, 2)
    first, second = (facts_of(path) for path in sorted((tmp_path / "snapshots").iterdir()))
    assert {(fact["lr"], fact["weight_decay"]) for fact in first.values()} == {(None, None)}
    rows = logger.run.forces().set_index("tensor")
    for name, fact in second.items():
        assert fact["lr"] == rows.loc[name, "lr"]
        assert fact["weight_decay"] == rows.loc[name, "weight_decay"]


def test_metrics_stand_beside_the_forces():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with wd.ForceLogger(optimizer, model, every=2) as logger:
        train(model, optimizer, 4, after=lambda t: logger.record(loss=torch.tensor(1 / t)))
        logger.record(step=2, eval_loss=0.3)
    metrics = logger.run.metrics()
    assert metrics["step"].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(metrics["loss"], [1, 1 / 2, 1 / 3, 1 / 4], rtol=1e-6)
    assert metrics["eval_loss"].tolist()[1] == 0.3


def test_a_full_disk_does_not_end_the_training_and_loses_nothing(tmp_path, monkeypatch):
    import weightdyn.record.logger as module

    monkeypatch.setattr(module, "_FLUSH_SECONDS", -1.0)  # write after every update
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    logger = wd.ForceLogger(optimizer, model, out=tmp_path)
    flush = logger._writer.flush

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logger._writer, "flush", full)
    with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
        train(model, optimizer, 3)
    assert len(caught) == 1
    monkeypatch.setattr(logger._writer, "flush", flush)
    train(model, optimizer, 2, start=3)
    logger.close()
    assert sorted(wd.RunLog(tmp_path).forces()["step"].unique()) == [1, 2, 3, 4, 5]


def test_a_nan_on_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    logger = wd.ForceLogger(optimizer, model, out=tmp_path, weibull_every=4)

    def full(info):
        raise OSError(28, "No space left on device")

    def go_on():
        train(model, optimizer, 2)
        model[0].weight.data[0, 0] = math.nan
        train(model, optimizer, 3, start=2)

    with monkeypatch.context() as patch:
        patch.setattr(logger._writer._store, "write_info", full)
        with pytest.warns(RuntimeWarning) as caught:
            go_on()
    assert {str(each.message).split(": ")[1][:10] for each in caught} == {"the log co", "0.weight h"}
    logger.close()
    run = wd.RunLog(tmp_path)
    assert sorted(run.forces()["step"].unique()) == [1, 2, 3, 4, 5]
    assert run.info["flags"]["first_non_finite"]["step"] == 3


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_disk(tmp_path, monkeypatch):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())

    def full():
        raise OSError(28, "No space left on device")

    def fail(logger):
        with logger:
            train(model, optimizer, 2)
            monkeypatch.setattr(logger._writer, "flush", full)
            raise KeyError("mine")

    logger = wd.ForceLogger(optimizer, model, out=tmp_path)
    with (
        pytest.warns(RuntimeWarning, match="last rows could not be written"),
        pytest.raises(KeyError, match="mine"),
    ):
        fail(logger)
    monkeypatch.undo()
    logger.close()
    assert wd.RunLog(tmp_path).forces()["step"].max() == 2


def test_a_snapshot_that_cannot_be_written_does_not_end_the_training(tmp_path):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    logger = wd.ForceLogger(optimizer, model, out=tmp_path, snapshot_every=1)
    (tmp_path / "snapshots").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="snapshot of update 1 could not be written"):
        train(model, optimizer, 1)
    logger.close()


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    (tmp_path / "elsewhere").mkdir()
    with wd.ForceLogger(optimizer, model, out="run"):
        train(model, optimizer, 2)
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert wd.RunLog(tmp_path / "run").forces()["step"].max() == 2


def test_a_forked_child_leaves_the_log_to_its_parent(tmp_path):
    code = f"""
import os, torch, weightdyn as wd
p = torch.nn.Parameter(torch.ones(2, 2))
optimizer = torch.optim.AdamW([p])
logger = wd.ForceLogger(optimizer, out={str(tmp_path / "run")!r})
def update():
    p.grad = torch.ones(2, 2)
    optimizer.step()
update()
child = os.fork()
if child:
    update()
    logger.flush()
    os.waitpid(child, 0)
else:
    raise SystemExit  # runs what is registered for the exit
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert wd.RunLog(tmp_path / "run").forces()["step"].tolist() == [1, 2]


def test_a_forgotten_logger_keeps_its_rows_and_frees_the_model(tmp_path):
    def forget():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        wd.ForceLogger(optimizer, model, out=tmp_path)
        train(model, optimizer, 3)
        return weakref.ref(model[0].weight)

    weight = forget()
    gc.collect()
    assert weight() is None
    assert wd.RunLog(tmp_path).forces()["step"].max() == 3


def test_a_checkpoint_never_knows_of_an_update_that_the_log_does_not(tmp_path):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    logger = wd.ForceLogger(optimizer, model, out=tmp_path)
    train(model, optimizer, 3)
    assert len(wd.RunLog(tmp_path).forces()) == 0
    optimizer.state_dict()
    assert wd.RunLog(tmp_path).forces()["step"].max() == 3
    train(model, optimizer, 2, start=3)
    assert logger.state_dict() == {"step": 5}
    assert wd.RunLog(tmp_path).forces()["step"].max() == 5
    logger.close()


def test_the_loggers_state_resumes_an_optimizer_that_counts_nothing(tmp_path):
    model = mlp()
    for start, updates in ((0, 6), (4, 3)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        with wd.ForceLogger(optimizer, model, source="displacement", out=tmp_path) as logger:
            if start:
                logger.load_state_dict({"step": start})
            train(model, optimizer, updates, start=start)
            assert logger.step == start + updates
    table = wd.RunLog(tmp_path).forces()
    assert table["step"].unique().tolist() == list(range(1, 8))
    assert not table.duplicated(["step", "tensor"]).any()
    for wrong in ({}, {"step": -1}, 3):
        with pytest.raises((ValueError, TypeError), match="state"):
            logger.load_state_dict(wrong)


def test_a_checkpoint_on_a_full_disk_is_saved_all_the_same_with_a_word_of_warning(tmp_path, monkeypatch):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    logger = wd.ForceLogger(optimizer, model, out=tmp_path)
    train(model, optimizer, 2)

    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logger._writer, "flush", full)
        with pytest.warns(RuntimeWarning, match="No space left on device"):
            assert optimizer.state_dict()["state"]
        with pytest.raises(OSError, match="No space"):
            logger.state_dict()
    logger.close()
    assert wd.RunLog(tmp_path).forces()["step"].max() == 2


@pytest.mark.parametrize("out", [True, False])
def test_to_look_at_a_run_writes_nothing_and_its_tables_are_up_to_date(tmp_path, out):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with wd.ForceLogger(optimizer, model, out=tmp_path / "run" if out else None) as logger:
        run = logger.run
        train(model, optimizer, 2)
        assert logger.run.path == (tmp_path / "run" if out else None)
        assert not list(tmp_path.rglob("*.parquet"))
        assert run.forces(by="model")["step"].tolist() == [1, 2]
        train(model, optimizer, 1, start=2, after=lambda t: logger.record(loss=1.0))
        assert run.metrics()["step"].tolist() == [3]
        train(model, optimizer, 1, start=3)
    assert run.forces(by="model")["step"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("out", [True, False])
def test_a_run_can_be_sent_to_another_process_while_it_is_written(tmp_path, out):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with wd.ForceLogger(optimizer, model, out=tmp_path if out else None) as logger:
        train(model, optimizer, 2)
        sent = pickle.loads(pickle.dumps(logger.run))
        pd.testing.assert_frame_equal(sent.forces(), logger.run.forces())


def test_a_run_of_a_logger_does_not_keep_the_model_alive():
    def forget():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        logger = wd.ForceLogger(optimizer, model)
        train(model, optimizer, 3)
        return weakref.ref(model[0].weight), logger.run

    weight, run = forget()
    gc.collect()
    assert weight() is None
    assert run.forces()["step"].max() == 3


@pytest.mark.parametrize("how", ["never", "no gradient"])
def test_a_logger_that_saw_no_update_says_what_is_likely_wrong(how):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    logger = wd.ForceLogger(optimizer, model)
    if how == "never":
        another = torch.optim.AdamW(model.parameters())
        train(model, another, 2)
        why = r"its step\(\) was never called: does another optimizer make the updates"
    else:
        optimizer.step()
        why = r"its parameters had no gradient at any step\(\)"
    with pytest.warns(RuntimeWarning, match=f"no update of this AdamW to log; {why}"):
        logger.close()
    logger.close()  # says it once


def test_an_error_of_the_training_is_not_followed_by_a_word_about_missing_updates():
    model = mlp()
    with (
        pytest.raises(KeyError, match="mine"),
        wd.ForceLogger(torch.optim.AdamW(model.parameters()), model),
    ):
        raise KeyError("mine")


def test_the_cell_of_a_notebook_that_is_run_again_overwrites_its_run(tmp_path):
    for updates in (5, 3):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        with wd.ForceLogger(optimizer, model, out=tmp_path, overwrite=True, snapshot_every=updates) as logger:
            train(model, optimizer, updates)
            (tmp_path / "notes.txt").write_text("mine")
    assert logger.run.forces()["step"].unique().tolist() == [1, 2, 3]
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-000003.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    # A job that is requeued loads its checkpoint and goes on, with the same line of code.
    state = optimizer.state_dict()
    optimizer = torch.optim.AdamW(model.parameters())
    with wd.ForceLogger(optimizer, model, out=tmp_path, overwrite=True) as logger:
        optimizer.load_state_dict(state)
        train(model, optimizer, 2, start=3)
    assert logger.run.forces()["step"].unique().tolist() == [1, 2, 3, 4, 5]


def test_closing_takes_the_hooks_off():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    logger = wd.ForceLogger(optimizer, model)
    train(model, optimizer, 2)
    logger.close()
    logger.close()
    train(model, optimizer, 2, start=2)
    assert logger.run.forces()["step"].max() == 2
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_counts_rates_and_skips_that_only_the_device_knows_give_the_same_rows(monkeypatch):
    # The path of a GPU on the CPU: every tensor is taken for one that must not be waited for.
    def run():
        model = mlp()
        matrices = {"params": [model[0].weight, model[3].weight], "lr": torch.tensor(1e-2)}
        rest = {"params": [model[0].bias, model[2].weight], "lr": torch.tensor(2e-2), "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([matrices, rest], fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        with wd.ForceLogger(optimizer, model) as logger:
            for t in range(1, 9):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, t) * (math.inf if t in (1, 4) else 1)).backward()
                if t == 6:
                    model[3].weight.grad = None
                scaler.step(optimizer)
                scaler.update()
                logger.record(t=t)
        assert logger.step == 6
        assert logger.run.metrics()["step"].tolist() == [0, 1, 2, 3, 4, 5, 6]
        return logger.run.forces()

    expected = run()
    for module in ("watch", "optimizers"):
        monkeypatch.setattr(
            f"weightdyn.record.{module}.is_remote", lambda number: isinstance(number, torch.Tensor)
        )
    pd.testing.assert_frame_equal(run(), expected, rtol=1e-9)
    assert expected.groupby("step").size().tolist() == [4, 4, 4, 3, 4, 4]


def test_nothing_waits_for_the_device_between_flushes():
    # On the meta device there are no values: a copy to the host would raise.
    with torch.device("meta"):
        # Sizes with a common divisor: the norm of torch 2.10 on this device keeps an axis of one element.
        model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 4))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    logger = wd.ForceLogger(optimizer, model, audit_every=2)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert len(logger._book.pending) == 4
    logger._book.pending.clear()  # there is nothing to bring over
    logger.close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be a positive int.*got 0"),
        ({"weibull_every": 2.5}, ValueError, r"weibull_every must be.*got 2\.5"),
        ({"params": mlp()}, ValueError, "params has none of the optimizer's parameters"),
        ({"params": [torch.ones(2)]}, TypeError, r"\(name, parameter\) pairs"),
        ({"every": None}, ValueError, "every must be a positive int.*number, got None"),
        (
            {"tensors": "attention"},
            ValueError,
            r"tensors='attention' selects none .* 6 parameters: \S+weight",
        ),
        ({"tensors": 3}, TypeError, "tensors must be a regular expression or a function, got int"),
        ({"snapshot_every": 2}, ValueError, "snapshot_every.*out="),
        (
            {"source": "gradient"},
            ValueError,
            "source must be 'auto', 'moments' or 'displacement', got 'gradient'",
        ),
        ({"views": "row"}, ValueError, "views must be True, False or 'head', got 'row'"),
        ({"start_step": -1}, ValueError, "start_step.*got -1"),
        ({"start_step": "3"}, ValueError, "start_step.*got '3'"),
        ({"tensors": "["}, ValueError, r"tensors must be a regular expression, got '\['"),
        ({"params": 3}, TypeError, r"\(name, parameter\) pairs"),
        (
            {"out": ""},
            ValueError,
            "out must be a directory's path, or None to keep the log in memory.*got ''",
        ),
        ({"out": 3}, ValueError, "out must be a directory's path.*got 3"),
        ({"overwrite": "yes"}, ValueError, "overwrite must be True or False, got 'yes'"),
        ({"start_step": True}, ValueError, "start_step.*got True"),
    ],
)
def test_wrong_arguments_are_named_at_construction(arguments, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        wd.ForceLogger(torch.optim.AdamW(model.parameters()), **{"params": model, **arguments})


def test_what_is_not_adam_is_refused_and_told_what_would_work():
    model = mlp()
    with pytest.raises(TypeError, match=r'AdamW.*got SGD.*source="displacement"'):
        wd.ForceLogger(torch.optim.SGD(model.parameters(), lr=1), source="moments")
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer.*, got Sequential"):
        wd.ForceLogger(model)
    with pytest.raises(ValueError, match="two parameters are named 'a'"):
        wd.ForceLogger(
            torch.optim.AdamW(model.parameters()), [("a", model[0].weight), ("a", model[3].weight)]
        )


def test_a_subclass_with_a_step_of_its_own_is_not_taken_for_adamw():
    class Signed(torch.optim.AdamW):
        def step(self, closure=None):
            pass

    with pytest.raises(TypeError, match=r'Signed, which has a step\(\) of its own; source="displacement"'):
        wd.ForceLogger(Signed(mlp().parameters()), source="moments")


def test_a_metric_that_is_no_number_is_named():
    model = mlp()
    logger = wd.ForceLogger(torch.optim.AdamW(model.parameters()), model, every=np.int64(2))
    with pytest.raises(ValueError, match=r"metric 'loss' must be one number, got a tensor of shape \(2,\)"):
        logger.record(loss=torch.ones(2))


def test_of_a_wrapper_the_inner_optimizer_is_logged():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model = mlp()
    optimizer = Wrapper(torch.optim.AdamW(model.parameters()))
    with wd.ForceLogger(optimizer, model) as logger:
        loss_of(model, 1).backward()
        optimizer.step()
    assert len(logger.run.forces()) == 6
    assert logger.run.info["optimizer"]["name"] == "AdamW"


def test_complex_parameters_are_refused_by_name():
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"parameter c is torch\.strided of torch\.complex64"):
        wd.ForceLogger(torch.optim.AdamW([("c", p)]))


def test_the_repr_says_what_is_logged_and_where(tmp_path):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    logger = wd.ForceLogger(optimizer, model, out=tmp_path / "r")
    assert repr(logger) == f"ForceLogger(AdamW, 6 tensors, at update 0, into {tmp_path / 'r'})"


@pytest.mark.parametrize("step", [-1, 1.5, "last", True])
def test_a_step_to_record_at_is_a_whole_number(step):
    model = mlp()
    with wd.ForceLogger(torch.optim.AdamW(model.parameters()), model) as logger:
        train(model, logger._optimizers[0], 1)
        with pytest.raises((TypeError, ValueError), match="step must be a whole number >= 0, or None"):
            logger.record(step, loss=1.0)
    assert logger.run.metrics().empty


def test_the_run_says_what_its_forces_and_its_decay_are_from():
    class Calling(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    for make, source, decay in (
        (torch.optim.AdamW, "moments", "table"),
        (torch.optim.SGD, "displacement", "table"),
        (Calling, "displacement", "twins"),
    ):
        model = mlp()
        log = wd.ForceLogger(make(model.parameters()), model)
        with pytest.warns(RuntimeWarning, match="no update"):
            log.close()
        assert (log.run.info["source"], log.run.info["decay"]) == (source, decay)
        assert f"forces by   {source}" in repr(log.run)
        assert f"decay by    {decay}" in repr(log.run)
