"""Prove on a batch that a rescaling changes nothing: outputs, loss and gradients.

The proof looks at what the network computes and not at what the pairs say, so it finds a pair that is none: in
float64 what is left of the difference is rounding, or it is a mistake.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from weightdyn.core.checks import check_instance, shown
from weightdyn.wisca.apply import apply_, scale_by
from weightdyn.wisca.pairs import unwrap
from weightdyn.wisca.plan import Pairs, own_pairs, plan_rescale, scale_factors

Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor | None]]


def check_equivalence(
    model: nn.Module,
    batch: Any,
    *,
    table: pd.DataFrame | None = None,
    pairs: Pairs = ("qk", "vo"),
    forward: Forward | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Prove on a batch that a rescaling changes nothing: outputs, loss and gradients, on a copy of the model.

    In the model's own type and in float64, with dropout off; what a model computes in float32 of its own accord
    (the loss, in transformers) stays that. The gradient of a weight that was multiplied by f must be g/f; the
    difference is that of f times the new gradient and the old one.

    Args:
        model: the model. It stays as it is, and so does its mode.
        batch: arguments of the model, with labels if there shall be a loss; or token ids, labels at once.
        table: the rescaling to check: of `plan_rescale`, or your own. Default: one is planned.
        pairs: as in `rescale_`; your own pairs, if the table was made with such.
        forward: for models that do not return transformers' outputs: a function of a model and the batch, that
            returns outputs and loss. Without a loss (None) the gradients are those of the outputs' mean square.
        options: of `plan_rescale`: norm, granularity, power_of_two, max_alpha, errors, progress.

    Returns:
        Rows for each `dtype` and `quantity` ("outputs", "loss", "gradients"): `difference` (max|Δ|), `magnitude`
        (the largest before; of gradients that of all tensors), `relative` (their ratio), and `tensor`, the one
        whose gradient differs most.

    Raises:
        TypeError, ValueError: `model`, `batch` or `table` is none, or what `plan_rescale` raises.

    Memory: one copy of the model and its gradients, in float64 at last.

    >>> import torch, weightdyn as wd
    >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    >>> config = GPTNeoXConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                        num_attention_heads=2, bos_token_id=0, eos_token_id=0)
    >>> proof = check_equivalence(GPTNeoXForCausalLM(config), torch.arange(8)[None], power_of_two=True)
    >>> proof["difference"].max().item()
    0.0
    """
    model = unwrap(model)
    if forward is None:
        what = "token ids (whole numbers), or a dict of the model's arguments; give forward= for others"
        check_instance("batch", batch, (Tensor, Mapping), what)
        ids = isinstance(batch, Tensor) and not (
            batch.is_floating_point() or batch.is_sparse or batch.is_meta
        )
        if not len(batch) or (isinstance(batch, Tensor) and not ids):
            raise ValueError(f"batch must be {what}, got {shown(batch)}")
    elif not callable(forward):
        raise TypeError(f"forward must be a function of a model and a batch, or None, got {shown(forward)}")
    if table is None:
        table = plan_rescale(model, pairs=pairs, **options)
    elif options:
        raise ValueError(f"table is given: {sorted(options)} would have no effect")
    own = own_pairs(pairs)
    factors = scale_factors(model, table, pairs=own)
    rows = []
    for dtype in (None, torch.float64):
        twin = copy.deepcopy(model).eval()
        twin = twin if dtype is None else twin.to(dtype)
        before = _measure(twin, batch, dtype, forward)
        apply_(twin, table, pairs=own, progress=False)
        after = _measure(twin, batch, dtype, forward)
        gradients = before.pop("gradients"), after.pop("gradients")
        kind = str(before["outputs"].dtype).removeprefix("torch.")
        for quantity, value in before.items():
            rows.append(
                {
                    "dtype": kind,
                    "quantity": quantity,
                    "difference": float((after[quantity].double() - value.double()).abs().max()),
                    "magnitude": float(value.abs().max()),
                    "tensor": None,
                }
            )
        for name, gradient in gradients[1].items():
            scale_by(gradient, factors.get(name, {}), 1)
        differences = {
            name: float((gradients[1][name].double() - gradient.double()).abs().max())
            for name, gradient in gradients[0].items()
        }
        worst = max(differences, key=differences.__getitem__)
        rows.append(
            {
                "dtype": kind,
                "quantity": "gradients",
                "difference": differences[worst],
                "magnitude": max(float(gradient.abs().max()) for gradient in gradients[0].values()),
                "tensor": worst,
            }
        )
    found = pd.DataFrame(rows)
    found.insert(4, "relative", found["difference"] / found["magnitude"])
    return found


def _measure(
    model: nn.Module, batch: Any, dtype: torch.dtype | None, forward: Forward | None
) -> dict[str, Any]:
    """Outputs, loss if there is one, and the gradients of all parameters."""
    model.zero_grad()
    with torch.enable_grad():
        if forward is not None:
            outputs, loss = forward(model, _cast(batch, dtype))
        else:
            inputs: dict[str, Any] = (
                {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else dict(batch)
            )
            result = model(**{name: _cast(value, dtype) for name, value in inputs.items()})
            loss = getattr(result, "loss", None)
            outputs = result.logits if hasattr(result, "logits") else result[0]
        torch.as_tensor(outputs.square().mean() if loss is None else loss).backward()
    gradients = {
        name: each.grad.detach().clone() for name, each in model.named_parameters() if each.grad is not None
    }
    model.zero_grad()
    found = {"outputs": outputs.detach(), "gradients": gradients}
    return found if loss is None else {**found, "loss": loss.detach()}


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    is_number = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_number and dtype is not None else value
