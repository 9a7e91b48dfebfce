"""Which decay the log has, against what one step with it and one without do to the weights, optimizer by optimizer.

    python benchmarks/check_optimizers.py > data/optimizers.md

Each trains a small model in float64 (those that compute in float32 in that) under a falling learning rate.
Five of its updates are made once more without decay: what the weights differ by, along the weights, is ηλ. The
log's ηλ of every tensor is held against it. Needs `pip install "weightdyn[stacks,hf]"`.
"""

import importlib
import warnings

import torch
from torch import nn
from tqdm import tqdm

import weightdyn as wd

STEPS = (1, 2, 4, 7, 11)


class Composers(torch.optim.AdamW):
    """AdamW with a decay by λ·η/η₀, a step of its own."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        for group in self.param_groups:
            group["initial_lr"] = lr

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            decay, group["weight_decay"] = group["weight_decay"], 0.0
            for p in group["params"]:
                p.mul_(1 - group["lr"] / group["initial_lr"] * decay)
            torch.optim.AdamW.step.__wrapped__(self)
            group["weight_decay"] = decay


class Skipping(torch.optim.Optimizer):
    """RMSprop whose update and decay are multiplied by 0 where the gradient is far too large, as OLMo-core's do."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        factor = (torch.stack([g.norm() for g in grads]).norm() < 1e3).to(grads[0])
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), v=torch.zeros_like(p))
                state["step"] += factor.float()
                state["v"].lerp_(p.grad.square(), 0.1 * factor.item())
                p.mul_(1 - factor * group["lr"] * group["weight_decay"])
                p.sub_(factor * group["lr"] * p.grad / (state["v"].sqrt() + 1e-8))


class InTheGradient(torch.optim.Optimizer):
    """Signs of a gradient that has the decay in it."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * torch.sign(p.grad + group["weight_decay"] * p))


def named(path, **options):
    module, name = path.rsplit(".", 1)
    return lambda params: getattr(importlib.import_module(module), name)(
        params, **{"lr": 1e-2, "weight_decay": 0.1, **options}
    )


def bits(name, **options):
    return named(f"bitsandbytes.optim.{name}", **({"min_8bit_size": 64} if "8" in name else {}), **options)


DECOUPLED = {"decoupled_weight_decay": True}
OPTIMIZERS = {
    **{f"torch {name}": named(f"torch.optim.{name}") for name in ("AdamW", "Muon", "Adafactor")},
    **{
        f"torch {name}, decoupled": named(f"torch.optim.{name}", **DECOUPLED)
        for name in ("Adam", "NAdam", "RAdam")
    },
    **{
        f"torch {name}": named(f"torch.optim.{name}")
        for name in ("Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta")
    },
    "torch SGD": named("torch.optim.SGD", momentum=0.9),
    **{
        f"schedulefree {name}": named(f"schedulefree.{name}ScheduleFree")
        for name in ("AdamW", "RAdam", "SGD")
    },
    "schedulefree AdamW, closure": named("schedulefree.AdamWScheduleFreeClosure"),
    "lion-pytorch Lion": named("lion_pytorch.Lion"),
    "lion-pytorch Lion, decoupled": named("lion_pytorch.Lion", weight_decay=1e-3, **DECOUPLED),
    "transformers Adafactor": named(
        "transformers.optimization.Adafactor", relative_step=False, scale_parameter=False
    ),
    "transformers Adafactor, scale_parameter": named(
        "transformers.optimization.Adafactor", relative_step=False
    ),
    "transformers Adafactor, lr=None": named("transformers.optimization.Adafactor", lr=None),
    **{
        f"bitsandbytes {name}": bits(name)
        for name in (
            "AdamW8bit",
            "AdamW",
            "Adam8bit",
            "Lion8bit",
            "LAMB8bit",
            "AdEMAMix8bit",
            "RMSprop8bit",
            "Adagrad8bit",
        )
    },
    **{f"torchao {name}": named(f"torchao.optim.{name}") for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")},
    "torchao Adam8bit": named("torchao.optim.Adam8bit"),
    "fully decoupled AdamW (λη/η₀)": lambda params: Composers(params, 1e-2, 1e-3),
    "one that skips steps": lambda params: Skipping(params, 1e-2, 0.1),
    "an unknown one with the decay in its gradient": lambda params: InTheGradient(params, 1e-2, 0.1),
}


def gradients(model, t):
    generator = torch.Generator().manual_seed(t)
    like = next(model.parameters())
    x, y = (torch.randn(8, 12, generator=generator).to(like) for _ in range(2))
    model.zero_grad()
    (model(x) - y).square().mean().backward()
    if t == 3:
        like.grad.mul_(1e6)  # what one that skips steps leaves out


def train(make, until, dtype, matrices, without=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)).to(dtype)
    pairs = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 or not matrices]
    optimizer = make([p for _, p in pairs])
    if hasattr(optimizer, "train"):
        optimizer.train()
    change, steps = {}, 0
    with wd.ForceLogger(optimizer, pairs) as log:
        for t in range(1, until + 1):
            gradients(model, t)
            for group in optimizer.param_groups:
                lr = 1e-2 * (1 - t / 20)
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(lr)
                elif group["lr"] is not None:
                    group["lr"] = lr
                if t == without:
                    group["weight_decay"] = 0.0
            before = {name: p.detach().double().clone() for name, p in pairs}
            optimizer.step(lambda: None) if "Closure" in type(optimizer).__name__ else optimizer.step()
            steps, last = log.step, steps
            if steps > last:
                change[t] = steps, before, {name: p.detach().double().clone() for name, p in pairs}
    return log.run, change


def check(name, make):
    """The source, how the decay is told, and the worst relative error of ηλ; or why it is not told."""
    inside = "torchao" in name or "bitsandbytes" in name
    options = {"dtype": torch.float32 if inside else torch.float64, "matrices": "Muon" in name}
    try:
        run, change = train(make, max(STEPS), **options)
    except ImportError as error:
        return "", "", f"not installed here ({error.name})"
    rows = run.forces().set_index(["step", "tensor"])
    worst = 0.0
    coupled = (rows["weight_decay"] == 0).all()
    if not rows["weight_decay"].isna().any() and not coupled:
        for t in filter(change.__contains__, STEPS):
            step, before, after = change[t]
            _, other = train(make, t, without=t, **options)
            for label, w in before.items():
                product = float((other[t][2][label] - after[label]).mul(w).sum() / w.square().sum())
                row = rows.loc[step, label]
                worst = max(worst, abs(row.lr * row.weight_decay / product - 1))
    skipped = max(STEPS) - len(change)
    said = f"{worst:.0e}" if not coupled else "0 (in u)"
    if "no_decay" in run.info:
        said = f"NaN: {run.info['no_decay'].partition(': ')[2]}"
    if skipped:
        said += f"; {skipped} skipped step is no update" if skipped == 1 else f"; {skipped} skipped steps"
    return run.info["source"], run.info["decay"], said


def main():
    warnings.simplefilter("ignore")
    torch.compiler.set_stance("force_eager")
    torch.set_num_threads(1)
    print("# Which decay is logged\n")
    print(
        "Worst relative error of ηλ over the tensors of a small model and five updates, against a step without"
    )
    print(
        "decay (`benchmarks/check_optimizers.py`). Where it is in the gradient, λ is 0 and it shows in u.\n"
    )
    print("| optimizer | forces by | decay by | error of ηλ |\n|---|---|---|---|")
    for name, make in tqdm(OPTIMIZERS.items(), disable=None):
        print("|", name, "|", " | ".join(check(name, make)), "|", flush=True)


if __name__ == "__main__":
    main()
