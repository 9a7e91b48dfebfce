"""Exact forces from states in shards, against the log of the same training; and what strangers may put there."""

import base64
import importlib.util
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import weightdyn as wd
from weightdyn.checkpoints.states import forces_from_states
from weightdyn.files.statefiles import read_state
from weightdyn.files.weightfiles import CheckpointError

SCRIPT = Path(__file__).with_name("sharded") / "savers.py"

if sys.platform == "win32":
    pytest.skip("gloo is tested on Linux and macOS", allow_module_level=True)

spec = importlib.util.spec_from_file_location("savers", SCRIPT)
assert spec is not None
assert spec.loader is not None
savers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(savers)
STEPS = savers.STEPS


def agree(found, log, bound=1e-4):
    """The forces of a checkpoint are the log's of the same update, to a part of |a| + |i| + |d|."""
    truth = log[log["step"] == STEPS].set_index("tensor")
    found = found.set_index("tensor")
    assert set(found.index) == set(truth.index)
    truth = truth.loc[found.index]
    assert (found["step"] == STEPS).all()
    assert found["lr"].to_numpy() == pytest.approx(truth["lr"].to_numpy(), rel=1e-9)
    assert found["weight_decay"].to_numpy() == pytest.approx(truth["weight_decay"].to_numpy())
    scale = truth[["alignment", "injection", "decay"]].abs().sum(axis=1)
    for force in ("alignment", "injection", "decay"):
        assert ((found[force] - truth[force]).abs() <= bound * scale).all(), force
    assert found["norm_sq"].to_numpy() == pytest.approx(truth["norm_sq"].to_numpy(), rel=1e-5)


# --- two processes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes saved."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(wd.__file__).parents[1])}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(SCRIPT), str(folder), "fsdp2", "core", "fsdp1"]
    running = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-5000:]
    return folder


@pytest.fixture(scope="module")
def alone():
    """The log of the training that FSDP1 shares, in one process."""
    model = savers.made(torch.float64)
    optimizer = savers.optimizer_of(model)
    with wd.ForceLogger(optimizer, model) as log:
        savers.train(model, optimizer)
    return log.run.forces()


@pytest.mark.parametrize("layout", ["plain", "app", "flat"])
def test_two_processes_leave_the_forces_of_their_log(two, layout):
    found = forces_from_states(two / "fsdp2" / layout, progress=False)
    assert set(found["lr_from"]) == {"schedule"}
    agree(found, wd.RunLog(two / "fsdp2" / "log").forces())


def test_accelerates_sharded_states_have_them_as_well(two):
    pytest.importorskip("accelerate")
    found = forces_from_states(two / "fsdp2" / "accelerate", progress=False)
    agree(found, wd.RunLog(two / "fsdp2" / "log").forces())


def test_torchtitan_keeps_no_rate_and_takes_one_that_fits_the_next(two):
    place = two / "fsdp2" / "titan" / f"step-{STEPS}"
    with pytest.warns(UserWarning, match="lr= tells the rate"):
        unknown = forces_from_states(place, progress=False)
    assert unknown["alignment"].isna().all()

    def cosine(step):
        return savers.PEAK * (1 + np.cos(np.pi * (np.asarray(step) - 1) / savers.TOTAL)) / 2

    agree(forces_from_states(place, lr=cosine, progress=False), wd.RunLog(two / "fsdp2" / "log").forces())
    with pytest.raises(ValueError, match="neither this update nor the next"):
        forces_from_states(place, lr=lambda step: cosine(step + 3), progress=False)


def test_olmo_core_leaves_the_rate_of_the_update(two):
    found = forces_from_states(two / "core" / f"step{STEPS}", progress=False)
    assert set(found["lr_from"]) == {"file"}
    assert found["lr"].unique() == pytest.approx([savers.rate(STEPS)])
    agree(found, wd.RunLog(two / "core" / "log").forces())


@pytest.mark.parametrize("layout", ["new", "legacy"])
def test_olmo_s_shards_of_fsdp_join_to_the_training_of_one_process(two, alone, layout):
    found = forces_from_states(two / "fsdp1" / layout / f"step{STEPS}", progress=False)
    agree(found, alone, 1e-9)


def test_a_series_of_shards_is_one_of_checkpoints(two, tmp_path):
    for step in (STEPS, STEPS + 1):
        (tmp_path / f"step{step}").symlink_to(two / "core" / f"step{STEPS}")
    table = forces_from_states(wd.Checkpoints(tmp_path), progress=False)
    assert sorted(set(table["step"])) == [STEPS, STEPS + 1]


def test_a_process_whose_file_lacks_is_missed(two, tmp_path):
    place = tmp_path / "legacy"
    shutil.copytree(two / "fsdp1" / "legacy" / f"step{STEPS}", place)
    (place / "rank1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"of 1 of 2 processes"):
        read_state(place)
    shutil.copy(place / "rank0.pt", place / "rank1.pt")
    with pytest.raises(CheckpointError, match="each of the weights once"):
        read_state(place)


# --- one process ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A model and optimizer behind a training that was logged."""
    model = savers.made()
    optimizer = savers.optimizer_of(model)
    with wd.ForceLogger(optimizer, model) as log:
        savers.train(model, optimizer)
    return model, optimizer, log.run.forces()


def by_name(optimizer):
    """An optimizer's state dict as FSDP.optim_state_dict makes it: by names, and those of wrapped modules."""
    state = optimizer.state_dict()
    names = {
        i: name
        for group in state["param_groups"]
        for i, name in zip(group["params"], group["param_names"], strict=True)
    }
    return {
        "state": {names[i]: kept for i, kept in state["state"].items()},
        "param_groups": [
            {
                **group,
                "params": group["param_names"],
                "param_names": [f"_fsdp_wrapped_module.{name}" for name in group["param_names"]][::-1],
            }
            for group in state["param_groups"]
        ],
    }  # fmt: skip


def encoded(tree, way=()):
    """As olmo/safetensors_util.py names what a state dict holds."""
    for key, value in tree.items():
        here = (*way, key)
        if isinstance(value, dict):
            yield from encoded(value, here)
            continue
        pickled = not isinstance(value, torch.Tensor)
        name = base64.urlsafe_b64encode(pickle.dumps((here, pickled))).decode()
        yield name, torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) if pickled else value


def save_unsharded(folder, weights, moments, kind):
    folder.mkdir()
    for name, part in (("model", weights), ("optim", moments)):
        if kind == "safetensors":
            save_file(dict(encoded(part)), folder / f"{name}.safetensors")
        else:
            torch.save(part, folder / f"{name}.pt")
    torch.save(savers.progress(), folder / "train.pt")
    (folder / "config.yaml").write_text(savers.YAML)
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("keyed", ["names", "numbers"])
def test_olmo_s_unsharded_folders_hold_the_forces_of_the_log(trained, tmp_path, kind, keyed):
    model, optimizer, log = trained
    moments = by_name(optimizer) if keyed == "names" else optimizer.state_dict()
    place = save_unsharded(tmp_path / f"step{STEPS}-unsharded", model.state_dict(), moments, kind)
    found = forces_from_states(place, progress=False)
    assert set(found["lr_from"]) == {"file"}
    agree(found, log)


def test_the_weights_of_olmo_s_safetensors_have_the_model_s_names(trained, tmp_path):
    model, optimizer, _ = trained
    save_unsharded(tmp_path / "step5-unsharded", model.state_dict(), optimizer.state_dict(), "safetensors")
    (tmp_path / "step5-unsharded" / "optim.safetensors").unlink()
    table = wd.Checkpoints(tmp_path).measure(weibull=False, cache=False, n_jobs=1, progress=False)
    truth = {name: float((p.detach().double() ** 2).sum()) for name, p in model.named_parameters()}
    assert dict(zip(table["tensor"].astype(str), table["norm_sq"], strict=True)) == pytest.approx(truth)


def test_an_optimizer_s_numbers_match_where_shapes_tell_and_nowhere_else(tmp_path):
    """torch.distributed.checkpoint keeps no order of a model, and plain state dicts have no names."""
    sure = torch.nn.Linear(3, 2)
    unsure = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    logs = {}
    for name, model in (("sure", sure), ("unsure", unsure)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        with wd.ForceLogger(optimizer, model) as log:
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        logs[name] = log.run.forces().set_index("tensor")
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_dcp.save(content, checkpoint_id=tmp_path / name, no_dist=True)
    found = forces_from_states(tmp_path / "sure", lr=0.1, progress=False).set_index("tensor")
    truth = logs["sure"].loc[found.index]
    assert found["alignment"].to_numpy() == pytest.approx(truth["alignment"].to_numpy(), rel=1e-4)
    with pytest.raises(CheckpointError, match="not certain"):
        forces_from_states(tmp_path / "unsure", lr=0.1, progress=False)
    found = forces_from_states(tmp_path / "unsure", lr=0.1, model=unsure, progress=False).set_index("tensor")
    truth = logs["unsure"].loc[found.index]
    assert found["alignment"].to_numpy() == pytest.approx(truth["alignment"].to_numpy(), rel=1e-4)


def test_a_training_without_an_update_has_no_forces(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    content = {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save(content, checkpoint_id=tmp_path / "x", no_dist=True)
    with pytest.raises(CheckpointError, match="no update yet"):
        forces_from_states(tmp_path / "x", progress=False)


def test_groups_of_different_rates_are_not_taken_for_each_other(tmp_path):
    """The flat form of an optimizer's state has no order of groups, and the scheduler's rates have no names."""
    model = savers.made()
    optimizer = savers.optimizer_of(model)
    optimizer.param_groups[1]["lr"] = 3 * savers.PEAK
    scheduler = savers.scheduler_of(optimizer)
    savers.train(model, optimizer, scheduler=scheduler)
    weights, moments = get_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    content = {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save(content, checkpoint_id=tmp_path / "x", no_dist=True)
    with pytest.warns(UserWarning, match="scheduler"):
        found = forces_from_states(tmp_path / "x", progress=False)
    assert found["alignment"].isna().all()


def test_a_count_that_olmo_core_did_not_advance_makes_corrections_of_the_first_update(tmp_path):
    """SkipStepAdamW before June 2025: an update is (1−β₁)⁻¹·√(1−β₂) = 2.24 times as large as AdamW's."""
    generator = torch.Generator().manual_seed(0)
    w, m, v = torch.randn(4, 3, generator=generator, dtype=torch.float64), 0.0, 0.0
    lr, decay, beta1, beta2, eps, steps = 0.01, 0.1, 0.9, 0.95, 1e-8, 40
    for _ in range(steps):
        g = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        before = w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        u = (m / (1 - beta1)) / ((v / (1 - beta2)).sqrt() + eps)
        w = (1 - lr * decay) * w - lr * u
    place = tmp_path / f"step{steps}"
    kept = {"step": torch.tensor(0.0), "exp_avg": m, "exp_avg_sq": v}
    options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay, "initial_lr": 1.0}
    content = {
        "model": {"w": w},
        "optim": {"state": {"w": kept}, "param_groups": [{**options, "params": ["w"]}]},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save(content, checkpoint_id=place / "model_and_optim", no_dist=True)
    (place / "train").mkdir()
    torch.save(savers.progress(steps), place / "train" / "rank0.pt")
    optim = {"_CLASS_": "olmo_core.optim.adamw.SkipStepAdamWConfig"}
    (place / "config.json").write_text(json.dumps({"train_module": {"optim": optim}}))
    row = forces_from_states(place, progress=False).iloc[0]
    assert row["step"] == steps
    assert row["norm_sq"] == pytest.approx(float((before**2).sum()), rel=1e-9)
    assert row["injection"] == pytest.approx(lr**2 * float((u**2).sum()), rel=1e-9)
    assert row["alignment"] == pytest.approx(-2 * lr * (1 - lr * decay) * float((before * u).sum()), rel=1e-9)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.fixture
def unsharded(trained, tmp_path):
    model, optimizer, _ = trained
    return save_unsharded(tmp_path / "step5-unsharded", model.state_dict(), by_name(optimizer), "safetensors")


def test_updates_that_leave_weights_alone_are_refused(unsharded):
    config = unsharded / "config.yaml"
    config.write_text(config.read_text().replace("  name: adamw", "  name: adamw\n  selective_updates: true"))
    with pytest.raises(CheckpointError, match=r"config\.yaml says selective_updates"):
        read_state(unsharded)


def test_lion_has_no_forces_of_adam(unsharded):
    config = unsharded / "config.yaml"
    config.write_text(config.read_text().replace("adamw", "lionw"))
    assert read_state(unsharded).optimizer == "LionW"
    with pytest.raises(CheckpointError, match="Lion"):
        forces_from_states(unsharded, progress=False)


def test_local_shards_are_refused_with_what_makes_them_whole(tmp_path):
    for name in ("model", "optim", "train"):
        (tmp_path / name).mkdir()
        torch.save({}, tmp_path / name / "rank0.pt")
    (tmp_path / "config.yaml").write_text(savers.YAML)
    with pytest.raises(CheckpointError, match=r"scripts/unshard\.py"):
        read_state(tmp_path)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def named(value):
    return base64.urlsafe_b64encode(pickle.dumps(value)).decode()


def test_names_and_values_that_are_pickles_are_not_called(unsharded, tmp_path):
    owned, w = tmp_path / "owned", torch.ones(2, 2)
    names = {
        "a call": named(((Evil(owned),), False)),
        "a call alone": named(Evil(owned)),
        "no keys": named(((), False)),
        "keys of keys": named(((("a",),), False)),
        "three": named((("a",), False, 1)),
        "no flag": named((("a",), 1)),
        "no pickle": "gASV" + "A" * 40,
        "plain": "layers.0.weight",
        "long": "gA" + "A" * 10_000,
    }
    for what, name in names.items():
        save_file({name: w}, unsharded / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"model\.safetensors.* no name as OLMo"):
            read_state(unsharded)
        assert not owned.exists(), what
    for one, other in ((("a",), ("a", "b")), (("a", "b"), ("a",)), (("a", 1), ["a", 1])):
        save_file({named((one, False)): w, named((other, False)): 2 * w}, unsharded / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"lies within something else|is there twice"):
            read_state(unsharded)
    evil = torch.frombuffer(bytearray(pickle.dumps([Evil(owned)])), dtype=torch.uint8)
    save_file(
        {named((("param_groups",), True)): evil, named((("state", "w", "m"), False)): w},
        unsharded / "optim.safetensors",
    )
    with pytest.raises(CheckpointError, match="step5-unsharded"):
        read_state(unsharded)
    assert not owned.exists()


def test_shards_of_strangers_are_refused(two, tmp_path):
    place = tmp_path / "legacy"
    source = two / "fsdp1" / "legacy" / f"step{STEPS}"
    evil = {
        "model": {"w": Evil(tmp_path / "owned")},
        "optim": {"state": {}, "param_groups": []},
        "world_size": 1,
    }
    for count, content in ((2, None), (1, evil), (1, {"world_size": 1}), (1, {"world_size": "x"}), (1, [1])):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        if count == 1:
            (place / "rank1.pt").unlink()
        if content is None:
            (place / "rank1.pt").write_bytes((place / "rank1.pt").read_bytes()[:-700])
        else:
            torch.save(content, place / "rank0.pt")
        with pytest.raises(CheckpointError, match="legacy"):
            read_state(place)
    assert not (tmp_path / "owned").exists()
