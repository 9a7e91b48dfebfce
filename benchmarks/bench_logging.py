"""What logging costs: a logged update's extra time against torch's own step and against the training step.

Both sides run in turn in one process, round after round; the medians of the paired differences are printed, and
the ratios that the library promises. The peak of the extra memory is taken in a process of its own.

    python benchmarks/bench_logging.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import weightdyn as wd
from weightdyn.train.corpus import Corpus
from weightdyn.train.models import make_model
from weightdyn.train.trainer import DEMO

CORPUS = Corpus.read()


def make(name: str) -> tuple[nn.Module, torch.optim.AdamW]:
    model = make_model(name, seed=0)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, foreach=True)


def gradients(model: nn.Module, update: int = 1) -> None:
    batch = CORPUS.batch(0, update, DEMO.batch_size, DEMO.seq_len)
    model.zero_grad()
    logits = model(batch[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()


def seconds(run: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def read(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """One read of w, m and v, which nothing that measures them can undercut."""
    for p in model.parameters():
        state = optimizer.state[p]
        for tensor in (p.detach(), state["exp_avg"], state["exp_avg_sq"]):
            tensor.sum()


def against_the_step(name: str, rounds: int, times: int) -> None:
    """With and without drift, and with updates that are not logged."""
    model, optimizer = make(name)
    gradients(model)
    seconds(optimizer.step, times)
    sides: dict[str, dict[str, Any]] = {
        "drift=True": {"drift": True},
        "drift=False": {"drift": False},
        "every=1000": {"every": 1000},
    }
    plain, floor = [], []
    logged: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        plain.append(seconds(optimizer.step, times))
        for side, options in sides.items():
            with wd.ForceLogger(optimizer, model, start_step=0, **options):
                optimizer.step()
                logged[side].append(seconds(optimizer.step, times))
        floor.append(seconds(lambda: read(model, optimizer), times))
    step = statistics.median(plain)
    weights = sum(p.numel() for p in model.parameters())
    print(
        f"{name:>12} {weights / 1e6:7.1f}M weights: step {step * 1e3:8.2f} ms; one read of w, m, v "
        f"{statistics.median(floor) / step:.2f}x"
    )
    extra = {
        side: statistics.median(b - a for a, b in zip(plain, times, strict=True))
        for side, times in logged.items()
    }
    best = {side: min(times) - min(plain) for side, times in logged.items()}
    for side in sides:
        share = extra[side] / step
        print(f"{side:>24}: {extra[side] * 1e3:+8.2f} ms = {share:.2f}x (best {best[side] * 1e3:+.2f} ms)")
    print(
        f"{'drift=True/drift=False':>24}: {extra['drift=True'] / extra['drift=False']:.2f} "
        f"(best {best['drift=True'] / best['drift=False']:.2f}; budget 1.4)"
    )


@contextlib.contextmanager
def force_logger(model: nn.Module, optimizer: torch.optim.AdamW):
    with wd.ForceLogger(optimizer, model):
        yield lambda t: None


@contextlib.contextmanager
def tensorboard(model: nn.Module, optimizer: torch.optim.AdamW):
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:

        def after(t: int) -> None:
            for name, p in model.named_parameters():
                writer.add_histogram(name, p, t)

        yield after


@contextlib.contextmanager
def wandb_watch(model: nn.Module, optimizer: torch.optim.AdamW):
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True, console="off"))
        run.watch(model, log="all", log_freq=1)
        try:
            yield lambda t: run.log({"t": t})
        finally:
            run.unwatch(model)
            run.finish()


def against_the_training_step(rounds: int, times: int) -> None:
    """The demo's whole update: batch, forward, backward, clipping, step."""
    sides = {"ForceLogger, every=1": force_logger}
    if importlib.util.find_spec("tensorboard"):
        sides["TensorBoard histograms"] = tensorboard
    if importlib.util.find_spec("wandb"):
        sides["wandb.watch"] = wandb_watch
    for title, side in sides.items():
        model, optimizer = make(DEMO.model)
        t = 0

        def update(after: Callable[[int], None] = lambda t: None) -> None:
            nonlocal t
            t += 1
            gradients(model, t)  # noqa: B023
            nn.utils.clip_grad_norm_(model.parameters(), DEMO.clip or math.inf)  # noqa: B023
            optimizer.step()  # noqa: B023
            after(t)

        seconds(update, 5)
        plain, logged = [], []
        for _ in range(rounds if side is force_logger else 3):
            plain.append(seconds(update, times))
            with side(model, optimizer) as after:
                update(after)
                logged.append(seconds(lambda after=after: update(after), times))
        step = statistics.median(plain)
        extra = statistics.median(b - a for a, b in zip(plain, logged, strict=True))
        budget = " (budget +3 %)" if side is force_logger else ""
        print(
            f"{title:>24}: training step {step * 1e3:6.1f} ms, {extra * 1e3:+7.2f} ms = {extra / step:+.1%}{budget}"
        )


def peak_memory(name: str) -> None:
    """Growth of the process' peak memory over logged updates, audited and with Weibull fits."""
    model, optimizer = make(name)
    gradients(model)
    for _ in range(3):
        optimizer.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with wd.ForceLogger(optimizer, model, audit_every=2, weibull_every=4):
        for _ in range(8):
            optimizer.step()
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{name:>12}: peak extra memory {extra:.0f} MB (budget 64 MB, model {size(model):.0f} MB)")


def size(model: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        peak_memory(arguments.memory)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("\na logged step's extra time against torch's foreach AdamW step (budget without drift 1.0x)")
    against_the_step("tiny", arguments.rounds, times=30)
    against_the_step("pythia-70m", arguments.rounds, times=3)
    print(f"\nthe same against the whole training step of the demo ({DEMO.model}, batch {DEMO.batch_size})")
    against_the_training_step(arguments.rounds, times=10)
    print("\npeak memory")
    for name in ("tiny", "pythia-70m"):
        subprocess.run([sys.executable, __file__, "--memory", name], check=True)


if __name__ == "__main__":
    main()
