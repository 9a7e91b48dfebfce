"""What OLMo does to the tensors of its checkpoints: names that are pickles, and shards that know their place.

`olmo/safetensors_util.py` flattens a state dict for safetensors: each name is the URL-safe base64 of a pickle of
the keys that led there and of whether the value is a tensor of the bytes of a pickle. Its older sharded checkpoints
are torch's ShardedTensors, pickled by every rank. Both are read without a call (`files.pickles`).

Source: github.com/allenai/OLMo, olmo/safetensors_util.py and olmo/checkpoint.py.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, NamedTuple

from weightdyn.files.pickles import Global, Object, Saved, unpickled

_LONGEST = 4096  # characters of a name; the longest of OLMo has 150


class Key(NamedTuple):
    """What a name says."""

    way: tuple[str | int, ...]
    pickled: bool  # whether the tensor is the bytes of a pickle


class Sharded(NamedTuple):
    """A tensor of which one process holds some boxes."""

    shape: tuple[int, ...]
    shards: tuple[tuple[tuple[int, ...], Saved], ...]  # where each begins, and what it is


def decoded(name: str) -> Key | None:
    """What a name in one of OLMo's safetensors says; None of a name that is none of its.

    >>> decoded("gASVEgAAAAAAAACMBXN0YXRllIwBd5SGlImGlC4=")
    Key(way=('state', 'w'), pickled=False)
    >>> decoded("layers.0.weight") is None
    True
    """
    if len(name) > _LONGEST or not name.startswith("gA"):  # as a pickle of protocol 2 to 5 begins
        return None
    try:
        data = base64.b64decode(name, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    try:
        found = unpickled(data, longest=_LONGEST, reads=1000)
    except Exception:  # whatever a damaged pickle raises
        return None
    if type(found) is not tuple or len(found) != 2:
        return None
    way, pickled = found
    named = type(way) in (tuple, list) and way and all(type(key) in (str, int) for key in way)
    return Key(tuple(way), pickled) if named and type(pickled) is bool else None


def sharded(value: Any) -> Sharded | None:
    """The shards of a pickled ShardedTensor that one process holds; None of anything else.

    Raises:
        ValueError: it is one, and its shards lie elsewhere than in it.
    """
    if not isinstance(value, Object) or value.kind != Global("torch._tensor", "_rebuild_from_type_v2"):
        return None
    if len(value.args) != 4 or not isinstance(value.args[1], Global) or value.args[1].name != "ShardedTensor":
        return None
    local, metadata = _sequence(value.args[3])[:2]
    shape = _numbers(_fields(metadata)["size"])
    shards = []
    for shard in _sequence(local):
        fields = _fields(shard)
        place, tensor = _fields(fields["metadata"]), fields["tensor"]
        offset, sizes = _numbers(place["shard_offsets"]), _numbers(place["shard_sizes"])
        if not isinstance(tensor, Saved) or tensor.shape != sizes:
            raise ValueError(f"a shard of the shape {sizes} is none, or another")
        ends = zip(offset, sizes, shape, strict=True)
        if any(first + size > whole for first, size, whole in ends):
            raise ValueError(f"a shard of the shape {sizes} at {offset} is beyond its tensor's {shape}")
        if 0 not in sizes:
            shards.append((offset, tensor))
    return Sharded(shape, tuple(shards))


def _fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass; one with slots is pickled as a pair, of nothing and of them."""
    state = record.state if isinstance(record, Object) else None
    if type(state) is tuple and len(state) == 2:
        state = state[1]
    if type(state) is not dict:
        raise ValueError("it has a ShardedTensor that is none")
    return state


def _sequence(value: Any) -> Any:
    if type(value) not in (list, tuple):
        raise ValueError(f"it has a ShardedTensor with a {type(value).__name__}")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in _sequence(value)):
        raise ValueError(f"it has a ShardedTensor of {str(value)[:80]}")
    return tuple(value)
