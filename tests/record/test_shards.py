"""Parts of tensors that several processes hold, and what is added up of them."""

import contextlib
import copy
import importlib.util
import itertools
import math
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Partial, _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import weightdyn as wd
from weightdyn.core.naming import View, describe
from weightdyn.files.weightfiles import CheckpointError, list_tensors
from weightdyn.record import logger, shards
from weightdyn.record.shards import Box, Held, closure, flat_boxes, grid_ranges

SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)


def numbered(shape):
    return torch.arange(math.prod(shape)).reshape(shape)


def inside(box):
    return tuple(slice(first, first + size) for first, size in zip(box.offset, box.shape, strict=True))


@given(SHAPES, st.data())
def test_the_boxes_of_a_flat_range_are_its_weights_in_their_order(shape, data):
    whole = numbered(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    held = Held.flat(shape, start, stop, ())
    local = whole.flatten()[start:stop]
    assert len(held.boxes) <= 2 * len(shape) - 1
    pieces = held.pieces(local)
    assert [piece.shape for piece in pieces] == [box.shape for box in held.boxes]
    for piece, box in zip(pieces, held.boxes, strict=True):
        assert torch.equal(piece, whole[inside(box)])
    assert torch.equal(torch.cat([piece.flatten() for piece in [local[:0], *pieces]]), local)


def split_by_torch(whole, mesh_shape, coordinate, placements):
    """What torch itself hands to a process, mesh dimension by mesh dimension."""
    for chunks, i, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if not placement.is_replicate():
            whole = placement._split_tensor(whole, chunks, with_padding=False)[0][i]
    return whole


@st.composite
def placed(draw):
    shape = draw(SHAPES)
    mesh_shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1)
    kinds = st.one_of(
        st.just(Replicate()),
        dims.map(Shard),
        st.builds(lambda dim, sf: _StridedShard(dim, split_factor=sf), dims, st.integers(1, 3)),
    )
    return shape, mesh_shape, [draw(kinds) for _ in mesh_shape]


@settings(max_examples=200)
@given(placed())
def test_the_boxes_of_a_dtensor_are_what_torch_gives_to_each_process(case):
    shape, mesh_shape, placements = case
    whole = numbered(shape)
    for coordinate in itertools.product(*map(range, mesh_shape)):
        local = split_by_torch(whole, mesh_shape, coordinate, placements)
        held = Held.grid(shape, grid_ranges(shape, mesh_shape, coordinate, placements), ())
        pieces = held.pieces(local)
        for piece, box in zip(pieces, held.boxes, strict=True):
            assert torch.equal(piece, whole[inside(box)])
        assert sum(piece.numel() for piece in pieces) == local.numel()


def test_fsdp_over_tensor_parallelism_is_one_box_where_it_cuts_evenly():
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    firsts = [
        grid_ranges((8, 3), (2, 2), place, placements)[0] for place in itertools.product(range(2), range(2))
    ]
    assert firsts == [[(0, 2)], [(4, 6)], [(2, 4)], [(6, 8)]]  # as torch's own documentation has it


def test_a_partial_sum_is_no_part_of_a_tensor():
    with pytest.raises(TypeError, match="no part of a tensor"):
        grid_ranges((4,), (2,), (0,), [Partial()])


@pytest.mark.parametrize("views", [True, "head"])
@given(data=st.data())
@settings(max_examples=50)
def test_views_that_are_clipped_to_boxes_are_the_views_of_the_whole(views, data):
    config = {"num_attention_heads": 2, "hidden_size": 4, "model_type": "gpt_neox"}
    shape = (12, 4)
    name = describe("layers.0.attention.query_key_value.weight", shape, config, views=views)
    whole = numbered(shape)
    start = data.draw(st.integers(0, 48))
    stop = data.draw(st.integers(start, 48))
    found = [[] for _ in name.views]
    for box in flat_boxes(shape, start, stop):
        clipped = box.clip(name.views)
        assert len(clipped) == len(name.views)
        for i, view in enumerate(clipped):
            for low, high in view.ranges:
                found[i] += whole[inside(box)].narrow(view.axis, low, high - low).flatten().tolist()
    for view, held in zip(name.views, found, strict=True):
        assert sorted(held) == sorted(set(view.of(whole).flatten().tolist()) & set(range(start, stop)))


def test_a_view_without_weights_in_a_box_keeps_its_place():
    views = [View("q", "q", 0, ((0, 4),)), View("k", "k", 0, ((4, 8),)), View("v", "v", 0, ((8, 12),))]
    assert [view.ranges for view in Box((5, 0), (2, 3)).clip(views)] == [(), ((0, 2),), ()]


def test_ranks_that_share_no_tensor_but_a_neighbour_add_up_together():
    rows = (frozenset({0, 1}), frozenset({2, 3}))
    columns = (frozenset({0, 2}), frozenset({1, 3}))
    assert closure(0, [rows]) == (0, 1)
    assert closure(3, [columns]) == (1, 3)
    assert all(closure(rank, [rows, columns]) == (0, 1, 2, 3) for rank in range(4))
    assert np.array_equal(closure(2, []), [2])


# --- real processes ----------------------------------------------------------------------------------------------


SCRIPTS = Path(__file__).with_name("distributed")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(wd.__file__).parents[1])}

if sys.platform == "win32":
    pytest.skip("gloo and torchrun are tested on Linux and macOS", allow_module_level=True)


def stacks():
    """The module that the processes run."""
    spec = importlib.util.spec_from_file_location("stacks", SCRIPTS / "stacks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchrun(processes, folder, *names):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += [SCRIPTS / "stacks.py", folder, *names]
    done = subprocess.run(
        list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The log of the same training in one process."""
    module, folder = stacks(), tmp_path_factory.mktemp("alone")
    model = module.made()
    optimizer = module.optimizer_of(model)
    with wd.ForceLogger(optimizer, model, config=module.CONFIG, out=folder, **module.OPTIONS):
        module.train(model, optimizer)
    return wd.RunLog(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, folder, "fsdp", "tp", "zero", "ddp", "megatron", "zero3", "resumed-0-2", "attached_wrongly")
    return folder


@pytest.fixture(scope="module")
def three(two):
    torchrun(3, two, "fsdp", "resumed-2-4")
    return two


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    torchrun(4, folder, "hsdp", "fsdp_tp")
    return folder


FORCES = [
    "norm_sq",
    "norm_sq_after",
    "alignment",
    "injection",
    "decay",
    "drift",
    "signal",
    "u_max",
    "m_rms",
    "v_mean",
]
FORCES += ["m_rms", "v_mean", "lr", "weight_decay", "relative_update"]


def sorted_by_tensor(table):
    return table.assign(tensor=table["tensor"].astype(str)).sort_values(["step", "tensor"], ignore_index=True)


def check_equal(got, want, given=False):
    """Two force tables are equal to 1e-5, and those of Weibull fits to 1e-6.

    Of a log of shards that were given to it nothing is known of the weights before the first update.
    """
    left, right = sorted_by_tensor(got.forces()), sorted_by_tensor(want.forces())
    names = ["step", "tensor", "layer", "component", "role", "numel"]
    assert left[names].astype(str).equals(right[names].astype(str))
    assert left["tensor"].str.contains("[q]", regex=False).any()
    for name in FORCES:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-5, atol=0, err_msg=name)
    # Of the first update nothing is remembered: what there is of it is rounding.
    scale = right["alignment"].abs()
    np.testing.assert_allclose(left["memory"] / scale, right["memory"] / scale, rtol=1e-5, atol=1e-5)
    assert (left["residual"].isna() == (right["residual"].isna() | given)).all()
    left, right = sorted_by_tensor(got.weibull()), sorted_by_tensor(want.weibull())
    right = right[right["step"] > 0].reset_index(drop=True) if given else right
    assert left[["step", "tensor", "n"]].astype(str).equals(right[["step", "tensor", "n"]].astype(str))
    for name in ("lam", "k", "r_squared", "ks"):
        np.testing.assert_allclose(left[name], right[name], rtol=1e-6, atol=0, err_msg=name)
    left, right = (list_tensors([run.path / "snapshots/step-000004.safetensors"]) for run in (got, want))
    assert [*left] == [*right]
    for name, stored in left.items():
        torch.testing.assert_close(stored.read(), right[name].read(), rtol=1e-6, atol=1e-9)
        last = stored.shape[0] - 1
        torch.testing.assert_close(stored.read(last), right[name].read(last), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("stack", ["megatron", "zero3"])
def test_flat_shards_that_are_handed_over_log_what_one_process_does(two, alone, stack):
    check_equal(wd.RunLog(two / stack), alone, given=True)


@pytest.mark.parametrize("way", ["fsdp", "tp", "zero", "ddp"])
def test_two_processes_log_what_one_process_does(two, alone, way):
    check_equal(wd.RunLog(two / f"{way}-2"), alone)


@pytest.mark.slow
def test_three_processes_with_uneven_and_empty_parts_log_what_one_process_does(three, alone):
    check_equal(wd.RunLog(three / "fsdp-3"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["hsdp", "fsdp_tp"])
def test_four_processes_on_a_mesh_of_two_dimensions_log_what_one_process_does(four, alone, way):
    check_equal(wd.RunLog(four / f"{way}-4"), alone)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.slow
def test_a_training_goes_on_in_its_log_with_another_number_of_processes(three, alone):
    module, folder = stacks(), three
    module.resumed(folder, 4, 5)
    got, want = wd.RunLog(folder / "resumed").forces(), alone.forces()
    assert got[["step", "tensor"]].astype(str).equals(want[["step", "tensor"]].astype(str))
    for name in ("norm_sq", "norm_sq_after", "alignment", "injection", "decay", "drift", "signal"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=0, err_msg=name)


def test_a_snapshot_of_which_a_part_is_missing_or_wrong_is_refused(two):
    folder = two / "fsdp-2/snapshots"
    whole, part = folder / "step-000004.safetensors", folder / "part-000004-00001.safetensors"
    content = part.read_bytes()
    part.unlink()
    with pytest.raises(CheckpointError, match=r"lacks part-000004-00001\.safetensors.*copy it there"):
        list_tensors([whole])
    part.write_bytes(
        content.replace(
            b'\\"embed_in.weight\\", [17, 16], [9, 0]', b'\\"embed_in.weight\\", [17, 16], [8, 0]'
        )
    )
    with pytest.raises(
        CheckpointError, match=r"parts of embed_in\.weight do not hold each of the weights once"
    ):
        list_tensors([whole])
    part.write_bytes(content)
    assert list_tensors([whole])


# --- one process of many ------------------------------------------------------------------------------------------


@pytest.fixture
def group(monkeypatch):
    """A process group of one, whose tensors are sharded all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_one(way, folder, **options):
    module = stacks()
    model, optimizer, called, part = module.way(way)
    options = {**module.OPTIONS, **options}
    with wd.ForceLogger(optimizer, model, config=module.CONFIG, out=folder, **options):
        module.train(called, optimizer, part)
    return wd.RunLog(folder)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # which torch's own ZeroRedundancyOptimizer calls
@pytest.mark.parametrize("way", ["fsdp", "zero"])
def test_one_process_that_shards_logs_what_one_does_that_does_not(group, alone, tmp_path, way):
    check_equal(in_one(way, tmp_path), alone)


def test_a_sharded_model_that_was_evaluated_before_has_the_names_of_the_plain_one(group, alone, tmp_path):
    """Its outermost module then has whole parameters, which are not those of the optimizer."""
    module = stacks()
    model, optimizer, called, part = module.way("fsdp")
    tokens = next(iter(module.batches(0, 1)))[1]
    with torch.no_grad():
        called(tokens[:, :-1])
    with wd.ForceLogger(optimizer, model, config=module.CONFIG, out=tmp_path, **module.OPTIONS):
        module.train(called, optimizer, part)
    check_equal(wd.RunLog(tmp_path), alone)


def test_a_logged_update_is_two_reductions_and_nothing_else_is_sent(group):
    """All that a process sends goes through an operator of c10d: a sum and a maximum for each logged update."""
    module = stacks()
    sent = []

    class Sent(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "c10d" in func.namespace:
                sent.append(func.name())
            return func(*args, **(kwargs or {}))

    def updates(every):
        model, optimizer, *_ = module.way("fsdp")
        log = every and wd.ForceLogger(optimizer, model, config=module.CONFIG, every=every)
        for t in range(6):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1 + t)
            with Sent():
                optimizer.step()
        if log:
            log.close()
            assert log.run.forces()["step"].nunique() == 6 // every
        return len(sent)

    assert updates(None) == 0
    assert updates(3) == 2 * 2
    assert updates(1) - 2 * 2 == 2 * 6
    assert {name.partition("::")[2].partition(".")[0] for name in sent} == {"allreduce_"}


@contextlib.contextmanager
def warned(message):
    """Some warning says this; others may come with it."""
    with pytest.warns(RuntimeWarning) as told:
        yield
    assert any(re.search(message, str(each.message)) for each in told), [str(each.message) for each in told]


class Work:
    """A reduction that another rank never joins."""

    def is_completed(self):
        return False


def logger_of_one(**options):
    module = stacks()
    model, optimizer, called, part = module.way("fsdp")
    log = wd.ForceLogger(optimizer, model, config=module.CONFIG, **options)
    return log, lambda: module.train(called, optimizer, part, steps=1)


def test_a_timed_flush_waits_for_no_rank_and_an_exception_for_a_second(group, monkeypatch):
    log, step = logger_of_one(weibull_every=1)
    step()
    with monkeypatch.context() as patched:
        patched.setattr(dist, "all_reduce", lambda *_, **__: Work())
        step()
        since = time.monotonic()
        log._bring_over()
        assert time.monotonic() - since < 0.5
    step()
    log._bring_over()
    since = time.monotonic()
    with warned("update 2 and later ones did not come"), pytest.raises(ZeroDivisionError), log:
        raise ZeroDivisionError
    assert 0.9 < time.monotonic() - since < 3
    assert log.run.forces()["step"].unique().tolist() == [1]  # in their order: the third is behind the second


def test_what_a_broken_group_lost_is_left_out_and_said(group, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Connection closed by peer")

    log, step = logger_of_one(weibull_every=1)
    monkeypatch.setattr(dist, "all_reduce", broken)
    with warned("fits over the ranks of update 0 are lost: Connection closed by peer"):
        step()
    log.close()
    assert len(log.run.forces()) == len(log.run.weibull()) == 0


def reduced_as(change, monkeypatch):
    reduce = dist.all_reduce

    def changed(buffer, op, **options):
        change(buffer, op)
        return reduce(buffer, op, **options)

    monkeypatch.setattr(dist, "all_reduce", changed)


def test_parts_that_are_there_twice_are_nan_with_the_reason(group, monkeypatch):
    log, step = logger_of_one()
    reduced_as(lambda buffer, op: buffer.mul_(2) if op == dist.ReduceOp.SUM else None, monkeypatch)
    step()
    with warned(r"544 of the 272 weights of embed_in\.weight were counted"):
        log.close()
    assert log.run.forces()["norm_sq"].isna().all()


def test_ranks_at_different_updates_are_nan_with_the_reason(group, monkeypatch):
    log, step = logger_of_one()
    reduced_as(lambda buffer, op: buffer[-2].add_(1) if op == dist.ReduceOp.MAX else None, monkeypatch)
    step()
    with warned("at update 1 the ranks were not at the same update"):
        log.close()
    assert log.run.forces()["norm_sq"].isna().all()


@pytest.mark.parametrize("large", [False, True])
def test_fits_of_parts_that_are_there_twice_are_left_out(group, monkeypatch, large):
    if large:
        monkeypatch.setattr("weightdyn.record.fits.SORTED", 100)
    log, step = logger_of_one(weibull_every=lambda t: t == 1, every=lambda t: False, start_step=7)
    log.load_state_dict({"step": 0})
    reduced_as(lambda buffer, op: buffer.mul_(2), monkeypatch)
    with warned("do not hold each weight of .* once"):
        step()
        log.close()
    assert (log.run.weibull()["n"] < 100).all() if large else not len(log.run.weibull())


def test_large_tensors_are_fitted_from_counts_as_they_are_when_whole(group, monkeypatch, tmp_path):
    monkeypatch.setattr("weightdyn.record.fits.SORTED", 0)
    monkeypatch.setattr("weightdyn.record.fits.is_coarse", lambda sample: False)
    module = stacks()
    model, optimizer, called, part = module.way("fsdp")
    with wd.ForceLogger(optimizer, model, config=module.CONFIG, weibull_every=1) as log:
        module.train(called, optimizer, part, steps=1)
    fits = log.run.weibull().set_index(["step", "tensor"])
    weights = dict(model.named_parameters())["embed_out.weight"].full_tensor().detach()
    want = wd.fit_weibull(wd.MagnitudeHistogram.from_tensor(weights))
    got = fits.loc[(1, "embed_out.weight")]
    assert got["k"] == pytest.approx(want.k, rel=1e-12)
    assert got["lam"] == pytest.approx(want.lam, rel=1e-12)
    assert got["n"] == want.n


def test_where_bins_blur_the_weights_of_a_shared_tensor_there_is_no_fit(group, monkeypatch):
    monkeypatch.setattr("weightdyn.record.fits.SORTED", 0)
    log, step = logger_of_one(weibull_every=1)
    with torch.no_grad():
        for p in log._optimizers[0].param_groups[0]["params"]:
            p.to_local().fill_(0.1).add_(1e-4 * torch.randn_like(p.to_local()))
    with warned("blur them"):
        step()
    log.close()
    fits = log.run.weibull()
    assert not (fits["step"] == 0).any()


def test_an_announcement_tells_who_is_silent_and_what_differs(group, monkeypatch):
    monkeypatch.setattr(shards, "PATIENCE", 0.1)
    store = dist.distributed_c10d._get_default_store()
    mine = shards.Announcement({"every": 2, "out": "a"}, [0, 1, 2])
    with pytest.raises(RuntimeError, match=r"none on the ranks \[1, 2\]\. Remedy: attach it"):
        mine.check("attach it")
    store.set("weightdyn/every-out/1", '{"every": 3, "out": "a"}')
    store.set("weightdyn/every-out/2", '{"every": 2, "out": "a"}')
    with pytest.raises(
        RuntimeError, match="rank 1 has every=3 where this one has 2; rank 2 attached one more"
    ):
        mine.check("attach it")
    for rank in (1, 2):
        store.set(f"{mine._name}/{rank}", "")
    mine.check("attach it")


def test_the_step_that_a_checkpoint_makes_to_have_a_state_is_none(group, tmp_path):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    module = stacks()
    model, optimizer, called, part = module.way("fsdp")
    with wd.ForceLogger(optimizer, model, config=module.CONFIG) as log:
        get_optimizer_state_dict(model, optimizer)
        assert log.step == 0
        module.train(called, optimizer, part, steps=2)
    assert log.step == 2


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_rank_of_a_zero_redundancy_optimizer_that_steps_no_tensor_attaches_as_the_others_do(group):
    model, zero, *_ = stacks().way("zero")
    assert len(zero._param_to_rank)  # it is found out once
    for each in zero.optim.param_groups:
        each["params"] = []  # as where there are more ranks than tensors
    with pytest.warns(RuntimeWarning, match="no update"), wd.ForceLogger(zero, model, views=False) as log:
        assert f"{len([*model.parameters()])} tensors" in repr(log)


def two_optimizers(model, later=()):
    parameters = [p for name, p in model.named_parameters() if name not in later]
    return [torch.optim.SGD(parameters[:5], lr=1e-2), torch.optim.AdamW(parameters[5:], lr=1e-2)]


def taking_turns(model, optimizers, first=0, steps=3, between=lambda step: None, rests=()):
    """Updates of all optimizers, one behind the other; in those named the second rests."""
    module = stacks()
    for step, tokens in module.batches(first, steps):
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizers[0].step()
        between(step)
        if step not in rests:
            optimizers[1].step()
        for each in optimizers:
            each.zero_grad()


def check_as_if_whole(train, later=()):
    """Two optimizers of shared tensors leave the rows that they leave of tensors that are whole."""
    module, found = stacks(), []
    for way in ("plain", "fsdp"):
        model = module.made() if way == "plain" else module.way(way)[0]
        optimizers = two_optimizers(model, later=later)
        with wd.ForceLogger(optimizers, model, config=module.CONFIG) as log:
            train(model, optimizers, log)
        found.append(log.run.forces().sort_values(["step", "tensor"], key=lambda each: each.astype(str)))
    plain, shared = found
    for name in ("step", "tensor"):
        assert shared[name].astype(str).tolist() == plain[name].astype(str).tolist()
    np.testing.assert_allclose(shared["alignment"], plain["alignment"], rtol=1e-9)


def test_a_flush_between_the_optimizers_of_an_update_loses_none_of_it(group):
    check_as_if_whole(lambda model, both, log: taking_turns(model, both, between=lambda _: log._bring_over()))


def test_a_group_that_joins_a_later_optimizer_keeps_what_the_first_has_made(group):
    later = ("embed_out.weight", "final_layer_norm.bias")

    def train(model, optimizers, log):
        taking_turns(model, optimizers, steps=2)
        parameters = dict(model.named_parameters())
        optimizers[1].add_param_group({"params": [parameters[name] for name in later]})
        taking_turns(model, optimizers, first=2, steps=2)

    check_as_if_whole(train, later)


def test_a_state_that_is_loaded_while_an_optimizer_rests_leaves_later_updates_in_the_log(group):
    def train(model, optimizers, log):
        taking_turns(model, optimizers, steps=2)
        states = [copy.deepcopy(each.state_dict()) for each in optimizers]
        taking_turns(model, optimizers, first=2, steps=1, rests=[2])
        for each, state in zip(optimizers, states, strict=True):
            each.load_state_dict(state)
        log.load_state_dict({"step": 2})
        taking_turns(model, optimizers, first=2, steps=2)

    check_as_if_whole(train)


def test_a_checkpoint_made_while_an_optimizer_rests_knows_of_no_more_than_the_log(group, tmp_path):
    model = stacks().way("fsdp")[0]
    optimizers = two_optimizers(model)
    with wd.ForceLogger(optimizers, model, out=tmp_path / "run", views=False) as log:
        taking_turns(model, optimizers, rests=[2])
        optimizers[0].state_dict()
        assert wd.RunLog(tmp_path / "run").forces()["step"].max() == log.step == 3


def test_ranks_wait_to_know_of_a_skipped_step_so_that_all_log_the_same_updates(group, monkeypatch):
    log, step = logger_of_one(every=2)
    skips = iter([0.0, 1.0, 0.0, 0.0])
    monkeypatch.setattr(log._watches[0], "was_skipped", lambda: torch.tensor(next(skips)))
    for _ in range(4):
        step()
    assert log.step == 3
    log.close()
    assert log.run.forces()["step"].unique().tolist() == [2]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_process_group_that_is_gone_by_then_does_not_keep_the_log_from_closing(monkeypatch, tmp_path, way):
    monkeypatch.setattr(logger, "involved", lambda *_: (0, 1))  # so that it tells others of itself
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = stacks()
        model, optimizer, called, part = module.way(way)
        log = wd.ForceLogger(optimizer, model, config=module.CONFIG, out=tmp_path)
        monkeypatch.setattr(log, "_meet", lambda: None)
        module.train(called, optimizer, part, steps=2)
    finally:
        dist.destroy_process_group()
    log.close()
    assert wd.RunLog(tmp_path).forces()["step"].max() == 2


def test_a_gradient_that_is_cut_otherwise_leaves_drift_unknown(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (1,))
    p = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = torch.optim.AdamW([p])
    with wd.ForceLogger(optimizer) as log:
        p.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Shard(1)])
        with pytest.warns(RuntimeWarning, match="not cut as the tensor is"):
            optimizer.step()
        assert log.latest()["drift"].isna().all()
        assert log.latest()["alignment"].notna().all()


# --- shards that are handed over ---------------------------------------------------------------------------------


def shard(**options):
    w, m, v = torch.full((6,), 2.0), torch.full((6,), 0.5), torch.full((6,), 0.5)
    return wd.Shard(
        **{
            "name": "w",
            "weights": w,
            "exp_avg": m,
            "exp_avg_sq": v,
            "step": 1,
            "lr": 0.1,
            "weight_decay": 0.5,
        }
        | {"eps": 0.0, "betas": (0.5, 0.5)}
        | options
    )


def test_what_is_handed_over_is_measured_by_the_formula():
    log = wd.ShardLogger({"w": (2, 3)})
    log.update([shard()])
    (row,) = log.latest().to_dict("records")
    before = (2.0 + 0.1) / (1 - 0.05)  # u = 1 takes w to 2: w' = (1 - ηλ)w - ηu
    assert row["norm_sq_after"] == pytest.approx(24)
    assert row["norm_sq"] == pytest.approx(6 * before**2)
    assert row["alignment"] == pytest.approx(-2 * 0.1 * 0.95 * 6 * before)
    assert row["injection"] == pytest.approx(0.01 * 6)
    assert math.isnan(row["drift"])  # without a gradient
    log.update([shard(step=2, grad=torch.ones(6))])
    assert log.latest()["drift"].notna().all()


def test_a_strong_decay_is_told_from_the_weights_after_it():
    log = wd.ShardLogger({"w": (2, 3)})
    log.update([shard(weight_decay=8.0)])
    (row,) = log.latest().to_dict("records")
    assert row["norm_sq"] == pytest.approx(6 * (2.1 / 0.2) ** 2)


@pytest.mark.parametrize(
    ("shards", "kind", "message"),
    [
        ([shard(name="b")], ValueError, "'b' is none of shapes"),
        ([shard(), shard()], ValueError, "'w' is there twice"),
        ([shard(weights=torch.ones(5))], ValueError, "exp_avg of w has the shape"),
        ([shard(weights=torch.ones(6).bfloat16())], TypeError, "bfloat16.*that the optimizer steps"),
        ([shard(start=1)], ValueError, r"do not lie in a tensor of shape \(2, 3\) at start=1"),
        ([shard(grad=torch.ones(2))], ValueError, "grad of w has the shape"),
        ([7], TypeError, "shards must be Shard"),
        ([shard(lr=math.nan)], ValueError, "lr must be"),
    ],
)
def test_shards_that_do_not_fit_are_refused(shards, kind, message):
    with pytest.raises(kind, match=message):
        wd.ShardLogger({"w": (2, 3)}).update(shards)


def test_a_part_without_the_ranks_that_have_the_rest_is_refused():
    part = {name: torch.ones(3) for name in ("weights", "exp_avg", "exp_avg_sq")}
    with pytest.raises(ValueError, match=r"a part of .* give group="):
        wd.ShardLogger({"w": (2, 3)}).update([shard(**part)])


# --- a rank that is lost -----------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def lose(folder, how, stop=False):
    """Train on two processes, of which the second goes; return what the first printed, and how long it lived on."""
    port = free_port()
    both = []
    for rank in (1, 0):
        place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        both.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPTS / "lost.py"), str(folder), how],
                env={**ENVIRONMENT, **{name: str(value) for name, value in place.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    left = both[1]
    try:
        assert left.stdout is not None
        printed = left.stdout.readline()
        assert printed == "alone\n"
        since = time.monotonic()
        if stop:
            time.sleep(0.5)
            left.terminate()
        printed = left.stdout.read()
        left.wait(60)
        return printed, time.monotonic() - since, left.returncode
    finally:
        for process in both:
            process.kill()
            process.communicate()


def check_left(folder, how, **options):
    printed, lived, status = lose(folder, how, **options)
    assert status != 0
    steps = wd.RunLog(folder / "run").forces().groupby("step").size()
    assert steps.index.tolist() == [1, 2, 3, 4, 5]  # the sixth was not whole
    assert steps.nunique() == 1
    return printed, lived


def seconds(printed):
    return float(re.search(r"left after ([0-9.]+)", printed)[1])


@pytest.mark.slow
def test_an_exception_beside_a_rank_that_hangs_is_out_after_a_second_with_the_log_whole(tmp_path):
    printed, lived = check_left(tmp_path, "alone")
    assert seconds(printed) < 1.5
    assert lived < 5  # nor does the end of the process wait for the other


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "raise", "hang"])
def test_a_lost_rank_leaves_the_log_whole_and_holds_nobody_up(tmp_path, how):
    printed, _ = check_left(tmp_path, how)
    assert seconds(printed) < 1.5  # from torch's own failure on


@pytest.mark.slow
@pytest.mark.parametrize("how", ["term", "flush"])
def test_sigterm_beside_a_rank_that_hangs_ends_the_process_with_the_log_whole(tmp_path, how):
    _, lived = check_left(tmp_path, how, stop=True)
    assert lived < 3
