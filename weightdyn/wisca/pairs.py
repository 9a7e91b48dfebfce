"""Which tensors of a model stand in a product of which the network sees only the product.

Attention sees q·kᵀ and, through the softmax's weights, o·v; a gated MLP sees down·(… * up), and ReLU lets a factor
through; a norm's gain meets the columns of the linears behind it; a LoRA adapter is B·A. Multiply one side by α and
the other by 1/α, and the outputs stay what they are.

A pair is written in *channels*, the finest parts that can have an α of their own, as a label on every index of an
axis: row i of q belongs to channel c, and so do the rows of k (and the biases) that meet it. Grouped heads, RoPE's
paired rows and fused matrices are nothing but labels then, and one loop rescales them all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weightdyn.core.checks import check_flag, check_text, check_whole, shown
from weightdyn.core.naming import describe

KINDS = {
    "qk": ("q", "k"),
    "vo": ("o", "v"),
    "up_down": ("up", "down"),
    "norm": ("gain", "linears"),
    "lora": ("A", "B"),
}
"""Kinds of pairs, and their sides: the first is multiplied by α, the second by 1/α."""


@dataclass(frozen=True, eq=False)
class Part:
    """Entries of one parameter that a pair scales.

    Attributes:
        name: the parameter's name, as `named_parameters()` has it.
        axis: the axis along which it falls into channels.
        channels: int64 (size of the axis,), the channel of each index, or −1 for one that stays as it is.
        measured: whether it counts in the norm of its side. Biases are scaled with their rows, and do not count.
    """

    name: str
    axis: int
    channels: Tensor
    measured: bool = True

    def __post_init__(self):
        check_text("name", self.name, "a parameter's name")
        check_whole("axis", self.axis)
        check_flag("measured", self.measured)
        _check_labels("channels", self.channels, -1)


@dataclass(frozen=True, eq=False)
class ScalingPair:
    """Two sides of a product: `a` may be multiplied by any α > 0 per channel, if `b` is multiplied by 1/α.

    Attributes:
        kind: one of `KINDS`, or a name of your own.
        module: where the pair lives; kind and module together tell it from all others.
        a: parts of the side that is multiplied by α.
        b: parts of the side that is multiplied by 1/α.
        heads: int64 (channels,), the head (or key-value group) of each channel; None if all are one.
        layer: block index in its stack; None outside the blocks.
        refused: why this pair cannot be rescaled; None if it can.
        stack: which stack of blocks, as `describe` names it; stack and layer together are unique in a model.

    With grouped heads every query head of a group meets the same k and v: their rows share its channels.

    >>> rows = torch.arange(64)                        # one channel for each row of v and column of o
    >>> pair = ScalingPair("vo", "blocks.0", a=[Part("blocks.0.o.weight", 1, rows)],
    ...                    b=[Part("blocks.0.v.weight", 0, rows)], heads=rows // 16, layer=0)
    >>> pair.size, pair.head_count
    (64, 4)
    """

    kind: str
    module: str
    a: Sequence[Part] = ()
    b: Sequence[Part] = ()
    heads: Tensor | None = None
    layer: int | None = None
    refused: str | None = None
    stack: str = ""

    def __post_init__(self):
        check_text("kind", self.kind, "a kind of pairs, such as 'vo'")
        for name, side in (("a", self.a), ("b", self.b)):
            several = isinstance(side, Sequence) and not isinstance(side, str)
            if not several or not all(isinstance(part, Part) for part in side):
                raise TypeError(f"{name} must be Parts, in a list, got {shown(side)}")
        if self.heads is not None:
            _check_labels("heads", self.heads, 0)
        check_whole("layer", self.layer, none="outside the blocks")

    @property
    def size(self) -> int:
        """Number of channels."""
        tops = [int(part.channels.max()) for part in (*self.a, *self.b) if len(part.channels)]
        return max(tops, default=-1) + 1

    @property
    def head_count(self) -> int:
        """Number of heads, or key-value groups: 1 where there are none."""
        return 1 if self.heads is None or not len(self.heads) else int(self.heads.max()) + 1

    @property
    def sides(self) -> tuple[str, str]:
        """What its two sides are called in tables."""
        return KINDS.get(self.kind, ("a", "b"))

    def __str__(self) -> str:
        return f"{self.kind} of {self.module or 'the model'}"

    def __repr__(self) -> str:
        if self.refused is not None:
            return f"ScalingPair({self}, refused: {self.refused})"
        names = [" + ".join(part.name for part in side if part.measured) for side in (self.a, self.b)]
        return f"ScalingPair({self}: {names[0]} · {names[1]}, {self.head_count} heads, {self.size} channels)"


def _check_labels(argument: str, labels: Any, low: int) -> None:
    plain = isinstance(labels, Tensor) and labels.layout == torch.strided and not labels.is_meta
    whole = plain and labels.ndim == 1 and not (labels.is_floating_point() or labels.is_complex())
    if not whole or (labels.numel() and int(labels.min()) < low):
        raise TypeError(f"{argument} must be a 1-D tensor of whole numbers >= {low}, got {shown(labels)}")


class _Family(NamedTuple):
    """Where the linears and norms stand in a block, and the final norm beside the blocks."""

    q: str
    k: str
    v: str
    o: str
    up: str
    down: str
    norms: tuple[tuple[str, tuple[str, ...]], ...]  # norm, and the linears that read its output
    final: str
    gate: str | None = None
    conv1d: bool = False  # weights are (in, out)


_LLAMA = _Family(
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    norms=(("input_layernorm", ("q", "k", "v")), ("post_attention_layernorm", ("gate", "up"))),
    final="norm",
)
_FAMILIES = {
    "gpt_neox": _Family(
        q="attention.query_key_value",
        k="attention.query_key_value",
        v="attention.query_key_value",
        o="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        norms=(("input_layernorm", ("q",)), ("post_attention_layernorm", ("up",))),
        final="final_layer_norm",
    ),
    "gpt2": _Family(
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        norms=(("ln_1", ("q",)), ("ln_2", ("up",))),
        final="ln_f",
        conv1d=True,
    ),
    "opt": _Family(
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.out_proj",
        up="fc1",
        down="fc2",
        norms=(("self_attn_layer_norm", ("q", "k", "v")), ("final_layer_norm", ("up",))),
        final="final_layer_norm",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "olmo2": _LLAMA._replace(norms=()),
}
FAMILIES = tuple(sorted(_FAMILIES))
"""Model types of transformers whose pairs `find_pairs` knows; PEFT's LoRA adapters it finds on any model."""

_HOMOGENEOUS = ("relu", "leaky_relu", "linear")  # act(αx) = α·act(x) for α > 0
_BLOCK = re.compile(r"(?:(?P<parent>.*)\.)?(?:layers|h)\.(?P<layer>[0-9]+)")
_WRAPPED = ("module", "_orig_mod")

_HOW_TO = """\
describe its pairs yourself, for example of v and o without grouped heads:

    from weightdyn.wisca import Part, ScalingPair
    rows = torch.arange(hidden_size)          # the channel of each row of v and of each column of o
    pairs = [
        ScalingPair("vo", f"blocks.{i}", layer=i, heads=rows // head_dim,
                    a=[Part(f"blocks.{i}.o.weight", 1, rows)],
                    b=[Part(f"blocks.{i}.v.weight", 0, rows), Part(f"blocks.{i}.v.bias", 0, rows, measured=False)])
        for i in range(layers)
    ]
    wisca.rescale_(model, pairs=pairs)

and let wisca.check_equivalence(model, batch, pairs=pairs) say whether that was right"""


def find_pairs(model: nn.Module) -> list[ScalingPair]:
    """List the pairs of tensors of which the model sees only the product.

    qk       q rows · k rows; one head of the pair is a key-value group with all its query heads, and one channel
             the two rows that RoPE turns together. With QK-norm (Qwen3, OLMo-2) the norms' gains are the
             pair, since the projections' scale is divided out; Qwen3 has one gain for all heads.
    vo       o columns · v rows; biases of v with their rows, the bias of o stays.
    up_down  up rows · down columns, of a gated MLP or one with ReLU. GELU has no such pair: refused.
    norm     a norm's gain and bias · the columns of the linears that read it, before attention, the MLP and the
             head. Norms behind attention and MLP (OLMo-2) have none: refused.
    lora     A rows · B columns of each LoRA adapter of PEFT, with any base model. The base weights of a PEFT
             model are refused: an adapter that is saved without them would no longer fit.

    Args:
        model: a transformers model of one of `FAMILIES`, bare or with its head, or wrapped by
            DistributedDataParallel or `torch.compile`; or a PEFT model with LoRA adapters.

    Returns:
        The pairs, block by block. Those that cannot be rescaled are there too, with the reason as `refused`;
        tied tensors (a norm in front of a head that is the embedding) are one.

    Raises:
        ValueError: the model is of no known kind; the message shows how to describe its pairs.
    """
    model = unwrap(model)
    adapters = list(_adapters(model))
    if adapters:
        reason = (
            "these weights belong to the base model, and an adapter saved without them would no longer fit; "
            'rescale the adapters with pairs=("lora",), or the base model before the adapters are added'
        )
        found = [ScalingPair(kind, "", refused=reason) for kind in KINDS if kind != "lora"] + adapters
    else:
        found = list(_known(model))
    shared = shared_parameters(model)
    return [_refuse_shared(pair, shared) for pair in found]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model behind DistributedDataParallel and `torch.compile`, whose names have no prefix."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while inner := next((getattr(model, name) for name in _WRAPPED if _is_wrapper(model, name)), None):
        model = inner
    return model


def _is_wrapper(model: nn.Module, name: str) -> bool:
    return [child for child, _ in model.named_children()] == [name] and "config" not in vars(model)


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters that share memory with another one, or have two names: {name: the other name}.

    Scaling one of them scales the other, which stands in another place of the network.
    """
    spans = []
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if tensor.numel() and tensor.device.type != "meta" and is_plain(tensor):
            last = sum(
                (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + (last + 1) * tensor.element_size(), name))
    shared: dict[str, str] = {}
    spans.sort()
    reach = ("", 0, "")  # device, furthest end so far, and whose it is
    for device, start, end, name in spans:
        if device == reach[0] and start < reach[1]:
            shared.setdefault(name, reach[2])
            shared.setdefault(reach[2], name)
        if device != reach[0] or end > reach[1]:
            reach = (device, end, name)
    return shared


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is whole and dense, and its entries can be scaled in place."""
    return type(tensor.data).__name__ != "DTensor" and tensor.layout == torch.strided


def _refuse_shared(pair: ScalingPair, shared: dict[str, str]) -> ScalingPair:
    for part in (*pair.a, *pair.b):
        if pair.refused is None and part.name in shared:
            reason = f"{part.name} is tied to {shared[part.name]}, which would be scaled with it"
            return dataclasses.replace(pair, refused=reason)
    return pair


# --- PEFT ---------------------------------------------------------------------------------------------------


def _adapters(model: nn.Module) -> Iterator[ScalingPair]:
    """A pair for each LoRA adapter in a PEFT model: known by its attributes, so PEFT is not needed."""
    for path, module in model.named_modules():
        for first, second, ending in (
            ("lora_A", "lora_B", ".weight"),
            ("lora_embedding_A", "lora_embedding_B", ""),
        ):
            for adapter in getattr(module, first, None) or ():
                names = [f"{path}.{each}.{adapter}{ending}" for each in (first, second)]
                rank, other = model.get_parameter(names[0]).shape[0], model.get_parameter(names[1]).shape[1]
                where = f"{path}.{adapter}"
                if rank != other:
                    reason = f"its A has {rank} rows and its B {other} columns"
                    yield _placed(ScalingPair("lora", where, refused=reason), names[0])
                    continue
                rows = torch.arange(rank)
                a, b = (Part(name, axis, rows) for axis, name in enumerate(names))
                yield _placed(ScalingPair("lora", where, (a,), (b,)), names[0])


def _placed(pair: ScalingPair, name: str) -> ScalingPair:
    """The pair with the stack and the layer of one of its parameters."""
    described = describe(name, ())
    return dataclasses.replace(pair, stack=described.stack, layer=described.layer)


# --- the families -------------------------------------------------------------------------------------------


def _known(model: nn.Module) -> Iterator[ScalingPair]:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _FAMILIES:
        named = f"a model of type {kind!r}" if kind else f"{type(model).__name__}, which has no config"
        raise ValueError(
            f"model is {named}; pairs are known for {', '.join(FAMILIES)}, and for LoRA adapters of PEFT. "
            f"For this one {_HOW_TO}"
        )
    blocks = [_Block(model, config, _FAMILIES[kind], path) for path, _ in model.named_modules()]
    blocks = [block for block in blocks if block.exists]
    if not blocks:
        raise ValueError(f"model is of type {kind!r}, but has no block with {_FAMILIES[kind].o}; {_HOW_TO}")
    for block in blocks:
        for pair in (block.qk(), block.vo(), block.up_down(), *block.norms()):
            yield _placed(pair, f"{block.attention}.weight")
    yield from blocks[-1].final()


class _Block:
    """One block of a model, and the pairs in it."""

    def __init__(self, model: nn.Module, config: Any, family: _Family, path: str):
        self.model, self.config, self.family, self.path = model, config, family, path
        match = _BLOCK.fullmatch(path)
        self.exists = match is not None and self._has(f"{path}.{family.o}")
        if match is None or not self.exists:
            return
        self.parent = match["parent"]
        self.attention = f"{path}.{family.o.rpartition('.')[0]}"
        self.head_count = int(config.num_attention_heads)
        self.kv_count = int(getattr(config, "num_key_value_heads", None) or self.head_count)
        self.head_dim = self._weight(self._of("o")).shape[0 if family.conv1d else 1] // self.head_count

    def qk(self) -> ScalingPair:
        inner = _rotary_channels(self.head_dim, self._rotary())
        width = int(inner.max()) + 1
        norms = [f"{self.attention}.{name}" for name in ("q_norm", "k_norm")]
        if all(self._has(norm) for norm in norms):
            shared = self._weight(norms[0]).numel() == self.head_dim  # one gain for all heads, as in Qwen3
            channels = [inner, inner] if shared else [self._channels(part, inner) for part in ("q", "k")]
            a, b = (self._gain(norm, each) for norm, each in zip(norms, channels, strict=True))
            heads = None if shared else _head_of(self.kv_count, width)
        else:
            a, b = (self._rows(part, self._channels(part, inner)) for part in ("q", "k"))
            heads = _head_of(self.kv_count, width)
        return ScalingPair("qk", self.attention, a, b, heads)

    def vo(self) -> ScalingPair:
        inner = torch.arange(self.head_dim)
        # An o column meets the query head whose output it reads, and through it the v of that head's group.
        o = self._columns("o", self._channels("q", inner))
        v = self._rows("v", self._channels("v", inner))
        return ScalingPair("vo", self.attention, o, v, _head_of(self.kv_count, self.head_dim))

    def up_down(self) -> ScalingPair:
        module = f"{self.path}.{self.family.up.rpartition('.')[0]}".rstrip(".")
        name = next(
            getattr(self.config, key)
            for key in ("hidden_act", "activation_function")
            if hasattr(self.config, key)
        )
        if self.family.gate is None and name not in _HOMOGENEOUS:
            reason = (
                f"its activation {name!r} is not positively homogeneous, so up and down are no pair; "
                f"that takes a gated MLP, or one of {', '.join(_HOMOGENEOUS)}"
            )
            return ScalingPair("up_down", module, refused=reason)
        inner = torch.arange(self._weight(self._of("down")).shape[0 if self.family.conv1d else 1])
        up, down = self._rows("up", inner), self._columns("down", inner)
        return ScalingPair("up_down", module, up, down)

    def norms(self) -> Iterator[ScalingPair]:
        behind = "its norms stand behind attention and MLP, and the residual stream sees their gains"
        if not self.family.norms:
            yield ScalingPair("norm", self.path, refused=behind)
        for norm, linears in self.family.norms:
            module = f"{self.path}.{norm}"
            if not getattr(self.config, "do_layer_norm_before", True):
                yield ScalingPair("norm", module, refused=behind)
            else:
                yield self._norm(module, [self._of(each) for each in linears])

    def final(self) -> Iterator[ScalingPair]:
        """The norm behind the last block, where a head of its own reads it."""
        prefix = f"{self.parent}." if self.parent else ""
        heads = [name for name in (f"{prefix}project_out", "lm_head", "embed_out") if self._has(name)]
        norm = f"{prefix}{self.family.final}"
        if heads and self._has(norm):
            # Unlike a block's, the head is a Linear in every family.
            yield self._norm(norm, heads[:1], transposed=False)

    def _norm(self, module: str, linears: list[str], transposed: bool | None = None) -> ScalingPair:
        gain = getattr(self.model.get_submodule(module), "weight", None)
        if gain is None:
            return ScalingPair("norm", module, refused="it has no gain")
        channels = torch.arange(gain.numel())
        transposed = self.family.conv1d if transposed is None else transposed
        columns = [Part(f"{name}.weight", 0 if transposed else 1, channels) for name in linears]
        return ScalingPair("norm", module, self._gain(module, channels), columns)

    def _of(self, part: str) -> str:
        return f"{self.path}.{getattr(self.family, part)}"

    def _has(self, path: str) -> bool:
        try:
            return self.model.get_submodule(path) is not None
        except AttributeError:
            return False

    def _weight(self, path: str) -> Tensor:
        return self.model.get_parameter(f"{path}.weight")

    def _rotary(self) -> int:
        """How many of a head's rows RoPE turns; 0 where positions are embedded."""
        if self.config.model_type in ("gpt2", "opt"):
            return 0
        return getattr(self.model.get_submodule(self.attention), "rotary_ndims", self.head_dim)

    def _channels(self, part: str, inner: Tensor) -> Tensor:
        """Channel of each row of q, k or v from that of a row in its head."""
        groups = _groups(self.head_count if part == "q" else self.kv_count, self.kv_count)
        return (groups[:, None] * (int(inner.max()) + 1) + inner).reshape(-1)

    def _rows(self, part: str, channels: Tensor) -> tuple[Part, ...]:
        """What makes the outputs of a linear: its rows, of a fused one those of this part, and their biases."""
        path = self._of(part)
        weight = self._weight(path)
        axis = 1 if self.family.conv1d else 0
        if part in ("q", "k", "v") and self.family.q == self.family.k:
            views = describe(f"{path}.weight", tuple(weight.shape), self.config).views
            view = next((view for view in views if view.component == part), None)
            if view is None:
                raise ValueError(
                    f"the config's heads do not account for the rows of {path}.weight, {tuple(weight.shape)}. "
                    f"Correct the config, or {_HOW_TO}"
                )
            label = torch.full((weight.shape[axis],), -1)
            label[torch.cat([torch.arange(*bounds) for bounds in view.ranges])] = channels
            channels = label
        return (Part(f"{path}.weight", axis, channels), *self._bias(path, channels))

    def _bias(self, path: str, channels: Tensor) -> tuple[Part, ...]:
        """The bias that is added to what the gain or the rows make: it has their scale."""
        if getattr(self.model.get_submodule(path), "bias", None) is None:
            return ()
        return (Part(f"{path}.bias", 0, channels, measured=False),)

    def _columns(self, part: str, channels: Tensor) -> tuple[Part, ...]:
        """What reads the inputs of a linear: its columns, and no bias."""
        return (Part(f"{self._of(part)}.weight", 0 if self.family.conv1d else 1, channels),)

    def _gain(self, path: str, channels: Tensor) -> tuple[Part, ...]:
        return (Part(f"{path}.weight", 0, channels), *self._bias(path, channels))


def _groups(heads: int, kv_heads: int) -> Tensor:
    """Key-value head of each of `heads`: transformers repeats each for its group, 0 0 1 1, not 0 1 0 1."""
    return torch.arange(kv_heads).repeat_interleave(heads // kv_heads)


def _head_of(heads: int, width: int) -> Tensor:
    return torch.arange(heads).repeat_interleave(width)


def _rotary_channels(head_dim: int, rotary: int) -> Tensor:
    """Channel of each row of a head: RoPE mixes row i with row i + rotary/2, which must scale alike."""
    channels = torch.arange(head_dim)
    half = (rotary + 1) // 2
    channels[half : 2 * half] -= half
    channels[2 * half :] -= half
    return channels
