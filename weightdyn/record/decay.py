"""The decay that acts in an optimizer's updates: by its law where it is known, else asked of twins.

Closure cannot show a wrong λ: what is credited wrongly to decay, alignment takes with the opposite sign. And
optimizers differ: λη (torch), λη/η₀ (Composer), λη·scale (Adafactor), λ at another point (schedule-free), λ in the
gradient. So one that `optimizers.KNOWN` does not have is asked: twins of a tensor in the same state, under the same
settings, are stepped with the same gradient, one with its decay and one with none. Their difference over w is ηλ.
Nothing of this is left in the optimizer, its hooks or the random numbers. Where the answer is not clear λ is NaN,
for a reason.
"""

from __future__ import annotations

import inspect
import math
import random
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from weightdyn.core.checks import check_number
from weightdyn.record.optimizers import (
    Acting,
    Law,
    check_optimizer,
    decoupled_decay,
    is_remote,
    law_of,
    lr_of,
)

Given = float | Callable[[Mapping[str, Any], int], float]

_SAME = 1e-3  # relative error of λ that is accepted
_FEW = 64  # weights that tell whether a difference is proportional to them
_TOGETHER = 1 << 20  # weights that are asked at once
_LARGE = 1 << 24  # ... of a tensor that is not asked where two others of its group can be
_BESIDE = 0.05  # part of the step by which a twin of float64 may miss it
_DECAYS = re.compile(r"(^|_)(wd|weight_decay)($|_rate$|_at_y$)")
_REMEDY = "give the decay that acts by weight_decay=, a number or a function of group and step"


class Decay:
    """The decay that acts in an optimizer's updates; one for each optimizer that is logged.

    Args:
        optimizer: one that makes its steps itself.
        given: λ, in the place of what is found out: a number, or a function of the parameters' group and the
            update's number.

    Attributes:
        told: how λ is known: "table", "twins" or "given".

    Raises:
        TypeError, ValueError: `given` is neither a finite number nor a function.

    >>> p = nn.Parameter(torch.ones(3))
    >>> decay = Decay(torch.optim.AdamW([p], lr=0.1, weight_decay=0.5))
    >>> decay.told, decay.acted([p], step=1)
    ('table', [Acting(lr=0.1, weight_decay=0.5)])
    """

    def __init__(self, optimizer: torch.optim.Optimizer, given: Given | None = None):
        self._optimizer = check_optimizer(optimizer)
        if given is not None and not callable(given):
            given = check_number("weight_decay", given)
        self._given = given
        self._entry = law_of(optimizer)
        self.told = "given" if given is not None else "table" if self._entry is not None else "twins"
        self._why: str | None = None
        self._twins = _Twins(optimizer)
        self._notes: dict[Tensor, dict[str, float]] = {}
        self._first: dict[Tensor, Tensor] | None = None

    @property
    def reason(self) -> str | None:
        """Why λ is NaN, the first time that it was; None where it never was."""
        why = self._why or self._twins.why
        return why and f"{type(self._optimizer).__name__}: {why}; {_REMEDY}"

    @property
    def is_by_group(self) -> bool:
        """Whether `of_group` is what acts: nothing else of the optimizer has to be looked at."""
        return self._given is not None or (self._entry is not None and self._entry.law is None)

    def of_group(self, group: Mapping[str, Any], step: int) -> float:
        """λ that is given or named for a group in an update; what acts of it, `acted` tells."""
        if callable(self._given):
            return check_number("weight_decay(group, step)", self._given(group, step))
        return decoupled_decay(self._optimizer, group) if self._given is None else self._given

    def note(self, parameters: Sequence[Tensor]) -> None:
        """Before a logged update whose step has a closure, in which `ask` is called."""
        if self.told == "twins":
            self._first = {p: _beginning(p) for p in parameters}

    @torch.no_grad()
    def ask(self, parameters: Sequence[Tensor], step: int) -> None:
        """Before a logged update, when the gradients are there and weights and state are those before it.

        In a closure that is called several times it is asked each time.
        """
        entry, first = self._entry, self._first
        if self.told == "twins":
            moved = first is not None and any(not torch.equal(first[p], _beginning(p)) for p in first)
            self._twins.ask(parameters, moved)
        elif entry is not None and entry.noted:
            states = {p: self._optimizer.state.get(p) or {} for p in parameters}
            self._notes = {
                p: {key: float(state[key]) for key in entry.noted if key in state}
                for p, state in states.items()
            }

    @torch.no_grad()
    def acted(self, parameters: Sequence[Tensor], step: int) -> list[Acting]:
        """η and λ of each tensor in the update that was just made, the state being that after it."""
        groups = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        self._first = None
        if self.told == "twins":
            found = self._twins.answer(parameters, groups)
        elif self._entry is not None and self._entry.law is not None:
            found = [self._by_law(self._entry.law, p, groups[p]) for p in parameters]
        else:
            named = {id(group): self._named(group) for group in self._optimizer.param_groups}
            found = [named[id(groups[p])] for p in parameters]
        if callable(self._given):
            each = {id(group): self.of_group(group, step) for group in self._optimizer.param_groups}
            return [Acting(one.lr, each[id(groups[p])]) for p, one in zip(parameters, found, strict=True)]
        return found if self._given is None else [Acting(one.lr, self._given) for one in found]

    def _named(self, group: Mapping[str, Any]) -> Acting:
        return Acting(
            lr_of(group), decoupled_decay(self._optimizer, group) if self._given is None else math.nan
        )

    def _by_law(self, law: Law, parameter: Tensor, group: Mapping[str, Any]) -> Acting:
        told = law(self._optimizer, group, parameter, self._notes.get(parameter, {}))
        if isinstance(told, Acting):
            return told
        if self._given is None:
            self._why = self._why or told
        return Acting(lr_of(group), math.nan)


# --- twins ---------------------------------------------------------------------------------------------------


class _Expected(NamedTuple):
    """A tensor, its weights before the step, and what its twin has after it."""

    parameter: Tensor
    before: Tensor
    after: Tensor


class _Twins:
    """Questions to twins, and how much of a group one of its tensors answers for.

    At the 1st, 2nd, 4th, … question every tensor is asked. Where those of a group agree, the smallest that tells
    enough speaks for them until then, and another one in turn is asked beside it; once they disagree, each is asked
    each time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.why: str | None = None
        self._optimizer = optimizer
        self._asked = False
        self._questions = 0
        self._widen = True  # until a twin of float64 made another step
        self._speakers: dict[int, Tensor] = {}  # by group
        self._apart: set[int] = set()  # groups whose tensors decay differently
        self._answers: dict[Tensor, float | None] = {}  # ηλ; None where no number is, NaN of w = 0
        self._expected: dict[int, _Expected] = {}

    def refuse(self, why: str) -> None:
        """There is no answer for this update."""
        self.why = self.why or why
        self._asked, self._answers, self._expected = True, {}, {}

    def ask(self, parameters: Sequence[Tensor], moved: bool) -> None:
        """Ask what each group's decay will do in the step that begins, if it has not moved the weights yet."""
        self._asked, self._answers, self._expected = True, {}, {}
        wanted = set(parameters)
        members: dict[int, list[Tensor]] = {}
        for i, group in enumerate(self._optimizer.param_groups):
            some = sorted(
                (p for p in group["params"] if p in wanted and p.grad is not None), key=Tensor.numel
            )
            if some and _decays(self._optimizer, group):
                members[i] = some[:2] + [p for p in some[2:] if p.numel() <= _LARGE]
        if not members:
            return
        why = _why_no_twin(self._optimizer, [p for some in members.values() for p in some])
        if moved:
            why = "its step moves the weights before its closure makes the gradients"
        if why is not None:
            self.refuse(why)
            return
        self._questions += 1
        everyone = self._questions & (self._questions - 1) == 0
        asked = {i: some if everyone else self._chosen(i, some) for i, some in members.items()}
        try:
            self._compare(asked)
            apart = {i: members[i] for i in asked if not self._agree(i, asked[i])}
            self._compare({i: [p for p in some if p not in self._answers] for i, some in apart.items()})
        except _Untold as error:
            self.refuse(str(error))

    def _chosen(self, group: int, members: Sequence[Tensor]) -> Sequence[Tensor]:
        """Who of a group is asked where not everyone is."""
        speaker = self._speakers.get(group)
        if group in self._apart or not any(p is speaker for p in members):
            return members
        others = [p for p in members if p is not speaker and p.numel() <= _TOGETHER]
        return [p for p in members if p is speaker] + (others and [others[self._questions % len(others)]])

    def _agree(self, group: int, asked: Sequence[Tensor]) -> bool:
        """Whether the tensors of a group that were asked decay alike; who speaks for them, if so."""
        told = [p for p in asked if not _is_nan(self._answers[p])]  # w = 0 tells nothing
        products = [product for p in told if (product := self._answers[p]) is not None]
        alike = len(products) == len(told)
        if alike and products:
            alike = max(products) - min(products) <= _SAME / 5 * abs(products[-1])
        if not alike:
            self._apart.add(group)
        elif told and not any(p is self._speakers.get(group) for p in told):
            self._speakers[group] = next((p for p in told if p.numel() >= _FEW), told[-1])
        return alike

    def answer(
        self, parameters: Sequence[Tensor], groups: Mapping[Tensor, Mapping[str, Any]]
    ) -> list[Acting]:
        """η and λ of each, after the step."""
        index = {id(group): i for i, group in enumerate(self._optimizer.param_groups)}
        missed = {i for i, expected in self._expected.items() if not self._made(expected)}
        self._widen = self._widen and not missed
        decaying = {
            i for i, group in enumerate(self._optimizer.param_groups) if _decays(self._optimizer, group)
        }
        found = []
        for p in parameters:
            group, i = groups[p], index[id(groups[p])]
            lr = lr_of(group)
            decay = 0.0
            if i in decaying:
                decay = math.nan if i in missed else self._decay_of(p, i, lr)
            elif not any(True for _ in _settings(self._optimizer, group)) and self._hidden(group):
                decay = math.nan
            found.append(Acting(lr, decay))
        self._asked, self._answers, self._expected = False, {}, {}
        return found

    def _decay_of(self, parameter: Tensor, group: int, lr: float | Tensor) -> float:
        one = parameter if group in self._apart else self._speakers.get(group, parameter)
        product = self._answers.get(one, math.nan)
        eta, why = float(lr), None
        if one not in self._answers:
            why = "the gradients were not there when its step began"
            if self._asked and parameter.numel() > _LARGE:
                why = "its tensors decay differently, and some are too large to be asked"
        elif product is None:
            why = (
                "what its decay does to a tensor is not proportional to the weights (where it is added to the "
                "gradient, weight_decay=0 counts it as a part of u)"
            )
        elif math.isnan(product):  # w = 0
            return 0.0
        elif math.isnan(eta):
            why = "its groups name no learning rate"
        elif eta == 0 and product != 0:
            why = "it decays at a learning rate of 0"
        self.why = self.why or why
        return math.nan if why is not None or product is None else product / eta if eta else 0.0

    def _hidden(self, group: Mapping[str, Any]) -> bool:
        """Whether some setting may be a decay that nobody here knows how to switch off."""
        names = [
            name
            for name, value in (*group.items(), *vars(self._optimizer).items())
            if _MAY_DECAY.search(name) and not _NO_DECAY.search(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value
        ]
        if names:
            self.why = self.why or f"its setting {names[0]!r} may be a decay of the weights"
        return bool(names)

    def _made(self, expected: _Expected) -> bool:
        """Whether the optimizer made the step that its twin made, and no part of w more."""
        p, before, after = expected
        now = p.detach().double()
        missed, size = now - after, torch.linalg.vector_norm
        rounding = 4 * torch.finfo(p.dtype).eps * size(before)
        if size(missed) <= rounding:
            return True
        along = (missed * before).sum().abs()
        more = along > 0.01 * ((after - before) * before).sum().abs()
        more = more and p.numel() >= _FEW and along > size(missed) * size(before) / 2
        if size(missed) <= _BESIDE * size(now - before) + rounding and not more:
            return True
        self.why = self.why or "a twin of one of its tensors made another step than the optimizer"
        return False

    def _compare(self, asked: Mapping[int, Sequence[Tensor]]) -> None:
        """Ask tensors of some groups, as many at once as are small together."""
        batch: dict[Tensor, int] = {}
        for p, i in sorted(
            ((p, i) for i, some in asked.items() for p in some), key=lambda each: each[0].numel()
        ):
            if batch and sum(map(Tensor.numel, batch)) + p.numel() > _TOGETHER:
                self._compare_at_once(batch)
                batch = {}
            batch[p] = i
        if batch:
            self._compare_at_once(batch)

    def _compare_at_once(self, batch: Mapping[Tensor, int]) -> None:
        found: dict[Tensor, float | None] = {}
        after: dict[Tensor, Tensor] = {}
        if self._widen and all(p.numel() <= _LARGE for p in batch):
            try:
                plain, after = (_stepped(self._optimizer, [*batch], s, torch.float64) for s in (0.0, 1.0))
                told = {p: _over(p, plain[p], after[p]) for p in batch}
                found = {p: product for p, (product, sure) in told.items() if sure}
            except _Untold:
                raise
            except Exception:  # it may not work in float64
                found = {}
        for p, i in batch.items():
            if p not in found:
                try:
                    found[p], after[p] = self._stronger(p, self._optimizer.param_groups[i])
                except _Untold:
                    raise
                except Exception as error:
                    raise _Untold(
                        f"its twins could not be stepped ({type(error).__name__}: {error})"
                    ) from None
            kept = self._expected.get(i)
            if kept is None or kept.parameter.numel() < _FEW:
                self._expected[i] = _Expected(p, p.detach().double(), after[p])
        self._answers.update(found)

    def _stronger(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[float | None, Tensor]:
        """ηλ where rounding hides it: from a decay as strong as shows, if it acts in proportion to its setting."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        lr = lr_of(group)
        nominal = abs(float(lr)) * max(
            (abs(number) for number in _numbers(self._optimizer, group)), default=0.0
        )
        strong = 2.0 ** max(0, math.floor(-6 - math.log2(nominal))) if 0 < nominal < math.inf else 1.0
        plain, once, less, more = (
            _stepped(self._optimizer, [parameter], strength, dtype)[parameter]
            for strength in (0.0, 1.0, strong / 8, strong)
        )
        if torch.equal(plain, more):
            twice = _stepped(self._optimizer, [parameter], 1.0, dtype, grown=2.0)[parameter]
            w = (
                parameter.detach().double()
            )  # added again, it is there after the step unless something decays it
            limit = 8 * torch.finfo(dtype).eps * torch.linalg.vector_norm(w)
            if torch.linalg.vector_norm(twice - once - w) <= limit:
                return 0.0, once
            raise _Untold("its setting of a weight decay does not switch off what decays the weights")
        fits = _fits(parameter, plain, more)
        base = min(fits, key=lambda each: fits[each].rest)
        product = fits[base].product / strong
        if math.isnan(product) or fits[base].rest > _SAME * fits[base].size:
            return (product if math.isnan(product) else None), once
        rounding = 4 * torch.finfo(dtype).eps
        for decayed, strength, noise in ((less, strong / 8, 0.0), (once, 1.0, rounding)):
            other = _fits(parameter, plain, decayed)[base].product / strength
            if abs(other - product) > _SAME * abs(product) + noise:
                return None, once
        return product, once


class _Untold(Exception):
    """Why a question has no answer."""


class _Alone(TorchDispatchMode):
    """Refuses to communicate with other processes, which may not ask."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise _Untold("its step communicates between processes, so that no twin can be stepped")
        return func(*args, **(kwargs or {}))


def _is_nan(number: float | None) -> bool:
    return number is not None and math.isnan(number)


def _beginning(parameter: Tensor) -> Tensor:
    """Enough of a tensor to see that it was moved."""
    return parameter.detach().reshape(-1)[:1024].clone()


class _Fit(NamedTuple):
    """What decay does to a tensor, as a multiple of other weights: ηλ, what is left, and the size of all."""

    product: float
    rest: float
    size: float


def _fits(parameter: Tensor, plain: Tensor, decayed: Tensor) -> dict[str, _Fit]:
    """From the weights after a step without and with decay.

    A decay acts on the weights before the step or on those after it, w' = (1 − ηλ)(w − ηu). NaN where they are 0.
    """
    difference = plain - decayed
    size = float(torch.linalg.vector_norm(difference))
    found = {}
    for name, base in (("before", parameter.detach().double()), ("after", plain)):
        product = float((difference * base).sum()) / (float((base * base).sum()) or math.nan)
        found[name] = _Fit(product, float(torch.linalg.vector_norm(difference - product * base)), size)
    return found if parameter.detach().any() else dict.fromkeys(found, _Fit(math.nan, math.nan, size))


def _over(parameter: Tensor, plain: Tensor, decayed: Tensor) -> tuple[float | None, bool]:
    """ηλ, NaN where the weights are 0 and None where it is no number; and whether rounding did not hide it."""
    fits = _fits(parameter, plain, decayed)
    product, rest, size = min(fits.values(), key=lambda each: each.rest)
    if math.isnan(product) or size == 0:
        return product, math.isnan(product)
    if rest <= _SAME * size:
        return product, True
    hidden = 4 * torch.finfo(torch.float32).eps * float(torch.linalg.vector_norm(plain))
    return None, not rest <= hidden


# --- one twin ------------------------------------------------------------------------------------------------


_MAY_DECAY = re.compile(r"decay|shrink|(^|_)l2(_|$)")
_NO_DECAY = re.compile(r"lr|rate|moment|beta|var|ema|avg|rms|grad|eps|step")


def _settings(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Iterator[Any]:
    """Values of the settings that are named as a weight decay."""
    for name, value in (*group.items(), *vars(optimizer).items()):
        if _DECAYS.search(name) and not isinstance(value, bool | str):
            yield value


def _numbers(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Iterator[float]:
    for value in _settings(optimizer, group):
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, int | float | Tensor):
                yield float(each)


def _decays(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a group names a decay that is not 0."""
    return any(is_remote(value) for value in _settings(optimizer, group)) or any(_numbers(optimizer, group))


def _scaled(name: str, value: Any, strength: float) -> Any:
    if not _DECAYS.search(name) or isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        return type(value)(_scaled(name, each, strength) for each in value)
    return value * strength if isinstance(value, int | float | Tensor) else value


def _why_no_twin(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> str | None:
    kind = type(optimizer)
    if hasattr(kind, "__del__"):
        return "it frees what it holds when it is deleted, so that no twin can be made"
    if any(_holds_optimizer(value) for value in vars(optimizer).values()):
        return "it steps by another optimizer that it holds, so that no twin can be made"
    own = tree_leaves(
        [value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")]
    )
    members = {p for group in optimizer.param_groups for p in group["params"]}
    if sum(each.numel() for each in own if isinstance(each, Tensor) and each not in members) > _LARGE:
        return f"it keeps more than {_LARGE:,} numbers outside of its state, so that no twin is made"
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return "its step needs a closure, so that no twin can be stepped"
    strange = next((p for p in parameters if type(p.data) is not Tensor), None)
    if strange is not None:
        return f"its parameters are {type(strange.data).__name__}s, of which no twin can be made"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "its step is captured in a CUDA graph, where no twin can be stepped"
    return None


def _holds_optimizer(value: Any) -> bool:
    held = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    )
    return any(isinstance(each, torch.optim.Optimizer) for each in held)


def _stepped(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    strength: float,
    dtype: torch.dtype,
    grown: float = 1.0,
) -> dict[Tensor, Tensor]:
    """The weights of some tensors, in float64, after a step of a twin that has no others.

    Args:
        optimizer: the one whose twin is made.
        parameters: the tensors, which have gradients.
        strength: what its decay is multiplied by.
        dtype: of the twin's tensors.
        grown: what its weights are multiplied by.
    """
    with _unnoticed(parameters):
        twin, copies = _twin(optimizer, parameters, strength, dtype)
        for copy in copies.values() if grown != 1.0 else ():
            copy.mul_(grown)
        step: Any = type(twin).step
        while getattr(step, "hooked", False):  # torch's wrapper, which calls hooks and notes profiles
            step = step.__wrapped__
        step(twin)
    return {p: copy.detach().double() for p, copy in copies.items()}


@contextmanager
def _unnoticed(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Random numbers go on as if nothing had been drawn, and no hook, compiler or other process takes part."""
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    module = sys.modules[torch.optim.Optimizer.__module__]
    hooks = {
        name: getattr(module, name)
        for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    }
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            stack.enter_context(_Alone())
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        hooks = {name: held for name, held in hooks.items() if held}
        for name in hooks:
            setattr(module, name, OrderedDict())
        try:
            yield
        finally:
            for name, held in hooks.items():
                setattr(module, name, held)
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def _twin(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], strength: float, dtype: torch.dtype
) -> tuple[torch.optim.Optimizer, dict[Tensor, Tensor]]:
    """A copy of an optimizer that has some of its parameters, and their copies; it shares nothing it may write to.

    Whatever else refers to a parameter refers to an empty one in the copy.
    """
    twin: Any = object.__new__(type(optimizer))
    others = nn.Parameter(torch.empty(0), requires_grad=False)
    memo: dict[int, Any] = {id(p): others for group in optimizer.param_groups for p in group["params"]}
    memo[id(optimizer)] = twin
    copies: dict[Tensor, Tensor] = {}
    for p in parameters:
        copy = nn.Parameter(_cast(p.detach(), dtype), requires_grad=p.requires_grad)
        copies[p] = memo[id(p)] = copy
    for p, copy in copies.items():
        if p.grad is not None:
            copy.grad = memo[id(p.grad)] = _cast(p.grad, dtype)
        vars(copy).update(deepcopy(vars(p), memo))
    twin.state = memo[id(optimizer.state)] = defaultdict(dict)
    twin.param_groups = memo[id(optimizer.param_groups)] = []
    for group in optimizer.param_groups:
        one = memo[id(group)] = {"params": [copies[p] for p in group["params"] if p in copies]}
        one |= {
            name: deepcopy(_scaled(name, value, strength), memo)
            for name, value in group.items()
            if name != "params"
        }
        twin.param_groups.append(one)
    for key, state in optimizer.state.items():
        if not isinstance(key, Tensor):
            twin.state[key] = deepcopy(state, memo)
        elif key in copies:
            memo |= {id(value): _cast(value, dtype) for value in state.values() if isinstance(value, Tensor)}
            twin.state[copies[key]] = {name: deepcopy(value, memo) for name, value in state.items()}
    for name, value in vars(optimizer).items():
        if name in (
            "state",
            "param_groups",
            "step",
        ):  # a step of the object itself is a scheduler's, which counts
            continue
        hooks = name.startswith("_optimizer_") and name.endswith("_hooks")
        vars(twin)[name] = OrderedDict() if hooks else deepcopy(_scaled(name, value, strength), memo)
    twin.defaults = {name: _scaled(name, value, strength) for name, value in twin.defaults.items()}
    return twin, copies


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, in another type if it is a plain one of numbers; one made of others is made of their copies."""
    tensor = tensor.detach()
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name).clone() for name in names}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    plain = type(tensor) is Tensor and tensor.is_floating_point() and tensor.ndim > 0
    return tensor.to(dtype, copy=True) if plain else tensor.clone()
