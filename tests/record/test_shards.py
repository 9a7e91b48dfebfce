"""Parts of tensors that several processes hold, and what is added up of them."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Partial, _StridedShard

import weightdyn as wd
from weightdyn.core.naming import View, describe
from weightdyn.files.weightfiles import CheckpointError, list_tensors
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
        torch.testing.assert_close(stored.read(), right[name].read(), rtol=1e-9, atol=1e-12)
        last = stored.shape[0] - 1
        torch.testing.assert_close(stored.read(last), right[name].read(last), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stack", ["megatron", "zero3"])
def test_flat_shards_that_are_handed_over_log_what_one_process_does(two, alone, stack):
    check_equal(wd.RunLog(two / stack), alone, given=True)


@pytest.mark.parametrize("way", ["fsdp", "tp", "zero", "ddp"])
def test_two_processes_log_what_one_process_does(two, alone, way):
    check_equal(wd.RunLog(two / f"{way}-2"), alone)


def test_three_processes_with_uneven_and_empty_parts_log_what_one_process_does(three, alone):
    check_equal(wd.RunLog(three / "fsdp-3"), alone)


@pytest.mark.parametrize("way", ["hsdp", "fsdp_tp"])
def test_four_processes_on_a_mesh_of_two_dimensions_log_what_one_process_does(four, alone, way):
    check_equal(wd.RunLog(four / f"{way}-4"), alone)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
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
def test_sigterm_beside_a_rank_that_hangs_ends_the_process_with_the_log_whole(tmp_path):
    _, lived = check_left(tmp_path, "term", stop=True)
    assert lived < 3
