"""ForceLogger.scalars against the log, and against vectors that are put together by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import weightdyn as wd
from weightdyn.record.scalars import SCALARS

FORCES = ["alignment", "injection", "decay"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.up_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.up_proj(torch.tanh(self.q_proj(x) * self.k_proj(x)))


def make(**options):
    net = Net()
    groups = [
        {"params": [net.q_proj.weight, net.q_proj.bias], "lr": 0.1, "weight_decay": 0.3},
        {"params": [net.k_proj.weight, net.up_proj.weight], "lr": 0.02, "weight_decay": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups)
    return net, optimizer, wd.ForceLogger(optimizer, net, **options)


def step(net, optimizer, seed=0):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    (net(x) - x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_there_are_none_before_the_first_logged_update():
    net, optimizer, log = make(every=2, weibull_every=1)
    assert log.scalars() == {}
    step(net, optimizer)
    assert log.scalars() == {}
    step(net, optimizer)
    assert log.scalars()
    log.close()


def test_a_groups_numbers_are_those_of_its_weights_side_by_side():
    net, optimizer, log = make()
    for seed in range(5):
        before = torch.cat([net.q_proj.weight.flatten(), net.k_proj.weight.flatten()]).detach().double()
        step(net, optimizer, seed)
    after = torch.cat([net.q_proj.weight.flatten(), net.k_proj.weight.flatten()]).detach().double()
    got = log.scalars()
    cosine = (before @ after) / (before.norm() * after.norm())
    assert got["forces/selection/norm"] == pytest.approx(before.norm().item(), rel=1e-6)
    assert got["forces/selection/angle"] == pytest.approx(math.acos(cosine), rel=1e-5)
    # What is left of the step when each tensor's own decay is taken off.
    q, k = before[:64], before[64:]
    update = after - torch.cat([q * (1 - 0.1 * 0.3), k * (1 - 0.02 * 0.01)])
    ratio = (update.norm() / before.norm()).item()
    assert got["forces/selection/relative_update"] == pytest.approx(ratio, rel=1e-5)
    log.close()


@pytest.mark.parametrize("by", ["role", "component", "model", ["component", "role"], None])
def test_shares_are_those_of_the_log(by):
    net, optimizer, log = make()
    for seed in range(3):
        step(net, optimizer, seed)
    got = log.scalars(by)
    table = log.latest()
    keys = [by] if isinstance(by, str) else by or ["tensor"]
    groups = [("model", table)] if by == "model" else table.groupby(keys, observed=True)
    labels = set()
    for values, rows in groups:
        label = "/".join([values] if isinstance(values, str) else values)
        labels.add(label)
        sums = rows[[*FORCES, "drift", "memory"]].sum()
        total = sums[FORCES].abs().sum()
        for name in FORCES:
            assert got[f"forces/{label}/{name}_share"] == pytest.approx(abs(sums[name]) / total, rel=1e-9)
        for name in ("drift", "memory"):
            assert got[f"forces/{label}/{name}_signed_share"] == pytest.approx(sums[name] / total, rel=1e-9)
    assert {name.removeprefix("forces/").rpartition("/")[0] for name in got} == labels
    assert all(type(value) is float for value in got.values())
    log.close()


def test_layers_and_views_have_names_of_their_own():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
    )
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    with wd.ForceLogger(optimizer, model, weibull_every=1) as log:
        x = torch.randint(0, 32, (2, 8))
        model(x, labels=x).loss.backward()
        optimizer.step()
        layers, tensors = log.scalars("layer"), log.scalars(None)
    found = {name.split("/", 1)[1].rpartition("/")[0] for name in layers}
    stack = log.latest()["stack"].loc[lambda stack: stack != ""].iloc[0]
    assert found == {f"{stack}/0", f"{stack}/1", "outside"}
    assert "forces/gpt_neox.layers.0.attention.query_key_value.weight/q/norm" in tensors
    assert "weibull/gpt_neox.layers.0.attention.query_key_value.weight/q/lam" in tensors


def test_the_names_are_those_that_are_documented():
    net, optimizer, log = make(weibull_every=1)
    step(net, optimizer)
    got = {name.replace("/model/", "/<group>/") for name in log.scalars("model")}
    assert got == set(SCALARS)
    log.close()


def test_weibull_numbers_are_of_the_latest_fit_pooled_over_the_group():
    net, optimizer, log = make(weibull_every=2)
    for seed in range(3):
        step(net, optimizer, seed)
    got = log.scalars()
    fits = log.run.weibull().query("step == 2 and role == 'selection'")
    n = fits["n"].to_numpy()
    lam = np.sqrt((n * fits["lam"] ** 2).sum() / n.sum())
    assert got["weibull/selection/lam"] == pytest.approx(lam, rel=1e-12)
    assert got["weibull/selection/k"] == pytest.approx((n * fits["k"]).sum() / n.sum(), rel=1e-12)
    log.close()


def test_a_drift_that_was_not_measured_has_no_entry():
    net, optimizer, log = make(drift=False)
    step(net, optimizer)
    assert not any("signed" in name for name in log.scalars())
    log.close()


def test_a_diverged_tensor_is_nan_and_leaves_the_other_groups():
    net, optimizer, log = make()
    step(net, optimizer)
    with torch.no_grad():
        net.up_proj.weight.fill_(math.nan)
    step(net, optimizer)
    with pytest.warns(RuntimeWarning, match="NaN or inf"):
        got = log.scalars()
    assert math.isnan(got["forces/transmission/norm"])
    log.close()


def test_an_unknown_group_is_refused_before_there_is_an_update_too():
    _, _, log = make()
    with pytest.raises(ValueError, match="by='head'"):
        log.scalars("head")
    with pytest.warns(RuntimeWarning, match="no update"):
        log.close()
