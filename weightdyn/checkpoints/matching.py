"""Which weights the state of an optimizer belongs to.

torch's optimizers number their parameters in the order of their groups, and a checkpoint has names for the weights
alone. A state has the shape of its weights, but all layers have a q and a k of one shape, and a pair that is
swapped makes wrong forces that nothing shows. So a match counts only where it is the only one: by names where the
file has them, else by the order in which the model registers its parameters, each group taking its own in that
order. That order stands in a state dict that was pickled, and not in safetensors, which sort by name; there the
model has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from weightdyn.core.checks import refuse
from weightdyn.core.naming import bare_names
from weightdyn.files.statefiles import SavedState, Slot
from weightdyn.files.weightfiles import CheckpointError, Stored

_WAYS = 2000  # partial matches that are followed at a time; a model with that many has no certain one
_SIZE = 1 << 12  # parameters or modules that a config may make beyond those of the file


def match_slots(
    state: SavedState, names: Sequence[str] | None = None, model: nn.Module | None = None, config: Any = None
) -> list[tuple[Slot, str]]:
    """The slots that have a state, each with the name of its weights.

    Args:
        state: the checkpoint.
        names: the parameters' names in the order of the optimizer's groups, where the user knows them.
        model: the model, whose order of parameters counts.
        config: the config of a transformers model, which makes one where transformers is installed.

    Raises:
        ValueError: `names` or `model` do not fit the checkpoint.
        CheckpointError: no match is certain; the message says what would make one so.
    """
    slots = [slot for slot in state.slots if not _is_number(slot)]
    if names is not None:
        given = _names_given(state, names)
        return _checked(
            state, [pair for pair in zip(state.slots, given, strict=True) if pair[0].tensors], "names"
        )
    if model is None and all(slot.name is not None for slot in slots):
        return _checked(state, _by_name(state, slots), "source")
    if model is not None:
        order = _order_of(state, model)
    elif state.ordered:
        order = list(state.weights)
    else:
        order = _order_of_config(state, config)
    if order is not None:
        matched = _in_order(state, slots, order)
    else:
        matched = _by_shape(state, slots)
    return [(slot, name) for slot, name in zip(slots, matched, strict=True) if slot.tensors]


def _is_number(slot: Slot) -> bool:
    """Whether it is of a parameter that is one number, which tables do not have."""
    return not slot.tensors and "exp_avg" in slot.numbers


def _shape(slot: Slot) -> tuple[int, ...] | None:
    """The shape of its weights; None before the first update."""
    return next((slot.tensors[key].shape for key in ("exp_avg", "state1") if key in slot.tensors), None)


def _remedy(what: str = "") -> str:
    return (
        f"{what}pass model= (the model, whose order of parameters tells), or names= (the names of the parameters "
        "in the order of the optimizer's groups)"
    )


def _names_given(state: SavedState, names: Any) -> list[str]:
    if (
        isinstance(names, str | bytes)
        or not isinstance(names, Sequence)
        or not all(isinstance(n, str) for n in names)
    ):
        raise refuse(
            "names", "the names of the parameters in the order of the optimizer's groups, or None", names
        )
    if len(names) != len(state.slots):
        raise ValueError(
            f"names has {len(names)} names, and the optimizer of {state.place} {len(state.slots)} parameters"
        )
    return list(names)


def _checked(state: SavedState, pairs: Sequence[tuple[Slot, str]], argument: str) -> list[tuple[Slot, str]]:
    """The pairs, each name as the file has it; raises where one is not there or of another shape."""
    known = _known_as(state.weights)
    bare = dict(zip((name for _, name in pairs), bare_names([name for _, name in pairs]), strict=True))
    found: list[tuple[Slot, str]] = []
    for slot, name in pairs:
        own = name if name in state.weights else known.get(bare[name])
        if own is None:
            raise ValueError(f"{argument}: {state.place} has no weights {name!r}; it has {list(known)[:5]} …")
        if (shape := _shape(slot)) is not None and shape != state.weights[own].shape:
            raise ValueError(
                f"{argument}: in {state.place} {name} has the shape {state.weights[own].shape}, and its "
                f"optimizer's state {shape}"
            )
        found.append((slot, own))
    if len({own for _, own in found}) < len(found):
        raise ValueError(f"{argument}: a name is there twice in the optimizer of {state.place}")
    return found


def _known_as(weights: Mapping[str, Stored]) -> dict[str, str]:
    """Names without wrappers -> as the file has them."""
    return dict(zip(bare_names(list(weights)), weights, strict=True))


def _by_name(state: SavedState, slots: Sequence[Slot]) -> list[tuple[Slot, str]]:
    return [(slot, slot.name) for slot in slots if slot.tensors and slot.name is not None]


# --- by order ---------------------------------------------------------------------------------------------


def _in_order(state: SavedState, slots: Sequence[Slot], order: Sequence[str]) -> list[str]:
    """The weights of each slot, if one way alone takes them from the model's order, each group's in that order.

    Weights that no group has (frozen ones, buffers) are passed over, as many as there are more weights than slots.
    """
    groups: dict[int, list[int]] = {}
    for i, slot in enumerate(slots):
        groups.setdefault(slot.group, []).append(i)
    columns = list(groups.values())
    shapes = [[_shape(slots[i]) for i in column] for column in columns]
    spare = len(order) - len(slots)
    if spare < 0:
        raise CheckpointError(
            f"{state.place}: the optimizer has {len(slots)} parameters, and there are {len(order)} tensors of "
            f"weights; is it another model's? {_remedy('If not, ')}"
        )
    # After each of the weights: how many each group has taken -> in how many ways, and the last choice.
    levels: list[dict[tuple[int, ...], tuple[int, int]]] = [{(0,) * len(columns): (1, -1)}]
    for place, name in enumerate(order):
        shape, here = state.weights[name].shape, {}
        for taken, (ways, _) in levels[-1].items():
            for column, own in enumerate(shapes):
                if taken[column] < len(own) and own[taken[column]] in (shape, None):
                    after = (*taken[:column], taken[column] + 1, *taken[column + 1 :])
                    _add(here, after, ways, column)
            if place - sum(taken) < spare:
                _add(here, taken, ways, -1)
        if len(here) > _WAYS:
            raise _uncertain(state, "its groups could take their parameters from the model in too many ways")
        levels.append(here)
    whole = tuple(len(own) for own in shapes)
    ways = levels[-1].get(whole, (0, -1))[0]
    if ways == 0:
        raise CheckpointError(
            f"{state.place}: the shapes of the optimizer's state do not follow from those of the weights, in the "
            f"order of the model, by any split into its groups; {_remedy()}"
        )
    if ways > 1:
        raise _uncertain(state, "its groups could take their parameters from the model in several ways")
    matched = [""] * len(slots)
    taken = whole
    for name, level in zip(reversed(order), reversed(levels), strict=False):
        column = level[taken][1]
        if column >= 0:
            taken = (*taken[:column], taken[column] - 1, *taken[column + 1 :])
            matched[columns[column][taken[column]]] = name
    return matched


def _add(
    level: dict[tuple[int, ...], tuple[int, int]], taken: tuple[int, ...], ways: int, choice: int
) -> None:
    known = level.get(taken, (0, -1))[0]
    level[taken] = min(known + ways, 2), choice


def _by_shape(state: SavedState, slots: Sequence[Slot]) -> list[str]:
    """The same without an order: certain where no two weights have one shape."""
    named: dict[tuple[int, ...], list[str]] = {}
    for name, stored in state.weights.items():
        named.setdefault(stored.shape, []).append(name)
    shapes = [_shape(slot) for slot in slots]
    if any(shape is None or len(named.get(shape, ())) != 1 for shape in shapes) or len(set(shapes)) < len(
        shapes
    ):
        raise _uncertain(
            state,
            "its weights are in no order of the model (safetensors sort them), and several tensors have one shape",
        )
    return [named[shape][0] for shape in shapes if shape is not None]


def _uncertain(state: SavedState, why: str) -> CheckpointError:
    return CheckpointError(
        f"{state.place}: which weights each state of the optimizer belongs to is not certain: {why}. To make it "
        f"so, {_remedy()}"
    )


# --- the model's order ------------------------------------------------------------------------------------


def _order_of(state: SavedState, model: Any) -> list[str]:
    """The file's names of a model's parameters, in the model's order."""
    if not isinstance(model, nn.Module):
        raise refuse("model", "a torch.nn.Module, or None", model)
    parameters = [(name, p) for name, p in model.named_parameters() if p.ndim and p.numel()]
    if len(trained := [pair for pair in parameters if pair[1].requires_grad]) == len(state.slots):
        parameters = trained
    known = _known_as(state.weights)
    names = bare_names([name for name, _ in parameters])
    shapes = [tuple(parameter.shape) for _, parameter in parameters]
    found = [[known.get(prefix + name, "") for name in names] for prefix in _prefixes(names, known)]
    fitting = [
        order for order in found if all(order) and [state.weights[own].shape for own in order] == shapes
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"model fits several parts of {state.place}, as to {fitting[0][:1]} and {fitting[1][:1]}"
        )
    odd = [
        f"{name} {shape}"
        for name, shape in zip(names, shapes, strict=True)
        if not _is_there(state, known, name, shape)
    ]
    raise ValueError(
        f"model: {state.place} lacks its parameters {odd[:5]} ({len(odd)}), or has them in other shapes; is it "
        "another model?"
    )


def _is_there(state: SavedState, known: Mapping[str, str], name: str, shape: tuple[int, ...]) -> bool:
    return name in known and state.weights[known[name]].shape == shape


def _prefixes(names: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """What may stand before a model's names in the file: nothing, or what a module around it put there."""
    if not names or all(name in known for name in names):
        return [""]
    return [each.removesuffix(names[0]) for each in known if each.endswith(f".{names[0]}")]


def _order_of_config(state: SavedState, config: Any) -> list[str] | None:
    """The order of the transformers model that a config describes; None where it cannot be made here."""
    model = model_of_config(config, len(state.weights))
    if model is None:
        return None
    try:
        return _order_of(state, model)
    except ValueError:
        return None


def model_of_config(config: Any, tensors: int) -> nn.Module | None:
    """The language model of transformers that a config describes, without weights (on the meta device).

    Args:
        config: a dict as config.json holds, or transformers' object.
        tensors: about how many parameters it should have; one that makes many more is given up.

    Returns:
        None if transformers is not installed or does not have such a model.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return None
    kinds = config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and len(kinds) == 1 else None
    try:
        from transformers import CONFIG_MAPPING
        from transformers.models.auto import modeling_auto as auto
    except ImportError:
        return None
    known = {
        name
        for task in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION")
        for name in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).values()
    }
    if not isinstance(kind, str) or kind not in known or config.get("model_type") not in CONFIG_MAPPING:
        return None
    import transformers

    settings = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        made = CONFIG_MAPPING[settings.pop("model_type")].from_dict(settings)
        with torch.device("meta"), _at_most(4 * tensors + _SIZE):
            return getattr(transformers, kind)(made)
    except Exception:  # a config of another version, or a damaged one: there is no such model
        return None


@contextlib.contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Raise where more modules or parameters than these are made."""
    left = [count]

    def spend(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("the config makes a model of too many parts")

    hooks = [
        nn.modules.module.register_module_parameter_registration_hook(spend),
        nn.modules.module.register_module_module_registration_hook(spend),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
