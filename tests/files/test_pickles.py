"""The reader of pickles against pickle.loads on what has no calls, and against torch.load."""

import collections
import io
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightdyn.files.pickles import Global, Object, read_saved, saved_tensors, unpickled

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.text(), st.integers()), inner)
    ),
    max_leaves=20,
)


@given(value=PLAIN, protocol=st.integers(1, pickle.HIGHEST_PROTOCOL))
def test_plain_objects_are_what_pickle_makes_of_them(value, protocol):
    data = pickle.dumps(value, protocol)
    if protocol < 3 and (b"_codecs" in data or b"__builtin__" in data):  # bytes were calls before protocol 3
        return
    assert unpickled(data) == pickle.loads(data)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_shared_recursive_and_ordered_objects_are_read_in_every_protocol(protocol):
    shared = [1, 2.5, "a"]
    ring = [shared, shared]
    ring.append(ring)
    found = unpickled(pickle.dumps({"ring": ring, "d": collections.OrderedDict(x=1), "s": {3}}, protocol))
    assert found["ring"][0] is found["ring"][1]
    assert found["ring"][2] is found["ring"]
    assert (found["ring"][0], found["d"], found["s"]) == (shared, {"x": 1}, {3})
    assert list(saved_tensors(found)) == []


class Owner:
    def __init__(self):
        self.value = 3

    def __reduce__(self):
        return os.mkdir, ("owned",), {"value": 3}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_become_records_and_nothing_is_called(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    found = unpickled(pickle.dumps([Owner(), os.path.join, collections.Counter("a")], protocol))
    assert isinstance(found[0], Object)
    assert (found[0].args, found[0].state) == (("owned",), {"value": 3})
    assert (found[0].kind.name, found[1]) == ("mkdir", Global("posixpath", "join"))
    assert isinstance(found[2], Object)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02K\x01}b.", "sets the state of a int"),  # BUILD on a number
        (b"\x80\x02cos\nmkdir\n}b.", "sets the state of a Global"),  # BUILD on a function
        (b"\x80\x02]K\x01R.", "calls what is no global"),
        (b"\x80\x02K\x01K\x02a.", "has a int where a list belongs"),
        (b"\x80\x02K\x01K\x02.", "does not end with one object"),
        (b"\x80\x04\x82\x01.", "EXT1"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02U\x01aQ.", "refers to something outside"),
    ],
)
def test_what_no_checkpoint_needs_is_refused(data, message):
    with pytest.raises((ValueError, IndexError), match=message):
        unpickled(data)


def test_tensors_lie_where_torch_load_reads_them(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tree = {
        "model": {"w": base, "t": base.t(), "p": torch.nn.Parameter(base[1:3, ::2])},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": base.to(torch.bfloat16)}}},
        "bits": torch.ones(3, dtype=torch.uint16),  # of a type that no storage is named after
        "other": [torch.float16, torch.Size([2]), collections.Counter()],
    }
    for new in (True, False):
        file = tmp_path / f"{new}.pt"
        torch.save(tree, file, _use_new_zipfile_serialization=new)
        with file.open("rb", buffering=0) as opened:
            found = read_saved(opened, file.stat().st_size)
        data = file.read_bytes()
        for way, saved in saved_tensors(found):
            truth = tree
            for key in way:
                truth = truth[key]
            dtype = getattr(torch, saved.dtype)
            raw = torch.frombuffer(
                bytearray(data[saved.storage.begin :][: saved.storage.length]), dtype=dtype
            )
            read = raw.as_strided(saved.shape, saved.strides, saved.offset)
            assert dtype == truth.dtype
            assert torch.equal(read, truth.detach())
        assert {way[0] for way, _ in saved_tensors(found)} == {"model", "optimizer", "bits"}
        assert found["other"][:2] == [Global("torch", "float16"), (2,)]


def test_a_pickle_in_a_stream_is_read_to_its_end_and_no_further():
    stream = io.BytesIO(pickle.dumps([1]) + pickle.dumps("b") + b"rest")
    assert (unpickled(stream), unpickled(stream), stream.read()) == ([1], "b", b"rest")
