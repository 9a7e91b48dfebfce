"""The loops that people write around an optimizer: each is logged as it trains, and trains as if it were not.

Every training here runs twice. Alone it gives the weights that it must end at, to the last bit. With a logger each
of its updates is made again in float64, from copies of weights, gradients and state that were taken before it.
"""

import contextlib
import copy
import functools
import io
import math
import os
import pickle
import re
import threading
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import weightdyn as wd

EXACT = 1e-4  # of the row's budget
HALF = 2**-7  # m̂, √v̂ and their quotient are rounded to 8 bits, 2⁻⁹ each, and ‖u‖² has u twice


class Reference:
    """Each update of AdamW again in float64, of what `watch` copied before it."""

    def __init__(self, optimizer, names):
        self.optimizer, self.names = optimizer, names
        self.rows, self.updates = [], 0
        self.held = {}  # what m would be if every gradient had been 1

    @contextlib.contextmanager
    def watch(self, scale=1.0):
        before = [
            (p, {**group}, self.copied(p), p.grad.detach().double() / scale, self.state(p))
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        for _, group, *_ in before:
            group["lr"] = float(group["lr"])  # a tensor may be another one after the step
        yield
        moved = [each for each in before if self.state(each[0]).get("step", 0) > each[-1].get("step", 0)]
        self.updates += bool(moved)
        for p, group, w, g, state in moved:
            self.row(p, group, w, -g if group["maximize"] else g, state)

    def copied(self, p):
        return p.detach().double().clone()

    def state(self, p):
        return {key: self.copied(value) for key, value in self.optimizer.state.get(p, {}).items()}

    def row(self, p, group, w, g, state):
        lr, decay, eps = group["lr"], group["weight_decay"], group["eps"]
        beta1, beta2 = map(float, group["betas"])
        count = float(state.get("step", 0)) + 1
        m = beta1 * state.get("exp_avg", 0) + (1 - beta1) * g
        v = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * g * g
        if p.dtype.itemsize < 4 and not group["fused"]:  # each operation stores what it made
            m, v = (self.state(p)[key] for key in ("exp_avg", "exp_avg_sq"))
        if group["amsgrad"]:
            v = torch.maximum(v, state.get("max_exp_avg_sq", torch.zeros_like(v)))
        held = self.held[p] = beta1 * (self.held[p] if count > 1 else 0) + (1 - beta1)
        below = (v / (1 - beta2**count)).sqrt() + eps
        u = m / (1 - beta1**count) / below
        g = g * held / (1 - beta1**count) / below  # as if all of u were made of it
        shrink = 1 - lr * decay
        self.rows.append({
            "step": self.updates,
            "tensor": self.names[p],
            "alignment": float(-2 * lr * shrink * (w * u).sum()),
            "injection": float(lr**2 * (u * u).sum()),
            "decay": float((shrink**2 - 1) * (w * w).sum()),
            "drift": float(-2 * lr * shrink * (w * g).sum()),
            "norm_sq": float((w * w).sum()),
            "norm_sq_after": float(self.copied(p).square().sum()),
        })  # fmt: skip

    def furthest(self, got):
        """The largest error of a row, as a fraction of its budget: |drift| + |memory| + |injection| + |decay|."""
        want = pd.DataFrame(self.rows)
        both = got.astype({"tensor": str}).merge(want, on=["step", "tensor"], suffixes=("", "_want"))
        assert len(both) == len(want) == len(got) > 0
        wanted = both[[f"{name}_want" for name in ("injection", "decay", "drift", "alignment")]]
        budget = wanted.abs().sum(axis=1) + (both["alignment_want"] - both["drift_want"]).abs()
        bounds = dict.fromkeys(("alignment", "injection", "decay", "drift"), budget)
        bounds |= dict.fromkeys(("norm_sq", "norm_sq_after"), both["norm_sq_after_want"])
        errors = pd.DataFrame({name: (both[name] - both[f"{name}_want"]).abs() for name in bounds})
        assert errors.notna().all(axis=None)
        fractions = [
            errors[name].where(errors[name] == 0, errors[name] / bound) for name, bound in bounds.items()
        ]
        return max(each.max() for each in fractions)


def twice(train, print_as=""):
    """Run a training alone and logged; the tables, and that nothing but the tables is the difference."""
    alone = train(lambda *_, **__: lambda **_: contextlib.nullcontext())
    attached = []

    def attach(optimizer, params, within=EXACT, **options):
        logger = wd.ForceLogger(optimizer, params, views=False, **options)
        pairs = params.named_parameters() if isinstance(params, nn.Module) else params
        reference = Reference(optimizer, {p: name for name, p in pairs})
        attached.append((logger, reference, within))
        return reference.watch

    logged = train(attach)
    assert len(alone) == len(logged) > 0
    assert all(torch.equal(a, b) for a, b in zip(alone, logged, strict=True))
    for logger, reference, within in attached:
        assert logger.step == reference.updates
        logger.close()
        error = reference.furthest(logger.run.forces())
        print(f"{print_as}: {error:.1e}")
        assert error <= within
    return [(logger.run, reference) for logger, reference, _ in attached]


def language_model(kind="llama", **options):
    import transformers

    torch.manual_seed(0)
    settings = {
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 32, **options,
    }  # fmt: skip
    if kind == "neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**settings))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def recompute(model, reentrant):
    """Activation checkpointing, under the name that this transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    keyword = f"{name}_checkpointing_kwargs"
    getattr(model, f"{name}_checkpointing_enable")(**{keyword: {"use_reentrant": reentrant}})


def loss_on(model, t):
    batch = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(t))
    return model(input_ids=batch, labels=batch).loss


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.LayerNorm(10), nn.Linear(10, 3))


def loss_of(model, t):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
    return (model(x).square().mean(-1) - 1).square().mean()


def adamw(params, **options):
    return torch.optim.AdamW(params, **{"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, **options})


def ends(*optimizers):
    """The weights and the state that a training ended at."""
    return [
        x.detach()
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        for x in (p, *optimizer.state[p].values())
    ]


# --- types ------------------------------------------------------------------------------------------------------


def autocast(attach, inside, **kind):
    model = language_model("neox")
    optimizer = adamw(model.parameters(), **kind)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, n / 4))
    watch = attach(optimizer, model)
    for t in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_on(model, t)
            if inside:
                loss.backward()
                with watch():
                    optimizer.step()
        if not inside:
            loss.backward()
            with watch():
                optimizer.step()
        schedule.step()
    return ends(optimizer)


def grad_scaler(attach, unscale, **kind):
    model = language_model()
    optimizer = adamw(model.parameters(), **kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    watch = attach(optimizer, model)
    for t in range(12):
        optimizer.zero_grad()
        for part in (2 * t, 2 * t + 1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_on(model, part) / 2
            scaler.scale(loss).backward()
        if t in (0, 4, 5, 11):
            model.lm_head.weight.grad[3, 1] = math.inf
        scale = scaler.get_scale()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        with watch(scale=1.0 if unscale else scale):
            scaler.step(optimizer)
        scaler.update()
    assert {float(state["step"]) for state in optimizer.state.values()} == {8.0}
    return ends(optimizer)


def masters(attach, **kind):
    model = language_model().to(torch.bfloat16)
    copies = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    optimizer = adamw(copies.values(), **kind)
    watch = attach(optimizer, copies.items())
    for t in range(8):
        loss_on(model, t).backward()
        for p, master in zip(model.parameters(), copies.values(), strict=True):
            master.grad, p.grad = p.grad.float(), None
        with watch():
            optimizer.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), copies.values(), strict=True):
                p.copy_(master)
    return [*ends(optimizer), *(p.detach() for p in model.parameters())]


def bf16_weights(attach, within, **kind):
    model = language_model("neox").to(torch.bfloat16)
    optimizer = adamw(model.parameters(), eps=2**-20, **kind)
    watch = attach(optimizer, model, within)
    for t in range(8):
        optimizer.zero_grad()
        loss_on(model, t).backward()
        with watch():
            optimizer.step()
    return ends(optimizer)


def bf16_matrices_beside_fp32_norms(attach, within, **kind):
    model = mlp()
    for i in (0, 3):
        model[i].to(torch.bfloat16)

        def cast(module, given):
            return given[0].to(module.weight.dtype)

        model[i].register_forward_pre_hook(cast)
    model[2].register_forward_pre_hook(lambda module, given: given[0].float())
    optimizer = adamw(model.parameters(), eps=2**-20, **kind)
    watch = attach(optimizer, model, within)
    for t in range(8):
        optimizer.zero_grad()
        loss_of(model, t).float().backward()
        with watch():
            optimizer.step()
    return ends(optimizer)


def fp16_weights_of_small_gradients(attach):
    # v is below the least number of float16: the fused step knows it, the state does not.
    rng = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(40, 30, generator=rng).half())
    optimizer = adamw([w], fused=True)
    watch = attach(optimizer, [("w", w)])
    for _ in range(4):
        w.grad = 1e-4 * torch.randn(40, 30, generator=rng).half()
        with watch():
            optimizer.step()
    return ends(optimizer)


def mixed_kernel(params, grads, exp_avgs, exp_avg_sqs, tops, steps, **given):
    """What the fused kernel of a GPU makes of fp32 weights beside bf16 moments: it rounds what it stores, last."""
    beta1, beta2, lr = given["beta1"], given["beta2"], given["lr"]
    for p, g, first, second, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        m = torch.lerp(first.float(), g, 1 - beta1)
        v = second.float() * beta2 + (1 - beta2) * g * g
        below = v.sqrt() / (1 - beta2 ** float(step)) ** 0.5 + given["eps"]
        p.mul_(1 - lr * given["weight_decay"]).sub_(lr / (1 - beta1 ** float(step)) * m / below)
        first.copy_(m)
        second.copy_(v)


def bf16_moments(attach, pattern="", **options):
    # torchtitan's fused_opt_states_bf16: a hook makes the state before the optimizer would.
    model = language_model("neox")
    optimizer = adamw(model.parameters(), fused=True)
    chosen = [p for name, p in model.named_parameters() if re.search(pattern, name)]

    def prepare(*_):
        for p in chosen:
            if not optimizer.state[p]:
                zeros = {key: torch.zeros_like(p, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros(()), **zeros}

    optimizer.register_step_pre_hook(prepare)
    watch = attach(optimizer, model, **options)
    with mock.patch.object(torch, "_fused_adamw_", mixed_kernel):
        for t in range(8):
            optimizer.zero_grad()
            loss_on(model, t).backward()
            with watch():
                optimizer.step()
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.bfloat16 for p in chosen)
    return ends(optimizer)


# --- gradients --------------------------------------------------------------------------------------------------


def checkpointed(attach, reentrant, clip, set_to_none):
    model = language_model("neox", attention_dropout=0.1, hidden_dropout=0.1)
    recompute(model, reentrant)
    model.enable_input_require_grads()
    optimizer = adamw(model.parameters())
    watch = attach(optimizer, model)
    for t in range(6):
        for part in range(3):
            (loss_on(model, 3 * t + part) / 3).backward()
        if clip == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        else:
            nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        with watch():
            optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return ends(optimizer)


def tied_frozen_and_added(attach, set_to_none):
    model = language_model(tie_word_embeddings=True)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    rest = [p for name, p in model.named_parameters() if "norm" not in name]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = adamw(rest)
    watch = attach(optimizer, model)
    for t in range(12):
        if t in (3, 8):  # freeze a layer, and free it again
            model.model.layers[0].requires_grad_(t == 8)
        if t == 5:
            optimizer.add_param_group(
                {"params": norms, "weight_decay": 0.0, "betas": (0.8, 0.9), "eps": 1e-6, "lr": 1e-2}
            )
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_on(model, t).backward()
        with watch():
            optimizer.step()
    return ends(optimizer)


def in_the_backward_pass(attach):
    model = language_model("neox")
    recompute(model, False)
    pairs = {p: (name, p) for name, p in model.named_parameters()}
    optimizers = {p: adamw([p]) for p in pairs}
    watches: dict[Any, Any] = dict.fromkeys(pairs, lambda: contextlib.nullcontext())
    for p in list(pairs)[::3]:
        watches[p] = attach(optimizers[p], [pairs[p]])

    def update(p):
        with watches[p]():
            optimizers[p].step()
        p.grad = None

    for p in pairs:
        p.register_post_accumulate_grad_hook(update)
    for t in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_on(model, t)
        loss.backward()
    return ends(*optimizers.values())


def functional(attach):
    models = [mlp().requires_grad_(True) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    with torch.no_grad():  # three that differ
        for p in params.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.ndim)))
    optimizer = adamw(params.values())
    watch = attach(optimizer, params.items())

    def loss(one, own, x):
        return (torch.func.functional_call(models[0], (one, own), x).square().mean(-1) - 1).square().mean()

    for t in range(8):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        grads = torch.vmap(torch.func.grad(loss), (0, 0, None))(params, buffers, x)
        for name, p in params.items():
            p.grad = grads[name]
        with watch():
            optimizer.step()
    return ends(optimizer)


# --- what happens between the steps -----------------------------------------------------------------------------


def surgery(attach, reset=False, **kind):
    model = mlp()
    optimizer = adamw(model.parameters(), lr=1e-2, **kind)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=20)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    watch = attach(optimizer, model)
    w = model[0].weight
    for t in range(16):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        with watch():
            optimizer.step()
        schedule.step()
        average.update_parameters(model)
        with torch.no_grad():
            if t % 3 == 0:
                model[3].weight.clamp_(-0.3, 0.3)
            if t == 2:  # parts of one vector from here on
                vector = nn.utils.parameters_to_vector(model.parameters())
                nn.utils.vector_to_parameters(vector.clone(), model.parameters())
            if t == 4:  # WISCA's: u stays
                w.mul_(2)
                optimizer.state[w]["exp_avg"].div_(2)
                optimizer.state[w]["exp_avg_sq"].div_(4)
            if t == 7:
                for p, mean in zip(model.parameters(), average.module.parameters(), strict=True):
                    p.copy_(mean)
            if t == 9:
                w.data = torch.randn(10, 6, generator=torch.Generator().manual_seed(9))
            if t == 11 and reset:
                optimizer.state.pop(w)
            if t == 13:
                optimizer.param_groups[0].update(weight_decay=0.3, eps=1e-5)
    return [*ends(optimizer), *(p.detach() for p in average.parameters())]


# --- options ----------------------------------------------------------------------------------------------------


def every_option_at_once(attach):
    model = mlp()
    groups = [
        {"params": [model[0].weight, model[0].bias], "betas": (0.7, 0.8), "eps": 1e-4, "amsgrad": True},
        {"params": [model[2].weight, model[3].weight], "lr": torch.tensor(2e-3), "weight_decay": 0.0},
        {"params": [model[2].bias, model[3].bias], "maximize": True},
    ]
    optimizer = adamw(groups, lr=torch.tensor(1e-2), fused=True, capturable=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (n + 1) / 8)
    watch = attach(optimizer, model)
    for t in range(8):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        with watch():
            optimizer.step()
        schedule.step()
    return ends(optimizer)


def modes(attach):
    torch.manual_seed(0)
    norm, turn = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal
    model = nn.Sequential(norm(nn.Linear(6, 10)), turn(nn.Linear(10, 10)), nn.Linear(10, 3))
    optimizer = adamw(model.parameters())
    watch = attach(optimizer, model)
    for t in range(6):
        optimizer.zero_grad()
        params = [*model.parameters()]
        grads = torch.autograd.grad(loss_of(model, t), params, create_graph=t == 1)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        dtype = (torch.float32, torch.bfloat16, torch.float16)[t % 3]
        with watch(), contextlib.ExitStack() as stack:
            torch.set_default_dtype(dtype)
            stack.callback(torch.set_default_dtype, torch.float32)
            torch.use_deterministic_algorithms(t == 2)
            stack.callback(torch.use_deterministic_algorithms, False)
            if t == 3:
                stack.enter_context(torch.inference_mode())
            optimizer.step()
    return ends(optimizer)


def differentiable(attach):
    start = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    w = start.clone()
    optimizer = adamw([w], differentiable=True)
    watch = attach(optimizer, [("w", w)])
    for t in range(4):
        w.grad = (start * (t + 1)).sin()
        with watch():
            optimizer.step()
    w.square().sum().backward(inputs=[start])
    assert start.grad is not None
    return [start.grad, *ends(optimizer)]


KINDS = {"foreach": {"foreach": True}, "fused": {"fused": True}}
LOOPS = {
    **{f"autocast-{name}": (autocast, {"inside": False, **kind}) for name, kind in KINDS.items()},
    "autocast-around-the-step": (autocast, {"inside": True}),
    **{f"scaler-{name}": (grad_scaler, {"unscale": False, **kind}) for name, kind in KINDS.items()},
    **{f"scaler-clipped-{name}": (grad_scaler, {"unscale": True, **kind}) for name, kind in KINDS.items()},
    **{f"masters-{name}": (masters, kind) for name, kind in KINDS.items()},
    "bf16-weights-foreach": (bf16_weights, {"within": HALF, "foreach": True}),
    "bf16-weights-fused": (bf16_weights, {"within": EXACT, "fused": True}),
    "bf16-matrices-foreach": (bf16_matrices_beside_fp32_norms, {"within": HALF, "foreach": True}),
    "bf16-matrices-fused": (bf16_matrices_beside_fp32_norms, {"within": EXACT, "fused": True}),
    "fp16-weights-fused": (fp16_weights_of_small_gradients, {}),
    "bf16-moments": (bf16_moments, {}),
    "bf16-moments-read-before": (bf16_moments, {"drift": "before"}),
    "checkpointed": (checkpointed, {"reentrant": False, "clip": "norm", "set_to_none": True}),
    "checkpointed-reentrant": (checkpointed, {"reentrant": True, "clip": "value", "set_to_none": False}),
    "tied-frozen-added": (tied_frozen_and_added, {"set_to_none": True}),
    "tied-frozen-zeroed": (tied_frozen_and_added, {"set_to_none": False}),
    "in-backward": (in_the_backward_pass, {}),
    "functional": (functional, {}),
    **{f"surgery-{name}": (surgery, kind) for name, kind in KINDS.items()},
    "surgery-reset": (surgery, {"reset": True}),
    "options": (every_option_at_once, {}),
    "differentiable": (differentiable, {}),
    "modes": (modes, {}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_each_update_is_that_of_a_float64_loop_and_the_training_stays_to_the_last_bit(name):
    train, options = LOOPS[name]
    twice(functools.partial(train, **options), print_as=name)


def test_fp32_moments_beside_bf16_ones_are_read_as_they_are():
    ((run, reference),) = twice(functools.partial(bf16_moments, pattern="embed_in", within=HALF))
    reference.rows = [row for row in reference.rows if "embed_in" not in row["tensor"]]
    assert reference.furthest(run.forces().query("~tensor.str.contains('embed_in')")) <= EXACT


# --- torch.compile ----------------------------------------------------------------------------------------------


def compiled(what, every, backend, logged=True, **kind):
    """Train with a compiled model and step; the graphs that there are after each update, and where it ends."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    use = {"backend": count if backend is None else backend}
    model = mlp()
    optimizer = adamw(model.parameters(), **{"lr": torch.tensor(1e-2), "foreach": False, **kind})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    net = torch.compile(model, **use)
    step = {
        "model": lambda: optimizer.step,
        "step": lambda: torch.compile(optimizer.step, **use),
        "function": lambda: torch.compile(lambda: optimizer.step(), **use),
    }[what]()
    logger = wd.ForceLogger(optimizer, net, every=every) if logged else None
    reference = Reference(optimizer, {p: name for name, p in model.named_parameters()})
    made = []
    for t in range(9):
        optimizer.zero_grad()
        loss_of(net, t).backward()
        with reference.watch() if logged else contextlib.nullcontext():
            step()
        schedule.step()
        made.append(len(graphs))
    if logger is not None:
        logger.close()
        table = logger.run.forces()
        assert set(table["step"]) == set(range(every, 10, every))
        reference.rows = [row for row in reference.rows if row["step"] % every == 0]
        assert reference.furthest(table) <= EXACT
    return made, ends(optimizer)


@pytest.mark.filterwarnings("ignore")  # of torch's own
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", [{}, {"fused": True, "foreach": None}], ids=["plain", "fused"])
@pytest.mark.parametrize("what", ["model", "step", "function"])
def test_a_logger_makes_torch_compile_nothing_again(what, kind, every):
    want, ending = compiled(what, every, None, logged=False, **kind)
    made, ended = compiled(what, every, None, **kind)
    assert made == want
    assert len({*made}) == 1  # all of it in the first update
    assert all(torch.equal(a, b) for a, b in zip(ended, ending, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("what", ["model", "step"])
def test_a_logger_leaves_what_a_backend_makes_of_a_training_as_it_is(what, backend):
    ending, ended = (compiled(what, 1, backend, logged=logged)[1] for logged in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(ended, ending, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_logger_of_a_step_that_was_compiled_before_sees_its_updates_until_it_is_closed():
    torch._dynamo.reset()
    model = mlp()
    optimizer = adamw(model.parameters(), foreach=False)
    step = torch.compile(optimizer.step, backend="eager")
    reference = Reference(optimizer, {p: name for name, p in model.named_parameters()})
    for t in range(9):
        if t == 3:
            logger = wd.ForceLogger(optimizer, model)
        if t == 6:
            logger.close()
        optimizer.zero_grad()
        loss_of(model, t).backward()
        with reference.watch():
            step()
    reference.rows = [row for row in reference.rows if row["step"] in (4, 5, 6)]
    assert reference.furthest(logger.run.forces()) < EXACT


WRAPPERS = {
    "compiled": lambda block: torch.compile(block, backend="eager"),
    "checkpointed": lambda block: wrapped_for_checkpoints(block),
}


def wrapped_for_checkpoints(block):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(block)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_model_whose_blocks_are_wrapped_has_the_names_of_the_plain_one(wrap):
    names = []
    for make in (lambda block: block, wrap):
        model = language_model("neox")
        layers = model.gpt_neox.layers
        for i in range(len(layers)):
            layers[i] = make(layers[i])
        names.append(list(wd.ForceLogger(adamw(model.parameters()), model).run.info["tensors"]))
    assert names[0] == names[1]


# --- other hooks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("what", ["weights", "rate"])
def test_what_another_hook_changes_after_the_step_is_not_taken_for_the_step(what, older):
    def train(attach):
        model = mlp()
        optimizer = adamw(model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
        ended = {}

        @torch.no_grad()
        def change(*_):
            if what == "rate":
                schedule.step()
                return
            for p in model.parameters():
                ended[p] = p.detach().double().clone()
                p.mul_(0.9)

        if older:
            optimizer.register_step_post_hook(change)
        watch = attach(optimizer, model)
        reference = getattr(watch, "__self__", None)
        if reference is not None:
            reference.copied = lambda p: ended.pop(p) if p in ended else p.detach().double().clone()
        if not older:
            optimizer.register_step_post_hook(change)
        for t in range(5):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            ended.clear()
            with watch():
                optimizer.step()
        return ends(optimizer)

    twice(train)


@pytest.mark.parametrize(
    ("dtype", "drift"),
    [
        (torch.float32, True),
        (torch.float32, "before"),
        (torch.bfloat16, True),
    ],
)
@pytest.mark.filterwarnings("ignore:ForceLogger")
def test_a_gradient_that_a_newer_hook_clips_gives_right_forces_or_none(dtype, drift):
    w = nn.Parameter(torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = adamw([w], fused=True)
    with wd.ForceLogger(optimizer, [("w", w)], drift=drift) as logger:

        def clip(*_):
            w.grad.clamp_(-0.1, 0.1)

        optimizer.register_step_pre_hook(clip)
        lengths = []
        for t in range(4):
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(t)).to(dtype)
            optimizer.step()
            state, count = optimizer.state[w], t + 1
            m, v = (
                state["exp_avg"].double() / (1 - 0.9**count),
                state["exp_avg_sq"].double() / (1 - 0.95**count),
            )
            lengths.append(float((3e-3 * m / (v.sqrt() + 1e-8)).square().sum()))
    got = logger.run.forces()["injection"].to_numpy()
    right = np.abs(got / lengths - 1) <= (EXACT if dtype == torch.float32 else HALF)
    assert (right | np.isnan(got)).all()


def test_groups_that_are_taken_out_and_put_back_have_the_rows_of_their_updates(tmp_path):
    def train(attach):
        model = mlp()
        optimizer = adamw([{"params": list(model[i].parameters())} for i in (0, 2, 3)])
        watch = attach(optimizer, model, out=tmp_path)
        for t in range(9):
            model.zero_grad()
            loss_of(model, t).backward()
            if t == 3:
                taken = optimizer.param_groups.pop(1)
            if t == 5:
                optimizer.param_groups[0]["params"].pop(0)
            if t == 7:
                optimizer.add_param_group(taken)
            with watch():
                optimizer.step()
        return ends(optimizer)

    twice(train)
    table = wd.RunLog(tmp_path).forces()
    assert table[["role", "numel"]].notna().all(axis=None)
    steps = table.groupby("tensor", observed=True)["step"].apply(list)
    assert steps["2.weight"] == [1, 2, 3, 8, 9]
    assert steps["0.weight"] == [1, 2, 3, 4, 5]


def test_a_step_that_fails_and_is_made_again_is_one_update():
    def train(attach):
        model = mlp()
        optimizer = adamw(model.parameters())
        watch = attach(optimizer, model)

        def fail():
            raise MemoryError

        for t in range(5):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            if t == 2:
                with pytest.raises(MemoryError):
                    optimizer.step(fail)
            with watch():
                optimizer.step()
        return ends(optimizer)

    ((run, _),) = twice(train)
    assert sorted(run.forces()["step"].unique()) == [1, 2, 3, 4, 5]


# --- closures and second loggers --------------------------------------------------------------------------------


def test_loggers_of_one_optimizer_do_not_see_one_another_also_where_a_closure_makes_the_gradients():
    tables, endings = [], []
    for count in (0, 1, 4):
        model = mlp().double()
        optimizer = adamw(model.parameters())

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            loss = (model(x).square().mean(-1) - 1).square().mean()
            loss.backward()
            return loss

        options = [{}, {"drift": "before"}, {"source": "displacement"}, {"every": 2, "audit_every": 3}]
        loggers = [wd.ForceLogger(optimizer, model, **each) for each in options[:count]]
        for t in range(8):
            if t == 4 and count == 4:
                loggers[1].close()
            assert optimizer.step(closure).requires_grad
        for logger in loggers:
            logger.close()
            tables.append(logger.run.forces().drop(columns="residual"))
        endings.append(ends(optimizer))
    for ending in endings[1:]:
        assert all(torch.equal(a, b) for a, b in zip(endings[0], ending, strict=True))
    alone, same, before, moved, second = tables
    pd.testing.assert_frame_equal(same, alone)
    columns = ["alignment", "injection", "decay", "drift", "memory_null", "norm_sq", "norm_sq_after"]
    for table in (before, moved, second):
        want = alone[alone["step"].isin(table["step"])].reset_index(drop=True)
        assert len(want) == len(table)
        np.testing.assert_allclose(table[columns], want[columns], rtol=1e-6, atol=1e-12)
    assert [sorted({*table["step"]}) for table in (before, second)] == [[1, 2, 3, 4], [2, 3, 4, 6, 8]]


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_which_asks_its_closure_many_times_makes_one_update_of_each_step(search):
    endings = []
    for logged in (False, True):
        model = mlp().double()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn=search)
        logger = wd.ForceLogger(optimizer, model, source="displacement") if logged else None
        norms, calls = [], []

        def closure(model=model, optimizer=optimizer, calls=calls):
            calls.append(1)
            optimizer.zero_grad()
            loss = (model[0].weight - 1).square().sum() + sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        for _ in range(3):
            norms.append(float(model[0].weight.detach().square().sum()))
            optimizer.step(closure)
        assert len(calls) > 3
        norms.append(float(model[0].weight.detach().square().sum()))
        endings.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*endings, strict=True))
    logger.close()
    table = logger.run.forces().query("tensor == '0.weight'")
    assert table["step"].tolist() == [1, 2, 3]
    change = table["alignment"] + table["injection"] + table["decay"]
    np.testing.assert_allclose(change, np.diff(norms), atol=1e-12)
    assert table["drift"].isna().all()


# --- copies, processes, threads ---------------------------------------------------------------------------------


def test_a_copy_of_an_optimizer_is_not_logged_and_does_not_hold_its_logger():
    def copies(model, optimizer, schedule):
        yield copy.deepcopy((model, optimizer, schedule))[:2]
        yield pickle.loads(pickle.dumps((model, optimizer)))
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        yield torch.load(file, weights_only=False)

    def train(attach):
        model = mlp()
        optimizer = adamw(model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
        watch = attach(optimizer, model)
        for t in range(6):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            with watch():
                optimizer.step()
            schedule.step()
            for other, its in copies(model, optimizer, schedule) if t == 3 else ():
                assert not its._optimizer_step_pre_hooks
                assert not its._optimizer_step_post_hooks
                before = other[0].weight.detach().clone()
                loss_of(other, t).backward()
                its.step()
                assert not torch.equal(before, other[0].weight)
        return ends(optimizer)

    twice(train)


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.randn(6, generator=torch.Generator().manual_seed(i))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_load_data_leave_the_log_alone(persistent, tmp_path):
    tables = []
    for workers in (0, 2):
        settings = {"persistent_workers": persistent, "multiprocessing_context": "fork"} if workers else {}
        model = mlp()
        optimizer = adamw(model.parameters())
        with wd.ForceLogger(optimizer, model, out=tmp_path / str(workers)) as logger:
            loader = torch.utils.data.DataLoader(Data(), batch_size=3, num_workers=workers, **settings)
            for epoch in range(2):
                for x in loader:
                    optimizer.zero_grad()
                    (model(x).square().mean(-1) - 1).square().mean().backward()
                    optimizer.step()
                logger.flush() if epoch == 0 else None
            del loader
        tables.append(wd.RunLog(tmp_path / str(workers)).forces())
        assert len(list((tmp_path / str(workers)).rglob("*.parquet"))) == 2
    pd.testing.assert_frame_equal(*tables)
    assert sorted(tables[0]["step"].unique()) == list(range(1, 9))


def test_a_forked_process_that_trains_leaves_the_log_to_its_parent(tmp_path, monkeypatch):
    monkeypatch.setattr("weightdyn.record.logger._FLUSH_SECONDS", -1.0)  # write after every update
    model = mlp()
    optimizer = adamw(model.parameters())
    with wd.ForceLogger(optimizer, model, out=tmp_path) as logger:

        def update(t):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()

        update(0)
        child = os.fork()
        if not child:
            try:
                for t in range(3):
                    update(100 + t)
                logger.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        update(1)
    assert wd.RunLog(tmp_path).forces()["step"].unique().tolist() == [1, 2]
    assert len(list(tmp_path.rglob("*.parquet"))) == 2


def test_a_parameter_whose_data_get_another_shape_is_read_as_it_is():
    a, b = (nn.Parameter(torch.randn(rows, 30)) for rows in (40, 60))
    optimizer = adamw([a, b])
    with wd.ForceLogger(optimizer, [("a", a), ("b", b)]) as logger:
        for t in range(4):
            if t == 2:  # rows of one go to the other
                for p, rows in ((a, 60), (b, 40)):
                    p.grad, p.data = None, torch.randn(rows, 30)
                    optimizer.state.pop(p)
            for p in (a, b):
                p.grad = torch.randn(p.shape)
            optimizer.step()
    table = logger.run.forces().query("step == 4").set_index("tensor")
    assert table["numel"].tolist() == [1800, 1200]
    for name, p in (("a", a), ("b", b)):
        assert table.loc[name, "norm_sq_after"] == pytest.approx(float(p.detach().square().sum()), rel=1e-5)


def test_threads_that_train_and_threads_that_read_have_each_their_own():
    def train(seed, read=lambda run: contextlib.nullcontext()):
        model, table = models.pop(), None
        optimizer = adamw(model.parameters())
        with wd.ForceLogger(optimizer, model) as logger, read(logger.run):
            for t in range(60):
                optimizer.zero_grad()
                loss_of(model, 1000 * seed + t).backward()
                optimizer.step()
        table = logger.run.forces()
        return table, ends(optimizer)

    @contextlib.contextmanager
    def another_reads(run):
        def read():
            while not stop.is_set():
                assert (run.forces(by="model")["step"].diff().dropna() == 1).all()
                looks.append(run)

        stop = threading.Event()
        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    models, looks = [mlp() for _ in range(6)], []
    found = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: train(seed, another_reads)}))
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert looks
    for seed in range(3):
        table, ending = train(seed)
        pd.testing.assert_frame_equal(found[seed][0], table)
        assert all(torch.equal(a, b) for a, b in zip(found[seed][1], ending, strict=True))


# --- names of masters -------------------------------------------------------------------------------------------


def test_the_names_of_bf16_copies_are_refused_where_the_optimizer_steps_their_masters():
    model = language_model("neox").to(torch.bfloat16)
    named = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    optimizer = adamw(named.values())
    for params in (model, model.named_parameters()):
        with pytest.raises(
            ValueError, match=r"params has none of the optimizer's parameters: is it .* a copy"
        ):
            wd.ForceLogger(optimizer, params)
    with wd.ForceLogger(optimizer, named.items(), config=model.config) as logger:
        for p in named.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert "gpt_neox.layers.0.attention.query_key_value.weight[q]" in logger.run.info["tensors"]


def test_masters_without_a_name_are_told_where_other_parameters_have_one():
    model = mlp()
    for i in (0, 3):
        model[i].to(torch.bfloat16)
    stepped = [nn.Parameter(p.detach().float()) if p.itemsize < 4 else p for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match=r"4 of the optimizer's parameters are not in params.*masters"):
        wd.ForceLogger(adamw(stepped), model)
