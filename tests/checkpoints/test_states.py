"""Forces from an optimizer's state, held against a float64 loop beside trainings of some hundred weights."""

import contextlib
import io
import itertools
import math
import os
import types
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch.optim import lr_scheduler

import weightdyn as wd
from weightdyn.checkpoints.matching import model_of_config
from weightdyn.checkpoints.rates import find_rates
from weightdyn.core.tables import FORCES, STATE_TABLE
from weightdyn.files.statefiles import read_state

UPDATES = 7
TOLERANCE = 1e-4  # of a row's budget


class Net(torch.nn.Module):
    """Two blocks alike, and a buffer."""

    def __init__(self, mean=13):
        super().__init__()
        self.register_buffer("mean", torch.zeros(mean))
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {name: torch.nn.Linear(12, 12, bias=name == "v") for name in ("q", "k", "v")}
                | {"norm": torch.nn.LayerNorm(12)}
            )
            for _ in range(2)
        )
        self.out = torch.nn.Linear(12, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block["norm"](x + torch.tanh(block["q"](x) * block["k"](x)) + block["v"](x))
        return self.out(x)


def two_groups(net):
    matrices = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]


class Training:
    """A training with the truth of its last update: forces from float64 moments and weights cloned before it."""

    def __init__(self, make=torch.optim.AdamW, groups=two_groups, schedule=None, seed=0, **options):
        torch.manual_seed(seed)
        self.net = Net()
        self.optimizer = make(groups(self.net), **{"lr": 1e-2, **options})
        self.schedule = schedule and schedule(self.optimizer)
        self.truth, self.moments = {}, {}
        self.updates = 0

    def update(self, before_step=lambda: None):
        self.optimizer.zero_grad()
        self.net(torch.randn(8, 12)).square().mean().backward()
        before_step()
        self.truth = {}
        names = {p: name for name, p in self.net.named_parameters()}
        for group in self.optimizer.param_groups:
            lr, decay, eps, (beta1, beta2) = (group[key] for key in ("lr", "weight_decay", "eps", "betas"))
            coupled = not group.get("decoupled_weight_decay", True)
            for p in (p for p in group["params"] if p.grad is not None):
                m, v, top, t = self.moments.get(p, (0.0, 0.0, torch.zeros(()), 0))
                w, g = p.detach().double().clone(), p.grad.double() * (-1 if group["maximize"] else 1)
                g = g + decay * w if coupled else g
                m, v, t = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g, t + 1
                top = torch.maximum(top, v)
                self.moments[p] = m, v, top, t
                root = (top if group["amsgrad"] else v) / (1 - beta2**t)
                u, acting = (m / (1 - beta1**t)) / (root.sqrt() + eps), 0.0 if coupled else decay
                self.truth[names[p]] = (
                    -2 * lr * (1 - lr * acting) * (w * u).sum().item(),
                    lr**2 * (u * u).sum().item(),
                    -(2 * lr * acting - (lr * acting) ** 2) * (w * w).sum().item(),
                )
        self.optimizer.step()
        self.updates += 1

    def run(self, updates=UPDATES, *, step_last=True, every=1):
        for index in range(updates):
            self.update()
            if self.schedule and (index + 1) % every == 0 and (step_last or index + 1 < updates):
                self.schedule.step()
        return self

    def state(self, **more):
        state = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), **more}
        return state if self.schedule is None else {**state, "scheduler": self.schedule.state_dict()}

    def save(self, folder, **more):
        file = folder / "ckpt.pt"
        torch.save(self.state(**more), file)
        return file


def budget_error(table, truth):
    """The largest error of a force, as a part of its row's budget."""
    rows = table.set_index("tensor")[[*FORCES]]
    assert set(rows.index) == set(truth)
    errors = [
        np.abs(rows.loc[name].to_numpy() - np.array(forces)).max() / np.abs(forces).sum()
        for name, forces in truth.items()
    ]
    return max(errors) if np.isfinite(errors).all() else math.inf


def wave(update):
    return 1e-2 * (1.2 + np.sin(update))


def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wd.forces_from_states(*args, **kwargs)


# --- the rate ---------------------------------------------------------------------------------------------

SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 6, 7], 0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, UPDATES),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, 1e-3),
    "WarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 2e-2, total_steps=12),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 10)], [4]
    ),
}


@pytest.mark.parametrize("step_last", [True, False], ids=["saved behind the scheduler", "saved before it"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_the_rate_of_each_scheduler_is_that_of_the_update_that_was_made(tmp_path, name, step_last):
    training = Training(schedule=SCHEDULES[name]).run(step_last=step_last)
    table = wd.forces_from_states(training.save(tmp_path))
    assert budget_error(table, training.truth) <= TOLERANCE
    assert set(table["lr_from"]) == {"schedule"}
    assert table["step"].unique().tolist() == [UPDATES]
    assert (table["span"] == 1).all()


def test_a_rate_that_is_one_update_off_would_be_seen(tmp_path):
    training = Training(schedule=SCHEDULES["SequentialLR"]).run()
    following = training.schedule.get_last_lr()[0]
    saved = training.state()
    del saved["scheduler"]
    for group in saved["optimizer"]["param_groups"]:
        del group["initial_lr"]
    torch.save(saved, tmp_path / "bare.pt")
    table = quiet(tmp_path / "bare.pt")  # which takes the group's, for want of anything else
    assert set(table["lr"]) == {following}
    assert budget_error(table, training.truth) > 100 * TOLERANCE


def test_a_group_without_a_scheduler_is_told_to_be_unchecked(tmp_path):
    training = Training().run()
    file = training.save(tmp_path)
    with pytest.warns(UserWarning, match=r"of 1 checkpoint \(.*no loop had set the next one"):
        table = wd.forces_from_states(file)
    assert set(table["lr_from"]) == {"group"}
    assert budget_error(table, training.truth) <= TOLERANCE
    table = wd.forces_from_states(file, lr=lambda update: np.full(update.shape, 1e-2))
    assert set(table["lr_from"]) == {"given"}


def test_a_loop_that_sets_the_next_rate_before_it_saves_is_found_out_by_the_schedule(tmp_path):
    training = Training()
    for index in range(UPDATES):
        for group in training.optimizer.param_groups:
            group["lr"] = float(wave(index + 1))
        training.update()
    for group in training.optimizer.param_groups:
        group["lr"] = float(wave(UPDATES + 1))
    file = training.save(tmp_path)
    assert budget_error(quiet(file), training.truth) > 100 * TOLERANCE
    table = wd.forces_from_states(file, lr=wave)
    assert budget_error(table, training.truth) <= TOLERANCE
    with pytest.raises(ValueError, match="neither this update nor the next"):
        wd.forces_from_states(file, lr=lambda update: wave(update + 2))


def test_a_function_that_no_file_holds_leaves_nan_and_the_reason_until_it_is_given(tmp_path):
    training = Training(
        schedule=lambda o: lr_scheduler.LambdaLR(o, lambda n: float(wave(n + 1)) / 1e-2)
    ).run()
    file = training.save(tmp_path)
    with pytest.warns(UserWarning, match="keeps its law to itself"):
        table = wd.forces_from_states(file)
    assert table[[*FORCES, "lr", "norm_sq"]].isna().all(axis=None)
    assert table["norm_sq_after"].notna().all()
    assert set(table["lr_from"]) == {""}
    assert budget_error(wd.forces_from_states(file, lr=wave), training.truth) <= TOLERANCE
    assert budget_error(wd.forces_from_states(file, lr=float(wave(UPDATES))), training.truth) <= TOLERANCE
    recipe = wd.Recipe(lr=wave)
    assert budget_error(wd.forces_from_states(file, lr=recipe), training.truth) <= TOLERANCE


def test_a_given_rate_that_the_file_contradicts_is_refused(tmp_path):
    training = Training(schedule=SCHEDULES["CosineAnnealingLR"]).run()
    file = training.save(tmp_path)
    with pytest.raises(ValueError, match=r"lr: it has 0.03 for update 7, .* was made at 0.00"):
        wd.forces_from_states(file, lr=0.03)
    given = wd.forces_from_states(file, lr=training.optimizer.param_groups[0]["initial_lr"] * 0 + float(
        find_rates(read_state(file), UPDATES, UPDATES)[0].lr
    ))  # fmt: skip
    assert budget_error(given, training.truth) <= TOLERANCE


def test_a_scheduler_that_is_stepped_by_epochs_is_nan_where_nothing_tells_the_epoch(tmp_path):
    training = Training(schedule=SCHEDULES["CosineAnnealingLR"]).run(every=3)
    with pytest.warns(UserWarning, match="stepped 2 times and the optimizer 7"):
        table = wd.forces_from_states(training.save(tmp_path))
    assert table["alignment"].isna().all()
    flat = Training(schedule=lambda o: lr_scheduler.StepLR(o, 30)).run(every=3)
    table = wd.forces_from_states(flat.save(tmp_path))  # either count has the same rate
    assert budget_error(table, flat.truth) <= TOLERANCE


def test_groups_of_different_rates_take_a_rate_each(tmp_path):
    training = Training(
        groups=lambda net: [{**g, "lr": lr} for g, lr in zip(two_groups(net), (1e-2, 3e-2), strict=True)]
    )
    file = training.run().save(tmp_path)
    assert budget_error(quiet(file), training.truth) <= TOLERANCE
    assert budget_error(wd.forces_from_states(file, lr=[1e-2, 3e-2]), training.truth) <= TOLERANCE
    with pytest.raises(ValueError, match="give a list with one for each"):
        wd.forces_from_states(file, lr=1e-2)
    with pytest.raises(ValueError, match="lr has 3 rates"):
        wd.forces_from_states(file, lr=[1e-2, 3e-2, 1.0])


def test_a_rate_whose_scheduler_is_not_in_the_file_is_not_known(tmp_path):
    training = Training(schedule=SCHEDULES["StepLR"]).run()
    state = training.state()
    del state["scheduler"]
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.warns(UserWarning, match="a scheduler was attached"):
        assert wd.forces_from_states(tmp_path / "ckpt.pt")["injection"].isna().all()


def test_updates_that_a_scaler_skipped_leave_the_rate_open(tmp_path):
    training = Training(schedule=SCHEDULES["CosineAnnealingLR"]).run(step_last=False)
    training.schedule.step()  # of an update that was skipped; behind the last one it was not stepped
    scaler = {"scale": 2.0, "_growth_tracker": 3}
    with pytest.warns(UserWarning, match="not certain"):
        assert wd.forces_from_states(training.save(tmp_path, scaler=scaler))["alignment"].isna().all()


@pytest.mark.parametrize(("batches", "known"), [(5, True), (8, False)])
def test_a_scheduler_that_is_stepped_at_every_batch_may_have_been_since_the_update(tmp_path, batches, known):
    training = Training(schedule=lambda o: lr_scheduler.StepLR(o, 6, 0.5))
    for batch in range(batches):
        if batch % 4 == 0:
            training.update()
        training.schedule.step()
    table = quiet(training.save(tmp_path))
    assert table["lr"].notna().all() == known
    assert not known or budget_error(table, training.truth) <= TOLERANCE


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_scheduler_that_steps_between_updates_is_not_one_of_several_processes(tmp_path, processes):
    training = Training(schedule=SCHEDULES["CosineAnnealingLR"])
    for _ in range(3):
        training.update()
        training.schedule.step()
        training.schedule.step()
    torch.save(training.net.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(training.optimizer.state_dict(), tmp_path / "optimizer.bin")
    torch.save(training.schedule.state_dict(), tmp_path / "scheduler.bin")
    for i in range(processes):
        (tmp_path / f"random_states_{i}.pkl").touch()
    table = quiet(tmp_path)
    if processes == 2:
        assert budget_error(table, training.truth) <= TOLERANCE
    else:
        assert table["lr"].isna().all()


# --- the optimizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"amsgrad": True}, {"maximize": True}, {"betas": (0.5, 0.9)}, {"eps": 1e-2}, {"fused": True}],
    ids=str,
)
def test_options_of_adamw_act_as_they_did(tmp_path, options):
    training = Training(**options).run()
    assert budget_error(quiet(training.save(tmp_path)), training.truth) <= TOLERANCE


def test_the_decay_of_adam_is_part_of_u(tmp_path):
    training = Training(torch.optim.Adam).run()
    table = quiet(training.save(tmp_path))
    assert budget_error(table, training.truth) <= TOLERANCE
    assert (table["decay"] == 0).all()
    assert (table["weight_decay"] == 0).all()


def test_an_unknown_kind_of_decay_is_nan_until_it_is_told(tmp_path):
    training = Training().run()
    state = training.state()
    for group in state["optimizer"]["param_groups"]:
        del group["decoupled_weight_decay"]  # as torch before 2.6 wrote it
    torch.save(state, file := tmp_path / "ckpt.pt")
    with pytest.warns(UserWarning, match='optimizer="AdamW" or "Adam" does'):
        table = wd.forces_from_states(file, lr=1e-2)
    decays = table["tensor"].str.contains(r"\.[qkv]\.weight|out\.weight")
    assert table.loc[decays, ["alignment", "decay", "norm_sq"]].isna().all(axis=None)
    assert table["injection"].notna().all()
    assert table.loc[~decays, "alignment"].notna().all()
    told = wd.forces_from_states(file, lr=1e-2, optimizer="AdamW")
    assert budget_error(told, training.truth) <= TOLERANCE
    assert (wd.forces_from_states(file, lr=1e-2, optimizer="Adam")["decay"] == 0).all()


def test_an_optimizer_that_the_groups_contradict_is_refused(tmp_path):
    file = Training().run(1).save(tmp_path)
    with pytest.raises(
        wd.CheckpointError, match=r"ckpt.pt: optimizer is 'Adam', and its groups say .* AdamW"
    ):
        wd.forces_from_states(file, optimizer="Adam")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "betas None"),
        (lambda p: torch.optim.RAdam(p, lr=0.1), "not torch's"),
        (lambda p: torch.optim.NAdam(p, lr=0.1), "mu_product|not torch's"),
        (lambda p: torch.optim.Adamax(p, lr=0.1), "not torch's"),
        (lambda p: torch.optim.Adafactor(p, lr=0.1), "betas None"),
    ],
    ids=["SGD", "RAdam", "NAdam", "Adamax", "Adafactor"],
)
def test_other_optimizers_are_refused_with_the_reason(tmp_path, make, why):
    net = Net()
    optimizer = make(net.parameters())
    net(torch.ones(1, 12)).sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    with pytest.raises(wd.CheckpointError, match=why):
        wd.forces_from_states(tmp_path / "ckpt.pt")


def test_an_optimizer_that_was_given_to_a_trainer_is_not_the_one_of_its_arguments(tmp_path):
    torch.save(types.SimpleNamespace(optim="adamw_torch_fused"), tmp_path / "training_args.bin")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    for make in (torch.optim.AdamW, torch.optim.RAdam):
        net = Net()
        optimizer = make(net.parameters(), lr=0.1)
        net(torch.ones(1, 12)).sum().backward()
        optimizer.step()
        torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        if make is torch.optim.AdamW:
            assert quiet(tmp_path)["injection"].notna().all()
    with pytest.raises(wd.CheckpointError, match="it is not torch's"):
        wd.forces_from_states(tmp_path)


def test_a_tensor_that_had_fewer_updates_than_others_is_nan(tmp_path):
    training = Training().run(3)
    training.update(lambda: setattr(training.net.out.bias, "grad", None))
    with pytest.warns(UserWarning, match=r"^1 row \(.*have had 3 updates and others 4"):
        table = wd.forces_from_states(training.save(tmp_path), lr=1e-2).set_index("tensor")
    assert table.loc["out.bias", [*FORCES]].isna().all()
    assert table.loc["out.bias", "updates"] == 3
    rest = table.drop("out.bias").reset_index()
    assert budget_error(rest, training.truth) <= TOLERANCE


def test_weights_in_bf16_say_so_and_are_near(tmp_path):
    training = Training().run()
    state = training.state()
    for moments in state["optimizer"]["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = moments[key].bfloat16()
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.warns(UserWarning, match="stored in bfloat16"):
        table = wd.forces_from_states(tmp_path / "ckpt.pt", lr=1e-2)
    assert 1e-5 < budget_error(table, training.truth) < 3e-2


@pytest.mark.parametrize("lost", [False, True])
def test_moments_in_8_bits_are_read_where_their_rounding_leaves_u_its_bound(tmp_path, lost):
    """As bitsandbytes writes them: codes of a map, and a scale for each 256 weights."""
    training = Training(groups=lambda net: [{"params": net.parameters()}], weight_decay=0.3).run()
    state = training.state()
    for kept in state["optimizer"]["state"].values():
        m, v = kept.pop("exp_avg"), kept.pop("exp_avg_sq")
        quantized = {}
        for number, moment, grid in (
            (1, m, torch.linspace(-1, 1, 256)),
            (2, v, torch.linspace(0, 1, 256) ** 2),
        ):
            blocks = moment.reshape(-1).split(256)
            scale = torch.stack([block.abs().max() for block in blocks])
            codes = [(b[:, None] / s - grid).abs().argmin(1) for b, s in zip(blocks, scale, strict=True)]
            quantized[f"state{number}"] = torch.cat(codes).to(torch.uint8).view(moment.shape)
            quantized |= {f"qmap{number}": grid, f"absmax{number}": scale}
        if lost:
            quantized["state2"].view(-1)[0], quantized["state1"].view(-1)[0] = 0, 255
        else:  # as fine as the map can tell
            quantized["state2"].clamp_(min=1)
        kept["__bnb_optimizer_quant_state__"] = quantized
    state["optimizer"]["param_groups"] = [
        {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "params")}
        for group in state["optimizer"]["param_groups"]
    ]
    torch.save(state, file := tmp_path / "ckpt.pt")
    with pytest.raises(wd.CheckpointError, match='optimizer="AdamW" or "Adam" says'):
        wd.forces_from_states(file, lr=1e-2)
    with pytest.warns(UserWarning, match="rounded to nearly 0" if lost else "stored in 8 bits"):
        table = wd.forces_from_states(file, lr=1e-2, optimizer="AdamW")
    if lost:
        assert table[[*FORCES]].isna().all(axis=None)
    else:
        assert budget_error(table, training.truth) < 0.1


# --- the match --------------------------------------------------------------------------------------------


def split(training, folder):
    """The same as two files, the weights sorted by name."""
    folder.mkdir(exist_ok=True)
    save_file(training.net.state_dict(), folder / "model.safetensors")
    torch.save(training.optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def test_an_optimizer_does_not_take_the_weights_of_another_step(tmp_path):
    training = Training(groups=lambda net: [*net.parameters()]).run(3)
    torch.save(training.net.state_dict(), tmp_path / "model_3.pt")
    torch.save(training.optimizer.state_dict(), tmp_path / "optimizer_3.pt")
    table = quiet(tmp_path / "optimizer_3.pt", lr=1e-2)
    assert budget_error(table, training.truth) <= TOLERANCE
    training.run(1)
    torch.save(training.optimizer.state_dict(), tmp_path / "optimizer_4.pt")
    with pytest.raises(wd.CheckpointError, match=r"no weights of its number beside it, but model_3\.pt"):
        wd.forces_from_states(tmp_path / "optimizer_4.pt", lr=1e-2)


def test_weights_sorted_by_name_are_refused_where_two_have_one_shape(tmp_path):
    training = Training().run()
    folder = split(training, tmp_path / "two")
    with pytest.raises(wd.CheckpointError, match=r"not certain: .* pass model= .* or names="):
        wd.forces_from_states(folder)
    table = wd.forces_from_states(folder, model=training.net, lr=1e-2)
    assert budget_error(table, training.truth) <= TOLERANCE
    parameters = dict(training.net.named_parameters())
    order = [name for one in (True, False) for name, p in parameters.items() if (p.ndim > 1) == one]
    table = wd.forces_from_states(folder, names=order, lr=1e-2)
    assert budget_error(table, training.truth) <= TOLERANCE
    swapped = [*order]
    swapped[0], swapped[1] = swapped[1], swapped[0]
    wrong = wd.forces_from_states(folder, names=swapped, lr=1e-2)  # which only the user can know
    assert budget_error(wrong, training.truth) > 100 * TOLERANCE
    file = folder / "optimizer.pt"  # as well named itself
    assert budget_error(wd.forces_from_states(file, model=training.net, lr=1e-2), training.truth) <= TOLERANCE


def test_weights_sorted_by_name_are_taken_where_each_has_a_shape_of_its_own(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    adamw = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(1, 3)).sum().backward()
    adamw.step()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    torch.save(adamw.state_dict(), tmp_path / "optimizer.pt")
    assert len(wd.forces_from_states(tmp_path, lr=0.1)) == 4


def test_names_that_the_optimizer_has_go_before_any_order(tmp_path):
    def named(net):
        return [{"params": [*net.named_parameters()][::-1]}]

    training = Training(groups=named).run()
    folder = split(training, tmp_path / "two")
    assert budget_error(wd.forces_from_states(folder, lr=1e-2), training.truth) <= TOLERANCE


def test_groups_that_could_take_other_tensors_of_the_same_shape_are_refused(tmp_path):
    def by_layer(net):
        last = [p for name, p in net.named_parameters() if not name.startswith("blocks.0")]
        return [{"params": last}, {"params": [*net.blocks[0].parameters()]}]

    training = Training(groups=by_layer).run()
    with pytest.raises(wd.CheckpointError, match="in several ways"):
        wd.forces_from_states(training.save(tmp_path))
    with pytest.raises(wd.CheckpointError, match="in several ways"):
        wd.forces_from_states(training.save(tmp_path), model=training.net)


def test_every_assignment_that_is_accepted_is_the_only_one():
    """Against all ways to deal the tensors out, tried one by one."""
    from weightdyn.checkpoints.matching import match_slots
    from weightdyn.files.statefiles import SavedState, Slot
    from weightdyn.files.weightfiles import CheckpointError, Stored

    rng = np.random.default_rng(0)

    def stored(name, kind):
        return Stored(name, (kind + 1,), "float32", (1,), Path("x"), 0)

    certain = 0
    for _ in range(400):
        shapes = rng.integers(0, 3, rng.integers(1, 7)).tolist()
        owner = rng.integers(-1, 2, len(shapes)).tolist()  # the group of each, or none
        wanted = [[kind for kind, own in zip(shapes, owner, strict=True) if own == group] for group in (0, 1)]
        slots = [
            Slot(group, None, {"exp_avg": stored("m", kind)}, {"step": 1.0})
            for group in (0, 1)
            for kind in wanted[group]
        ]
        names = [f"w{i}" for i in range(len(shapes))]
        state = SavedState(
            Path("x"),
            "torch.save",
            {n: stored(n, k) for n, k in zip(names, shapes, strict=True)},
            True,
            slots,
            [{}] * 2,
        )
        ways = [
            deal
            for deal in itertools.product((-1, 0, 1), repeat=len(shapes))
            if [[k for k, own in zip(shapes, deal, strict=True) if own == g] for g in (0, 1)] == wanted
        ]
        if len(ways) > 1:
            with pytest.raises(CheckpointError, match="several ways"):
                match_slots(state)
            continue
        certain += 1
        expected = [n for g in (0, 1) for n, own in zip(names, ways[0], strict=True) if own == g]
        assert [name for _, name in match_slots(state)] == expected
    assert certain > 30


def test_frozen_and_tied_weights_and_wrappers_do_not_shift_the_match(tmp_path):
    torch.manual_seed(0)
    net = Net()
    net.twin = net.out  # tied
    net.blocks[0]["norm"].requires_grad_(False)
    training = Training(groups=lambda _: [{"params": [p for p in net.parameters() if p.requires_grad]}])
    training.net = net
    training.run()
    state = training.state()
    state["model"] = {f"_orig_mod.{name}": tensor for name, tensor in state["model"].items()}
    torch.save(state, tmp_path / "ckpt.pt")
    table = wd.forces_from_states(tmp_path / "ckpt.pt", lr=1e-2, model=net)
    assert budget_error(table, training.truth) <= TOLERANCE


def test_a_buffer_of_the_shape_of_weights_is_told_from_them_by_the_model_alone(tmp_path):
    net = Net(mean=12)
    training = Training(groups=lambda _: two_groups(net), schedule=SCHEDULES["StepLR"])
    training.net = net
    file = training.run().save(tmp_path)
    with pytest.raises(wd.CheckpointError, match="in several ways"):
        wd.forces_from_states(file)
    assert budget_error(wd.forces_from_states(file, model=net), training.truth) <= TOLERANCE


def test_a_model_or_names_of_something_else_are_refused(tmp_path):
    file = Training().run(1).save(tmp_path)
    with pytest.raises(ValueError, match=r"model: .* lacks its parameters \['weight \(2, 2\)'"):
        wd.forces_from_states(file, model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model fits several parts"):
        wd.forces_from_states(file, model=Net().blocks[0])
    with pytest.raises(ValueError, match="names has 1 names"):
        wd.forces_from_states(file, names=["a"])
    with pytest.raises(ValueError, match=r"names: .* has no weights 'a0'"):
        wd.forces_from_states(file, names=[f"a{i}" for i in range(14)])


def test_a_config_makes_no_model_that_is_larger_than_its_file():
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 8,
              "intermediate_size": 8, "num_attention_heads": 1}  # fmt: skip
    model = model_of_config({**config, "num_hidden_layers": 2}, 20)
    assert model is not None
    assert all(p.is_meta for p in model.parameters())
    assert model_of_config({**config, "num_hidden_layers": 10**9}, 20) is None
    assert model_of_config({**config, "architectures": ["PreTrainedModel"]}, 20) is None
    assert model_of_config({"architectures": ["os.system"], "model_type": "llama"}, 20) is None


# --- sources ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the trainer with a cosine, and its last state."""
    from weightdyn.train.trainer import TrainConfig, train

    folder = tmp_path_factory.mktemp("trained") / "run"
    config = TrainConfig(
        corpus=(__file__,), steps=6, batch_size=1, seq_len=16, warmup=3, save_every=3, weibull_every=6,
        eval_every=6, device="cpu",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightdyn.train.trainer.EVAL_SEQUENCES", 1)
        return train(config, folder, progress=False)


def agrees(table, log):
    both = table.merge(log, on=["step", "tensor"], suffixes=("", "_log"))
    assert len(both) == len(table)
    size = both[[f"{force}_log" for force in FORCES]].abs().sum(axis=1)
    worst = max(((both[force] - both[f"{force}_log"]).abs() / size).max() for force in FORCES)
    return worst <= TOLERANCE


def test_the_state_of_our_trainer_is_its_last_update(run):
    log = run.forces()
    for source in (run, run.path, run.path / "resume.pt"):
        table = wd.forces_from_states(source)
        assert set(table["step"]) == {6}
        assert set(table["lr_from"]) == {"file"}
        assert agrees(table, log)
    views = table["tensor"].str.endswith("[q]")
    assert views.any()
    assert set(table.columns) == {*wd.FORCE_TABLE, *wd.LOG_TABLE, *STATE_TABLE}
    whole = wd.forces_from_states(run, views=False)
    assert not whole["tensor"].str.endswith("[q]").any()
    assert table["injection"].sum() == pytest.approx(whole["injection"].sum(), rel=1e-7)


def test_a_resume_pt_of_another_trainer_is_not_taken_for_ours(tmp_path):
    training = Training(schedule=SCHEDULES["CosineAnnealingLR"]).run()
    file = training.save(tmp_path, step=UPDATES, rng={}).rename(tmp_path / "resume.pt")
    table = wd.forces_from_states(file)
    assert set(table["lr_from"]) == {"schedule"}
    assert budget_error(table, training.truth) <= TOLERANCE
    state = training.state(step=UPDATES, rng={})
    del state["scheduler"]
    torch.save(state, file)
    with pytest.warns(UserWarning, match="a scheduler was attached"):
        assert wd.forces_from_states(file)["injection"].isna().all()


def test_snapshots_of_the_logger_are_the_rows_of_its_log(tmp_path):
    torch.manual_seed(0)
    net = Net()
    adamw = torch.optim.AdamW(two_groups(net), lr=1e-2)
    schedule = SCHEDULES["CosineAnnealingLR"](adamw)
    with wd.ForceLogger(adamw, net, out=tmp_path / "run", snapshot_every=2) as logger:
        for _ in range(6):
            adamw.zero_grad()
            net(torch.randn(8, 12)).square().mean().backward()
            adamw.step()
            schedule.step()
    table = wd.forces_from_states(tmp_path / "run")
    assert sorted(set(table["step"])) == [2, 4, 6]
    assert agrees(table, logger.run.forces())
    one = wd.forces_from_states(tmp_path / "run" / "snapshots" / "step-000004.safetensors")
    pd.testing.assert_frame_equal(one, table[table["step"] == 4].reset_index(drop=True))
    change = table["norm_sq_after"] - table["norm_sq"]
    assert table[[*FORCES]].sum(axis=1).to_numpy() == pytest.approx(change.to_numpy(), rel=1e-6, abs=1e-9)


def test_several_checkpoints_come_in_the_order_of_their_updates(tmp_path):
    training = Training(schedule=SCHEDULES["CosineAnnealingLR"])
    truth = {}
    for name in ("checkpoint-a", "checkpoint-b", "checkpoint-c"):
        torch.save(training.state(), tmp_path / f"{name}.pt")
        truth[training.updates] = dict(training.truth)
        training.run(2)
    expected = [2, 4]  # the first one was before any update
    places = [tmp_path / f"checkpoint-{letter}.pt" for letter in "cba"]
    for source in (tmp_path, places):
        table = wd.forces_from_states(source, progress=False)
        assert table["step"].unique().tolist() == expected
        for step, rows in table.groupby("step"):
            assert budget_error(rows, truth[step]) <= TOLERANCE
    mapped = wd.forces_from_states({200: places[1], 400: places[0]})
    assert mapped["step"].unique().tolist() == [200, 400]
    assert mapped["updates"].unique().tolist() == [2, 4]
    with pytest.raises(wd.CheckpointError, match="update 2 is there twice"):
        wd.forces_from_states([places[1], places[1]])
    with pytest.raises(wd.CheckpointError, match="no update yet"):
        wd.forces_from_states(places[2])


def test_what_is_no_such_checkpoint_is_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        wd.forces_from_states(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="holds none; it has"):
        wd.forces_from_states(tmp_path)
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(wd.CheckpointError, match="no checkpoint with an optimizer's state"):
        wd.forces_from_states(tmp_path / "model.safetensors")
    torch.save({"model": {"w": torch.ones(2, 2)}}, tmp_path / "weights.pt")
    with pytest.raises(wd.CheckpointError, match="no optimizer's state under one of the usual keys"):
        wd.forces_from_states(tmp_path / "weights.pt")


# --- files of strangers -----------------------------------------------------------------------------------


class Evil:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    training = Training().run()
    owned = tmp_path / "owned"
    file = training.save(tmp_path, arguments=Evil(owned), hyper_parameters={"a": [Evil(owned)]})
    assert budget_error(wd.forces_from_states(file, lr=1e-2), training.truth) <= TOLERANCE
    for place in ("model", "optimizer", "scheduler"):
        state = training.state()
        state[place] = {**state.get(place, {}), "evil": Evil(owned)}
        torch.save(state, file)
        with contextlib.suppress(wd.CheckpointError):
            quiet(file)
    state = training.state()
    state["optimizer"]["state"][0]["exp_avg"] = Evil(owned)
    torch.save(state, file)
    with pytest.raises(wd.CheckpointError, match=r"ckpt.pt .*mkdir"):
        wd.forces_from_states(file)
    assert not owned.exists()


@pytest.mark.parametrize(
    "odd",
    [
        {"milestones": __import__("collections").Counter({3: 10**12}), "gamma": 0.1},
        {"step_size": 0, "gamma": 0.1},
        {"step_size": 1, "gamma": 10**400},
        {"gamma": "x"},
        {"T_max": 0, "eta_min": 0.0},
        {"_milestones": [1, 2], "_schedulers": [{}, {}, {}]},
        {"T_0": 1, "T_i": 1, "T_mult": 10**9, "eta_min": 0, "T_cur": 0},
    ],
    ids=lambda odd: ", ".join(odd),
)
def test_a_scheduler_that_no_one_could_step_is_not_known(tmp_path, odd):
    training = Training(schedule=SCHEDULES["StepLR"]).run()
    state = training.state()
    base = {key: value for key, value in state["scheduler"].items() if key not in ("step_size", "gamma")}
    state["scheduler"] = {**base, **odd}
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.warns(UserWarning, match="lr= tells the rate"):
        assert wd.forces_from_states(tmp_path / "ckpt.pt")["alignment"].isna().all()


def test_damaged_states_name_their_file(tmp_path):
    training = Training().run(1)
    state = training.state()
    good = io.BytesIO()
    torch.save(state, good)
    file = tmp_path / "ckpt.pt"
    broken = [
        {"param_groups": []},
        {"param_groups": [{"params": [0]}]},
        {"param_groups": [{**state["optimizer"]["param_groups"][0], "params": [0, 0]}]},
        {"state": {99: {}}},
        {"state": {0: {"step": -1.0, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}},
        {"state": {0: {"step": 1.0, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(3)}}},
        {"state": {0: {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}},
        {"state": {0: [1, 2]}},
    ]
    for change in broken:
        torch.save({**state, "optimizer": {**state["optimizer"], **change}}, file)
        with pytest.raises(wd.CheckpointError, match=r"ckpt\.pt"):
            wd.forces_from_states(file)
    file.write_bytes(good.getvalue()[:-100])
    with pytest.raises(wd.CheckpointError, match=r"ckpt\.pt"):
        wd.forces_from_states(file)


def test_the_command_prints_shares_and_writes_the_table(tmp_path):
    from typer.testing import CliRunner

    from weightdyn.cli import app

    training = Training(schedule=SCHEDULES["CosineAnnealingLR"]).run()
    file, out = training.save(tmp_path), tmp_path / "forces.csv"
    done = CliRunner().invoke(app, ["forces", str(file), "--by", "model", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "alignment_share" in done.output
    assert f"{out}: 14 rows" in done.output
    assert budget_error(pd.read_csv(out), training.truth) <= TOLERANCE
    done = CliRunner().invoke(app, ["forces", str(tmp_path / "gone")])
    assert done.exit_code == 2
    assert "Error: source" in done.output
    assert "Traceback" not in done.output
