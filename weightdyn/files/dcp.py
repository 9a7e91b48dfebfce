"""Folders of torch.distributed.checkpoint: what their metadata says of which bytes lie where.

Every process writes what it holds into files of its own, one piece of a tensor or one object after the other, each
as torch.save writes it; `.metadata` tells of every name where its pieces lie. It is a pickle of dataclasses, and is
read as all pickles are here (`files.pickles`): of the classes that a checkpoint has the fields are taken, and any
other class is refused. So one process reads what a thousand wrote, without a model.

Nothing here opens a file: `weightfiles.dcp_entries` does.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

from weightdyn.files.pickles import Global, Object, unpickled

METADATA = ".metadata"
"""The name of the file that makes a folder a checkpoint."""

MODELS = ("model", "model_state_dict", "state_dict", "module")
"""Keys under which a model's weights are saved."""

_BESIDE = re.compile(r"(?:optim|lr_|sched|train_|trainer|dataloader|rng|scaler|epoch|step)", re.IGNORECASE)

LONGEST = 1 << 26
"""Bytes of a metadata beyond which it is refused: of 250,000 pieces it has 36 MB."""

_READS = 25_000_000  # numbers, strings and marks of it; a piece has 95


class Place(NamedTuple):
    """Bytes of a file of the folder that hold one piece of a tensor, or an object."""

    file: str
    begin: int
    length: int


class Piece(NamedTuple):
    """The box of a tensor that begins at `offset`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


class Pieces(NamedTuple):
    """A tensor: its form, and the pieces that hold weights of it."""

    shape: tuple[int, ...]
    dtype: str  # "" where the metadata does not say
    pieces: tuple[Piece, ...]


class Metadata(NamedTuple):
    """What the metadata of a folder says."""

    tensors: dict[str, Pieces]
    objects: dict[str, Place]
    ways: dict[str, tuple[str | int, ...]]  # of each name: the keys that led to it in what was saved

    def weights(self) -> dict[str, str]:
        """The names of the model's tensors, and what the model calls them.

        They lie under "model" or another of `MODELS`; where there is none, the model's are those of no other part.

        Raises:
            ValueError: they lie under several of them.
        """
        ways = {name: list(map(str, self.ways[name])) for name in self.tensors}
        for way in ways.values():
            del way[: len(way) > 1 and way[0] == "app"]  # the key of torch's tutorial
        under = sorted({way[0] for way in ways.values() if len(way) > 1 and way[0] in MODELS})
        if len(under) > 1:
            raise ValueError(f"it has weights under {' and '.join(under)}: which are the model's is unknown")
        if under:
            return {name: ".".join(way[1:]) for name, way in ways.items() if len(way) > 1 and way[0] in under}
        return {name: ".".join(way) for name, way in ways.items() if not _BESIDE.match(way[0])}


class Slice(io.RawIOBase):
    """Bytes [begin, begin + length) of an open file, as a file."""

    def __init__(self, opened: BinaryIO, begin: int, length: int) -> None:
        self._opened, self._begin, self._length, self._at = opened, begin, length, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The next byte that is read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; one beyond the end has nothing to read."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if at < 0:
            raise ValueError(f"it refers to byte {at}")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as there are, up to the buffer's length."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._at))
        self._opened.seek(self._begin + self._at)
        read = self._opened.readinto(view[:count])  # type: ignore[attr-defined]
        self._at += read or 0
        return read or 0


def read_metadata(data: bytes) -> Metadata:
    """What a `.metadata` says, its numbers checked against each other.

    Args:
        data: its bytes, or those up to `LONGEST` and one more.

    Raises:
        Exception: of any kind, for one that is damaged or has what no checkpoint has; ValueError where pieces lie
            in each other, where one is not in the files, or where a file is not of the folder.
    """
    fields = _fields(unpickled(data, longest=LONGEST, reads=_READS), "Metadata")
    listed = _typed(dict, fields["state_dict_metadata"])
    ways = fields.get("planner_data")
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for index, stored in _typed(dict, fields["storage_data"]).items():
        key = _fields(index, "MetadataIndex")
        offset = key.get("offset")
        places[_typed(str, key["fqn"]), None if offset is None else _numbers(offset)] = _place(stored)
    _check_apart(places)
    tensors: dict[str, Pieces] = {}
    objects: dict[str, Place] = {}
    for name, entry in listed.items():
        if _kind(entry) == "BytesStorageMetadata":
            objects[_typed(str, name)] = _found(places, name, None)
        else:
            tensors[_typed(str, name)] = _tensor(name, _fields(entry, "TensorStorageMetadata"), places)
    if places:
        name, offset = next(iter(places))
        raise ValueError(f"it has a place for {name} at {offset}, of which it says nothing else")
    return Metadata(tensors, objects, {name: _way(name, ways) for name in (*tensors, *objects)})


def _tensor(name: str, fields: dict[str, Any], places: dict[Any, Place]) -> Pieces:
    shape = _numbers(fields["size"])
    pieces = []
    for chunk in _typed(list, fields["chunks"]):
        box = _fields(chunk, "ChunkStorageMetadata")
        offset, sizes = _numbers(box["offsets"]), _numbers(box["sizes"])
        if not len(offset) == len(sizes) == len(shape):
            raise ValueError(
                f"{name} has {len(shape)} dimensions and a piece of {len(sizes)} at {len(offset)}"
            )
        if 0 in sizes:  # a process that holds no weight of it may have written that
            places.pop((name, offset), None)
        elif any(first + size > whole for first, size, whole in zip(offset, sizes, shape, strict=True)):
            raise ValueError(f"{name} of the shape {shape} has a piece of the shape {sizes} at {offset}")
        else:
            pieces.append(Piece(offset, sizes, _found(places, name, offset)))
    return Pieces(shape, _dtype(fields.get("properties")), tuple(pieces))


def _found(places: dict[Any, Place], name: str, offset: tuple[int, ...] | None) -> Place:
    found = places.pop((name, offset), None)
    if found is None:
        where = "" if offset is None else f" at {offset}"
        raise ValueError(f"it does not say where {name}{where} lies, or names that twice")
    return found


def _place(stored: Any) -> Place:
    fields = _fields(stored, "_StorageInfo")
    if transforms := fields.get("transform_descriptors"):
        raise ValueError(
            f"its files are written through {transforms!r}, which is not read; save without extensions"
        )
    (begin, length), file = _numbers((fields["offset"], fields["length"])), fields["relative_path"]
    return Place(_typed(str, file), begin, length)


def _check_apart(places: dict[Any, Place]) -> None:
    """No two pieces may share bytes: so what is read is never more than what the files hold."""
    reached: dict[str, int] = {}
    for (name, _), place in sorted(places.items(), key=lambda item: item[1]):
        if place.begin < reached.get(place.file, 0):
            raise ValueError(f"{name} lies in {place.file} at {place.begin:,}, within something else")
        reached[place.file] = place.begin + place.length


def _way(name: str, ways: Any) -> tuple[str | int, ...]:
    """The keys that led to a name; a planner that flattens nothing keeps none, and the name is the only one."""
    way = ways.get(name) if type(ways) is dict else None
    if way is None:
        return (name,)
    if type(way) is not tuple or not way or not all(type(key) in (str, int) for key in way):
        raise ValueError(f"the keys that lead to {name} are {way!r}")
    return way


def _dtype(properties: Any) -> str:
    """The first of the tuple that TensorProperties are pickled as."""
    state = properties.state if isinstance(properties, Object) else None
    first = state[0] if type(state) is tuple and state else None
    return first.name if isinstance(first, Global) and first.module == "torch" else ""


def _kind(entry: Any) -> str:
    return entry.kind.name if isinstance(entry, Object) else type(entry).__name__


def _fields(entry: Any, kind: str) -> dict[str, Any]:
    """The fields of a dataclass, which a pickle sets one by one."""
    if _kind(entry) != kind:
        raise ValueError(f"it has a {_kind(entry)} where a {kind} belongs")
    return _typed(dict, entry.state)


def _numbers(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError(f"it has {str(value)[:80]} where sizes belong")
    return value


def _typed(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


# --- trees ------------------------------------------------------------------------------------------------


def nested(
    ways: Mapping[str, tuple[str | int, ...]], values: Mapping[str, Any], lists: bool = True
) -> dict[Any, Any]:
    """What was saved, of its values by name and the keys that lead to them.

    Args:
        ways: of each name the keys.
        values: of each name its value.
        lists: whether a number among the keys is of a list, and not of a dict.

    Raises:
        ValueError: one value lies within another.

    >>> nested({"a.0.b": ("a", 0, "b"), "c": ("c",)}, {"a.0.b": 1, "c": 2})
    {'a': [{'b': 1}], 'c': 2}
    """
    top: dict[Any, Any] = {}
    made = {id(top)}
    for name, value in values.items():
        *before, last = ways[name]
        inner = top
        for key in before:
            inner = inner.setdefault(key, {})
            if not (type(inner) is dict and (id(inner) in made or not inner)):
                raise ValueError(f"{name} lies within something else")
            made.add(id(inner))
        if last in inner:
            raise ValueError(f"{name} is there twice")
        inner[last] = value
    return _with_lists(top, made) if lists else top


def _with_lists(value: Any, made: set[int]) -> Any:
    if id(value) not in made:
        return value
    items = {key: _with_lists(each, made) for key, each in value.items()}
    if items and all(type(key) is int for key in items):
        return [items[key] for key in sorted(items)]
    return items


def by_parameter(flat: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict of its flat form, in which each parameter has the options of its group.

    >>> by_parameter({"state.a.w.step": 3, "param_groups.a.w.lr": 0.1, "param_groups.a.b.lr": 0.1})
    {'state': {'a.w': {'step': 3}}, 'param_groups': [{'lr': 0.1, 'params': ['a.w', 'a.b']}]}
    """
    state: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        part, _, rest = name.partition(".")
        parameter, _, key = rest.rpartition(".")
        if part == "state":
            state.setdefault(parameter, {})[key] = value
        elif part == "param_groups":
            options.setdefault(parameter, {})[key] = value
    groups: dict[str, dict[str, Any]] = {}
    for parameter, own in options.items():
        group = groups.setdefault(repr(sorted(own.items(), key=lambda item: item[0])), {**own, "params": []})
        group["params"].append(parameter)
    return {"state": state, "param_groups": list(groups.values())}
