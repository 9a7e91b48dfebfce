"""Shards that a training hands over: the log of stacks whose tensors say nothing of how they are cut.

Megatron's distributed optimizer and DeepSpeed's ZeRO keep flat pieces of fp32 weights and moments, and step them
in ways of their own. After each update the training hands over what its rank has, and the log is `ForceLogger`'s:
the same measuring, the same reductions, the same run directory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightdyn.core.checks import check_instance, check_number, check_whole, refuse, shown
from weightdyn.core.naming import Views
from weightdyn.record.logger import Every, ForceLogger, Tensors
from weightdyn.record.shards import Box, Copies, Held, Ranks


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one tensor, after an update.

    Attributes:
        name: the tensor's.
        weights: its fp32 (or fp64) weights after the update. Of one dimension they are a range of the flattened
            tensor that begins at `start`; else they are a box of it, at `offset`.
        exp_avg: m after the update, of the same shape.
        exp_avg_sq: v after the update, of the same shape.
        step: updates that the moments have had, t ≥ 1.
        lr: η of the update.
        weight_decay: λ that acted in it, decoupled: w ← (1 − ηλ)w.
        betas: β₁ and β₂.
        eps: ε.
        start: index of the first weight in the flattened tensor, or in the flattened `part` of it.
        offset: where a box begins in the whole tensor.
        part: (offset, shape) of the box that was flattened, where not all of the tensor was: tensor parallelism.
        grad: the gradient that made the update, as it acted (unscaled, clipped), of the same shape; without it
            drift and memory are NaN.
    """

    name: str
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    start: int = 0
    offset: Sequence[int] | None = None
    part: tuple[Sequence[int], Sequence[int]] | None = None
    grad: Tensor | None = None


class ShardLogger(ForceLogger):
    """Log the forces of tensors whose shards the training hands over itself, after each update.

    All ranks of `group` make one with the same arguments, and call `update` after every optimizer step with what
    they hold: a rank that holds nothing calls `update([])`. Each weight is handed over by one rank; of what several
    ranks hold a copy, by one of them. A tensor that nobody hands over was not updated.

        log = wd.ShardLogger(shapes, group=dist.group.WORLD, every=10, out="runs/mine")
        ...
        optimizer.step()
        log.update(shards())

    Megatron-LM, `DistributedOptimizer`: each rank of the data-parallel group has flat ranges of the fp32 weights.
    The group is that of one pipeline and tensor rank, each of which needs an `out` of its own.

        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        group = parallel_state.get_data_parallel_group()

        def shards():
            names = {p: name for name, p in model.named_parameters()}
            groups = {id(p): g for g in optimizer.optimizer.param_groups for p in g["params"]}
            pairs = [*zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups)]
            pairs += [*zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups)]
            for models, mains in pairs:
                for p, main in zip(models, mains):
                    state, settings = optimizer.optimizer.state[main], groups[id(main)]
                    yield wd.Shard(
                        names[p], main, state["exp_avg"], state["exp_avg_sq"],
                        step=int(settings.get("step", state.get("step"))), lr=settings["lr"],
                        weight_decay=settings["weight_decay"], betas=settings["betas"], eps=settings["eps"],
                        start=optimizer._get_model_param_range_map(p)["param"].start, grad=main.grad,
                    )

    DeepSpeed, ZeRO-1 and 2: the fragment of each parameter on this rank, if there is one.

        def shards():
            inner = engine.optimizer.optimizer
            for name, p in engine.module.named_parameters():
                fragment = getattr(p, "_hp_mapping", None)
                if fragment is not None:
                    settings = inner.param_groups[fragment.param_group_index]
                    yield wd.Shard(
                        name, fragment.get_hp_fragment(), fragment.get_optim_state_fragment("exp_avg"),
                        fragment.get_optim_state_fragment("exp_avg_sq"), step=engine.global_steps,
                        lr=settings["lr"], weight_decay=settings["weight_decay"], betas=settings["betas"],
                        eps=settings["eps"], start=fragment.lp_fragment_address.start,
                    )

    DeepSpeed, ZeRO-3: one flat piece of each parameter, the last padded. Its optimizer makes a step for each of its
    sub-groups; `update` is called once, after `engine.step()`.

        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        shapes = {name: tuple(p.ds_shape) for name, p in engine.module.named_parameters()}

        def shards():
            settings = engine.optimizer.param_groups[0]          # of the parameter's group, if there are several
            for name, p in engine.module.named_parameters():
                size = p.ds_tensor.ds_numel
                start = dist.get_rank() * size
                here = max(0, min(size, p.ds_numel - start))
                yield wd.Shard(
                    name, safe_get_local_fp32_param(p).flatten()[:here],
                    *(safe_get_local_optimizer_state(p, key).flatten()[:here] for key in ("exp_avg", "exp_avg_sq")),
                    step=engine.global_steps, lr=settings["lr"], weight_decay=settings["weight_decay"],
                    betas=settings["betas"], eps=settings["eps"], start=start,
                )

    Args:
        shapes: {name: shape of the whole tensor}.
        group: the process group whose ranks hold the tensors together. None: this process has all of them.
        dtype: of the weights that are handed over, float32 or float64.
        every, out, tensors, views, weibull_every, snapshot_every, overwrite, config, rules: as `ForceLogger`'s. At
            the start nothing is fitted, for the weights come after the first update.
        start_step: updates made before this logger.

    Raises:
        TypeError, ValueError: as `ForceLogger`; `shapes` is no mapping of shapes.

    >>> log = ShardLogger({"w": (2, 2)})
    >>> w, m, v = torch.ones(4), torch.ones(4), torch.ones(4)
    >>> log.update([Shard("w", w, m, v, step=1, lr=0.1, weight_decay=0.0)])
    >>> log.latest()["norm_sq_after"].item()
    4.0
    """

    _sees_start = False

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        group: Any = None,
        dtype: torch.dtype = torch.float32,
        every: Every = 1,
        out: str | Path | None = None,
        tensors: Tensors | None = None,
        views: Views = True,
        weibull_every: Every | None = None,
        snapshot_every: Every | None = None,
        start_step: int = 0,
        overwrite: bool = False,
        config: Any = None,
        rules: Mapping[str, str] | None = None,
    ):
        check_instance("shapes", shapes, Mapping, "{name: shape of the whole tensor}")
        self._shapes = {name: _checked_shape(name, shape) for name, shape in shapes.items()}
        self._group = group
        if dtype not in (torch.float32, torch.float64):
            raise refuse("dtype", "torch.float32 or torch.float64", dtype)
        self._dtype = dtype
        ranks = () if group is None else tuple(sorted(dist.get_process_group_ranks(group)))
        self._copies: Copies = (frozenset(ranks),) if len(ranks) > 1 else ()
        self._elsewhere = {name: nn.Parameter(torch.empty(0, dtype=dtype)) for name in self._shapes}
        self._named: dict[Tensor, str] = {p: name for name, p in self._elsewhere.items()}
        self._here: dict[
            str, tuple[Any, nn.Parameter, Held]
        ] = {}  # by name: how it is cut, and what stands for it
        # It makes no step: it holds the moments and settings where the measuring looks for them.
        holder = torch.optim.AdamW([{"params": [pair]} for pair in self._elsewhere.items()], weight_decay=0.0)
        super().__init__(
            holder,
            every=every,
            out=out,
            tensors=tensors,
            views=views,
            source="moments",
            weibull_every=weibull_every,
            snapshot_every=snapshot_every,
            start_step=start_step,
            overwrite=overwrite,
            config=config,
            rules=rules,
        )
        self._describe(optimizer={"name": "AdamW, handed over in shards"})

    def update(self, shards: Iterable[Shard]) -> None:
        """An optimizer step was made: hand over what this rank holds after it.

        Of an update that is not logged only the names are looked at.

        Raises:
            TypeError, ValueError: a shard does not fit into its tensor, or is there twice.
        """
        given: dict[str, Shard] = {}
        for shard in shards:
            check_instance("shards", shard, Shard, "Shard(name, weights, …)")
            if shard.name not in self._shapes or shard.name in given:
                what = (
                    "is there twice" if shard.name in given else f"is none of shapes: {[*self._shapes][:3]} …"
                )
                raise ValueError(f"shards: {shard.name!r} {what}")
            given[shard.name] = shard
        (holder,) = self._optimizers
        for group, name in zip(holder.param_groups, self._shapes, strict=True):
            group["params"] = [self._stand_in(name, given.get(name))]
            # Of the update that comes; what its decay leaves of the weights is seen behind it.
            group.update(lr=0.0, weight_decay=0.0)
        self._on_step_begin(0, holder, (), {})
        for group, name in zip(holder.param_groups, self._shapes, strict=True):
            shard, (parameter,) = given.get(name), group["params"]
            if shard is not None:
                group.update(lr=float(shard.lr), weight_decay=float(shard.weight_decay))
                group.update(betas=tuple(shard.betas), eps=float(shard.eps))
                holder.state[parameter] = {
                    "step": torch.tensor(float(shard.step)),
                    "exp_avg": shard.exp_avg.detach(),
                    "exp_avg_sq": shard.exp_avg_sq.detach(),
                }
        self._on_step_end(0, holder, (), {})

    def _stand_in(self, name: str, shard: Shard | None) -> nn.Parameter:
        """The parameter that stands for a tensor: what is here of it."""
        if shard is None:
            self._here.pop(name, None)
            parameter = self._elsewhere[name]
            parameter.grad = torch.empty(0, dtype=self._dtype)  # it may be updated elsewhere
            return parameter
        self._check(shard)
        weights = shard.weights.detach()
        cut = tuple(weights.shape), weights.dtype, weights.device, shard.start, shard.offset, shard.part
        known, parameter, _ = self._here.get(name, (None, None, None))
        if parameter is None or known != cut:
            parameter = nn.Parameter(weights)
            self._here[name] = cut, parameter, self._cut(shard)
            self._named = {p: name for name, p in self._elsewhere.items()}
            self._named.update({p: name for name, (_, p, _) in self._here.items()})
        parameter.data = weights
        grad = torch.full((), math.nan, dtype=weights.dtype, device=weights.device).expand(weights.shape)
        parameter.grad = grad if shard.grad is None else shard.grad.detach().to(weights.dtype)
        state = self._optimizers[0].state
        before = torch.tensor(float(shard.step - 1))
        state[parameter] = {**state.get(parameter, {}), "step": before}
        return parameter

    def _check(self, shard: Shard) -> None:
        grads = {} if shard.grad is None else {"grad": shard.grad}
        own = {"weights": shard.weights, "exp_avg": shard.exp_avg, "exp_avg_sq": shard.exp_avg_sq}
        for name, tensor in {**own, **grads}.items():
            check_instance(name, tensor, Tensor, "a tensor")
            if tensor.shape != shard.weights.shape:
                raise ValueError(
                    f"{name} of {shard.name} has the shape {tuple(tensor.shape)}, and its weights have "
                    f"{tuple(shard.weights.shape)}"
                )
        if shard.weights.dtype != self._dtype:
            raise TypeError(
                f"weights of {shard.name} are {shard.weights.dtype}, where dtype={self._dtype}: hand over those "
                "that the optimizer steps, for others round the update away"
            )
        check_whole("step", shard.step)
        for name in ("lr", "weight_decay", "eps"):
            check_number(name, getattr(shard, name))

    def _cut(self, shard: Shard) -> Held:
        """Where a shard lies in its tensor."""
        shape = self._shapes[shard.name]
        first, size = shard.part or ((0,) * len(shape), shape)
        local = tuple(shard.weights.shape)
        if len(local) == 1 and (len(shape) != 1 or shard.offset is None):
            start = check_whole("start", shard.start)
            flat = Held.flat(size, start, start + local[0], self._copies)
            fits = start + local[0] <= math.prod(size)
            boxes = tuple(
                Box(tuple(a + b for a, b in zip(first, box.offset, strict=True)), box.shape)
                for box in flat.boxes
            )
            held = Held(shape, boxes, flat.places, self._copies)
        else:
            offset = tuple(shard.offset or first)
            fits = len(offset) == len(local) == len(shape)
            held = Held(shape, (Box(offset, local),), ((),), self._copies)
        ends = (end for box in held.boxes for end in zip(box.offset, box.shape, shape, strict=False))
        if not fits or any(a < 0 or a + n > size for a, n, size in ends):
            where = {"start": shard.start, "offset": shard.offset, "part": shard.part}
            raise ValueError(
                f"weights of {shard.name}, {local}, do not lie in a tensor of shape {shape} at "
                f"{', '.join(f'{name}={shown(value)}' for name, value in where.items() if value is not None)}"
            )
        if not self._copies and sum(math.prod(box.shape) for box in held.boxes) != math.prod(shape):
            raise ValueError(
                f"weights of {shard.name} are {local}, a part of {shape}: give group=, whose ranks have the rest"
            )
        return held

    def _shape(self, name: str, parameter: Tensor) -> tuple[int, ...]:
        return self._shapes[self._named[parameter]]

    def _held(self, index: int, name: str, parameter: Tensor) -> tuple[Held, bool]:
        _, here, held = self._here.get(self._named[parameter], (None, None, None))
        if held is not None and here is parameter:
            return held, False
        return Held(self._shape(name, parameter), (), (), self._copies), True

    def _all_ranks(self) -> tuple[int, ...]:
        return tuple(sorted(self._copies[0])) if self._copies else (0,)

    def _sharing(self, shared: Sequence[Any]) -> Ranks | None:
        if not self._copies:
            return None
        if self._book.ranks is not None:
            return self._book.ranks
        backend = dist.get_backend(self._group)
        device = (
            torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        )
        return Ranks([self._copies], [self._group], device)


def _checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(name, str) or not isinstance(shape, list | tuple):
        raise TypeError(
            f"shapes must be {{name: shape of the whole tensor}}, got {shown(name)}: {shown(shape)}"
        )
    return tuple(check_whole("shapes", size) for size in shape)
