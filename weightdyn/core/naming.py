"""What a parameter is, from its name: stack, layer, component, role, and the q, k, v inside a fused matrix.

One table of name endings serves every family, because families share their vocabulary: a name is cut back to
what stands behind its wrappers, and the row of the table that reaches furthest to the left from its end says
what it is (`attn.c_proj` is an attention output, `mlp.c_proj` an MLP's). Whatever no row knows is "other".

Fused matrices are split into views only where the config's head counts account for every row; a matrix that
does not add up is left whole, since a wrong split would give wrong forces without a sign of it.

A row of a table is a tensor or a view of one. Its label, `name` or `name[view]`, is made and parsed here alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from weightdyn.core.checks import check_mapping, refuse

if TYPE_CHECKING:
    import torch

COMPONENTS = (
    "q", "k", "v", "qkv", "o", "gate", "up", "down", "embed", "unembed", "norm", "bias", "other",
)  # fmt: skip
"""Every component, in the order of a figure's legend."""

ROLES = ("selection", "transmission", "value", "other")
"""Every role, in the order of a figure's legend."""

_ROLES = {
    "q": "selection",
    "k": "selection",
    "o": "transmission",
    "gate": "transmission",
    "up": "transmission",
    "down": "transmission",
    "v": "value",
}

Views = bool | Literal["head"]
"""How fused tensors fall into rows: True splits q, k, v (and gate, up), "head" each head too, False nothing."""

_ATTENTION = r"\w*[Aa]tt\w*\.(?:\w+\.){0,2}"

# Endings of a name, `.weight` left out. At one place in the name an earlier row wins over a later one.
# The layout says where the parts of a fused matrix lie, as transformers' own code has it:
#   "interleaved"  rows are (kv heads, q heads of the group + k + v, head_dim)   GPT-NeoX, Bloom, Falcon
#   "blocks"       all of q, then all of k, then all of v                        Phi-3
#   "conv1d"       blocks, on the columns of a Conv1D or the rows of a Linear    GPT-2, nanoGPT
#   "halves"       gate, then up                                                 Phi-3, GLM-4, stacked experts
_TABLE: tuple[tuple[str, str | None, str], ...] = (
    ("qkv", "interleaved", r"query_key_value"),
    ("qkv", "blocks", r"qkv_proj"),
    ("qkv", "conv1d", r"c_attn"),
    ("qkv", None, r"[Ww]?qkv|att_proj|in_proj_weight"),
    ("q", None, rf"q_proj|wq|{_ATTENTION}(?:q|query)"),
    ("k", None, rf"k_proj|wk|{_ATTENTION}(?:k|key)"),
    ("v", None, rf"v_proj|wv|{_ATTENTION}(?:v|value)"),
    ("o", None, rf"o_proj|{_ATTENTION}(?:out_proj|c_proj|dense|proj|wo|o)"),
    ("up", "halves", r"gate_up_proj"),
    ("gate", None, r"gate_proj|w1|wi_0"),
    ("up", None, r"up_proj|w3|wi_1|wi|fc1|fc_in|c_fc|dense_h_to_4h|linear1|intermediate\.dense"),
    ("down", None, r"down_proj|w2|wo|fc2|fc_out|c_proj|dense_4h_to_h|linear2|output\.dense"),
    ("unembed", None, r"lm_head|embed_out|unembed\w*"),
    ("norm", None, r"(?:\w*[Nn]orm(?:_?\w)?|ln(?:\d+|_\w+)?)(?:\.scale|\.gamma)?"),
    ("embed", None, r"\w*embed\w*|wte|wpe|shared"),
)
_ENDING = re.compile(
    r"(?:^|\.)(?:" + "|".join(f"({pattern})" for _, _, pattern in _TABLE) + r")(?:\.weight)?$"
)

# Model types that use one of these names for another layout: left whole.
_OTHER_LAYOUT = ("chatglm", "codegen", "gpt_bigcode", "gpt_oss", "minimax")

_WRAPPER = re.compile(
    r"^base_model\.model\.(?=.*\.)"
    r"|(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
    r"|(?<=\.)(?:original_module|modules_to_save\.[^.]+)\."
    r"|\.lora_\w+\.[^.]+(?=\.weight$|$)"
)
# A number between dots, and the module that it counts. Not \d: nine plain digits are a number that int() takes,
# whatever the string.
_NUMBER = re.compile(r"(?:^|(?P<counted>[^.]*)\.)(?P<number>[0-9]{1,9})(?=\.)")
_CONTAINERS = ("layers", "layer", "blocks", "block", "h")  # what a stack calls the list of its layers
_LONGEST = 1000  # no model has such names, and the patterns take time that grows with the square of them
_LABEL = re.compile(r"(?P<name>.*)\[(?P<view>(?:[qkv]|gate|up)(?:\.[0-9]+)?)\]", re.DOTALL)


def role_of(component: str) -> str:
    """Role of a component: selection (q, k), transmission (o, gate, up, down), value (v), other (the rest).

    A fused `qkv` has parts of two roles and counts as other; its views have their own.

    Raises:
        ValueError: if `component` is none of `COMPONENTS`.

    >>> role_of("k"), role_of("down"), role_of("qkv")
    ('selection', 'transmission', 'other')
    """
    return _ROLES.get(_check_component(component, "component"), "other")


@dataclass(frozen=True)
class View:
    """A part of one tensor: index ranges along one axis.

    Attributes:
        name: "q", "gate", or one head, "q.3"; `name[view]` labels it in tables (`TensorRow.label`).
        component: one of `COMPONENTS`.
        axis: the axis that is cut, from 0.
        ranges: half-open index ranges (start, stop) on that axis, ascending.
    """

    name: str
    component: str
    axis: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def role(self) -> str:
        """Role of the component."""
        return role_of(self.component)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this part of `tensor`: no copy where it is one range, else the ranges joined on `axis`."""
        parts = [tensor.narrow(self.axis, start, stop - start) for start, stop in self.ranges]
        if len(parts) == 1:
            return parts[0]
        import torch  # whoever has a tensor has it; readers of tables do without

        return torch.cat(parts, self.axis)

    def numel(self, shape: Sequence[int]) -> int:
        """Return the number of weights in this part of a tensor of that shape."""
        across = math.prod(size for axis, size in enumerate(shape) if axis != self.axis)
        return across * sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class TensorRow:
    """A row of a table: a tensor, or a view of one.

    Attributes:
        label: what the column `tensor` says: the parameter's name, with [view] behind it for a view.
        stack, layer: as `TensorName` has them.
        component: one of `COMPONENTS`.
        numel: number of weights.
        view: which part of the tensor it is; None for all of it.
    """

    label: str
    stack: str
    layer: int | None
    component: str
    numel: int
    view: View | None = None

    @property
    def role(self) -> str:
        """Role of the component."""
        return role_of(self.component)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this row's part of `tensor`."""
        return tensor if self.view is None else self.view.of(tensor)

    def identity(self) -> dict[str, Any]:
        """The columns that say what the row is: tensor, stack, layer, component, role, numel."""
        return {
            "tensor": self.label,
            "stack": self.stack,
            "layer": self.layer,
            "component": self.component,
            "role": self.role,
            "numel": self.numel,
        }


@dataclass(frozen=True)
class TensorName:
    """What `describe` says of one tensor.

    Attributes:
        name: the name as it was given, wrappers included.
        layer: block index in its stack; None outside the blocks.
        component: one of `COMPONENTS`.
        views: the parts of a fused tensor, disjoint and covering it; () if it is one thing.
        stack: which of the model's stacks of blocks it is in, "encoder" or "decoder" or a ResNet's "layer2", as
            the name has it; stack and layer together are unique in a model. "" outside the blocks, and where the
            name says no more than the number.
    """

    name: str
    layer: int | None
    component: str
    views: tuple[View, ...] = ()
    stack: str = ""

    @property
    def role(self) -> str:
        """Role of the component."""
        return role_of(self.component)

    def rows(self, shape: Sequence[int]) -> tuple[TensorRow, ...]:
        """The rows that the tensor has in a table: one for each view, or one for all of it.

        >>> fused = describe("h.0.attn.c_attn.weight", (4, 12), {"n_head": 2, "n_embd": 4})
        >>> [row.label for row in fused.rows((4, 12))]
        ['h.0.attn.c_attn.weight[q]', 'h.0.attn.c_attn.weight[k]', 'h.0.attn.c_attn.weight[v]']
        """
        where = self.stack, self.layer
        return tuple(
            TensorRow(f"{self.name}[{view.name}]", *where, view.component, view.numel(shape), view)
            for view in self.views
        ) or (TensorRow(self.name, *where, self.component, math.prod(shape)),)


def split_label(label: str) -> tuple[str, str | None]:
    """Name of the parameter, and of its view or None, behind a row's label.

    >>> split_label("h.0.attn.c_attn.weight[k.1]"), split_label("blocks[0].weight")
    (('h.0.attn.c_attn.weight', 'k.1'), ('blocks[0].weight', None))
    """
    if not isinstance(label, str):
        raise refuse("label", "a string", label)
    match = _LABEL.fullmatch(label)
    return (match["name"], match["view"]) if match else (label, None)


def check_views(views: Any) -> Views:
    """Return `views` if it is one of True, False and "head", else raise a ValueError."""
    if isinstance(views, bool) or (isinstance(views, str) and views == "head"):
        return views
    raise ValueError(f"views must be True, False or 'head', got {views!r}")


def check_config(config: Any) -> Any:
    """Return `config` if it can be a model's: a mapping, an object with attributes of its own, or None.

    Raises:
        TypeError, ValueError: it is a number, a string, a sequence, a tensor or a class: no model's config.
    """
    plain = isinstance(config, int | float | complex | str | bytes | Sequence | type) or hasattr(
        config, "shape"
    )
    if plain or (type(config) is object):
        raise refuse("config", "a model's config, a dict such as config.json holds, or None", config)
    return config


def describe(
    name: str,
    shape: Sequence[int],
    config: Any = None,
    *,
    views: Views = True,
    rules: Mapping[str, str] | None = None,
) -> TensorName:
    r"""Say what a parameter is; whatever the name, shape and config, there is an answer.

    Args:
        name: the parameter's name, as `named_parameters()` has it. The wrappers of DistributedDataParallel,
            FSDP, `torch.compile` and PEFT are looked through; a LoRA factor is what its matrix is.
        shape: its shape. 1-D gains are norms. Only matrices and stacked experts (3-D) have views.
        config: the model's transformers config, a dict such as config.json holds, or any object with such
            attributes. Needed for the views of fused attention matrices and stacked experts, and for heads;
            of a model with a vision or audio part each part's own config is taken.
        views: True splits fused matrices, False leaves them whole, "head" makes one view for each head of q, k
            and v ("q.0", "q.1", …), in unfused matrices too. Under grouped-query attention k and v have the
            number of key-value heads.
        rules: {regular expression: component}, searched in the name behind its wrappers before all else, in
            order; the first that is found decides. A group `(?P<layer>\d+)` in it sets the layer, a group
            `(?P<stack>…)` the stack.

    Returns:
        The description. A fused attention matrix is "qkv", its views q, k, v; a fused gate and up is "up",
        its views gate, up. A tied embedding is what its name says, and `named_parameters()` has it once, as
        embed. Position embeddings are "embed"; routers, score heads and latent projections are "other". The
        layer is the first number in the name, but of stages that hold numbered blocks the block's.

    Raises:
        ValueError: if a rule is not a regular expression, names no component, or its layer is no number;
            `views` is none of these.

    >>> up = describe("gpt_neox.layers.3.mlp.dense_h_to_4h.weight", (48, 12))
    >>> up.stack, up.layer, up.component, up.role
    ('gpt_neox', 3, 'up', 'transmission')
    >>> fused = describe("gpt_neox.layers.3.attention.query_key_value.weight", (36, 12),
    ...                  {"num_attention_heads": 2, "hidden_size": 12})
    >>> [(view.name, view.ranges) for view in fused.views]
    [('q', ((0, 6), (18, 24))), ('k', ((6, 12), (24, 30))), ('v', ((12, 18), (30, 36)))]
    """
    check_views(views)
    if not isinstance(name, str):
        raise refuse("name", "a string", name)
    if len(name) > _LONGEST:
        return TensorName(name, None, "other")
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes):
        raise refuse("shape", "a tensor's shape, such as (512, 512)", shape)
    check_mapping("rules", rules, "{regular expression: component}")
    check_config(config)
    short = _WRAPPER.sub("", name)
    component, layout = _look_up(short, len(shape))
    stack, layer = _place(short)
    for pattern, ruled in (rules or {}).items():
        match = _search(pattern, _check_component(ruled, f"rules[{pattern!r}]"), short)
        if match:
            stack, layer = match.groupdict().get("stack") or stack, _ruled_layer(match, layer)
            component, layout = ruled, (layout if ruled == component else None)
            break
    found: tuple[View, ...] = ()
    per_head = views == "head"
    # The A of a LoRA pair has the rank for rows: no part of it belongs to q alone.
    if views and (layout or (per_head and component in ("q", "k", "v"))) and ".lora_A." not in name:
        own = _own_config(config, short)
        if layout == "halves":
            found = tuple(_halves(shape, own))
        else:
            found = tuple(_attention(component, layout, shape, own, per_head))
    return TensorName(name, layer, component, found, stack)


def _place(short: str) -> tuple[str, int | None]:
    """Stack and layer of a name without wrappers."""
    numbers = list(_NUMBER.finditer(short))
    if not numbers:
        return "", None
    own, *inner = numbers
    deeper = next((each for each in inner if each["counted"] == "blocks"), None)
    if deeper is None and own["counted"] in ("stages", "stage") and inner:
        deeper = inner[0]
    own = deeper or own
    before = short[: own.start("number")].rstrip(".")
    head, _, last = before.rpartition(".")
    return (head if last in _CONTAINERS else before), int(own["number"])


def _look_up(short: str, ndim: int) -> tuple[str, str | None]:
    """Component and layout of a name without wrappers."""
    if short.endswith("bias"):
        return "bias", None
    match = _ENDING.search(short)
    if match and match.lastindex:
        return _TABLE[match.lastindex - 1][:2]
    # A vector called weight in a module of any other name, nn.Sequential's among them, is a norm's gain.
    return ("norm" if ndim == 1 and re.search(r"(?:^|\.)weight$", short) else "other"), None


def _check_component(component: str, argument: str) -> str:
    if not isinstance(component, str) or component not in COMPONENTS:
        raise refuse(argument, f"one of {COMPONENTS}", component)
    return component


def _search(pattern: str, component: str, short: str) -> re.Match[str] | None:
    try:
        return re.search(pattern, short)
    except re.error as error:
        raise ValueError(
            f"rules: {pattern!r} (for {component!r}) is not a regular expression: {error}"
        ) from error


def _ruled_layer(match: re.Match[str], layer: int | None) -> int | None:
    text = match.groupdict().get("layer")
    if text is None:
        return layer
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(
            f"rules: the group 'layer' of {match.re.pattern!r} must match a number such as '12', got {text!r}"
        )
    return int(text)


def _read(config: Any, *keys: str) -> Any:
    """First of `keys` that the config, a mapping or an object, has a value for."""
    for key in keys:
        value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
        if value is not None:
            return value
    return None


def _count(config: Any, *keys: str) -> int:
    """The same for a positive whole number; 0 if there is none."""
    value = _read(config, *keys)
    return value if isinstance(value, int) and value > 0 else 0


def _own_config(config: Any, short: str) -> Any:
    """The part of a composite config that this parameter was built from."""
    kind = next((kind for kind in ("vision", "audio") if kind in short), "text")
    return _read(config, f"{kind}_config") or config


def _has_other_layout(own: Any) -> bool:
    return _read(own, "model_type") in _OTHER_LAYOUT


def _attention(
    component: str, layout: str | None, shape: Sequence[int], own: Any, per_head: bool
) -> Iterator[View]:
    """Views of a matrix with rows for heads; none where the heads do not account for every row."""
    heads = _count(own, "num_attention_heads", "n_head", "num_heads", "n_heads")
    kv_heads = _count(own, "num_key_value_heads", "num_kv_heads") or heads
    if len(shape) != 2 or not heads or heads % kv_heads or (layout and _has_other_layout(own)):
        return
    dim = _count(own, "head_dim", "d_kv") or _count(own, "hidden_size", "n_embd", "d_model") // heads
    counts = {"q": heads, "k": kv_heads, "v": kv_heads}
    if layout is None:
        counts = {component: counts[component]}
    size = dim * sum(counts.values())
    axis = next((a for a in range(2 if layout == "conv1d" else 1) if shape[a] == size > 0), None)
    if axis is None:
        return
    # The places of each part's heads on the axis, in steps of head_dim.
    places: dict[str, Sequence[int]] = {}
    if layout == "interleaved":
        group = heads // kv_heads
        starts = range(0, kv_heads * (group + 2), group + 2)
        places["q"] = [start + head for start in starts for head in range(group)]
        places["k"] = [start + group for start in starts]
        places["v"] = [start + group + 1 for start in starts]
    else:
        first = 0
        for part, count in counts.items():
            places[part] = range(first, first + count)
            first += count
    for part, where in places.items():
        if per_head:
            for head, place in enumerate(where):
                yield View(f"{part}.{head}", part, axis, ((place * dim, (place + 1) * dim),))
        else:
            yield View(part, part, axis, _joined(where, dim))


def _joined(places: Sequence[int], dim: int) -> tuple[tuple[int, int], ...]:
    """Ranges of ascending places of `dim` indices each, neighbours in one range."""
    ranges: list[tuple[int, int]] = []
    for place in places:
        start, stop = place * dim, (place + 1) * dim
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return tuple(ranges)


def _halves(shape: Sequence[int], own: Any) -> Iterator[View]:
    """Gate, then up: rows of a matrix; of stacked experts the axis that does not take the hidden state."""
    axis = 0 if len(shape) == 2 else None
    if len(shape) == 3:
        hidden = 0 if _has_other_layout(own) else _count(own, "hidden_size", "n_embd", "d_model")
        # (experts, 2·inner, hidden) in most families, (experts, hidden, 2·inner) in Llama 4.
        axis = next((a for a, other in ((1, 2), (2, 1)) if shape[other] == hidden > 0), None)
    if axis is None:
        return
    half, odd = divmod(shape[axis], 2)
    if half > 0 and not odd:
        yield View("gate", "gate", axis, ((0, half),))
        yield View("up", "up", axis, ((half, 2 * half),))
