"""The pass over weights and moments against float64 arithmetic on whole tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightdyn.core.naming import View, describe
from weightdyn.record import moments
from weightdyn.record.moments import PRODUCTS, Adam, Fresh, Plan

CPU = torch.device("cpu")
ADAM = Adam(0.9, 0.95, 1e-8, 7)


def state(shape, dtype=torch.float32, seed=0):
    """Weights and moments of the sizes that training has."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=rng) * 0.02
    m = torch.randn(shape, generator=rng) * 1e-3
    v = torch.rand(shape, generator=rng) * 1e-5
    return w.to(dtype), m.to(dtype), v.to(dtype)


def expected(w, m, v, adam=ADAM):
    """The columns of one tensor, in NumPy's float64."""
    w, m, v = (np.asarray(x.double()).ravel() for x in (w, m, v))
    m_hat, v_hat = m / (1 - adam.beta1**adam.step), v / (1 - adam.beta2**adam.step)
    u = m_hat / (np.sqrt(v_hat) + adam.eps)
    return [w @ u, u @ u, w @ w, m_hat @ m_hat, v_hat.sum(), np.abs(u).max()]


def check(got, want, rel=4e-7):
    want = np.asarray(want)
    got = np.asarray(got)[:, : want.shape[1]]
    # ⟨w,u⟩ nearly cancels: its error is measured against the norms
    scale = np.abs(want)
    scale[:, 0] = np.sqrt(want[:, 1] * want[:, 2])
    assert (np.abs(got - want) <= rel * scale).all(), np.abs(got - want) / scale


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 70), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6),
    st.integers(64, 700),
    st.integers(1, 300),
)
def test_products_of_any_shapes_cut_anywhere(shapes, chunk, small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(moments._CHUNK, "cpu", chunk)
        patch.setattr(moments, "_SMALL", min(small, chunk))
        plan = Plan(shapes, [()] * len(shapes), CPU)
        states = [state(shape, seed=i) for i, shape in enumerate(shapes)]
        got = plan.moments(*zip(*states, strict=True), [ADAM] * len(shapes))
    check(got, [expected(*each) for each in states])


NEOX = {"model_type": "gpt_neox", "num_attention_heads": 4, "hidden_size": 32}
NEOX_QKV = "gpt_neox.layers.0.attention.query_key_value.weight"
GPT2 = {"model_type": "gpt2", "n_head": 4, "n_embd": 32}
PHI3 = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
MIXTRAL = {"model_type": "mixtral", "hidden_size": 24}


@pytest.mark.parametrize("chunk", [1 << 10, 1 << 18])
@pytest.mark.parametrize(
    ("name", "shape", "config", "views_of"),
    [
        (NEOX_QKV, (96, 32), NEOX, False),
        (NEOX_QKV, (96, 32), NEOX, True),
        ("transformer.h.0.attn.c_attn.weight", (32, 96), GPT2, True),
        ("model.layers.0.self_attn.qkv_proj.weight", (64, 32), PHI3, True),
        ("model.layers.0.mlp.experts.gate_up_proj", (3, 40, 24), MIXTRAL, False),
    ],
)
def test_each_view_has_its_own_products(name, shape, config, views_of, chunk, monkeypatch):
    monkeypatch.setitem(moments._CHUNK, "cpu", chunk)
    monkeypatch.setattr(moments, "_SMALL", 1 << 10)
    views = describe(name, shape, config, views="head" if views_of else True).views
    assert views
    other = (5, 7)
    plan = Plan([other, shape, other], [(), views, ()], CPU)
    states = [state(s, seed=i) for i, s in enumerate((other, shape, other))]
    got = plan.moments(*zip(*states, strict=True), [ADAM] * 3)
    parts = [[view.of(x) for x in states[1]] for view in views]
    check(got, [expected(*each) for each in (states[0], *parts, states[2])])
    assert plan.numel.tolist() == [35, *(part[0].numel() for part in parts), 35]


def test_views_that_alternate_within_a_row():
    views = (View("a", "q", 1, ((0, 3), (6, 9))), View("b", "k", 1, ((3, 6), (9, 12))))
    plan = Plan([(50, 12)], [views], CPU)
    w, m, v = state((50, 12))
    columns = [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    check(plan.moments([w], [m], [v], [ADAM]), [expected(w[:, c], m[:, c], v[:, c]) for c in columns])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 400), (40,)])
def test_every_float_type(dtype, shape):
    w, m, v = state(shape, dtype)
    v = v.clamp_min(1e-6)  # float16 ends at 6e-8
    adam = ADAM._replace(eps=1e-6)
    got = Plan([shape], [()], CPU).moments([w], [m], [v], [adam])
    check(got, [expected(w, m, v, adam)], rel=1e-12 if dtype == torch.float64 else 4e-7)


@pytest.mark.parametrize("chunk", [100, 1 << 18])
def test_tensors_that_are_not_contiguous(chunk, monkeypatch):
    monkeypatch.setitem(moments._CHUNK, "cpu", chunk)
    monkeypatch.setattr(moments, "_SMALL", 50)
    w, m, v = (x.T for x in state((60, 90)))
    channels_last = [x.to(memory_format=torch.channels_last) for x in state((4, 6, 5, 5))]
    plan = Plan([(90, 60), (4, 6, 5, 5)], [(), ()], CPU)
    got = plan.moments([w, channels_last[0]], [m, channels_last[1]], [v, channels_last[2]], [ADAM] * 2)
    check(got, [expected(w, m, v), expected(*channels_last)])


def test_each_tensor_is_corrected_by_its_own_count_and_betas():
    shapes = [(8,), (100, 100), (3,), (300, 300)]
    adams = [Adam(0.9, 0.99, 1e-8, 1), Adam(0.8, 0.999, 1e-6, 20), Adam(0.5, 0.9, 1e-3, 3), ADAM]
    states = [state(shape, seed=i) for i, shape in enumerate(shapes)]
    got = Plan(shapes, [()] * 4, CPU).moments(*zip(*states, strict=True), adams)
    check(got, [expected(*each, adam) for each, adam in zip(states, adams, strict=True)])


def test_one_bad_weight_spoils_only_its_own_row():
    shapes = [(8,), (8,), (300, 300), (8,)]
    states = [state(shape, seed=i) for i, shape in enumerate(shapes)]
    states[1][0][3] = math.nan
    states[2][1][0, 0] = math.inf
    got = Plan(shapes, [()] * 4, CPU).moments(*zip(*states, strict=True), [ADAM] * 4)
    assert torch.isfinite(got[[0, 3], :6]).all()
    assert got[:, 6:].isnan().all()
    assert got[1, 0].isnan()
    assert got[1, 2].isnan()
    assert got[2, 1].isinf()
    assert got[2, 5].isinf()
    assert got[2, 2].isfinite()


def test_norms_are_good_to_a_billionth():
    w = state((2000, 700))[0]
    got = Plan([(2000, 700)], [()], CPU).norms([w])
    assert got.item() == pytest.approx(float((w.double() ** 2).sum()), rel=2e-9)


def test_displacement_recovers_the_update_that_was_made():
    rng = np.random.default_rng(0)
    shapes = [(30, 40), (7,), (9,)]
    w = [torch.from_numpy(rng.normal(size=shape)) for shape in shapes]
    u = [torch.from_numpy(rng.normal(size=shape)) for shape in shapes]
    lr, decay = [0.1, 0.01, 0.0], [0.1, 0.0, 0.1]
    after = [(1 - a * b) * x - a * y for x, y, a, b in zip(w, u, lr, decay, strict=True)]
    got = Plan(shapes, [()] * 3, CPU).displacement(w, after, lr, decay)
    for row in (0, 1):
        want = [float((w[row] * u[row]).sum()), float((u[row] ** 2).sum()), float((w[row] ** 2).sum())]
        np.testing.assert_allclose(got[row, :3], want, rtol=1e-10)
        assert got[row, 5].item() == pytest.approx(float(u[row].abs().max()), rel=1e-10)
    assert got[2, :2].tolist() == [0, 0]  # nothing moves at η = 0
    assert got[:, 3:5].isnan().all()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_gradient_gives_the_moments_that_the_step_will_make(maximize, amsgrad):
    p = torch.nn.Parameter(state((50, 40))[0].double())
    optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.95), amsgrad=amsgrad, maximize=maximize)
    plan = Plan([(50, 40)], [()], CPU)
    for t in range(1, 5):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).double() / t
        kept = {key: value.clone() for key, value in optimizer.state[p].items()}
        w = p.detach().clone()
        optimizer.step()
        after = optimizer.state[p]
        if not kept:
            continue
        tops = [kept["max_exp_avg_sq"]] if amsgrad else None
        ahead = plan.moments(
            [w], [kept["exp_avg"]], [kept["exp_avg_sq"]], [ADAM._replace(step=t)], ahead=True,
            fresh=Fresh([p.grad], [-1.0 if maximize else 1.0], [0.0]), max_exp_avg_sqs=tops,
        )  # fmt: skip
        top = after["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        check(ahead, [expected(w, after["exp_avg"], top, ADAM._replace(step=t))], rel=1e-12)


def test_nothing_waits_for_the_device():
    # Tensors on the meta device have no values: whatever would copy one to the host raises.
    shapes = [(8,), (500, 400), (96, 32)]
    views = describe(NEOX_QKV, (96, 32), NEOX).views
    meta = torch.device("meta")
    plan = Plan(shapes, [(), (), views], meta)
    tensors = [torch.empty(shape, device=meta) for shape in shapes]
    step = torch.empty((), device=meta)
    out = plan.moments(tensors, tensors, tensors, [ADAM, ADAM._replace(step=step), ADAM])
    assert out.shape == (2 + len(views), len(PRODUCTS))
    assert out.device == meta
    assert plan.displacement(tensors, tensors, [0.1, step, 0.1], [0.1] * 3).device == meta
    assert plan.norms(tensors).device == meta
