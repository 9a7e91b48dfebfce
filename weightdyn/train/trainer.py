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
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightdyn.checkpoints.recipe import Recipe
from weightdyn.core.checks import (
    check_betas,
    check_choice,
    check_instance,
    check_number,
    check_path,
    check_text,
    check_whole,
    refuse,
)
from weightdyn.core.progress import Progress, progress_bar
from weightdyn.core.tables import aggregate, budget
from weightdyn.files.durable import write_file
from weightdyn.record.logger import ForceLogger
from weightdyn.record.runlog import RunLog, RunWriter
from weightdyn.train.corpus import Corpus, require_length
from weightdyn.train.loop import evaluated, load_state, make_updates, restore_state, save_state
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
        schedule: "cosine" down to `floor·lr` at the last update, or "constant". `Recipe.from_settings` has the
            formula, and the property `recipe` is made by it.
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
        TypeError, ValueError: a value is of another kind, or out of its range; the message names the field.
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
        if not isinstance(paths, Sequence) or not all(isinstance(path, str | os.PathLike) for path in paths):
            raise refuse("corpus", "paths of text files or folders", self.corpus)
        object.__setattr__(self, "corpus", tuple(os.fspath(path) for path in paths))
        check_choice("model", self.model, MODELS)
        for name in ("steps", "batch_size", "log_every", "weibull_every", "eval_every", "save_every"):
            check_whole(name, getattr(self, name), 1)
        check_whole("seq_len", self.seq_len, 2, CONTEXT)
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_whole("warmup", self.warmup, 0, self.steps)
        check_number("floor", self.floor, 0, 1)
        object.__setattr__(self, "betas", check_betas("betas", self.betas))  # a list, in run.json
        for name in ("lr", "eps"):
            check_number(name, getattr(self, name), 0, open_low=True)
        check_number("weight_decay", self.weight_decay, 0)
        check_choice("decayed", self.decayed, ("matrices", "all"))
        check_number("clip", self.clip, 0, open_low=True, none="no clipping")
        check_whole("seed", self.seed, 0, 2**63 - 1)
        check_text("device", self.device, "'auto' or the name of a device, such as 'cpu'")

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a run from what its `run.json` says: `TrainConfig.from_info(run.info)`.

        Raises:
            TypeError, ValueError: `info` is not of a run that `train` wrote, or a field there is out of its range.
        """
        check_instance("info", info, Mapping, "the info of a run, as RunLog.info is")
        written = info.get("train")
        if not isinstance(written, Mapping):
            raise ValueError(
                f"info must be of a run that train() wrote, got one with the sections {sorted(map(str, info))}"
            )
        return cls(**{f.name: written[f.name] for f in fields(cls) if f.name in written})

    @property
    def recipe(self) -> Recipe:
        """Learning rate of every update, decay, betas and eps, as all that recovers forces takes them.

        >>> config = TrainConfig(lr=1.0, steps=100, warmup=10, floor=0.2)
        >>> config.recipe.lr_at([1, 10, 55, 100]).round(3).tolist()
        [0.1, 1.0, 0.6, 0.2]
        """
        return Recipe.from_settings(
            lr=self.lr,
            steps=self.steps,
            schedule=self.schedule,
            warmup=self.warmup,
            floor=self.floor,
            weight_decay=self.weight_decay,
            betas=self.betas,
            eps=self.eps,
            decayed=self.decayed,
        )


DEMO = TrainConfig(steps=1500, batch_size=16, lr=8e-3, weight_decay=0.5, weibull_every=10)
"""What `weightdyn demo` trains. τ = 1/(lr·weight_decay) = 250 updates, a sixth of the run: the weights have
time to grow, to overshoot and to relax, while the model learns."""


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


def _held_out_loss(model: nn.Module, sequences: Tensor, batch_size: int) -> float:
    total = sum(float(_loss(model, part)) * len(part) for part in sequences.split(batch_size))
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


def train(
    config: TrainConfig, out: str | Path, *, resume: Resume = "auto", progress: Progress = None
) -> RunLog:
    """Train a model, and log the forces of every tensor into a run directory.

    Afterwards `out` holds the run (`run.json`, `forces/`, `weibull/`, and `metrics/` with loss, lr, grad_norm
    and eval_loss, losses in nats per byte), `checkpoints/step-*.safetensors` with the weights after 0, 1, 2,
    4, … updates and every `save_every`, and `resume.pt`, the state that the run continues from.

    Args:
        config: all that decides the run.
        out: the run directory.
        resume: "auto" continues what `out` holds, if anything, and where `resume.pt` is gone it begins again, with
            a warning; "must" wants something to continue; "never" wants nothing there. A run that is at its end
            already is returned as it is.
        progress: a bar with the loss and the share of alignment in the force budget. None: where someone watches.

    Returns:
        The run, for reading.

    Raises:
        ValueError: if `out` was trained with another configuration (the fields are named), or the corpus is
            too small.
        RunLogError: if `resume.pt` or another file of the run is damaged.
        FileExistsError: if `out` holds another kind of run, or resume="never" and it holds one.
        FileNotFoundError: if a corpus path does not exist, or resume="must" and there is nothing to continue.
        ImportError: if transformers is not installed.
    """
    check_instance("config", config, TrainConfig, "a TrainConfig")
    check_choice("resume", resume, ("auto", "must", "never"))
    out = check_path("out", out, "the path of a run directory")
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
        if not saved.exists():
            _miss_state(saved, resume)
    elif resume == "must":
        raise FileNotFoundError(f"{out} holds no run to continue; resume='auto' starts one")
    state = load_state(saved, config.steps)
    done = 0 if state is None else state["step"]
    if done == config.steps:
        return RunLog(out)

    def evaluate() -> float:
        return _held_out_loss(model, evaluation, config.batch_size)

    def loss(update: int) -> Tensor:
        return _loss(model, corpus.batch(config.seed, update, config.batch_size, config.seq_len).to(device))

    recipe, parameters = config.recipe, list(model.parameters())
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        progress_bar(
            progress=progress, total=config.steps, initial=done, unit="update", mininterval=0.5
        ) as bar,
    ):
        torch.manual_seed(config.seed)
        if state is not None:
            restore_state(saved, state, model, optimizer)
        with contextlib.closing(RunWriter(out, done, {"train": record})) as writer:
            if done == 0:
                writer.restart(0)  # what an attempt left that died early is done again
                writer.append("metrics", {"step": 0, "eval_loss": evaluated(model, evaluate)})
                _save_checkpoint(out, 0, model)
                save_state(saved, 0, model, optimizer)  # from here on a run without this file has lost it
        with ForceLogger(
            optimizer, model, every=config.log_every, weibull_every=config.weibull_every, out=out
        ) as logger:
            for update, metrics in make_updates(
                model,
                optimizer,
                logger,
                range(done + 1, config.steps + 1),
                rates=lambda update: [float(recipe.lr_at(update))] * len(optimizer.param_groups),
                loss=loss,
                clip=None
                if config.clip is None
                else partial(nn.utils.clip_grad_norm_, parameters, config.clip),
                evaluate=evaluate,
                eval_every=config.eval_every,
                extra=lambda _: {"lr": optimizer.param_groups[0]["lr"]},
            ):
                # The bar is drawn twice a second, and where nobody watches never.
                if bar.update() or (update == config.steps and not bar.disable):
                    bar.set_postfix_str(
                        f"loss {float(metrics['loss']):.3f}, alignment {_alignment_share(logger):.0%}"
                    )
                if _is_save(config, update):
                    # In this order nothing is lost by a kill in between: what is behind resume.pt is done again.
                    _save_checkpoint(out, update, model)
                    logger.flush()
                    save_state(saved, update, model, optimizer)
            return logger.run


def _miss_state(saved: Path, resume: Resume) -> None:
    """Refuse, or say, that a run with updates begins again because its state is gone."""
    steps = RunLog(saved.parent).metrics()["step"]
    last = int(steps.max()) if len(steps) else 0
    gone = f"{saved} is gone, and with it the state that the run of {last} updates continues from"
    if resume == "must":
        raise FileNotFoundError(f"{gone}: copy it from a backup, or begin again with resume='auto'")
    if last > 0:
        warnings.warn(
            f"{gone}: it begins again at update 0, and its rows replace those that are there",
            UserWarning,
            stacklevel=3,
        )


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
