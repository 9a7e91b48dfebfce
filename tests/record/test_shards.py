"""Parts of tensors that several processes hold, and what is added up of them."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Partial, _StridedShard

from weightdyn.core.naming import View, describe
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
