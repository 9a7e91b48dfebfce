"""Several optimizers of one run: one table, one count of updates, each tensor measured by its own optimizer."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import weightdyn as wd


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


def split(model):
    """Muon for the matrices and AdamW for the rest, as people train."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.9)
    return muon, torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.2)


def batches(n):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 12, generator=generator) for _ in range(n)]


def train(model, optimizers, data):
    for x in data:
        for each in optimizers:
            each.zero_grad()
        model(x).square().mean().backward()
        for each in optimizers:
            each.step()


def columns(table):
    return table.drop(columns=["tensor", "stack", "layer", "component", "role"], errors="ignore")


def test_muon_and_adamw_in_one_run_have_the_tables_of_two_loggers():
    one, two = mlp(), mlp()
    optimizers, apart = split(one), split(two)
    with wd.ForceLogger(optimizers, one) as log:
        train(one, optimizers, batches(6))
    with (
        wd.ForceLogger(apart[0], two, source="displacement") as first,
        wd.ForceLogger(apart[1], two) as second,
    ):
        train(two, apart, batches(6))
    got = log.run.forces()
    wanted = pd.concat([first.run.forces(), second.run.forces()])
    wanted["tensor"] = wanted["tensor"].astype(str)
    wanted = wanted.set_index(["step", "tensor"])
    got = got.assign(tensor=got["tensor"].astype(str)).set_index(["step", "tensor"])
    assert len(got) == len(wanted) == 6 * 4
    numbers = columns(got).select_dtypes("number")
    pd.testing.assert_frame_equal(numbers, columns(wanted).select_dtypes("number").loc[got.index], rtol=1e-12)
    assert log.run.info["source"] == "displacement (Muon), moments (AdamW)"
    assert log.run.info["optimizer"]["name"] == "Muon + AdamW"
    assert {group["optimizer"] for group in log.run.info["optimizer"]["groups"]} == {"Muon", "AdamW"}
    assert "Muon" in log.run.info["no_drift"]
    assert repr(log).startswith("ForceLogger(Muon + AdamW, 4 tensors, at update 6")


def test_an_optimizer_in_the_backward_pass_counts_as_one_update():
    whole, parts = mlp(), mlp()
    single = torch.optim.AdamW(whole.parameters(), lr=1e-2, weight_decay=0.1)
    with wd.ForceLogger(single, whole) as log:
        train(whole, [single], batches(5))
    many = {p: torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1) for p in parts.parameters()}

    def step(p):
        many[p].step()
        many[p].zero_grad()

    for p in parts.parameters():
        p.register_post_accumulate_grad_hook(step)
    fits = []
    with wd.ForceLogger(
        list(many.values()), parts, weibull_every=lambda t: fits.append(t) or t % 2 == 0
    ) as other:
        for x in batches(5):
            parts(x).square().mean().backward()
    assert other.step == 5
    pd.testing.assert_frame_equal(other.run.forces(), log.run.forces(), rtol=1e-6)
    assert fits == [1, 2, 3, 4, 5]  # asked once for each update
    assert other.run.weibull()["step"].unique().tolist() == [0, 2, 4]
    assert other.run.info["optimizer"]["name"] == "AdamW ×4"


def test_parameters_that_are_exchanged_behind_the_logger_keep_their_names():
    """As Accelerate's `prepare` does under FSDP2, and whoever shards a model and then tells its optimizer."""
    tables = []
    for exchange in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        with wd.ForceLogger(optimizer, model, weibull_every=2) as log:
            if exchange:
                for module in model:
                    for name, parameter in [*module.named_parameters()]:
                        setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
                optimizer.param_groups[0]["params"] = [*model.parameters()]
            train(model, [optimizer], batches(3))
        tables.append(log.run)
    pd.testing.assert_frame_equal(tables[1].forces(), tables[0].forces())
    pd.testing.assert_frame_equal(tables[1].weibull(), tables[0].weibull())


def test_what_is_due_once_in_an_update_sees_all_of_it():
    model = mlp()
    optimizers = split(model)
    with wd.ForceLogger(optimizers, model, weibull_every=1) as log:
        for x in batches(3):
            train(model, optimizers, [x])
            fits = log.run.weibull()
            fits = fits[fits["step"] == log.step].set_index("tensor")
            for name in ("0.weight", "2.weight"):
                assert fits.loc[name, "lam"] == wd.fit_weibull(dict(model.named_parameters())[name]).lam


def test_an_optimizer_that_rests_leaves_no_row():
    model = mlp()
    first = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    second = torch.optim.AdamW(model[2].parameters(), lr=1e-2)
    with wd.ForceLogger([first, second], model) as log:
        for t, x in enumerate(batches(6), start=1):
            for each in (first, second):
                each.zero_grad()
            model(x).square().mean().backward()
            first.step()
            if t % 2 == 0:
                second.step()
    forces = log.run.forces()
    steps = {name: rows["step"].tolist() for name, rows in forces.groupby("tensor", observed=True)}
    assert steps["0.weight"] == [1, 2, 3, 4, 5, 6]
    assert steps["2.weight"] == [2, 4, 6]


def test_a_step_that_a_scaler_skips_leaves_the_others_in_their_update():
    model = mlp()
    first = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    second = torch.optim.AdamW(model[2].parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with wd.ForceLogger([first, second], model) as log:
        for t, x in enumerate(batches(6), start=1):
            for each in (first, second):
                each.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if t == 3:  # one of them only
                model[0].weight.grad[0, 0] = float("inf")
            if t == 5:
                model[0].weight.grad[0, 0] = model[2].weight.grad[0, 0] = float("inf")
            scaler.step(first)
            scaler.step(second)
            scaler.update()
    forces = log.run.forces()
    steps = {name: rows["step"].tolist() for name, rows in forces.groupby("tensor", observed=True)}
    assert log.step == 5
    assert steps["2.weight"] == [1, 2, 3, 4, 5]
    assert steps["0.weight"] == [1, 2, 4, 5]


def test_several_resume_where_the_checkpoint_was_made(tmp_path):
    model = mlp()
    optimizers = split(model)
    with wd.ForceLogger(optimizers, model, out=tmp_path / "run"):
        train(model, optimizers, batches(4))
        states = copy.deepcopy([model.state_dict(), *(each.state_dict() for each in optimizers)])
        train(model, optimizers, batches(7)[4:])
        wanted = [p.detach().clone() for p in model.parameters()]
    model = mlp()
    optimizers = split(model)
    with wd.ForceLogger(optimizers, model, out=tmp_path / "run") as log:
        model.load_state_dict(states[0])
        for each, state in zip(optimizers, states[1:], strict=True):
            each.load_state_dict(state)
        assert log.step == 4
        train(model, optimizers, batches(7)[4:])
    assert all(torch.equal(a, b) for a, b in zip(wanted, model.parameters(), strict=True))
    forces = wd.RunLog(tmp_path / "run").forces()
    assert forces["step"].value_counts().to_dict() == dict.fromkeys(range(1, 8), 4)
    closure = forces["alignment"] + forces["injection"] + forces["decay"]
    change = forces["norm_sq_after"] - forces["norm_sq"]
    assert np.abs(closure - change).max() <= 1e-5 * np.abs(change).max()


def test_groups_that_join_keep_the_others_numbers():
    model = mlp()
    first = torch.optim.AdamW([model[0].weight], lr=1e-2)
    second = torch.optim.AdamW([model[2].weight], lr=1e-2)
    with wd.ForceLogger([first, second], model) as log:
        train(model, [first, second], batches(3))
        first.add_param_group({"params": [model[0].bias]})
        train(model, [first, second], batches(3))
    forces = log.run.forces()
    assert forces["step"].value_counts().to_dict() == {1: 2, 2: 2, 3: 2, 4: 3, 5: 3, 6: 3}
    memory = forces[forces["tensor"] == "2.weight"]["memory_null"]
    assert memory.notna().all()


def test_a_tensor_of_two_optimizers_and_an_empty_list_are_refused():
    model = mlp()
    pair = [torch.optim.AdamW(model.parameters()), torch.optim.SGD(model[0].parameters())]
    with pytest.raises(ValueError, match=r"0\.weight is in two of the optimizers"):
        wd.ForceLogger(pair, model)
    with pytest.raises(ValueError, match=r"optimizer must be .* got none"):
        wd.ForceLogger([], model)
    with pytest.raises(TypeError, match="optimizer must be"):
        wd.ForceLogger([pair[0], model], model)


def test_optimizers_may_take_turns_in_another_order():
    model = mlp()
    first = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    second = torch.optim.AdamW(model[2].parameters(), lr=1e-2)
    with wd.ForceLogger([first, second], model) as log:
        for t, x in enumerate(batches(5)):
            for each in (first, second):
                each.zero_grad()
            model(x).square().mean().backward()
            for each in (first, second) if t % 2 else (second, first):
                each.step()
    assert log.step == 5
    assert log.run.forces()["step"].value_counts().to_dict() == dict.fromkeys(range(1, 6), 4)


def test_experts_without_tokens_leave_the_count_of_a_backward_pass():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 6)})
    many = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}

    def step(p):
        many[p].step()
        many[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    used = ["abc", "ac", "bc", "c", "abc"]
    with wd.ForceLogger(list(many.values()), model) as log:
        for names in used:
            x = torch.randn(4, 6)
            for name in names:
                x = model[name](x)
            x.square().mean().backward()
    forces = log.run.forces()
    for name in "abc":
        rows = forces[forces["tensor"] == f"{name}.weight"]
        assert rows["step"].tolist() == [t for t, names in enumerate(used, start=1) if name in names]
