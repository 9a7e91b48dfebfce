"""The reference trainer: a small language model on real text, with every force of every update on record.

It is here so that the library can be tried, tested and benchmarked on true training and not on toys: the
shapes are Pythia's and LLaMA's, the text is bytes, and everything that decides the course of the weights
(learning rate, decay, warm-up, betas, order of the data) stands in the run's own `run.json`, so that a
recovery from the checkpoints can be held against the logged truth.

Two rules make a killed run continue bit for bit on a CPU (with as many threads as before): what an update sees
is a pure function of the seed and of the update's number, and all else that it needs is written at every save.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from weightdyn.core.tables import aggregate, budget
from weightdyn.files.durable import write_file
from weightdyn.record.logger import ForceLogger
from weightdyn.record.runlog import RunLog, RunWriter
from weightdyn.train.corpus import Corpus, require_length
from weightdyn.train.models import CONTEXT, MODELS, make_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Schedule = Literal["cosine", "constant"]
Resume = Literal["auto", "must", "never"]

EVAL_SEQUENCES = 64
"""Sequences of an evaluation, evenly spaced over the held-out text."""

LR_FORMULA = (
    "u = number of the update, 1-based. u <= warmup: lr*u/warmup. Else, constant: lr; "
    "cosine: lr*(floor + (1 - floor)*(1 + cos(pi*(u - warmup)/(steps - warmup)))/2)"
)


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a training run.

    Args:
        model: one of `MODELS`.
        corpus: text files or folders of them; empty for the source text of Python's standard library.
        steps: updates.
        batch_size: sequences in an update.
        seq_len: bytes in a sequence, up to 2048.
        lr: peak learning rate.
        schedule: "cosine" down to `floor·lr` at the last update, or "constant". `lr_at` has the formula.
        warmup: updates of linear warm-up from lr/warmup to lr.
        floor: the cosine's end as a fraction of `lr`.
        betas, eps: AdamW's.
        weight_decay: decoupled decay λ; τ = 1/(lr·weight_decay) updates.
        decayed: "matrices" (not norms and biases, as Pythia) or "all".
        clip: largest norm of the gradient over all parameters; None for no clipping.
        seed: of the initial weights and of the order of the data.
        device: "auto" (CUDA where there is one, else CPU) or a torch device. Where CUDA has bf16,
            forward passes are in bf16 autocast; weights and moments are float32 everywhere.
        log_every, weibull_every, eval_every: updates between force rows, Weibull fits and evaluations.
        save_every: updates between checkpoints; there are also those at 0, 1, 2, 4, … and the last.

    Raises:
        ValueError: if a value is out of its range; it names the field, what it got and what is accepted.
    """

    model: str = "tiny"
    corpus: tuple[str, ...] = ()
    steps: int = 2000
    batch_size: int = 8
    seq_len: int = 128
    lr: float = 1e-3
    schedule: Schedule = "cosine"
    warmup: int = 100
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decayed: Literal["matrices", "all"] = "matrices"
    clip: float | None = 1.0
    seed: int = 0
    device: str = "auto"
    log_every: int = 1
    weibull_every: int = 20
    eval_every: int = 100
    save_every: int = 500

    def __post_init__(self):
        paths = [self.corpus] if isinstance(self.corpus, str | os.PathLike) else self.corpus
        object.__setattr__(self, "corpus", tuple(os.fspath(path) for path in paths))
        object.__setattr__(self, "betas", tuple(self.betas))

        def require(name: str, fits: Callable[[Any], bool], accepted: str) -> None:
            value = getattr(self, name)
            try:
                good = bool(fits(value))
            except TypeError:
                good = False
            if not good:
                raise ValueError(f"{name} must be {accepted}, got {value!r}")

        def whole(low: int, high: float = math.inf) -> Callable[[Any], bool]:
            return lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high

        require("model", lambda x: x in MODELS, f"one of {list(MODELS)}")
        for name in ("steps", "batch_size", "log_every", "weibull_every", "eval_every", "save_every"):
            require(name, whole(1), "a whole number >= 1")
        require("seq_len", whole(2, CONTEXT), f"a whole number from 2 to {CONTEXT}")
        require("lr", lambda x: 0 < x < math.inf, "a number > 0")
        require("schedule", lambda x: x in ("cosine", "constant"), "'cosine' or 'constant'")
        require("warmup", whole(0, self.steps), f"a whole number from 0 to steps={self.steps}")
        require("floor", lambda x: 0 <= x <= 1, "a fraction of lr from 0 to 1")
        require("betas", lambda x: len(x) == 2 and all(0 <= b < 1 for b in x), "two numbers in [0, 1)")
        require("eps", lambda x: 0 < x < math.inf, "a number > 0")
        require("weight_decay", lambda x: 0 <= x < math.inf, "a number >= 0")
        require("decayed", lambda x: x in ("matrices", "all"), "'matrices' or 'all'")
        require("clip", lambda x: x is None or 0 < x < math.inf, "None or a number > 0")
        require("seed", whole(0), "a whole number >= 0")

    @classmethod
    def from_info(cls, info: dict[str, Any]) -> TrainConfig:
        """The configuration of a run from what its `run.json` says: `TrainConfig.from_info(run.info)`."""
        if "train" not in info:
            raise ValueError(
                f"info must be of a run that train() wrote, got one with the sections {sorted(info)}"
            )
        return cls(**{f.name: info["train"][f.name] for f in fields(cls) if f.name in info["train"]})


DEMO = TrainConfig(steps=1500, batch_size=16, lr=8e-3, weight_decay=0.5, weibull_every=10)
"""What `weightdyn demo` trains. τ = 1/(lr·weight_decay) = 250 updates, a sixth of the run: the weights have
time to grow, to overshoot and to relax, while the model learns."""


def lr_at(config: TrainConfig, update: int) -> float:
    """Learning rate η of an update.

        u ≤ warmup:   lr · u/warmup
        "cosine":     lr · (floor + (1 − floor) · ½(1 + cos(π (u − warmup)/(steps − warmup))))
        "constant":   lr

    Args:
        config: its lr, schedule, warmup, floor and steps are used.
        update: the update's number u, 1-based, up to `steps`.

    >>> config = TrainConfig(lr=1.0, steps=100, warmup=10, floor=0.2)
    >>> [round(lr_at(config, u), 3) for u in (1, 10, 55, 100)]
    [0.1, 1.0, 0.6, 0.2]
    """
    if not 1 <= update <= config.steps:
        raise ValueError(f"update must be from 1 to steps={config.steps}, got {update}")
    if update <= config.warmup:
        return config.lr * update / config.warmup
    if config.schedule == "constant":
        return config.lr
    turn = math.pi * (update - config.warmup) / (config.steps - config.warmup)
    return config.lr * (config.floor + (1 - config.floor) * (1 + math.cos(turn)) / 2)


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    groups = {config.weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        decays = parameter.ndim >= 2 or config.decayed == "all"
        groups[config.weight_decay if decays else 0.0].append(parameter)
    return torch.optim.AdamW(
        [{"params": each, "weight_decay": decay} for decay, each in groups.items() if each],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    device = sequences.device
    with torch.autocast(device.type, torch.bfloat16, enabled=_has_bf16(device)):
        logits = model(sequences[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


@torch.no_grad()
def _evaluate(model: nn.Module, sequences: Tensor, batch_size: int) -> float:
    model.eval()
    total = sum(float(_loss(model, part)) * len(part) for part in sequences.split(batch_size))
    model.train()
    return total / len(sequences)


# --- what a run keeps ---------------------------------------------------------------------------------------


def _is_save(config: TrainConfig, step: int) -> bool:
    """Saves come at 0, 1, 2, 4, …, at every multiple of `save_every`, and at the end."""
    return step & (step - 1) == 0 or step % config.save_every == 0 or step == config.steps


def _save_checkpoint(out: Path, step: int, model: nn.Module) -> None:
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    # One entry of metadata: of several, safetensors writes the order at random.
    content = safetensors.torch.save(tensors, {"format": "pt"})
    write_file(folder / f"step-{step:06d}.safetensors", lambda path: path.write_bytes(content))


def _save_state(path: Path, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": _rng(model.device),
    }
    write_file(path, lambda temporary: torch.save(state, temporary))


def _rng(device: torch.device) -> dict[str, Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_rng(device: torch.device, rng: dict[str, Tensor]) -> None:
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "cuda" in rng:  # not if the run was begun on a CPU
        torch.cuda.set_rng_state(rng["cuda"], device)


def _record(config: TrainConfig, corpus: Corpus, model: PreTrainedModel) -> dict[str, Any]:
    """The section "train" of run.json: the configuration's fields, and what they came to."""
    return {
        **json.loads(json.dumps(asdict(config))),
        "lr_formula": LR_FORMULA,
        "precision": "bf16 autocast" if _has_bf16(model.device) else "float32",
        "corpus_sha256": corpus.sha256,
        "corpus_bytes": {"train": len(corpus.train), "held_out": len(corpus.held_out)},
        "architecture": json.loads(model.config.to_json_string(use_diff=False)),
    }


def _check_same(out: Path, record: dict[str, Any]) -> None:
    """Raise a ValueError that names what differs if `out` holds a run of another configuration."""
    written = RunLog(out).info.get("train")
    if written is None:
        raise FileExistsError(f"{out} holds a run that train() did not write; choose another out")
    names = ["corpus_sha256", *(f.name for f in fields(TrainConfig) if f.name != "corpus")]
    differ = [
        f"{name} (was {written.get(name)!r}, is {record[name]!r})"
        for name in names
        if written.get(name) != record[name]
    ]
    if differ:
        raise ValueError(
            f"{out} was trained with another configuration: {', '.join(differ)}; "
            "use the same one to continue it, or choose another out"
        )


# --- the loop -----------------------------------------------------------------------------------------------


def train(config: TrainConfig, out: str | Path, *, resume: Resume = "auto", progress: bool = True) -> RunLog:
    """Train a model, and log the forces of every tensor into a run directory.

    Afterwards `out` holds the run (`run.json`, `forces/`, `weibull/`, and `metrics/` with loss, lr, grad_norm
    and eval_loss, losses in nats per byte), `checkpoints/step-*.safetensors` with the weights after 0, 1, 2,
    4, … updates and every `save_every`, and `resume.pt`, the state that the run continues from.

    Args:
        config: all that decides the run.
        out: the run directory.
        resume: "auto" continues what `out` holds, if anything; "must" wants something to continue; "never"
            wants nothing there. A run that is at its end already is returned as it is.
        progress: show a bar with the loss and the share of alignment in the force budget.

    Returns:
        The run, for reading.

    Raises:
        ValueError: if `out` was trained with another configuration (the fields are named), or the corpus is
            too small.
        FileExistsError: if `out` holds another kind of run, or resume="never" and it holds one.
        FileNotFoundError: if a corpus path does not exist, or resume="must" and there is nothing.
        ImportError: if transformers is not installed.
    """
    if resume not in ("auto", "must", "never"):
        raise ValueError(f"resume must be 'auto', 'must' or 'never', got {resume!r}")
    out = Path(out)
    saved = out / "resume.pt"
    device = _device(config.device)
    corpus = Corpus.read(*config.corpus)
    require_length(corpus.train, config.seq_len, "training")
    evaluation = corpus.evaluation(EVAL_SEQUENCES, config.seq_len).to(device)
    model = make_model(config.model, config.seed).train()
    model.to(device)  # type: ignore[arg-type]  # transformers wraps torch's own `to`
    optimizer = _optimizer(config, model)
    record = _record(config, corpus, model)

    if (out / "run.json").exists() or saved.exists():
        if resume == "never":
            raise FileExistsError(f"{out} holds a run: choose another out, or resume='auto' to continue it")
        _check_same(out, record)
    elif resume == "must":
        raise FileNotFoundError(f"{out} holds no run to continue; resume='auto' starts one")
    state = torch.load(saved, map_location="cpu", weights_only=True) if saved.exists() else None
    done = 0
    if state is not None:
        done = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if done == config.steps:
        return RunLog(out)

    with contextlib.closing(RunWriter(out, done, {"train": record})) as writer:
        if done == 0:
            writer.restart(0)  # what an attempt left that died before its first save is done again
            writer.append(
                "metrics", {"step": 0, "eval_loss": _evaluate(model, evaluation, config.batch_size)}
            )
            _save_checkpoint(out, 0, model)

    parameters = list(model.parameters())
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        ForceLogger(
            optimizer, model, every=config.log_every, weibull_every=config.weibull_every, out=out
        ) as logger,
        tqdm(total=config.steps, initial=done, disable=not progress, unit="update", mininterval=0.5) as bar,
    ):
        torch.manual_seed(config.seed)
        if state is not None:
            _set_rng(device, state["rng"])
        for update in range(done + 1, config.steps + 1):
            lr = lr_at(config, update)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sequences = corpus.batch(config.seed, update, config.batch_size, config.seq_len).to(device)
            loss = _loss(model, sequences)
            loss.backward()
            metrics = {"loss": float(loss.detach()), "lr": lr}
            if config.clip is not None:
                metrics["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, config.clip))
            optimizer.step()
            optimizer.zero_grad()
            if update % config.eval_every == 0 or update == config.steps:
                metrics["eval_loss"] = _evaluate(model, evaluation, config.batch_size)
            logger.record(update, **metrics)
            if bar.update() or (progress and update == config.steps):  # the bar is drawn twice a second
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}, alignment {_alignment_share(logger):.0%}")
            if _is_save(config, update):
                # In this order nothing is lost by a kill in between: what is behind resume.pt is done again.
                _save_checkpoint(out, update, model)
                logger.flush()
                _save_state(saved, update, model, optimizer)
        return logger.run


def _alignment_share(logger: ForceLogger) -> float:
    table = logger.latest()
    return float(budget(aggregate(table, "model"))["alignment_share"].iloc[-1]) if len(table) else math.nan


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(
            f"device must be 'auto' or a device that torch has here, got {name!r}: {error}"
        ) from error
    return device
