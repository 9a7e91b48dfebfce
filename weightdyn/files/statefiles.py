"""Checkpoints with their optimizer's state: which files they are, and what stands in them.

Whoever wrote it, such a checkpoint holds the same: weights, what the optimizer keeps of each parameter (its
*slot*), the options of its groups, and what its scheduler has of itself. Here that is read, and nothing of it
interpreted: which weights a slot belongs to, and at which rate the last update was made, is for others to say.

To add a format is one entry in `FORMATS`: a test of the place, and a function that reads it. As everywhere, no code
of a file runs, and tensors stay where they are until they are asked for.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from weightdyn.core.checks import check_path
from weightdyn.files.dcp import METADATA, by_parameter, nested
from weightdyn.files.olmo import decoded, sharded
from weightdyn.files.pickles import LONGEST, Global, Object, Saved, read_saved, unpickled
from weightdyn.files.weightfiles import (
    CheckpointError,
    Part,
    Stored,
    checkpoint_files,
    dcp_entries,
    is_weight,
    joined,
    list_tensors,
    open_regular,
    parse_json,
    read_dcp,
    read_safetensors,
    read_text,
    refused,
    safetensors_metadata,
    stored_tensors,
)


class Slot(NamedTuple):
    """What an optimizer keeps of one parameter.

    Attributes:
        group: index of its group.
        name: the parameter's, where the file has names.
        tensors: its moments by their keys ("exp_avg", "exp_avg_sq", …); none before its first update.
        numbers: what is one number: {"step": 500.0}.
    """

    group: int
    name: str | None
    tensors: dict[str, Stored]
    numbers: dict[str, float]


class SavedState(NamedTuple):
    """A checkpoint with its optimizer's state.

    Attributes:
        place: the file or folder.
        format: its name in `FORMATS`.
        weights: the float tensors of the model by name, tied ones once.
        ordered: whether the weights come in the order in which the model registers them, as pickled state dicts
            keep it and safetensors do not.
        slots: what the optimizer keeps, in the order of its groups.
        groups: the options of each group: lr, betas, eps, weight_decay, …, without the parameters.
        step: updates made, where the file says so of the training.
        optimizer: the optimizer's class, where the file says so ("AdamW", "Adam", or a word of the framework's).
        rates: η of each group in the update that made the checkpoint, where the file says so outright; None of a
            group of which it is not known.
        schedule: what the scheduler kept of itself; None where the file has none.
        facts: what else the format says that tells the rate (`files.statefiles` fills it, `checkpoints.rates`
            reads it): "history", "arguments", "progress", "scaler", "processes" (0 where nothing tells).
    """

    place: Path
    format: str
    weights: dict[str, Stored]
    ordered: bool
    slots: list[Slot]
    groups: list[dict[str, Any]]
    step: int | None = None
    optimizer: str | None = None
    rates: list[float | None] | None = None
    schedule: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = MappingProxyType({})


class Format(NamedTuple):
    """A way to write such checkpoints.

    Attributes:
        fits: whether a place is one, from the place and the names of the files in it (none of a file).
        read: the state; raises a CheckpointError that says what is wrong.
    """

    fits: Callable[[Path, frozenset[str]], bool]
    read: Callable[[Path], SavedState]


def find_format(place: Path) -> str | None:
    """The name of the format of a place, or None: it is no checkpoint with an optimizer's state.

    Of a file only its name and its first bytes are looked at.
    """
    with refused(place):
        names = frozenset(path.name for path in place.iterdir()) if place.is_dir() else frozenset()
        return next((name for name, each in FORMATS.items() if each.fits(place, names)), None)


def read_state(place: Path) -> SavedState:
    """The weights and the optimizer's state of a checkpoint.

    Args:
        place: the file or folder.

    Raises:
        FileNotFoundError: there is nothing.
        CheckpointError: it has no optimizer's state that is known, or it is damaged.
    """
    check_path("place", place)
    if not place.exists():
        raise FileNotFoundError(f"source: there is no file or folder {place}")
    name = find_format(place)
    if name is None:
        raise CheckpointError(
            f"{place} is no checkpoint with an optimizer's state: known are {', '.join(FORMATS)}. Of weights "
            "alone recover_forces makes forces; two files of your own are best saved as one, "
            'torch.save({"model": …, "optimizer": …})'
        )
    return FORMATS[name].read(place)


# --- torch.save -------------------------------------------------------------------------------------------

MODEL_KEYS = ("model", "model_state_dict", "model_state", "state_dict", "module", "net", "network", "weights")
"""Usual keys of a model's state dict in what trainers save, …"""
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "optim_state_dict", "opt")
"""… of the optimizer's, …"""
SCHEDULE_KEYS = (
    "scheduler", "scheduler_state_dict", "lr_scheduler", "lr_scheduler_state_dict", "lr_sched", "sched", "schedule",
)  # fmt: skip
"""… of the scheduler's, …"""
SCALER_KEYS = ("scaler", "scaler_state_dict", "grad_scaler", "amp_scaler")
"""… of the GradScaler's, …"""
STEP_KEYS = ("step", "global_step", "iter_num", "iteration", "iter", "it", "steps", "num_updates")
"""… and of the number of updates."""

_DEEPEST = 8  # containers in each other in what is taken from a pickle as plain values
_MOST = 10_000  # values of such a container


class SavedFile:
    """A file of torch.save, its tree read and its tensors left where they are.

    Attributes:
        file: the file.
        tree: what it holds.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with refused(file), open_regular(file) as opened:
            self.size = os.fstat(opened.fileno()).st_size
            self.tree = read_saved(opened, self.size)

    def weights(self, state: Mapping[Any, Any]) -> dict[str, Stored]:
        """The float tensors of a state dict, in its order, tied ones once."""
        named = [(name, value) for name, value in state.items() if isinstance(name, str)]
        with refused(self.file):
            for name, value in named:
                if isinstance(value, Object):
                    raise TypeError(f"{name} is a {value.kind}, which is not read; save tensors alone")
            kept = stored_tensors(self.file, ((n, v) for n, v in named if isinstance(v, Saved)), self.size)
            return {stored.name: stored for stored in kept if is_weight(stored)}

    def optimizer(self, state: Any, group_from: int = 0) -> tuple[list[Slot], list[dict[str, Any]]]:
        """The slots and groups of an optimizer's state dict, its parameters keyed by number or by name.

        Args:
            state: the state dict, {"state": {…}, "param_groups": […]}.
            group_from: number of its first group.
        """
        with refused(self.file), open_regular(self.file) as opened:
            if not is_optimizer(state):
                raise TypeError("its optimizer's state has no 'state' and 'param_groups', as torch's have")
            groups, keys = [], []
            for index, group in enumerate(state["param_groups"], group_from):
                if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
                    raise TypeError("one of its optimizer's groups has no list of parameters")
                options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
                groups.append(self._plain(opened, options))
                names = group.get("param_names") or group["params"]
                pairs = zip(group["params"], names, strict=True)
                keys += [(index, key, _clean(key if isinstance(key, str) else name)) for key, name in pairs]
            if len({key for _, key, _ in keys}) < len(keys):
                raise ValueError("its optimizer's groups have a parameter twice")
            if strange := [key for key in state["state"] if key not in {key for _, key, _ in keys}]:
                raise ValueError(
                    f"its optimizer has a state of {strange[0]!r}, which is in none of its groups"
                )
            found: list[Slot] = []
            tensors: dict[tuple[int, str], Saved | Stored] = {}
            for index, key, name in keys:
                numbers: dict[str, float] = {}
                kept = dict(_items(state["state"].get(key, {})))
                for what, value in {**kept, **dict(_items(kept.pop(_BNB, {})))}.items():
                    if isinstance(value, Saved | Stored) and value.shape:
                        tensors[len(found), what] = value
                    elif isinstance(value, Object):
                        raise TypeError(
                            f"what its optimizer keeps of a parameter, {what}, is a {value.kind}, which is not "
                            "read; keep moments as plain tensors"
                        )
                    elif isinstance(number := self._plain(opened, value), int | float):
                        numbers[what] = float(number)
                found.append(Slot(index, name, {}, numbers))
            self._place(found, tensors)
        return found, groups

    def _place(self, slots: list[Slot], tensors: Mapping[tuple[int, str], Any]) -> None:
        """Give the slots their tensors; several may share one, as quantized moments do their map."""
        names: dict[Any, str] = {}
        for (index, what), saved in tensors.items():
            names.setdefault(_lies(saved), f"{index}.{what}")
        unique = {names[_lies(saved)]: saved for saved in tensors.values()}
        stored = {each.name: each for each in stored_tensors(self.file, unique.items(), self.size)}
        for (index, what), saved in tensors.items():
            place = stored.get(names[_lies(saved)])
            if place is not None:  # an empty one has none
                slots[index].tensors[what] = place._replace(name=what)

    def plain(self, value: Any) -> Any:
        """Numbers, strings, lists and dicts of these, as a pickle holds them; a tensor of one number is that."""
        with refused(self.file), open_regular(self.file) as opened:
            return self._plain(opened, value)

    def _plain(self, opened: BinaryIO, value: Any, depth: int = 0) -> Any:
        if depth > _DEEPEST or (isinstance(value, dict | list | tuple) and len(value) > _MOST):
            raise ValueError("its options are nested too deeply, or are too many")
        if isinstance(value, Stored):  # which is a tuple, as Saved is
            return _only_number(value)
        if isinstance(value, Saved):
            return self._number(opened, value) if math.prod(value.shape) == 1 else None
        if isinstance(value, dict):
            items = value.items()
            return {k: self._plain(opened, v, depth + 1) for k, v in items if isinstance(k, str | int)}
        if isinstance(value, list | tuple):
            return [self._plain(opened, each, depth + 1) for each in value]
        if isinstance(value, Object):
            return _of_object(value, lambda each: self._plain(opened, each, depth + 1))
        if isinstance(value, int) and abs(value) >= 1 << 63:  # whose powers would take for ever
            return None
        return value if isinstance(value, str | int | float | bool) else None

    def _number(self, opened: BinaryIO, saved: Saved) -> float | None:
        """A tensor of one number."""
        form = _FORMS.get(saved.dtype)
        begin = saved.storage.begin
        if form is None or begin is None:
            return None
        if (saved.offset + 1) * saved.itemsize > saved.storage.length:
            raise ValueError("a number of its optimizer's state lies beyond its storage")
        opened.seek(begin + saved.offset * saved.itemsize)
        data = opened.read(saved.itemsize)
        if saved.dtype == "bfloat16":
            data = b"\0\0" + data
        return struct.unpack(f"<{form}", data)[0]


class StoredTree(SavedFile):
    """What a trainer saved in a form whose tensors are found by name: a tree with `Stored` leaves.

    Attributes:
        file: the file that errors name.
        tree: what it holds.
        regrouped: whether the optimizer's groups were made of the options of its parameters, in any order.
    """

    def __init__(self, file: Path, tree: Any, *, regrouped: bool = False) -> None:
        self.file, self.tree, self.regrouped = file, tree, regrouped

    def weights(self, state: Mapping[Any, Any]) -> dict[str, Stored]:
        """The float tensors of a state dict, in its order."""
        named = [(name, each._replace(name=name)) for name, each in state.items() if isinstance(each, Stored)]
        with refused(self.file):
            return {name: each for name, each in named if is_weight(each)}

    def _place(self, slots: list[Slot], tensors: Mapping[tuple[int, str], Any]) -> None:
        for (index, what), stored in tensors.items():
            if math.prod(stored.shape):
                slots[index].tensors[what] = stored._replace(name=what)


def _only_number(stored: Stored) -> float | None:
    """A tensor of one number."""
    if math.prod(stored.shape) != 1 or stored.dtype not in _FORMS:
        return None
    return (stored if stored.shape else stored._replace(shape=(1,), strides=(1,))).read().item()


def _clean(name: Any) -> str | None:
    """A parameter's name without what FSDP puts into it; None of one that is known by its number."""
    return name.replace("_fsdp_wrapped_module.", "") if isinstance(name, str) else None


_BNB = "__bnb_optimizer_quant_state__"  # where bitsandbytes wraps what FSDP may not touch
_FORMS = {
    "float64": "d", "float32": "f", "float16": "e", "bfloat16": "f", "int64": "q", "int32": "i", "int16": "h",
    "int8": "b", "uint8": "B", "bool": "?",
}  # fmt: skip
_NUMPY = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}


def _lies(saved: Saved) -> tuple[Any, ...]:
    """Where a tensor lies: the same of two that share it."""
    return saved.storage.key, saved.offset, saved.shape, saved.strides


def _items(kept: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(kept, Mapping):
        raise TypeError(f"its optimizer keeps a {type(kept).__name__} of a parameter")
    for what, value in kept.items():
        if isinstance(what, str):
            yield what, value


def _of_object(value: Object, plain: Callable[[Any], Any]) -> Any:
    """What can be made of a record of a call without making it: NumPy's numbers, members of enums, counters."""
    module, name = value.kind
    if name == "scalar" and module.split(".")[0] == "numpy" and len(value.args) == 2:
        kind, data = value.args
        code = kind.args[0] if isinstance(kind, Object) and kind.args else None
        form = _NUMPY.get(code) if isinstance(code, str) else None
        if form and isinstance(data, bytes) and len(data) == struct.calcsize(f"<{form}"):
            return struct.unpack(f"<{form}", data)[0]
        return None
    if value.kind == Global("collections", "Counter") and len(value.args) == 1:
        return plain(value.args[0])
    if len(value.args) == 1 and isinstance(value.args[0], str) and value.state is None:  # an enum's value
        return value.args[0]
    return None


def is_optimizer(tree: Any) -> bool:
    """Whether something is the state dict of a torch optimizer."""
    return (
        isinstance(tree, Mapping)
        and isinstance(tree.get("state"), Mapping)
        and isinstance(tree.get("param_groups"), list)
    )


def _under(tree: Mapping[Any, Any], keys: Iterable[str], fits: Callable[[Any], bool]) -> Any:
    """What a tree has under one of the usual keys; None if it has none that fits."""
    return next((tree[key] for key in keys if key in tree and fits(tree[key])), None)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_model(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Saved | Stored) for each in value.values())


def _step(
    tree: Mapping[Any, Any], plain: Callable[[Any], Any], keys: Iterable[str] = STEP_KEYS
) -> int | None:
    """The number of updates that a tree names."""
    for key in keys:
        value = plain(tree.get(key))
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 53:
            return int(value) if value == int(value) else None
    return None


# --- formats ----------------------------------------------------------------------------------------------


def _read_trainer(place: Path) -> SavedState:
    """transformers' Trainer: optimizer.pt, scheduler.pt, trainer_state.json, training_args.bin, and the model's."""
    slots, groups = _optimizer_beside(place, "optimizer.pt")
    weights, ordered = _weights_beside(place)
    facts: dict[str, Any] = {}
    step = None
    if (place / "trainer_state.json").exists():
        history = place / "trainer_state.json"
        with refused(history):
            content = parse_json(read_text(history), history)
        step = _step(content, lambda value: value, ("global_step",))
        facts["history"] = content
    optimizer = None
    if (place / "training_args.bin").exists():
        arguments = SavedFile(place / "training_args.bin")
        if isinstance(arguments.tree, Object) and isinstance(arguments.tree.state, dict):
            facts["arguments"] = _arguments(arguments)
            optimizer = facts["arguments"].get("optim")
    schedule = _schedule_of(place / "scheduler.pt")
    return SavedState(
        place, "transformers", weights, ordered, slots, groups, step, optimizer, None, schedule, facts
    )


_ARGUMENTS = (
    "optim", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio",
)  # fmt: skip


def _arguments(saved: SavedFile) -> dict[str, Any]:
    """What of the TrainingArguments tells optimizer and schedule."""
    state = saved.tree.state
    return {name: saved.plain(state[name]) for name in _ARGUMENTS if name in state}


def _schedule_of(file: Path) -> Mapping[str, Any] | None:
    """What a file has of a scheduler; None if there is no such file."""
    if not file.exists():
        return None
    saved = SavedFile(file)
    found = saved.plain(saved.tree)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{file} holds no scheduler's state: copy it again")
    return found


def _optimizer_beside(place: Path, name: str) -> tuple[list[Slot], list[dict[str, Any]]]:
    """The optimizer's state of a folder: a file, or of FSDP's sharded states a folder of its own."""
    shards = place / _SHARDED_OPTIMIZER / METADATA
    if not (place / name).exists() and shards.exists():
        saved = _read_shards(shards)
        return saved.optimizer(_under(saved.tree, OPTIMIZER_KEYS, is_optimizer))
    saved = SavedFile(place / name)
    return saved.optimizer(saved.tree)


_SHARDED_OPTIMIZER = "optimizer_0"


def _weights_beside(place: Path) -> tuple[dict[str, Stored], bool]:
    """The weights of a folder, and whether they come in the model's order."""
    files = checkpoint_files(place)
    ordered = not any(file.suffix == ".safetensors" or file.name == METADATA for file in files)
    return list_tensors(files, as_filed=ordered), ordered


def _read_accelerate(place: Path) -> SavedState:
    """Accelerate's save_state: optimizer.bin, scheduler.bin and the model's; of one model and one optimizer."""
    names = [path.name for path in place.iterdir()]
    if more := sorted(
        name
        for name in names
        if re.fullmatch(r"(model|pytorch_model|pytorch_model_fsdp|optimizer|scheduler)_1(\..*)?", name)
    ):
        raise CheckpointError(
            f"{place} holds several models or optimizers ({more[0]}), and which belong together stands nowhere: "
            "save each with torch.save({'model': …, 'optimizer': …})"
        )
    slots, groups = _optimizer_beside(place, "optimizer.bin")
    weights, ordered = _weights_beside(place)
    facts: dict[str, Any] = {
        "processes": sum(bool(re.fullmatch(r"random_states_\d+\.pkl", n)) for n in names)
    }
    if (place / "scaler.pt").exists():
        scaler = SavedFile(place / "scaler.pt")
        facts["scaler"] = scaler.plain(scaler.tree)
    schedule = _schedule_of(place / "scheduler.bin")
    return SavedState(place, "accelerate", weights, ordered, slots, groups, None, None, None, schedule, facts)


def _read_snapshot(place: Path) -> SavedState:
    """ForceLogger's snapshots: what acted on each tensor stands in the metadata, so each is a group of its own."""
    with refused(place):
        metadata = safetensors_metadata(place)
        told = parse_json(metadata["tensors"], place)
        step = int(metadata["step"])
        tensors = list_tensors([place])
        slots, groups, rates = [], [], []
        for name, facts in told.items():
            if name not in tensors:
                continue  # a tensor of no weights
            lr, decay = facts["lr"], facts["weight_decay"]
            moments = {key: tensors.pop(f"{name}.{key}") for key in MOMENTS if f"{name}.{key}" in tensors}
            groups.append(
                {
                    "lr": lr,
                    "betas": facts["betas"],
                    "eps": facts["eps"],
                    "weight_decay": decay,
                    "amsgrad": MOMENTS[2] in moments,
                    "decoupled_weight_decay": True,  # what is told is what acted
                }
            )
            rates.append(lr)
            slots.append(Slot(len(slots), name, moments, {"step": float(facts["step"])}))
        weights = {name: stored for name, stored in tensors.items() if name in told}
    return SavedState(place, "snapshot", weights, False, slots, groups, step, "AdamW", rates)


MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""Adam's keys of m, v, and with amsgrad the maximum of v that the update divides by."""


def _read_saved(place: Path) -> SavedState:
    """What torch.save wrote: our trainer's resume.pt, Lightning's .ckpt, or a trainer's own dict."""
    saved = SavedFile(place)
    tree = saved.tree
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{place} holds a {type(tree).__name__}, not a dict of model and optimizer")
    if is_optimizer(tree):
        return _read_pair(place, saved)
    if "pytorch-lightning_version" in tree:
        return _of_lightning(saved)
    return _of_trainer(saved)


def _of_trainer(saved: SavedFile) -> SavedState:
    """A trainer's own dict, with model, optimizer and what else under usual keys."""
    place, tree = saved.file, saved.tree
    model, optimizer = _under(tree, MODEL_KEYS, _is_model), _under(tree, OPTIMIZER_KEYS, is_optimizer)
    if optimizer is None:
        raise CheckpointError(
            f"{place} holds no optimizer's state under one of the usual keys ({', '.join(OPTIMIZER_KEYS)}); it has "
            f"{[key for key in tree if isinstance(key, str)][:8]}"
        )
    if model is None:
        raise CheckpointError(
            f"{place} holds no model's state dict under one of the usual keys ({', '.join(MODEL_KEYS)}); it has "
            f"{[key for key in tree if isinstance(key, str)][:8]}"
        )
    slots, groups = saved.optimizer(optimizer)
    step = _step(tree, saved.plain)
    facts, schedule, rates = {}, saved.plain(_under(tree, SCHEDULE_KEYS, _is_mapping)), None
    if (scaler := saved.plain(_under(tree, SCALER_KEYS, _is_mapping))) is not None:
        facts["scaler"] = scaler
    kind = "torch.save"
    ours = place.name == "resume.pt" and set(tree) == {"step", "model", "optimizer", "rng"}
    if ours and not any("initial_lr" in group for group in groups):  # whose loop sets η before the update
        kind, rates = "weightdyn", [group.get("lr") for group in groups]
    return SavedState(
        place, kind, saved.weights(model), True, slots, groups, step, None, rates, schedule, facts
    )


def _of_lightning(saved: SavedFile) -> SavedState:
    """Lightning's: one or several optimizers of one module, of which the first's scheduler is read."""
    tree = saved.tree
    states, model = tree.get("optimizer_states"), tree.get("state_dict")
    if not isinstance(states, list) or not states or not isinstance(model, Mapping):
        raise CheckpointError(
            f"{saved.file} holds no optimizer's state: it was saved with save_weights_only=True"
        )
    if len(states) > 1:
        raise CheckpointError(
            f"{saved.file} holds {len(states)} optimizers, and which scheduler belongs to which stands nowhere; "
            "one is read. ForceLogger logs several while they train"
        )
    slots, groups = saved.optimizer(states[0])
    schedulers = tree.get("lr_schedulers") or []
    if not isinstance(schedulers, list) or len(schedulers) > 1:
        raise CheckpointError(f"{saved.file} holds several schedulers of one optimizer; one is read")
    schedule = saved.plain(schedulers[0]) if schedulers else None
    facts: dict[str, Any] = {}
    loops = tree.get("loops")
    if isinstance(loops, Mapping) and isinstance(loops.get("fit_loop"), Mapping):
        facts["progress"] = saved.plain(loops["fit_loop"])
    for key, value in tree.items():
        if isinstance(key, str) and "MixedPrecision" in key and isinstance(value, Mapping):
            facts["scaler"] = saved.plain(value)
    step = _step(tree, saved.plain, ("global_step",))
    weights = saved.weights(model)
    return SavedState(
        saved.file, "lightning", weights, True, slots, groups, step, None, None, schedule, facts
    )


# --- shards -----------------------------------------------------------------------------------------------


def _read_shards(file: Path) -> StoredTree:
    """What torch.distributed.checkpoint saved, but for what has nothing to do with weights and their updates."""
    metadata = read_dcp(file)
    heads = {*MODEL_KEYS, *OPTIMIZER_KEYS, *SCHEDULE_KEYS, *SCALER_KEYS, *STEP_KEYS, "train_state"}
    with refused(file):
        weights = metadata.weights()
        ways = {name: way[way[0] == "app" and len(way) > 1 :] for name, way in metadata.ways.items()}
        wanted = [name for name, way in ways.items() if way[0] in heads or name in weights]
    found = dcp_entries(file, metadata, wanted)
    with refused(file):
        tree, regrouped = nested(ways, found), False
        for key in OPTIMIZER_KEYS:
            if not isinstance(own := tree.get(key), dict):
                continue
            if isinstance(own.get("param_groups"), list):
                own.setdefault("state", {})  # of no update yet
            if is_optimizer(own):
                own["state"] = {_number_of(name): kept for name, kept in own["state"].items()}
            else:
                tree[key], regrouped = by_parameter(own), True
    if not any(
        _is_model(tree.get(key)) for key in MODEL_KEYS
    ):  # torchtitan saves the weights beside the rest
        tree["model"] = {weights[name]: found[name] for name in found if name in weights}
    return StoredTree(file, tree, regrouped=regrouped)


def _number_of(name: str) -> str | int:
    """A key of an optimizer's state, of which numbers were made strings."""
    return int(name) if name.isdecimal() and len(name) < 10 else name


def _read_dcp(place: Path) -> SavedState:
    """A folder of torch.distributed.checkpoint."""
    saved = _read_shards(place / METADATA)
    state = _of_trainer(saved)
    step, schedule = state.step, state.schedule
    if step is None and isinstance(train := saved.tree.get("train_state"), Mapping):  # torchtitan's
        step = _step(train, saved.plain)
    if schedule is not None and saved.regrouped:
        schedule = _for_any_group(schedule, len(state.groups))
    return state._replace(place=place, format="dcp", ordered=False, step=step, schedule=schedule)


def _for_any_group(schedule: Any, count: int) -> Any:
    """A scheduler's state for groups of another number and order, in what is the same for all of them."""
    if isinstance(schedule, list):
        return [_for_any_group(each, count) for each in schedule]
    if not isinstance(schedule, Mapping):
        return schedule
    found = {key: _for_any_group(value, count) for key, value in schedule.items()}
    for key in ("_last_lr", "base_lrs"):
        if isinstance(own := found.get(key), list) and own:
            found[key] = [own[0]] * count if own.count(own[0]) == len(own) else None
    return found


def _read_olmo(place: Path) -> SavedState:
    """OLMo's and OLMo-core's, whose trainers set η before an update and leave it until the next."""
    weights, (slots, groups), trainer = _olmo_parts(place)
    ordered = (place / "model.pt").exists()
    for slot in slots:
        # SkipStepAdamW of OLMo-core takes t + 1 of the t that it keeps, and until June 2025 did not count it up.
        if slot.numbers.get("step") == 0 and slot.tensors:
            slot.numbers["step"] = 1.0
    rates = [group.get("lr") for group in groups]
    step = _step(trainer, lambda value: value)
    return SavedState(place, "olmo", weights, ordered, slots, groups, step, _olmo_optimizer(place), rates)


def _olmo_parts(place: Path) -> tuple[dict[str, Stored], tuple[list[Slot], list[dict[str, Any]]], Any]:
    """Weights, optimizer, and what the trainer kept of itself, whichever way a folder was written."""
    if (place / "model" / "rank0.pt").exists() or (place / "optim").is_dir():
        raise CheckpointError(
            f"{place} is a local sharded checkpoint of OLMo, of flat pieces that no tensor can be read from alone; "
            "make it whole with OLMo's scripts/unshard.py"
        )
    if (place / "rank0.pt").exists():
        model = optim = _joined_ranks(place)
        trainer = {key: model.plain(model.tree.get(key)) for key in STEP_KEYS}
    elif (place / "model_and_optim").exists():
        model = optim = _read_shards(place / "model_and_optim" / METADATA)
        trainer = _olmo_trainer(place / "train" / "rank0.pt")
    else:
        model, optim = (_olmo_part(place, name) for name in ("model", "optim"))
        trainer = _olmo_trainer(place / "train.pt")
    weights, state = model.tree, optim.tree
    if model is optim and isinstance(weights, Mapping):
        weights, state = weights.get("model"), weights.get("optim")
    if not isinstance(weights, Mapping) or not _is_model(weights) or not is_optimizer(state):
        raise CheckpointError(f"{place} holds no weights and no optimizer's state as OLMo saves them")
    return model.weights(weights), optim.optimizer(state), trainer


def _olmo_trainer(file: Path) -> Mapping[str, Any]:
    """The numbers that OLMo's trainer kept of itself; none where it was left behind."""
    if not file.exists():
        return {}
    saved = SavedFile(file)
    if not isinstance(saved.tree, Mapping):
        raise CheckpointError(f"{file} holds no state of OLMo's trainer: copy it again")
    return {key: saved.plain(saved.tree.get(key)) for key in STEP_KEYS}


def _olmo_part(place: Path, name: str) -> SavedFile:
    """model or optim: safetensors whose names are pickles, or what torch.save wrote."""
    file = place / f"{name}.safetensors"
    if not file.exists():
        return SavedFile(place / f"{name}.pt")
    ways, values = {}, {}
    tensors, _ = read_safetensors(file)
    with refused(file):
        for stored in tensors:
            if (key := decoded(stored.name)) is None:
                raise ValueError(f"{stored.name[:80]} is no name as OLMo writes them")
            if stored.dtype == "other" or (key.pickled and stored.dtype != "uint8"):
                raise ValueError(f"{key.way} is of a type that torch does not have, or no bytes of a pickle")
            ways[stored.name] = key.way
            values[stored.name] = _pickled(stored) if key.pickled else stored
        return StoredTree(file, nested(ways, values, lists=False))


def _pickled(stored: Stored) -> Any:
    """What a tensor of the bytes of a pickle holds."""
    if (size := math.prod(stored.shape)) > LONGEST:
        raise ValueError(f"it has a pickle of {size:,} bytes")
    return unpickled(stored.read().numpy().tobytes())


def _joined_ranks(place: Path) -> StoredTree:
    """What each process pickled of its ShardedTensors, as one."""
    ranks = [SavedFile(place / "rank0.pt")]
    count = ranks[0].plain(ranks[0].tree.get("world_size")) if isinstance(ranks[0].tree, Mapping) else None
    found = sum(bool(re.fullmatch(r"rank[0-9]+\.pt", path.name)) for path in place.iterdir())
    if count != found:
        raise CheckpointError(
            f"{place} holds rank….pt of {found} of {count} processes: copy the others there"
        )
    ranks += [SavedFile(place / f"rank{i}.pt") for i in range(1, found)]
    parts: dict[tuple[str | int, ...], list[Part]] = {}
    for rank in ranks:
        with refused(rank.file):
            own = [(way, shards) for way, leaf in _leaves(rank.tree) if (shards := sharded(leaf))]
            boxes = [(way, each.shape, *shard) for way, each in own for shard in each.shards]
            named = ((str(i), box[-1]) for i, box in enumerate(boxes))
            for stored in stored_tensors(rank.file, named, rank.size):
                way, shape, offset, _ = boxes[int(stored.name)]
                parts.setdefault(way, []).append(Part(".".join(map(str, way)), shape, offset, stored))
    first = ranks[0]
    with refused(first.file):
        leaves = list(_leaves(first.tree))
        named = ((str(i), leaf) for i, (_, leaf) in enumerate(leaves) if isinstance(leaf, Saved))
        whole = {stored.name: stored for stored in stored_tensors(first.file, named, first.size)}
        ways = {str(i): way for i, (way, _) in enumerate(leaves)}
        values = {
            name: joined(".".join(map(str, way)), parts[way]) if way in parts else whole.get(name, leaf)
            for (name, way), (_, leaf) in zip(ways.items(), leaves, strict=True)
        }
        return StoredTree(first.file, nested(ways, values))


def _leaves(tree: Any, way: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """What lies in dicts and in lists of dicts, and the keys that lead to it."""
    if isinstance(tree, dict) and tree:
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(each, dict) for each in tree):
        items = enumerate(tree)
    else:
        yield way, tree
        return
    for key, each in items:
        yield from _leaves(each, (*way, key))


def _olmo_optimizer(place: Path) -> str | None:
    """The optimizer's class, of OLMo's config.yaml or OLMo-core's config.json."""
    file = place / "config.yaml"
    if file.exists():
        with refused(file):
            section = re.search(r"^optimizer:\n((?:[ ]+.*\n?)*)", read_text(file), re.MULTILINE)
        told = dict(re.findall(r"^ +(\w+): *(\S+) *$", section[1], re.MULTILINE)) if section else {}
        if told.get("selective_updates") == "true":
            raise CheckpointError(
                f"{file} says selective_updates: an update leaves weights without a gradient alone, which no "
                "moments tell; no forces are made of it"
            )
        return {"adamw": "AdamW", "lionw": "LionW"}.get(told.get("name", "adamw"), told.get("name"))
    file = place / "config.json"
    if not file.exists():
        return None
    content = parse_json(read_text(file), file)
    within = content.get("train_module")
    optim = within.get("optim") if isinstance(within, Mapping) else content.get("optim")
    kind = optim.get("_CLASS_") if isinstance(optim, Mapping) else None
    name = kind.rpartition(".")[2].removesuffix("Config") if isinstance(kind, str) else None
    return "AdamW" if name == "SkipStepAdamW" else name  # but for updates that it skips


def _read_pair(place: Path, saved: SavedFile) -> SavedState:
    """An optimizer's state in a file of its own, its model in another beside it."""
    slots, groups = saved.optimizer(saved.tree)
    files = checkpoint_files(place.parent)
    numbers = [_numbers_in(file.name) for file in (place, files[0])]
    if len(files) == 1 and all(numbers) and numbers[0] != numbers[1]:
        raise CheckpointError(
            f"{place} has no weights of its number beside it, but {files[0].name}: put the two files of one "
            "checkpoint into a folder"
        )
    weights, ordered = _weights_beside(place.parent)
    return SavedState(place, "torch.save", weights, ordered, slots, groups)


def _numbers_in(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _read_pair_folder(place: Path) -> SavedState:
    return _read_saved(_optimizers_in(place)[0])


def _optimizers_in(place: Path, names: Sequence[str] = ()) -> list[Path]:
    names = names or [path.name for path in place.iterdir()]
    found = (name for name in names if name.endswith(_PICKLED) and re.search("opt", name, re.IGNORECASE))
    return [place / name for name in sorted(found)]


_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def _begins_as_saved(place: Path) -> bool:
    """Whether a file begins as those of torch.save do."""
    if not place.is_file() or not place.name.endswith(_PICKLED):
        return False
    with open_regular(place) as opened:
        return opened.read(2) in (b"PK", b"\x80\x02")


def _is_snapshot(place: Path) -> bool:
    if not place.is_file() or place.suffix != ".safetensors":
        return False
    told = safetensors_metadata(place)
    if "boxes" in told and "tensors" not in told:
        raise CheckpointError(f"{place} is part of a snapshot: name the step-….safetensors beside it")
    return {"tensors", "step"} <= set(told)


_OLMO = [
    {"model_and_optim", "train"}, {"rank0.pt", "config.yaml"}, {"model", "optim", "train", "config.yaml"},
    {"model.pt", "optim.pt", "train.pt"}, {"model.pt", "optim.pt", "config.yaml"},
    {"model.safetensors", "optim.safetensors"},
]  # fmt: skip

FORMATS: dict[str, Format] = {
    "transformers": Format(
        lambda place, names: (
            "trainer_state.json" in names and bool({"optimizer.pt", _SHARDED_OPTIMIZER} & names)
        ),
        _read_trainer,
    ),
    "accelerate": Format(
        lambda place, names: bool({"optimizer.bin", _SHARDED_OPTIMIZER} & names), _read_accelerate
    ),
    "olmo": Format(lambda place, names: any(files <= names for files in _OLMO), _read_olmo),
    "dcp": Format(lambda place, names: METADATA in names, _read_dcp),
    "snapshot": Format(lambda place, names: not names and _is_snapshot(place), _read_snapshot),
    "torch.save": Format(lambda place, names: not names and _begins_as_saved(place), _read_saved),
    "two files": Format(
        lambda place, names: len(_optimizers_in(place, sorted(names) or [""])) == 1, _read_pair_folder
    ),
}
"""The formats that are known, those first that are surer."""
