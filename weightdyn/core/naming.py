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

_TIME_MIX = r"(?:rwkv\.blocks\.[0-9]+\.attention|blocks\.[0-9]+\.att)"  # transformers' name and RWKV's own
_ATTENDING = r"\w*[Aa]tt\w*"
_ATTENTION = rf"{_ATTENDING}\.(?:\w+\.){{0,2}}"

# Endings of a name, `.weight` left out. At one place in the name an earlier row wins over a later one.
# The layout says where the parts of a fused matrix lie, as the code of transformers and torch has it:
#   "interleaved"  rows are (kv heads, q heads of the group + k + v, head_dim)   GPT-NeoX, Falcon, GPT-BigCode
#   "blocks"       all of q, then all of k, then all of v                        Phi-3, MPT, DBRX, ModernBERT, OLMo
#   "conv1d"       blocks, on the columns of a Conv1D or the rows of a Linear    GPT-2, nanoGPT
#   "thirds"       blocks of as many rows as there are columns, heads or not     nn.MultiheadAttention, ViT
#   "quarters"     four times the q, then the v, then the k of a quarter's heads CodeGen
#   "latent"       rows are (heads, k without its rotary part + v)               DeepSeek's kv_b_proj
#   "halves"       gate, then up                                                 Phi-3, GLM-4, stacked experts
# A qkv further below its block than the attention itself is left whole: some of timm's have the heads outermost.
_TABLE: tuple[tuple[str, str | None, str], ...] = (
    ("qkv", "interleaved", r"query_key_value"),
    ("qkv", "blocks", r"qkv_proj|Wqkv|att_proj"),
    ("qkv", "conv1d", r"c_attn"),
    ("qkv", "thirds", rf"in_proj_weight|(?:^|[0-9]+\.){_ATTENDING}\.qkv"),
    ("qkv", "latent", r"kv_b_proj"),
    ("qkv", None, r"w?qkv"),
    # RWKV mixes over time by decay: its key and value meet no query and no softmax. What follows is an MLP.
    ("other", None, rf"{_TIME_MIX}\.(?:receptance|key|value|gate)"),
    ("o", None, rf"{_TIME_MIX}\.output|(?:mixer|mamba)\.out_proj"),
    ("up", None, r"(?:feed_forward|ffn)\.key"),
    ("down", None, r"(?:feed_forward|ffn)\.value"),
    ("q", None, rf"q_(?:b_)?proj(?:_weight)?|w_?q|{_ATTENTION}(?:q|query)"),
    ("k", None, rf"k_proj(?:_weight)?|w_?k|{_ATTENTION}(?:k|key)"),
    ("v", None, rf"v_proj(?:_weight)?|w_?v|{_ATTENTION}(?:v|value)"),
    ("o", None, rf"o_proj|attn_out|{_ATTENTION}(?:out_proj|c_proj|dense|proj|wo|w_out|o)"),
    ("up", "halves", r"gate_up_proj"),
    ("gate", None, r"gate_proj|w1|wi_0"),
    ("up", None, r"up_proj|w3|wi_1|wi|fc1|fc_in|c_fc|dense_h_to_4h|linear1|intermediate\.dense"),
    ("up", None, r"ff_proj"),  # of OLMo, with the gate behind it where the activation is one
    ("down", None, r"[0-9]+\.ff_out|down_proj|w2|wo|fc2|fc_out|c_proj|dense_4h_to_h|linear2|output\.dense"),
    ("unembed", None, r"lm_head(?:\.w_out)?|embed_out|unembed\w*|transformer\.ff_out|(?<!\.)output"),
    ("norm", None, r"(?:\w*[Nn]orm(?:_?\w)?|ln(?:\d+|_\w+)?)(?:\.scale|\.gamma)?"),
    ("embed", None, r"\w*embed\w*|wte|wpe|shared"),
)
_ENDING = re.compile(
    r"(?:^|\.)(?:" + "|".join(f"({pattern})" for _, _, pattern in _TABLE) + r")(?:\.weight)?$"
)

# Model types that use one of these names for another layout; None leaves the matrix whole.
_OTHER_LAYOUT = {
    "chatglm": None,
    "codegen": "quarters",
    "gpt_bigcode": "interleaved",
    "gpt_oss": None,
    "minimax": None,
}

_WRAPPER = re.compile(
    r"^base_model\.model\.(?=.*\.)"
    r"|(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
    r"|(?<=\.)(?:original_module|modules_to_save\.[^.]+)\."
    r"|\.lora_\w+\.[^.]+(?=\.weight$|$)"
)
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # what torch puts into the names of a block
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


def bare_names(names: Sequence[str]) -> list[str]:
    """The names of a model's parameters without what wrappers (torch.compile, DDP) put into all of them.

    >>> bare_names(["module._orig_mod.wte.weight", "module._orig_mod.module.bias"])
    ['wte.weight', 'module.bias']
    """
    bare = [".".join(part for part in name.split(".") if part not in _WRAPPED) for name in names]
    for wrapper in ("module.", "module."):
        if all(name.startswith(wrapper) for name in bare):
            bare = [name.removeprefix(wrapper) for name in bare]
    return bare


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
        its views gate, up. `nn.MultiheadAttention`'s `in_proj_weight` and a ViT's `attn.qkv` are thirds without a
        config too, and with "head" where the config's heads do not account for their columns. A tied embedding is
        what its name says, and `named_parameters()` has it once, as embed. Position embeddings are "embed"; routers
        and score heads are "other". The layer is the first number in the name, but of stages that hold numbered
        blocks the block's.

        Of latent attention (DeepSeek) `q_b_proj` is q and `kv_b_proj` a fused k and v, k without the rotary part
        that heads share; what makes the latents, `q_a_proj` and `kv_a_proj_with_mqa`, is "other": all heads share
        it, and a norm behind it takes its length out. What mixes over time without attention has no q, k
        or v: of Mamba's mixers and RWKV's time-mix the matrix that writes to the residual stream is "o", as of an
        attention, and the rest (Mamba's in_proj, x_proj, dt_proj, conv1d, A_log, D; RWKV's receptance, key,
        value) "other". RWKV's channel-mix is an MLP, its key up and its value down.

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
        layout = layout and _OTHER_LAYOUT.get(str(_read(own, "model_type")), layout)
        if component in ("qkv", "q", "k", "v"):
            found = tuple(_attention(component, layout, shape, own, per_head))
        elif layout == "halves":
            found = tuple(_halves(shape, own))
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
    short = short.replace("visual", "vision")
    kind = next((kind for kind in ("vision", "audio") if kind in short), "text")
    return _read(config, f"{kind}_config") or config


def _attention(
    component: str, layout: str | None, shape: Sequence[int], own: Any, per_head: bool
) -> Iterator[View]:
    """Views of a matrix with rows for heads; none where the heads do not account for every row."""
    if len(shape) != 2:
        return
    heads = _count(own, "num_attention_heads", "n_head", "num_heads", "n_heads")
    dim = _count(own, "head_dim", "d_kv")
    if heads and not dim:
        hidden = _count(own, "hidden_size", "n_embd", "d_model")
        dim = (hidden or (shape[1] if layout == "thirds" else 0)) // heads
    if layout == "thirds" and heads * dim != shape[1]:
        heads, dim, per_head = 1, shape[1], False
    runs, times = _runs(component, layout, heads, dim, own) if heads else ((), 0)
    size = times * sum(count * rows for _, count, rows in runs)
    axis = next((a for a in range(2 if layout == "conv1d" else 1) if shape[a] == size > 0), None)
    if axis is None:
        return
    places: dict[str, list[tuple[int, int]]] = {part: [] for part in ("q", "k", "v")}
    start = 0
    for part, count, rows in [*runs] * times:
        for _ in range(count):
            places[part].append((start, start + rows))
            start += rows
    for part, ranges in places.items():
        if per_head:
            for head, where in enumerate(ranges):
                yield View(f"{part}.{head}", part, axis, (where,))
        elif ranges:
            yield View(part, part, axis, _joined(ranges))


_Run = tuple[str, int, int]  # part, its heads in a row, rows of each


def _runs(component: str, layout: str | None, heads: int, dim: int, own: Any) -> tuple[tuple[_Run, ...], int]:
    """What the rows of a matrix make, in their order, and how many times over."""
    kv_heads = heads
    if layout != "thirds":
        kv_heads = _count(own, "num_key_value_heads", "num_kv_heads", "n_kv_heads") or heads
        if _read(own, "multi_query") is True and not _read(own, "new_decoder_architecture"):
            kv_heads = 1
    nope, rope, value = (_count(own, key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if layout == "latent":
        return (("k", 1, nope), ("v", 1, value)), heads if nope and value else 0
    if layout == "quarters":
        return (("q", heads // 4, dim), ("v", heads // 4, dim), ("k", heads // 4, dim)), 4
    if heads % kv_heads:
        return (), 0
    if layout == "interleaved":
        return (("q", heads // kv_heads, dim), ("k", 1, dim), ("v", 1, dim)), kv_heads
    if component == "q" and nope:
        dim = nope + rope
    blocks = ("q", heads, dim), ("k", kv_heads, dim), ("v", kv_heads, dim)
    return tuple(run for run in blocks if layout or run[0] == component), 1


def _joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ascending ranges, neighbours in one."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return tuple(joined)


def _halves(shape: Sequence[int], own: Any) -> Iterator[View]:
    """Gate, then up: rows of a matrix; of stacked experts the axis that does not take the hidden state."""
    axis = 0 if len(shape) == 2 else None
    if len(shape) == 3:
        hidden = _count(own, "hidden_size", "n_embd", "d_model")
        # (experts, 2·inner, hidden) in most families, (experts, hidden, 2·inner) in Llama 4.
        axis = next((a for a, other in ((1, 2), (2, 1)) if shape[other] == hidden > 0), None)
    if axis is None:
        return
    half, odd = divmod(shape[axis], 2)
    if half > 0 and not odd:
        yield View("gate", "gate", axis, ((0, half),))
        yield View("up", "up", axis, ((half, 2 * half),))
