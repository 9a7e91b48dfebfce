"""Rescaling in place: α by hand, moments by the algebra of Adam, forces by the log, and all or nothing."""

import copy
import json
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner
from wisca_models import FAMILIES, V, logits, make, same, tokens, weights

import weightdyn as wd
from weightdyn import wisca
from weightdyn.cli import app
from weightdyn.wisca import Part, ScalingPair
from weightdyn.wisca.schedule import EVENT

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(model, optimizer, updates, start=0):
    for t in range(start + 1, start + updates + 1):
        optimizer.zero_grad()
        batch = tokens(seed=t, batch=4)
        model(batch, labels=batch).loss.backward()
        optimizer.step()


def adamw(model, **options):
    return torch.optim.AdamW(
        model.parameters(), **{"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, **options}
    )


def everything(model, optimizer=None):
    """Copies of all that a rescaling may touch."""
    found = weights(model)
    found |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if optimizer is not None:
        for i, state in enumerate(optimizer.state.values()):
            found |= {f"{i}.{key}": value.clone() for key, value in state.items()}
    return found


# --- α ------------------------------------------------------------------------------------------------------


NORMS = {
    "l1": lambda w: float(w.double().abs().sum()),
    "l2": lambda w: float(w.double().norm()),
    "rms": lambda w: float(w.double().square().mean().sqrt()),
}


@pytest.mark.parametrize("norm", NORMS)
def test_alpha_balances_the_norms_of_q_and_k(norm):
    model, measure = make("llama"), NORMS[norm]
    q, k = (model.get_parameter(f"{name}.weight").detach() for name in (Q, K))
    old_q, old_k = q.clone(), k.clone()
    alpha = math.sqrt(measure(k) / measure(q))
    row = wisca.rescale_(model, norm=norm).iloc[0]
    assert (row["pair"], row["layer"], row["a"], row["b"]) == ("qk", 0, "q", "k")
    got = row[["alpha", "norm_a", "norm_b"]].astype(float)
    np.testing.assert_allclose(got, [alpha, measure(old_q), measure(old_k)], rtol=1e-7)
    torch.testing.assert_close(q, alpha * old_q)
    torch.testing.assert_close(k, old_k / alpha)
    assert math.isclose(measure(q), measure(k), rel_tol=1e-6)
    got = row[["norm_a_after", "norm_b_after"]].astype(float)
    np.testing.assert_allclose(got, [measure(q), measure(k)], rtol=1e-6)


@pytest.mark.parametrize(("norm", "power"), [("l1", -1 / 2), ("l2", -1 / 4), ("rms", 0)])
def test_under_grouped_heads_equal_variances_give_a_power_of_the_group_size(norm, power):
    from transformers import LlamaConfig, LlamaForCausalLM

    for group in (1, 4, 8):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=V, hidden_size=128, intermediate_size=64, num_hidden_layers=1,
                             num_attention_heads=8, num_key_value_heads=8 // group)  # fmt: skip
        table = wisca.rescale_(LlamaForCausalLM(config), norm=norm)
        np.testing.assert_allclose(table["alpha"], group**power, rtol=0.02)


def test_a_head_is_a_key_value_group_with_its_query_heads():
    model = make("llama")  # 6 heads of 8 in 2 groups
    q, k = (model.get_parameter(f"{name}.weight").detach().clone() for name in (Q, K))
    table = wisca.rescale_(model, pairs=("qk",), granularity="head")
    rows = table[table["layer"] == 0]
    assert rows["head"].tolist() == [0, 1]
    for group, row in rows.set_index("head").iterrows():
        own_q, own_k = q[24 * group : 24 * group + 24], k[8 * group : 8 * group + 8]
        assert math.isclose(row["alpha"], math.sqrt(own_k.abs().sum() / own_q.abs().sum()), rel_tol=1e-6)
    factor = torch.tensor(rows["alpha"].to_numpy()).repeat_interleave(24).float()[:, None]
    torch.testing.assert_close(model.get_parameter(f"{Q}.weight").detach(), q * factor)


def test_a_channel_is_the_two_rows_that_rope_turns_together():
    model = make("llama", num_key_value_heads=6)  # head_dim 8: rows i and i + 4
    q, k = (model.get_parameter(f"{name}.weight").detach().clone() for name in (Q, K))
    table = wisca.rescale_(model, pairs=("qk",), granularity="channel")
    rows = table[table["layer"] == 0]
    assert rows["channel"].tolist() == list(range(24))
    assert rows["head"].tolist() == [c // 4 for c in range(24)]
    two = [8 * 5 + 3, 8 * 5 + 7]
    expected = math.sqrt(k[two].abs().sum() / q[two].abs().sum())
    assert math.isclose(rows["alpha"].iloc[5 * 4 + 3], expected, rel_tol=1e-6)


def test_kinds_that_meet_in_one_tensor_are_balanced_one_after_the_other():
    model = make("llama")
    table = wisca.rescale_(model, pairs=("qk", "norm"))
    last = table[table["module"] == "model.layers.0.input_layernorm"].iloc[0]
    gain = model.get_parameter("model.layers.0.input_layernorm.weight").detach().abs().sum()
    linears = sum(
        model.get_parameter(f"model.layers.0.self_attn.{name}_proj.weight").detach().abs().sum()
        for name in "qkv"
    )
    assert math.isclose(gain, linears, rel_tol=1e-5)
    assert math.isclose(last["norm_a_after"], gain, rel_tol=1e-5)


def test_max_alpha_bounds_alpha_on_both_sides_and_powers_of_two_stay_inside():
    kinds = ("qk", "vo", "up_down", "norm")
    free = wisca.plan_rescale(make("llama"), pairs=kinds)["alpha"]
    assert free.max() > 1.3
    assert free.min() < 1 / 1.3
    bounded = wisca.plan_rescale(make("llama"), pairs=kinds, max_alpha=1.3)["alpha"]
    assert (bounded.max(), bounded.min()) == (1.3, 1 / 1.3)
    two = wisca.plan_rescale(make("llama"), pairs=kinds, max_alpha=3.9, power_of_two=True)["alpha"]
    assert set(two) <= {0.5, 1.0, 2.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_the_documented_columns_and_the_stack_of_the_force_table(family):
    model = make(family)
    table = wisca.plan_rescale(model, pairs=("qk", "vo", "norm"), errors="skip")
    assert list(table) == list(wisca.RESCALE_TABLE)
    optimizer = adamw(model)
    with wd.ForceLogger(optimizer, model) as logger:
        train(model, optimizer, 1)
    forces = logger.run.forces()
    inside = forces[forces["role"].isin(["selection", "value"])]
    places = set(zip(inside["stack"], inside["layer"], strict=True))
    assert set(zip(table["stack"], table["layer"], strict=True)) - {("", pd.NA)} == places


def test_the_same_block_number_of_two_stacks_is_two_places():
    model = nn.Module()
    model.encoder, model.decoder = make("llama"), make("llama")
    pairs = [
        ScalingPair(pair.kind, f"{side}.{pair.module}", *(
            [Part(f"{side}.{part.name}", part.axis, part.channels, part.measured) for part in half]
            for half in (pair.a, pair.b)
        ), pair.heads, pair.layer, stack=f"{side}.{pair.stack}")
        for side in ("encoder", "decoder") for pair in wisca.find_pairs(make("llama")) if pair.kind == "qk"
    ]  # fmt: skip
    table = wisca.rescale_(model, pairs=pairs)
    assert table.groupby(["stack", "layer"]).size().to_dict() == {
        (f"{side}.model", layer): 1 for side in ("encoder", "decoder") for layer in (0, 1)
    }


# --- the proof ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_loss_and_gradients_are_proven_to_stay(family):
    model = make(family).train()
    before = weights(model)
    proof = wisca.check_equivalence(model, tokens(), granularity="head")
    assert proof["quantity"].tolist() == ["outputs", "loss", "gradients"] * 2
    assert proof["dtype"].tolist() == ["float32"] * 3 + ["float64"] * 3
    assert (proof["relative"] <= [1e-5, 1e-5, 1e-4, 1e-12, 1e-12, 1e-6]).all()
    assert same(weights(model), before)
    assert model.training
    exact = wisca.check_equivalence(model, tokens(), granularity="channel", power_of_two=True)
    assert (exact["difference"] == 0).all()


def test_the_proof_shows_a_rescaling_that_is_none():
    model = make("qwen2")
    pair = next(pair for pair in wisca.find_pairs(model) if pair.kind == "qk")
    wrong = ScalingPair("qk", "wrong", a=pair.a, b=pair.b[:1])  # k's bias left behind
    proof = wisca.check_equivalence(model, tokens(), pairs=[wrong])
    assert (proof.loc[proof["quantity"] == "outputs", "relative"] > 1e-3).all()
    table = wisca.plan_rescale(model)
    with pytest.raises(ValueError, match="table is given"):
        wisca.check_equivalence(model, tokens(), table=table, norm="l2")


# --- undoing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_undo_is_the_inverse_to_the_last_bit_with_powers_of_two(family, granularity):
    model = make(family)
    optimizer = adamw(model, amsgrad=True)
    train(model, optimizer, 2)
    before = everything(model, optimizer)
    kinds = ("qk", "vo", "up_down", "norm")
    table = wisca.rescale_(
        model, optimizer, pairs=kinds, granularity=granularity, power_of_two=True, errors="skip"
    )
    assert not same(everything(model, optimizer), before)
    wisca.undo_(model, table, optimizer)
    assert same(everything(model, optimizer), before)


def test_undo_works_from_a_stored_table_and_close_to_rounding_without_powers_of_two(tmp_path):
    model = make("llama")
    before = weights(model)
    wisca.rescale_(model, granularity="channel").to_parquet(tmp_path / "table.parquet")
    wisca.undo_(model, pd.read_parquet(tmp_path / "table.parquet"))
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=3e-7, atol=0)


def test_undo_wants_the_optimizer_that_the_table_was_made_with():
    model = make("llama")
    optimizer = adamw(model)
    table = wisca.rescale_(model, optimizer)
    before = weights(model)
    with pytest.raises(ValueError, match=r"made with an optimizer \(moments='transport'\)"):
        wisca.undo_(model, table)
    with pytest.raises(ValueError, match="made with no optimizer"):
        wisca.undo_(model, table.assign(moments=None), optimizer)
    assert same(weights(model), before)


def test_a_table_can_be_changed_and_applied_to_a_twin():
    model, twin = make("llama"), make("llama")
    table = wisca.plan_rescale(model, granularity="head")
    before = logits(model)
    wisca.apply_(twin, table.assign(alpha=table["alpha"] * 1.5))
    torch.testing.assert_close(logits(twin), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    factors, shuffled = (wisca.scale_factors(model, t) for t in (table, table.sample(frac=1, random_state=0)))
    assert all(
        torch.equal(factors[name][axis], f) for name, axes in shuffled.items() for axis, f in axes.items()
    )
    assert set(factors[f"{Q}.bias"][0].tolist()) == set(
        table.loc[(table["pair"] == "qk") & (table["layer"] == 0), "alpha"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(alpha=-1.0), "every alpha must be a number > 0"),
        (lambda t: t.assign(module="elsewhere"), "which the model has not"),
        (lambda t: t.iloc[1:], "rows for qk"),
    ],
)
def test_a_table_of_another_model_is_refused(change, message):
    model = make("llama")
    table = wisca.plan_rescale(model, granularity="head")
    with pytest.raises(ValueError, match=message):
        wisca.apply_(model, change(table))
    with pytest.raises(TypeError, match="table must be what rescale_"):
        wisca.apply_(model, table[["pair", "alpha"]])


# --- all or nothing -----------------------------------------------------------------------------------------


def spoil_zero(model):
    model.get_parameter("model.layers.1.self_attn.v_proj.weight").data.zero_()


def spoil_nan(model):
    model.get_parameter("model.layers.1.self_attn.k_proj.weight").data[0, 0] = math.nan


def spoil_tie(model):
    layers = model.model.layers
    layers[1].self_attn.k_proj.weight = layers[0].self_attn.k_proj.weight


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_zero, "vo of model.layers.1.self_attn: the norm of v is 0, which has no finite α"),
        (spoil_nan, "qk of model.layers.1.self_attn: the norm of k is nan"),
        (spoil_tie, "k_proj.weight is tied to model.layers"),
    ],
)
def test_one_pair_that_cannot_be_done_leaves_everything_as_it_was(spoil, message):
    model = make("llama")
    spoil(model)
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    spoil(model)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        wisca.rescale_(model, optimizer)
    after = everything(model, optimizer)
    assert all(torch.equal(after[name].nan_to_num(), each.nan_to_num()) for name, each in before.items())


def test_pairs_that_cannot_be_done_are_skipped_if_the_user_says_so():
    model = make("llama")
    spoil_zero(model)
    before = weights(model)
    table = wisca.rescale_(model, errors="skip")
    skipped = table[table["skipped"].notna()]
    assert skipped[["pair", "layer", "alpha"]].to_numpy().tolist() == [["vo", 1, 1.0]]
    untouched = {name for name, tensor in weights(model).items() if torch.equal(tensor, before[name])}
    assert "model.layers.1.self_attn.o_proj.weight" in untouched
    assert f"{Q}.weight" not in untouched
    wisca.undo_(model, table)


def test_one_dead_head_is_skipped_alone():
    model = make("llama")
    model.get_parameter("model.layers.1.self_attn.v_proj.weight").data[8:].zero_()
    table = wisca.rescale_(model, granularity="head", errors="skip")
    assert table.loc[table["skipped"].notna(), ["layer", "head"]].to_numpy().tolist() == [[1, 1]]


def test_refused_kinds_say_why_and_leave_the_model():
    model = make("gpt_neox")
    before = weights(model)
    with pytest.raises(ValueError, match=r"not positively homogeneous.*\(and 1 more\). Nothing was changed"):
        wisca.rescale_(model, pairs=("qk", "up_down"))
    assert same(weights(model), before)


def test_entries_that_a_power_of_two_would_cost_a_bit_are_refused():
    model = make("llama", dtype=torch.float16)
    q = model.get_parameter(f"{Q}.weight")
    q.data[0, 0] = 2.0**-24 * 3  # subnormal: half of it is not there
    before = weights(model)
    with pytest.raises(ValueError, match="that a power of two costs them bits"):
        wisca.rescale_(model, power_of_two=True)
    assert same(weights(model), before)
    wisca.rescale_(model)


def test_entries_that_would_overflow_are_refused():
    model = make("llama", dtype=torch.float16)
    before = weights(model)
    table = wisca.plan_rescale(model)
    with pytest.raises(ValueError, match="would overflow"):
        wisca.apply_(model, table.assign(alpha=2.0**20))
    assert same(weights(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l3"}, r"norm must be .l1., .l2. or .rms., got .l3."),
        ({"granularity": "row"}, "granularity must be"),
        ({"moments": "drop"}, "moments must be"),
        ({"errors": "ignore"}, "errors must be"),
        ({"max_alpha": 0.5}, "max_alpha must be a number >= 1"),
        ({"pairs": "qk"}, "pairs must be some of"),
        ({"pairs": ("qkv",)}, "pairs must be some of"),
        ({"pairs": ()}, "pairs must be some of"),
        ({"pairs": ("lora",)}, r"no pair of the kinds \['lora'\]"),
    ],
)
def test_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        wisca.rescale_(make("llama"), **options)


@pytest.mark.parametrize("call", [wisca.apply_, wisca.undo_, wisca.scale_factors])
def test_what_is_no_table_of_a_rescaling_is_named(call):
    model = make("llama")
    for table in (None, 3, [], pd.DataFrame(), wisca.plan_rescale(model).assign(alpha="1")):
        with pytest.raises(TypeError, match="table must be what rescale_ or plan_rescale returns"):
            call(model, table)
    with pytest.raises(TypeError, match="pairs must be the ScalingPairs"):
        call(model, wisca.plan_rescale(model), pairs=("qk",))


def test_weights_without_values_are_refused():
    table = wisca.plan_rescale(make("llama"))
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        empty = LlamaForCausalLM(make("llama").config)
    with pytest.raises(ValueError, match="is no whole, dense tensor with values"):
        wisca.apply_(empty, table)
    with pytest.raises(ValueError, match="is no whole, dense, real tensor"):
        wisca.rescale_(empty)


@pytest.mark.parametrize("batch", [None, {}, "text", torch.zeros(2, 3), torch.zeros(0, 3, dtype=torch.long)])
def test_a_batch_that_no_model_takes_is_named(batch):
    with pytest.raises((TypeError, ValueError), match="batch must be token ids"):
        wisca.check_equivalence(make("llama"), batch)


def rows(name, count, axis=0):
    return [Part(name, axis, torch.arange(count))]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (ScalingPair("x", "m", rows("nothing", 3), rows("nothing", 3)), "no parameter nothing"),
        (ScalingPair("x", "m", rows(f"{Q}.weight", 3), rows(f"{K}.weight", 3)), "label 3 indices of axis 0"),
        (ScalingPair("x", "m", rows(f"{Q}.weight", 48)), "each side needs a part"),
        (
            ScalingPair("x", "m", rows(f"{Q}.weight", 48), rows(f"{K}.weight", 48, 1), heads=torch.arange(4)),
            "heads has 4 entries, and there are 48 channels",
        ),
    ],
)
def test_pairs_of_ones_own_that_do_not_fit_say_where(pair, message):
    model = make("llama")
    with pytest.raises(ValueError, match=message):
        wisca.rescale_(model, pairs=[pair])
    with pytest.raises(TypeError, match="not both"):
        wisca.rescale_(model, pairs=["qk", pair])
    with pytest.raises(ValueError, match="same kind and module"):
        wisca.rescale_(model, pairs=[pair, pair])


def test_a_part_and_a_pair_are_checked_when_they_are_made():
    for channels in (None, [0, 1], torch.ones(3), torch.zeros(2, 2, dtype=torch.long), torch.tensor([-2])):
        with pytest.raises(TypeError, match="channels must be a 1-D tensor of whole numbers >= -1"):
            Part("w", 0, channels)
    with pytest.raises(ValueError, match="axis must be a whole number >= 0, got -1"):
        Part("w", -1, torch.arange(3))
    with pytest.raises(TypeError, match="a must be Parts, in a list"):
        ScalingPair("x", "m", a=Part("w", 0, torch.arange(3)))
    with pytest.raises(TypeError, match="heads must be a 1-D tensor"):
        ScalingPair("x", "m", heads=torch.zeros(4))


# --- moments ------------------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    model = make("qwen2")
    optimizer = adamw(model, amsgrad=True)
    train(model, optimizer, 3)
    return model, optimizer


def state(model, optimizer, name):
    return {key: value.clone() for key, value in optimizer.state[model.get_parameter(name)].items()}


def test_transported_moments_are_divided_by_the_factor_and_its_square(trained):
    model, optimizer = trained
    names = [f"{Q}.weight", f"{Q}.bias", f"{K}.weight", f"{K}.bias"]
    before = {name: state(model, optimizer, name) for name in names}
    gradients = {name: model.get_parameter(name).grad.clone() for name in names}
    alpha = wisca.rescale_(model, optimizer)["alpha"][0]
    for name, factor in zip(names, [alpha, alpha, 1 / alpha, 1 / alpha], strict=True):
        after = state(model, optimizer, name)
        assert after["step"] == 3
        torch.testing.assert_close(after["exp_avg"], before[name]["exp_avg"] / factor)
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            torch.testing.assert_close(after[key], before[name][key] / factor**2)
        torch.testing.assert_close(model.get_parameter(name).grad, gradients[name] / factor)


def test_kept_moments_stay_and_reset_ones_start_anew(trained):
    model, optimizer = trained
    before = everything(model, optimizer)
    table = wisca.rescale_(model, optimizer, moments="keep")
    after = everything(model, optimizer)
    states = [name for name in before if name[0].isdigit()]
    assert all(torch.equal(before[name], after[name]) for name in states)
    assert set(table["moments"]) == {"keep"}
    wisca.rescale_(model, optimizer, moments="reset", norm="l2")
    assert all(not value.any() for value in state(model, optimizer, f"{Q}.weight").values())
    assert state(model, optimizer, "model.norm.weight")["step"] == 3


def test_gradients_follow_so_a_rescaling_may_come_before_or_behind_the_backward_pass():
    first, second = make("llama"), make("llama")
    batch = tokens()
    wisca.rescale_(first)
    first(batch, labels=batch).loss.backward()
    second(batch, labels=batch).loss.backward()
    wisca.rescale_(second)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["attribute", "values", "state"])
def test_fp32_master_weights_follow_their_copies(kind):
    model = make("llama", dtype=torch.bfloat16)
    masters = [nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    if kind == "attribute":
        for parameter, master in zip(model.parameters(), masters, strict=True):
            parameter.main_param = master
    if kind == "state":
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter, master in zip(model.parameters(), masters, strict=True):
            optimizer.state[parameter]["master_param"] = master.data
    else:
        optimizer = torch.optim.AdamW(
            [{"params": [m for m in masters if m.ndim == 1]}, {"params": [m for m in masters if m.ndim == 2]}]
        )
        for master in masters:
            master.grad = torch.ones_like(master)
        optimizer.step()
        for parameter, master in zip(model.parameters(), masters, strict=True):
            parameter.data.copy_(master.data)
    names = [name for name, _ in model.named_parameters()]
    old = dict(zip(names, [master.detach().clone() for master in masters], strict=True))
    table = wisca.rescale_(model, optimizer, granularity="head", power_of_two=True)
    factors = wisca.scale_factors(model, table)
    for name, master in zip(names, masters, strict=True):
        expected = old[name]
        for axis, factor in factors.get(name, {}).items():
            expected = expected * (factor[:, None] if master.ndim == 2 and axis == 0 else factor).float()
        assert torch.equal(master, expected)
        assert torch.equal(model.get_parameter(name), master.bfloat16())
        if kind != "state" and name in factors:
            m = optimizer.state[master]["exp_avg"]
            assert torch.equal(m * expected, torch.full_like(m, m.max()) * 0 + m * expected)
            assert not torch.equal(m, torch.full_like(m, 0.1))
    wisca.undo_(model, table, optimizer)
    assert all(torch.equal(master, old[name]) for name, master in zip(names, masters, strict=True))


def test_momentum_of_sgd_is_transported_and_an_unknown_state_is_refused():
    model = make("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    before = state(model, optimizer, f"{Q}.weight")["momentum_buffer"]
    alpha = wisca.rescale_(model, optimizer)["alpha"][0]
    torch.testing.assert_close(state(model, optimizer, f"{Q}.weight")["momentum_buffer"], before / alpha)
    k = model.get_parameter(f"{K}.weight")
    optimizer.state[k]["shampoo"] = torch.ones_like(k)
    untouched = everything(model, optimizer)
    with pytest.raises(TypeError, match="optimizer keeps 'shampoo'"):
        wisca.rescale_(model, optimizer, norm="l2")
    assert same(everything(model, optimizer), untouched)
    wisca.rescale_(model, optimizer, norm="l2", moments="keep")


@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="this torch has no Adafactor")
def test_factored_moments_are_refused_and_plain_counts_start_anew():
    model = make("llama")
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, 1)
    with pytest.raises(TypeError, match=r"optimizer keeps '(row|col)_var'"):
        wisca.rescale_(model, optimizer)
    q = model.get_parameter(f"{Q}.weight")
    optimizer.state[q]["step"] = 7  # as some optimizers outside torch have it
    wisca.rescale_(model, optimizer, moments="reset")
    assert optimizer.state[q]["step"] == 0
    assert not optimizer.state[q]["row_var"].any()


def test_two_optimizers_are_given_as_a_list_and_half_of_them_is_refused():
    model = make("llama")
    parts = [[p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim == 1]]
    optimizers = [torch.optim.AdamW(part) for part in parts]
    before = weights(model)
    with pytest.raises(ValueError, match="give all optimizers of the model, as a list"):
        wisca.rescale_(model, optimizers[0])
    with pytest.raises(TypeError, match="or several, got str"):
        wisca.rescale_(model, ["adam"])
    assert same(weights(model), before)
    wisca.rescale_(model, optimizers)


# --- forces -------------------------------------------------------------------------------------------------


def with_and_without(family, moments, updates=10, more=1, views=True, **options):
    """Force tables of the updates behind a rescaling and of a twin that was not rescaled."""
    model, twin = make(family), make(family)
    tables = []
    for each in (twin, model):
        optimizer = adamw(each)
        with wd.ForceLogger(optimizer, each, views=views) as logger:
            train(each, optimizer, updates)
            if each is model:
                table = wisca.rescale_(model, optimizer, moments=moments, **options)
            train(each, optimizer, more, updates)
        forces = logger.run.forces()
        tables.append(forces[forces["step"] > updates].reset_index(drop=True))
    predicted = wisca.predict_shift(tables[0], table, model, betas=(0.9, 0.95))
    return tables[0], predicted, tables[1]


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_the_logged_forces_behind_a_transported_rescaling_are_the_predicted_ones(family, granularity):
    views = "head" if granularity == "head" else True
    before, predicted, logged = with_and_without(
        family, "transport", views=views, granularity=granularity, pairs=("qk", "vo"), norm="l2"
    )
    assert (predicted["tensor"] == logged["tensor"]).all()
    known = predicted["factor"].notna()
    shifted = known & (predicted["factor"] != 1)
    assert shifted.sum() >= 8
    budget = predicted[list(wd.FORCES)].abs().sum(axis=1)
    for force in (*wd.FORCES, "drift", "memory"):
        assert ((predicted[force] - logged[force]).abs() <= 1e-3 * budget)[known].all(), force
    for column in ("norm_sq", "norm_sq_after"):
        np.testing.assert_allclose(predicted[column][known], logged[column][known], rtol=1e-5)
    assert ((predicted["signal"] - logged["signal"]).abs() <= 1e-3 * logged["injection"])[known].all()
    np.testing.assert_allclose(predicted["memory_null"][known], logged["memory_null"][known], rtol=1e-3)
    # κ begins at f times what it was.
    kappa = (logged["memory"] / logged["memory_null"]) / (before["memory"] / before["memory_null"])
    sure = shifted & (before["memory"].abs() > 0.05 * budget)
    assert sure.sum() >= 4
    np.testing.assert_allclose(kappa[sure], predicted["factor"][sure], rtol=0.02)
    # The shift is no rounding: without the prediction the same comparison fails by far.
    apart = (before["decay"] - logged["decay"]).abs() > 0.01 * budget
    assert apart[shifted].any()
    unknown = predicted[~known]["tensor"].astype(str)
    several = ["query_key_value.bias"] if family == "gpt_neox" else []
    if granularity == "head":  # of these the log has no rows by head
        several += ["dense.weight"] if family == "gpt_neox" else ["o_proj.weight", "[qkv]_proj.bias"]
    assert unknown.str.contains("|".join(several) or "nothing").all()


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_injection_behind_kept_and_reset_moments_is_near_the_prediction(moments):
    before, predicted, logged = with_and_without("llama", moments, updates=30, more=5)
    shifted = predicted["factor"] != 1
    for j, tolerance in [(31, 0.06), (32, 0.1), (35, 0.1)]:
        rows = shifted & (predicted["step"] == j)
        old, new, got = (table["injection"][rows].sum() for table in (before, predicted, logged))
        assert abs(got / new - 1) < tolerance
        assert abs(got / old - 1) > 2 * abs(got / new - 1)
    first = predicted["step"] == 31
    np.testing.assert_allclose(predicted["decay"][first], logged["decay"][first], rtol=1e-5)
    if moments == "reset":  # u is the sign of the gradient
        rows = shifted & first
        per_weight = logged["injection"] / logged["lr"] ** 2 / logged["numel"]
        np.testing.assert_allclose(per_weight[rows], 1, rtol=1e-2)
    untouched = ~shifted & first
    np.testing.assert_allclose(predicted["injection"][untouched], before["injection"][untouched])


def pure_noise(moments, updates=200, more=30):
    """Forces behind a rescaling, of gradients that are white noise whatever the weights are, in their units."""
    from weightdyn.wisca.plan import scale_factors

    sizes = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 64, "num_hidden_layers": 2}
    model = make("llama", **sizes, attention_bias=False)
    with torch.no_grad():  # small: what of w is no random walk tells nothing here
        for name, p in model.named_parameters():
            p.mul_(0.1 if "k_proj" in name or "v_proj" in name else 0.02)
    optimizer = adamw(model, betas=(0.9, 0.999))
    rng, factors, table = torch.Generator().manual_seed(1), {}, None
    with wd.ForceLogger(optimizer, model) as logger:
        for update in range(updates + more):
            if update == updates and moments is not None:
                table = wisca.rescale_(model, optimizer, moments=moments, pairs=("qk", "vo"), max_alpha=2)
                factors = scale_factors(model, table)
            for name, p in model.named_parameters():
                p.grad = torch.randn(p.shape, generator=rng)
                for factor in factors.get(name, {}).values():
                    p.grad /= float(factor.flatten()[0])
            optimizer.step()
    forces = logger.run.forces()
    return model, table, forces[forces["step"] > updates].reset_index(drop=True)


@pytest.mark.parametrize(("moments", "tolerance"), [("transport", 0.1), ("keep", 0.2), ("reset", 0.2)])
def test_momentum_forgets_the_rescaling_and_drift_does_not(moments, tolerance):
    before = pure_noise(None)[2]
    model, table, logged = pure_noise(moments)
    predicted = wisca.predict_shift(before, table, model, betas=(0.9, 0.999))
    assert set(predicted["factor"]) > {1.0}
    j = before["step"] - 200
    for side in (predicted["factor"] > 1.2, predicted["factor"] < 0.8):
        for window in ((j == 1) & (moments != "reset"), j.between(2, 6), j.between(16, 30)):
            rows = side & window
            for name in ("memory", "alignment"):
                old, new, got = (each[name][rows].sum() for each in (before, predicted, logged))
                assert abs(new - got) <= tolerance * max(abs(got), abs(old)), (name, window.sum())
        late = side & j.between(16, 30)
        f = predicted["factor"][late].mean()
        naive = f * before["alignment"][late].sum()
        got, new = (each["alignment"][late].sum() for each in (logged, predicted))
        assert abs(naive - got) > 2 * abs(new - got)
        if moments == "transport":
            kappa = [
                each["memory"][late].sum() / each["memory_null"][late].sum() for each in (before, logged)
            ]
            assert abs(kappa[1] - kappa[0]) < 0.15


def test_without_drift_memory_is_taken_for_white_noise():
    before = pure_noise(None)[2]
    model, table, logged = pure_noise("transport")
    blind = before.drop(columns=["drift", "memory", "memory_null", "signal"])
    predicted = wisca.predict_shift(blind, table, model)
    assert "memory" not in predicted
    late = (predicted["factor"] != 1) & (before["step"] > 215)
    got, new = (each["alignment"][late].sum() for each in (logged, predicted))
    assert abs(new / got - 1) < 0.1
    first = before["step"] == 201
    np.testing.assert_allclose(
        predicted["alignment"][first], (before["alignment"] * predicted["factor"])[first]
    )


def test_the_closed_form_of_the_memory_is_that_of_memory_null():
    from weightdyn.wisca.predict import noise_memory

    for beta1 in (0.0, 0.5, 0.9, 0.99):
        steps = np.arange(1.0, 400)
        np.testing.assert_allclose(
            2 * noise_memory(steps, beta1), wd.memory_null(np.ones(399), beta1), atol=1e-12
        )


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_drift_and_memory_of_the_next_update_are_near_the_prediction(moments):
    before, predicted, logged = with_and_without("llama", moments, updates=30)
    shifted = predicted["factor"] != 1
    for name in ("drift", "memory", "alignment"):
        error = (predicted[name] - logged[name])[shifted].abs().sum()
        assert (
            error
            < (0.1 if moments == "keep" else 0.5) * before[["drift", "memory"]][shifted].abs().sum().sum()
        )
    pd.testing.assert_frame_equal(
        predicted[~shifted][["alignment", "drift", "memory", "signal", "memory_null"]],
        before[~shifted][["alignment", "drift", "memory", "signal", "memory_null"]],
    )
    if moments == "reset":
        budget = logged[list(wd.FORCES)].abs().sum(axis=1)
        assert (logged["memory"].abs() <= 1e-3 * budget)[shifted].all()
        assert (predicted["memory"][shifted] == 0).all()
        assert predicted["signal"][shifted].isna().all()


def test_at_the_start_there_are_no_moments_and_the_prediction_is_exact_whatever_was_asked_for():
    _, predicted, logged = with_and_without("llama", "keep", updates=0)
    np.testing.assert_allclose(predicted["decay"], logged["decay"], rtol=1e-5)
    budget = predicted[list(wd.FORCES)].abs().sum(axis=1)
    for force in (*wd.FORCES, "drift", "memory"):
        assert ((predicted[force] - logged[force]).abs() <= 1e-3 * budget).all()


def weibull(model):
    rows = [("x", name, *fit[:2]) for name, p in model.named_parameters() if p.ndim == 2
            for fit in [(lambda f: (f.k, f.lam))(wd.fit_weibull(p))]]  # fmt: skip
    return pd.DataFrame(rows, columns=["step", "tensor", "k", "lam"]).assign(step=0)


def test_lambda_follows_the_factor_and_k_stays():
    model = make("llama")
    before = weibull(model)
    table = wisca.rescale_(model, pairs=("qk", "vo", "up_down"))
    predicted, fitted = wisca.predict_shift(before, table, model), weibull(model)
    assert (predicted["factor"] != 1).sum() == 12
    np.testing.assert_allclose(predicted["lam"], fitted["lam"], rtol=1e-4)
    np.testing.assert_allclose(predicted["k"], fitted["k"], rtol=1e-4)
    by_head = wisca.predict_shift(before, wisca.plan_rescale(model, granularity="head"), model)
    assert by_head.loc[by_head["factor"].isna(), "k"].isna().all()


def test_rows_up_to_the_rescaling_stay_and_tables_of_other_models_are_refused():
    before, _, _ = with_and_without("llama", "transport", updates=1, more=3)
    model = make("llama")
    table = wisca.plan_rescale(model)
    later = wisca.predict_shift(before, table, model, at=3)
    rows = before["step"] <= 3
    pd.testing.assert_series_equal(later["decay"][rows], before["decay"][rows])
    assert (later["factor"][rows] == 1).all()
    assert (later["factor"][~rows] != 1).any()
    with pytest.raises(ValueError, match="which is none of the model's tensors"):
        wisca.predict_shift(before, wisca.plan_rescale(make("gpt_neox")), make("gpt_neox"))
    with pytest.raises(ValueError, match="no column 'tensor'"):
        wisca.predict_shift(wd.aggregate(before, "role"), table, model)
    with pytest.raises(ValueError, match=r"lacks the columns \['lr'\]"):
        wisca.predict_shift(before.drop(columns="lr"), table, model, moments="keep")


def test_a_run_is_taken_in_place_of_its_force_table():
    model = make("llama")
    optimizer = adamw(model)
    with wd.ForceLogger(optimizer, model) as logger:
        train(model, optimizer, 2)
    table = wisca.plan_rescale(model)
    by_run = wisca.predict_shift(logger.run, table, model)
    pd.testing.assert_frame_equal(by_run, wisca.predict_shift(logger.run.forces(), table, model))
    with pytest.raises(TypeError, match="before must be a force table"):
        wisca.predict_shift("runs/demo", table, model)
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\)"):
        wisca.predict_shift(logger.run, table, model, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="before has two rows of"):
        wisca.predict_shift(pd.concat([logger.run.forces()] * 2), table, model)


# --- the schedule -------------------------------------------------------------------------------------------


def test_a_schedule_rescales_when_told_and_the_log_has_it_as_an_event():
    model = make("llama")
    optimizer = adamw(model)
    with wd.ForceLogger(optimizer, model, audit_every=1) as logger:
        with wisca.RescaleSchedule(
            model, optimizer, at=(0, 1), every=3, logger=logger, norm="l2"
        ) as schedule:
            train(model, optimizer, 7)
        train(model, optimizer, 2, start=7)
    metrics = logger.run.metrics()
    assert metrics.loc[metrics["event"] == EVENT, "step"].tolist() == [0, 1, 3, 6]
    assert schedule.events["step"].unique().tolist() == [0, 1, 3, 6]
    assert len(schedule.events) == 4 * 4
    assert schedule.step == 7
    # No force has anything of it: audited rows close, and norms jump by α² between the rows.
    forces = logger.run.forces()
    assert wd.closure(forces, by="model")["closure"].item() < 2e-3
    q = forces[forces["tensor"] == f"{Q}.weight"].set_index("step")
    events = schedule.events.query("pair == 'qk' and layer == 0")
    for step, alpha in zip(events["step"], events["alpha"], strict=True):
        if step:
            jump = q["norm_sq"][step + 1] / q["norm_sq_after"][step]
            assert math.isclose(jump, alpha**2, rel_tol=1e-5)


@pytest.mark.parametrize("source", ["moments", "displacement"])
@pytest.mark.parametrize("logger_first", [True, False])
def test_forces_are_measured_before_the_rescaling_whichever_was_attached_first(logger_first, source):
    tables = []
    for scheduled in (False, True):
        model = make("llama")
        optimizer = adamw(model)
        train(model, optimizer, 2)
        attach = [lambda o=optimizer, m=model: wd.ForceLogger(o, m, source=source)]
        if scheduled:
            attach.append(lambda o=optimizer, m=model: wisca.RescaleSchedule(m, o, every=3))
        if not logger_first:
            attach.reverse()
        attached = [make_it() for make_it in attach]
        train(model, optimizer, 1, start=2)
        for each in attached:
            each.close()
        tables.append(next(each for each in attached if isinstance(each, wd.ForceLogger)).run.forces())
    pd.testing.assert_frame_equal(*tables)


def test_a_schedule_counts_on_from_a_resumed_optimizer():
    model = make("llama")
    optimizer = adamw(model)
    train(model, optimizer, 4)
    schedule = wisca.RescaleSchedule(model, optimizer, at=[0, 5])
    assert schedule.events.empty
    train(model, optimizer, 2, start=4)
    assert schedule.events["step"].unique().tolist() == [5]
    schedule.close()
    schedule.close()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ValueError, "at or every must be given"),
        ({"every": 0}, ValueError, "every must be a whole number"),
        ({"at": (-1,)}, ValueError, "at must be a whole number >= 0, got -1"),
        ({"every": 2, "norms": "l1"}, TypeError, "norms"),
    ],
)
def test_a_schedule_is_checked_when_it_is_made(options, kind, message):
    model = make("llama")
    with pytest.raises(kind, match=message):
        wisca.RescaleSchedule(model, adamw(model), **options)
    with pytest.raises(TypeError, match="optimizer must be a torch"):
        wisca.RescaleSchedule(model, None, every=2)


# --- LoRA ---------------------------------------------------------------------------------------------------


def adapter(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "embed_tokens"], **options
    )
    return peft.get_peft_model(make("llama"), config)


def test_an_adapter_is_balanced_once_its_b_has_moved(tmp_path):
    from peft import PeftModel

    model = adapter().eval()
    before = weights(model)
    with pytest.raises(ValueError, match=r"the norm of [AB] is 0, which has no finite α"):
        wisca.rescale_(model, pairs=("lora",))
    table = wisca.rescale_(model, pairs=("lora",), errors="skip")
    assert table["skipped"].str.contains("norm of B is 0").sum() == 4
    wisca.undo_(model, table)
    assert all(torch.allclose(each, before[name]) for name, each in weights(model).items())

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, 3)
    output = logits(model)
    assert (output - logits(make("llama"))).abs().max() > 1e-2
    table = wisca.rescale_(model, optimizer, pairs=("lora",))
    assert len(table) == 5
    np.testing.assert_allclose(table["norm_a_after"], table["norm_b_after"])
    a, b = (model.get_parameter(f"base_model.model.{Q}.lora_{x}.default.weight").detach() for x in "AB")
    assert math.isclose(a.abs().sum(), b.abs().sum(), rel_tol=1e-5)
    scale = float(output.abs().max())
    torch.testing.assert_close(logits(model), output, rtol=0, atol=1e-5 * scale)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), output, rtol=0, atol=1e-5 * scale)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), output, rtol=0, atol=1e-5 * scale)


def test_adapters_are_rescaled_exactly_with_powers_of_two_by_tensor_and_by_channel():
    for granularity in ("tensor", "channel"):
        model = adapter(init_lora_weights=False).eval()
        before, output = weights(model), logits(model)
        table = wisca.rescale_(model, pairs=("lora",), granularity=granularity, power_of_two=True)
        assert len(table) == (5 if granularity == "tensor" else 20)
        assert (table["alpha"] != 1).any()
        assert torch.equal(logits(model), output)
        wisca.undo_(model, table)
        assert same(weights(model), before)


def test_the_base_model_of_an_adapter_is_left_alone():
    model = adapter(init_lora_weights=False)
    with pytest.raises(ValueError, match=r"belong to the base model.*pairs=\(\"lora\",\)"):
        wisca.rescale_(model)


def test_the_proof_and_the_schedule_take_adapters():
    model = adapter(init_lora_weights=False)
    proof = wisca.check_equivalence(model, tokens(), pairs=("lora",))
    assert (proof["relative"] <= [1e-5, 1e-5, 1e-4, 1e-12, 1e-12, 1e-6]).all()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with wisca.RescaleSchedule(model, optimizer, every=2, pairs=("lora",)) as schedule:
        train(model, optimizer, 2)
    assert len(schedule.events) == 5


# --- the command --------------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in ("wisca", "rescale", *arguments)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_command_takes_a_folder_and_leaves_one_of_the_same_format(dtype, tmp_path):
    from transformers import AutoModelForCausalLM, __version__

    as_stored = {"dtype" if int(__version__.split(".")[0]) >= 5 else "torch_dtype": "auto"}
    model = make("llama", dtype=dtype)
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    result = call(tmp_path / "in", "-o", tmp_path / "out", "--granularity", "head", "--power-of-two")
    assert result.exit_code == 0, result.output
    assert "max |Δlogit| 0.0e+00" in result.output
    names = [{file.name for file in (tmp_path / each).iterdir()} for each in ("in", "out")]
    assert names[0] == names[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **as_stored).eval()
    assert loaded.dtype == dtype
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "in", **as_stored).eval()
    assert torch.equal(logits(loaded), logits(original))
    expected = copy.deepcopy(model)
    wisca.rescale_(expected, granularity="head", power_of_two=True)
    assert same(weights(loaded), weights(expected))


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path):
    make("gpt_neox").save_pretrained(tmp_path / "in")
    for arguments, message in [
        ((tmp_path / "none", "-o", tmp_path / "out"), "has no config.json"),
        ((tmp_path / "in", "-o", tmp_path / "in"), "exists already"),
        ((tmp_path / "in", "-o", tmp_path / "out", "--pairs", "qk,up_down"), "not positively homogeneous"),
        ((tmp_path / "in", "-o", tmp_path / "out", "--norm", "l3"), "norm must be"),
    ]:
        result = call(*arguments)
        assert result.exit_code == 2
        assert message in result.output
        assert not (tmp_path / "out").exists()
    result = call(tmp_path / "in", "-o", tmp_path / "out", "--pairs", "qk,up_down", "--skip")
    assert result.exit_code == 0, result.output
    assert "skipped: its activation" in result.output


def spoiled_config(**change):
    def edit(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))

    return edit


def fifo(name):
    def make(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


EVIL = """
import pathlib
from transformers import LlamaConfig
pathlib.Path('executed').touch()
class C(LlamaConfig): pass
"""
SPOILED = {
    "code of its own": spoiled_config(
        model_type="own", auto_map={"AutoConfig": "evil.C"}, architectures=["C"]
    ),
    "an architecture that is a number": spoiled_config(architectures=[3]),
    "html": lambda folder: (folder / "config.json").write_text("<html>sign in</html>"),
    "deep": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "cut": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" + bytes(100)),
    "fifo": fifo("model.safetensors"),
}


@pytest.mark.skipif(os.name != "posix", reason="makes a FIFO")
@pytest.mark.parametrize("damage", SPOILED)
def test_a_folder_that_is_no_model_is_named_and_runs_no_code(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    make("llama").save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL)
    SPOILED[damage](folder)
    with pytest.raises(wd.CheckpointError, match=r"(?s)in cannot be read as a transformers model.*copy its"):
        wisca.rescale_folder(folder, tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_a_class_that_is_no_model_is_not_called(tmp_path, capfd):
    make("llama").save_pretrained(tmp_path / "in")
    spoiled_config(architectures=["pipeline"])(tmp_path / "in")
    capfd.readouterr()
    table, difference, magnitude = wisca.rescale_folder(tmp_path / "in", tmp_path / "out")
    assert len(table) == 4
    assert difference < 1e-5 * magnitude
    assert "\r" not in capfd.readouterr().err  # nobody watches


def test_folders_are_named():
    for options in ({"source": None, "out": "x"}, {"source": "x", "out": ""}):
        with pytest.raises((TypeError, ValueError), match=r"(source|out) must be"):
            wisca.rescale_folder(**options)
