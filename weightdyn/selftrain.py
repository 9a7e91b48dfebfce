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
import functools
import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from weightdyn.forces import aggregate, budget
from weightdyn.logger import ForceLogger
from weightdyn.runlog import RunLog, RunWriter, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Schedule = Literal["cosine", "constant"]
Resume = Literal["auto", "must", "never"]

VOCABULARY = 256
"""Bytes: every text has the same tokens, and none needs a download."""

CONTEXT = 2048
"""The longest sequence that the models accept."""

HELD_OUT = 20
"""One file in so many is held out for evaluation; of fewer files, the last 1/HELD_OUT of the text."""

EVAL_SEQUENCES = 64
"""Sequences of an evaluation, evenly spaced over the held-out text."""

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "gpt_neox",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    },
    "tiny-llama": {
        "model_type": "llama",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
    },
    "pythia-14m": {
        "model_type": "gpt_neox",
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    },
    "pythia-70m": {
        "model_type": "gpt_neox",
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    },
    "llama-70m": {
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1376,
    },
}
"""Shapes by name, in the words of transformers' configurations. Pythia's blocks are those of the models after
which they are named, and llama-70m's are of the same size; but the vocabulary is bytes, so there are fewer
parameters than the names say: 0.9 million in tiny and tiny-llama, 1.3 in pythia-14m, 19 in the last two."""

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


# --- text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text as bytes, in a part to train on and a part held out.

    Attributes:
        train, held_out: uint8 tensors.
        train_files, held_out_files: where they come from; with few files these are the same, and `held_out`
            is the end of the text.
        sha256: digest of both parts, by which a resumed run knows its text again.
    """

    train: Tensor
    held_out: Tensor
    train_files: tuple[Path, ...]
    held_out_files: tuple[Path, ...]
    sha256: str

    @classmethod
    def read(cls, *paths: str | Path) -> Corpus:
        """Read text files, or folders with all their text files in the order of their names.

        Of a folder, hidden files and files with a NUL byte (they are no text) are left out. Without a path:
        the `.py` files of the running Python's standard library, without its tests, which not every system
        installs. Twenty files or more: every twentieth is held out; else the last twentieth of the text is.
        What was read stays in memory until the files change.

        Raises:
            FileNotFoundError: if a path does not exist, or holds no text.
        """
        files = _text_files([Path(path) for path in paths]) if paths else _standard_library()
        return _read(tuple((file, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files))

    def batch(self, seed: int, update: int, batch_size: int, seq_len: int) -> Tensor:
        """The sequences of an update: int64 of shape (batch_size, seq_len + 1), targets one byte on.

        Their places are drawn evenly from the training part, by a generator seeded with (seed, update) alone.
        """
        _require_length(self.train, seq_len, "training")
        places = np.random.default_rng((seed, update)).integers(len(self.train) - seq_len, size=batch_size)
        return _sequences(self.train, places, seq_len)

    def evaluation(self, sequences: int, seq_len: int) -> Tensor:
        """`sequences` sequences evenly spaced over the held-out part; int64 of shape (…, seq_len + 1)."""
        _require_length(self.held_out, seq_len, "held-out")
        places = np.linspace(0, len(self.held_out) - seq_len - 1, sequences).astype(np.int64)
        return _sequences(self.held_out, places, seq_len)


def _require_length(text: Tensor, seq_len: int, part: str) -> None:
    if len(text) <= seq_len:
        raise ValueError(
            f"the corpus is too small for seq_len={seq_len}: its {part} part needs more than {seq_len} bytes and "
            f"has {len(text)}; give more text or a smaller seq_len"
        )


def _sequences(text: Tensor, places: np.ndarray, seq_len: int) -> Tensor:
    return text[torch.from_numpy(places[:, None] + np.arange(seq_len + 1))].long()


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [file for file in root.rglob("*.py") if not skipped.intersection(file.relative_to(root).parts)]
    if not files:
        raise FileNotFoundError(
            f"this Python has no source text in {root}: name text files or a folder as corpus"
        )
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _text_files(paths: Iterable[Path]) -> list[Path]:
    files: dict[Path, None] = {}  # a file named twice counts once, so that no text is on both sides
    for path in paths:
        if path.is_file():
            found = [path]
        elif path.is_dir():
            inside = sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
            found = [file for file in inside if _is_text(file, path)]
        else:
            raise FileNotFoundError(f"corpus: there is no file or folder {path}")
        if not found:
            raise FileNotFoundError(f"corpus: the folder {path} holds no text files")
        files.update(dict.fromkeys(file.resolve() for file in found))
    return list(files)


def _is_text(file: Path, root: Path) -> bool:
    if not file.is_file() or any(part.startswith(".") for part in file.relative_to(root).parts):
        return False
    with file.open("rb") as stream:
        return b"\0" not in stream.read(8192)


@functools.lru_cache(maxsize=4)
def _read(files: tuple[tuple[Path, int, int], ...]) -> Corpus:
    texts = [(file, file.read_bytes()) for file, _, _ in files]
    if len(texts) >= HELD_OUT:
        held_out = texts[HELD_OUT - 1 :: HELD_OUT]
        train = [text for i, text in enumerate(texts) if i % HELD_OUT != HELD_OUT - 1]
        train_bytes, held_out_bytes = (b"".join(text for _, text in part) for part in (train, held_out))
    else:
        train = held_out = texts
        joined = b"".join(text for _, text in texts)
        cut = len(joined) - len(joined) // HELD_OUT
        train_bytes, held_out_bytes = joined[:cut], joined[cut:]
    digest = hashlib.sha256(len(train_bytes).to_bytes(8, "little") + train_bytes + held_out_bytes)
    return Corpus(
        _bytes(train_bytes),
        _bytes(held_out_bytes),
        tuple(file for file, _ in train),
        tuple(file for file, _ in held_out),
        digest.hexdigest(),
    )


def _bytes(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, np.uint8).copy())


# --- model and optimizer ------------------------------------------------------------------------------------


def make_model(name: str, seed: int) -> PreTrainedModel:
    """A byte-level causal language model of transformers with fresh weights, in float32 on the CPU.

    Args:
        name: one of `MODELS`.
        seed: of the initial weights; torch's own random state stays as it is.

    Raises:
        ValueError: if there is no such shape.
        ImportError: if transformers is not installed.
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {list(MODELS)}, got {name!r}")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError('the models need transformers: pip install "weightdyn[hf]"') from error
    config = AutoConfig.for_model(
        **MODELS[name], vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, use_cache=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


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
    _require_length(corpus.train, config.seq_len, "training")
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
