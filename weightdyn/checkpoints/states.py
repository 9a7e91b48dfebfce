"""The exact forces of the updates that made checkpoints, from the optimizer's state in them.

Behind an update AdamW's moments and the weights tell its three products in closed form, and a checkpoint that a
training can resume from has both. So each such checkpoint holds one row of the log that nobody kept. The arithmetic
is the logger's own; what is new here is to know which moments belong to which weights, and at which learning rate
the update was made, and to say so where that cannot be known.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor, nn

from weightdyn.checkpoints.matching import match_slots
from weightdyn.checkpoints.measure import pieces_of
from weightdyn.checkpoints.rates import Given, find_rates, rate_given
from weightdyn.checkpoints.series import Checkpoints
from weightdyn.core.checks import check_choice, check_mapping, check_path, refuse
from weightdyn.core.naming import TensorName, Views, bare_names, check_config, check_views, describe
from weightdyn.core.progress import Progress, progress_bar
from weightdyn.core.tables import STATE_TABLE, force_table
from weightdyn.files.parquet import read_parquet, write_parquet
from weightdyn.files.statefiles import MOMENTS, SavedState, Slot, find_format, read_state
from weightdyn.files.weightfiles import CheckpointError, Stored, config_beside, doubt, refused
from weightdyn.record.book import Book, ProductsAfter, Round
from weightdyn.record.moments import PRODUCTS, Adam, Plan
from weightdyn.record.runlog import RunLog
from weightdyn.record.shards import Box

Optimizer = Literal["AdamW", "Adam"]

Place = str | os.PathLike[str]
Source = RunLog | Checkpoints | Place | Sequence[Place] | Mapping[int, Place]

_BATCH = 1 << 22  # weights of small tensors that are read together


def forces_from_states(
    source: Source,
    *,
    names: Sequence[str] | None = None,
    model: nn.Module | None = None,
    config: Any = None,
    rules: Mapping[str, str] | None = None,
    lr: Given | Sequence[Given] | None = None,
    optimizer: Optimizer | None = None,
    views: Views = True,
    cache: str | os.PathLike[str] | bool = True,
    progress: Progress = None,
) -> pd.DataFrame:
    """The exact forces of the updates that made checkpoints, from the optimizer's state in them.

        ⟨w,u⟩ = (⟨w',u⟩ + η‖u‖²)/(1−ηλ)      ‖w‖² = (‖w'‖² + 2η⟨w',u⟩ + η²‖u‖²)/(1−ηλ)²,     u = m̂/(√v̂+ε)

    with w', m and v as they are stored, behind the update: what `ForceLogger` would have logged of it.

    Args:
        source: a checkpoint: a folder of transformers' Trainer (`checkpoint-500`) or of Accelerate's `save_state`,
            Lightning's `.ckpt`, a file of `torch.save` with model and optimizer under usual keys (or two files in
            a folder), a folder of torch.distributed.checkpoint (torchtitan's; Accelerate's and Trainer's sharded
            states), OLMo's (unsharded, or sharded by torch) or OLMo-core's, a snapshot of `ForceLogger`; or
            several: a run directory or `RunLog` (its `resume.pt` and snapshots), a folder of checkpoints, a list of
            any of these, {step: path or hf://owner/name@revision}, hf://owner/name, or a series, `Checkpoints`. No
            code of a file runs.
        names: the names of the parameters in the order of the optimizer's groups, where the match of weights and
            states is not certain otherwise. (It is taken for certain that a group lists its parameters in the
            model's order, as model.parameters() does, and that a scheduler was stepped behind its update: no file
            tells of a loop that did otherwise.)
        model: the model, for the same: its order of parameters tells. Without either, names in the file count, or
            the order of a state dict that was pickled, or that of the transformers model that config.json names.
        config: the model's config, which says how fused matrices are split; None looks for it beside.
        rules: {regular expression: component} for names that are not known, as in `describe`.
        lr: η of the update, where the checkpoint does not tell it: a number, a function of update numbers, a
            `Recipe`, or a list with one of these for each of the optimizer's groups. What it says is checked.
        optimizer: "AdamW" or "Adam", where the checkpoint does not say which made it. They differ in what their
            weight decay does.
        views: True splits fused tensors, "head" into heads, False leaves them whole.
        cache: folder for what was computed of checkpoints on the hub, which are fetched one at a time and not
            again; True for the series' own, False for none.
        progress: a bar. None: where someone watches.

    Returns:
        A force table of span 1 with the columns of `FORCE_TABLE`, `LOG_TABLE` and `STATE_TABLE`: for each
        checkpoint a row for each tensor. `step` is the number of updates that the optimizer has made, as
        `ForceLogger` counts them (of a mapping or series, its steps). Drift needs the gradient and is NaN.
        Where η or the decay is not known, forces are NaN, and `note` and a warning say why.

    Raises:
        FileNotFoundError: there is no such source, or no checkpoint with an optimizer's state in it.
        CheckpointError: a checkpoint is damaged, is of no Adam, or it is not certain which state belongs to which
            weights; the message says what would make it so.
        TypeError, ValueError: an argument is none of these, or contradicts a checkpoint.

    Source: the closed form is `before_step`'s; the learning rate is `checkpoints.rates`'.

    >>> import tempfile
    >>> layer = torch.nn.Linear(4, 4)
    >>> adamw = torch.optim.AdamW(layer.parameters(), lr=0.1)
    >>> layer(torch.ones(1, 4)).sum().backward()
    >>> adamw.step()
    >>> file = Path(tempfile.mkdtemp()) / "state.pt"
    >>> torch.save({"model": layer.state_dict(), "optimizer": adamw.state_dict()}, file)
    >>> forces_from_states(file, lr=0.1)[["step", "tensor", "injection"]].round(4).to_numpy().tolist()
    [[1, 'weight', 0.16], [1, 'bias', 0.04]]
    """
    check_config(config)
    check_views(views)
    check_mapping("rules", rules, "{regular expression: component}")
    if optimizer is not None:
        check_choice("optimizer", optimizer, ("AdamW", "Adam"))
    asked = _Asked(names, model, config, rules, lr, optimizer, views)
    if isinstance(source, Mapping) or (isinstance(source, str) and source.startswith("hf://")):
        source = Checkpoints(source, config=config, rules=rules)
    if isinstance(source, Checkpoints):
        found = _of_series(source, asked, cache, progress)
    else:
        places = _places(source)
        bar = progress_bar(
            places, progress=progress if len(places) > 1 else False, unit="checkpoint", desc="forces"
        )
        one = progress if len(places) == 1 else False
        found = [update for place in bar if (update := _update(read_state(place), None, asked, one))]
        found = _once(found)
    if not found:
        raise CheckpointError(f"source: {_shown(source)} has made no update yet, and so has no forces")
    table = _table(sorted(found, key=lambda update: update.step))
    _warn(table)
    return table


class _Asked(NamedTuple):
    """What the caller said of all checkpoints."""

    names: Sequence[str] | None
    model: nn.Module | None
    config: Any
    rules: Mapping[str, str] | None
    lr: Given | Sequence[Given] | None
    optimizer: Optimizer | None
    views: Views


class _Update(NamedTuple):
    """What a checkpoint tells of the update that made it.

    Attributes:
        step: the update's number.
        place: the checkpoint.
        rows: the stored columns of the log, and those of `STATE_TABLE`.
        labels: what each row is, by its label, as run.json has it.
    """

    step: int
    place: Path
    rows: pd.DataFrame
    labels: dict[str, dict[str, Any]]


def _once(found: Sequence[_Update]) -> list[_Update]:
    """The updates, each once: of what a trainer copies as its last, the one with the number is taken."""
    known: dict[int, _Update] = {}
    for update in sorted(found, key=lambda update: update.place.name.startswith("last")):
        other = known.setdefault(update.step, update)
        if other is not update and not update.place.name.startswith("last"):
            raise CheckpointError(
                f"update {update.step} is there twice, in {other.place} and {update.place}: give {{step: path}}"
            )
    return list(known.values())


def _shown(source: Any) -> str:
    return repr(source) if isinstance(source, Checkpoints) else str(getattr(source, "path", source))


def _table(found: Sequence[_Update]) -> pd.DataFrame:
    """The force table of all updates."""
    labels = {label: entry for update in found for label, entry in update.labels.items()}
    rows = pd.concat([update.rows for update in found], ignore_index=True)
    table = force_table(rows, labels)
    return table.assign(**{name: rows[name].to_numpy() for name in STATE_TABLE})


def _warn(table: pd.DataFrame) -> None:
    """Say what is missing or was not checked, each once."""
    unchecked = table[table["lr_from"] == "group"]
    if len(unchecked):
        count = unchecked["step"].nunique()
        warnings.warn(
            f"the learning rate of {count} checkpoint{'s' * (count != 1)} (η = {unchecked['lr'].iloc[0]:.6g} at "
            f"update {unchecked['step'].iloc[0]}) is that of the optimizer's group, and nothing says that no loop "
            "had set the next one already: lr= (a schedule) checks it",
            stacklevel=3,
        )
    for note, rows in table[table["note"] != ""].groupby("note", sort=False):
        first, many = rows.iloc[0], "s" * (len(rows) != 1)
        warnings.warn(
            f"{len(rows)} row{many} ({first['tensor']} at update {first['step']}): {note}", stacklevel=3
        )


# --- where ------------------------------------------------------------------------------------------------


def _places(source: Any) -> list[Path]:
    """The checkpoints on a disk that a source is."""
    if isinstance(source, list | tuple) and source:
        return [place for each in source for place in _places(each)]
    if isinstance(source, RunLog):
        if source.path is None:
            raise ValueError("source: a run in memory has no checkpoints; give a run directory")
        source = source.path
    if not isinstance(source, str | os.PathLike):
        raise refuse(
            "source",
            "a checkpoint's file or folder, a run directory or RunLog, a folder of checkpoints, a list of these, "
            "{step: path}, hf://owner/name, or Checkpoints",
            source,
        )
    place = check_path("source", source)
    if not place.exists():
        raise FileNotFoundError(f"source: there is no file or folder {place}")
    if not place.is_dir():
        return [place]
    if (place / "run.json").is_file():
        return _places_of_run(place)
    if find_format(place) is not None:
        return [place]
    with refused(place):
        inside = sorted(path for path in place.iterdir() if not path.name.startswith("."))
        found = [path for path in inside if find_format(path) is not None]
    if not found:
        raise FileNotFoundError(
            f"source: {place} is no checkpoint with an optimizer's state, and holds none; it has "
            f"{[path.name for path in inside][:8]}"
        )
    return found


def _places_of_run(folder: Path) -> list[Path]:
    """A run's snapshots, and the state that it continues from, if no snapshot is of the same update."""
    snapshots = sorted((folder / "snapshots").glob("step-*.safetensors"))
    last = folder / "resume.pt"
    if last.is_file():
        made = read_state(last).step
        if made and f"step-{made:06d}.safetensors" not in {path.name for path in snapshots}:
            return [*snapshots, last]
    if not snapshots:
        raise FileNotFoundError(
            f"source: the run {folder} has neither snapshots (ForceLogger(snapshot_every=…)) nor a resume.pt; its "
            "log is RunLog(path).forces()"
        )
    return snapshots


_IDLE = re.compile(r"rng_state|tokenizer|vocab|merges|\.(?:md|txt|png|py|jinja)$|^\.git", re.IGNORECASE)


def _of_series(
    series: Checkpoints, asked: _Asked, cache: str | os.PathLike[str] | bool, progress: Progress
) -> list[_Update]:
    """The updates of a series: what is on the hub is fetched one at a time, and what was computed of it is kept."""
    folder = series.cache_folder(cache, "forces")
    config = asked.config if asked.config is not None else series.config()
    asked = asked._replace(config=config, rules=asked.rules or series.rules)
    found: list[_Update] = []
    for step in progress_bar([*series.steps], progress=progress, unit="checkpoint", desc="forces"):
        try:
            commit = series.commit(step)
            kept = (
                None if commit is None or folder is None else _Kept(folder, step, _key(asked, commit, step))
            )
            update = None if kept is None else kept.read()
            if update is None:
                with series.files(step, lambda name: not _IDLE.search(name)) as paths:
                    if not paths:
                        raise CheckpointError(f"step {step} of {series} holds no files")
                    name, path = next(iter(paths.items()))
                    place = path if len(paths) == 1 else path.parents[name.count("/")]
                    update = _update(read_state(place), step, asked, False)
                if kept is not None and update is not None:
                    kept.write(update)
        except (CheckpointError, FileNotFoundError) as error:
            if series.errors == "raise":
                raise
            warnings.warn(f"left out: {error}", stacklevel=3)
            continue
        if update is not None:
            found.append(update)
    return found


def _key(asked: _Asked, commit: str, step: int) -> str:
    """What the forces of a checkpoint on the hub depend on, as text."""
    config = asked.config.to_dict() if hasattr(asked.config, "to_dict") else asked.config
    order = None if asked.model is None else [name for name, _ in asked.model.named_parameters()]
    given: Sequence[Any] = asked.lr if isinstance(asked.lr, list | tuple) else [asked.lr]
    rates = [None if lr is None else [_rate_or_none(lr, step + i) for i in (0, 1)] for lr in given]
    names = None if asked.names is None else list(asked.names)
    told = [_KEPT, commit, step, names, order, config, asked.rules, rates, asked.optimizer, asked.views]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _rate_or_none(lr: Given, step: int) -> float | None:
    try:
        return rate_given(lr, step)
    except (TypeError, ValueError):  # which is told when it is used
        return None


_KEPT = 1  # version of what is kept of them; others are computed again


class _Kept:
    """Where what was computed of a checkpoint on the hub is kept: a Parquet file for each step."""

    def __init__(self, folder: Path, step: int, key: str) -> None:
        self.step, self.key = step, key
        self.path = folder / f"step-{step:06d}-{key[:12]}.parquet"

    def write(self, update: _Update) -> None:
        """Keep it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = pa.Table.from_pandas(update.rows, preserve_index=False)
        about = {"key": self.key, "place": str(update.place), "labels": update.labels}
        write_parquet(self.path, rows.replace_schema_metadata({"weightdyn": json.dumps(about)}))

    def read(self) -> _Update | None:
        """What was kept; None if nothing was, or nothing that can be read."""
        try:
            table = read_parquet(self.path)
            about = json.loads(table.schema.metadata[b"weightdyn"])
            if about["key"] != self.key:
                return None
            return _Update(self.step, Path(about["place"]), table.to_pandas(), about["labels"])
        except Exception:  # whatever is wrong with it, it can be computed again
            return None


# --- one checkpoint ---------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A tensor whose update is measured."""

    slot: Slot
    stored: Stored
    name: TensorName
    rows: range  # of the record
    adam: Adam
    amsgrad: bool


def _update(state: SavedState, step: int | None, asked: _Asked, progress: Progress) -> _Update | None:
    """The update that made a checkpoint; None if none did.

    Args:
        state: the checkpoint.
        step: its number, where the source says so; None for the updates that the optimizer has made.
        asked: what the caller said.
        progress: a bar over the weights.
    """
    with refused_state(state):
        kinds = [_kind(state, group, asked.optimizer) for group in state.groups]
        for slot in state.slots:
            _check_slot(state, slot)
    made = max((int(slot.numbers["step"]) for slot in state.slots if slot.tensors), default=0)
    if made == 0:
        return None
    if step is None:  # OLMo-core's moments did not always count theirs
        step = state.step if state.format == "olmo" and state.step else made
    number = step
    config = asked.config if asked.config is not None else config_beside(state.place)
    matched = match_slots(state, asked.names, asked.model, config)
    rates = find_rates(state, made, number, asked.lr)
    bare = dict(zip(state.weights, bare_names(list(state.weights)), strict=True))

    book = Book(lambda what, message: warnings.warn(f"{state.place}: {message}", stacklevel=2))
    tensors: list[_Tensor] = []
    for slot, own in (pair for pair in matched if pair[0].numbers["step"] > 0):
        stored = state.weights[own]
        name = describe(bare[own], stored.shape, config, views=asked.views, rules=asked.rules)
        rows = name.rows(stored.shape)
        first = len(book.labels)
        book.labels |= {row.label: {**row.identity(), "parameter": bare[own]} for row in rows}
        group, rate = state.groups[slot.group], rates[slot.group]
        beta1, beta2 = rate.betas or group["betas"]
        adam = Adam(beta1, beta2, group["eps"], slot.numbers["step"])
        here = range(first, first + len(rows))
        tensors.append(_Tensor(slot, stored, name, here, adam, bool(group.get("amsgrad"))))

    record = book.record(Round(number))
    about = pd.DataFrame({"updates": made, "lr_from": "", "note": ""}, index=range(len(book.labels)))
    for each in tensors:
        group, rate = state.groups[each.slot.group], rates[each.slot.group]
        decay, why = _decay(group, kinds[each.slot.group])
        known, late = _moved(each.slot, made)
        rows = each.rows
        record.moved[rows] = True
        record.lr[rows] = rate.lr if known else math.nan
        record.weight_decay[rows] = decay
        notes = [late, rate.why if not rate.source else "", why, _coarse(each)]
        about.loc[[*rows], ["updates", "lr_from", "note"]] = [
            int(each.slot.numbers["step"]), rate.source if known else "", "; ".join(filter(None, notes)),
        ]  # fmt: skip
    for chosen, products in _measured(tensors, progress):
        here = [row for each in chosen for row in each.rows]
        record.waiting.append(ProductsAfter(here, products))
        largest = dict(zip(here, products[:, PRODUCTS.index("u_max")].tolist(), strict=True))
        for each in (each for each in chosen if _coarse(each)):
            if max(largest[row] for row in each.rows) > _LOOSE * _bound(each.adam):
                record.lr[each.rows] = math.nan
                about.loc[[*each.rows], ["lr_from", "note"]] = "", _LOST
    rows = cast(pd.DataFrame, book.take()).reset_index(drop=True)
    rows["tensor"] = rows["tensor"].astype(str)
    odd = [
        doubt(norm, book.labels[label]["numel"])
        for label, norm in zip(rows["tensor"], rows["norm_sq_after"], strict=True)
    ]
    about["note"] = ["; ".join(filter(None, pair)) for pair in zip(about["note"], odd, strict=True)]
    return _Update(number, state.place, pd.concat([rows, about], axis=1), book.labels)


_LOOSE = 2.0  # what is coarse may be above the bound by rounding
_LOST = "some of its v are rounded to nearly 0 in the file, which leaves u without a bound"


def _bound(adam: Adam) -> float:
    """The largest |u| that any gradients make, by Cauchy and Schwarz: where v is kept whole none is above it."""
    beta1, beta2, _, step = (float(each) for each in adam)
    squares = (1 - beta1**2 / beta2) * (1 - beta2) if beta1**2 < beta2 else math.nan
    return (1 - beta1) / math.sqrt(squares) * math.sqrt(1 - beta2**step) / (1 - beta1**step)


def _moved(slot: Slot, made: int) -> tuple[bool, str]:
    """Whether it is certain that the last update moved a parameter, and why not."""
    own = int(slot.numbers["step"])
    if own == made:
        return True, ""
    return False, (
        f"its moments have had {own} updates and others {made}: whether the last one moved it is not known"
    )


def _coarse(each: _Tensor) -> str:
    """What makes the forces of a tensor less than exact."""
    if "qmap1" in each.slot.tensors:
        return "its moments are stored in 8 bits, coarser than those that made the update"
    kinds = {each.stored.dtype, *(stored.dtype for stored in each.slot.tensors.values())}
    coarse = sorted(kind for kind in kinds if getattr(torch, kind).itemsize < 4)
    return f"it is stored in {coarse[0]}, whose rounding its forces have" if coarse else ""


# --- which optimizer --------------------------------------------------------------------------------------

_TORCH = {"amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"}
"""Options that the groups of torch's Adam and AdamW have, and of no other optimizer that keeps such moments."""

_TOLD = {
    "AdamW": "AdamW", "Adam": "Adam", "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW",
    "adamw_torch_xla": "AdamW", "adamw_torch_npu_fused": "AdamW", "adamw_bnb_8bit": "AdamW", "adamw_8bit": "AdamW",
    "paged_adamw_8bit": "AdamW", "paged_adamw_32bit": "AdamW",
}  # fmt: skip
"""What a checkpoint may call the optimizer, and what it is; transformers has words of its own."""

_OF_TORCH = {name for name in _TOLD if name.startswith("adamw_torch")}
_BITS = {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
_BLOCK = 256  # weights that share a scale in the 8-bit moments of bitsandbytes


def _kind(state: SavedState, group: Mapping[str, Any], given: Optimizer | None) -> str | None:
    """ "AdamW" or "Adam"; None of one of the two where it is not known which."""
    told = given or (None if state.optimizer is None else _TOLD.get(state.optimizer, ""))
    if told == "":
        raise ValueError(
            f"its optimizer is {state.optimizer}, and the forces of Adam and AdamW alone follow from moments"
        )
    betas, eps = group.get("betas"), group.get("eps")
    good = isinstance(betas, list) and len(betas) == 2 and all(_is_part(beta) for beta in betas)
    if not good or not isinstance(eps, int | float) or isinstance(eps, bool) or not eps >= 0:
        raise ValueError(f"its optimizer has the betas {betas} and the eps {eps}, which Adam has not")
    # What a Trainer's arguments say is its default even where another optimizer was given to it.
    other = state.optimizer in _OF_TORCH and given is None and "amsgrad" not in group
    if other or (told is None and not set(group) >= _TORCH):
        raise ValueError(
            'which optimizer made it is not told, and it is not torch\'s: optimizer="AdamW" or "Adam" says that it '
            "is one of the two, in what it computes"
        )
    decoupled = group.get("decoupled_weight_decay")
    if decoupled is None:
        return told
    kind = "AdamW" if decoupled else "Adam"
    if given not in (None, kind):
        raise ValueError(f"optimizer is {given!r}, and its groups say that it is {kind}")
    return kind


def _is_part(beta: Any) -> bool:
    return isinstance(beta, int | float) and not isinstance(beta, bool) and 0 <= beta < 1


def _check_slot(state: SavedState, slot: Slot) -> None:
    """Raise if what is kept of a parameter are not Adam's moments."""
    kept = set(slot.tensors)
    if not kept:
        return
    good = kept == {*MOMENTS[:2]} or kept == {*MOMENTS} or kept in ({"state1", "state2"}, _BITS)
    if not good or set(slot.numbers) - {"step"} or "step" not in slot.numbers:
        raise ValueError(
            f"its optimizer keeps {sorted({*kept, *slot.numbers})} of a parameter, and forces follow from Adam's "
            f"{', '.join(MOMENTS[:2])} and step alone"
        )
    if not 0 <= slot.numbers["step"] < 1 << 53 or slot.numbers["step"] % 1:
        raise ValueError(f"its optimizer has made {slot.numbers['step']} updates of a parameter")
    shapes = {stored.shape for key, stored in slot.tensors.items() if key in (*MOMENTS, "state1", "state2")}
    if len(shapes) > 1:
        raise ValueError(f"its optimizer's moments of one parameter have the shapes {sorted(shapes)}")
    if state.groups[slot.group].get("amsgrad") and MOMENTS[2] not in kept:
        raise ValueError(f"its optimizer has amsgrad and keeps no {MOMENTS[2]}")


def _decay(group: Mapping[str, Any], kind: str | None) -> tuple[float, str]:
    """λ that acted on a group's weights, or NaN and why it is not known."""
    decay = group.get("weight_decay")
    if not isinstance(decay, int | float) or isinstance(decay, bool):
        return math.nan, "its decay is not known"
    if decay == 0 or kind == "Adam":  # which adds it to the gradient
        return 0.0, ""
    if kind is None:
        return math.nan, (
            f"it has a weight decay of {decay:.6g}, and whether AdamW or Adam made it is not told: "
            'optimizer="AdamW" or "Adam" does'
        )
    return float(decay), ""


# --- products ---------------------------------------------------------------------------------------------


def _measured(tensors: Sequence[_Tensor], progress: Progress) -> Iterator[tuple[list[_Tensor], Tensor]]:
    """PRODUCTS of the weights as they are, small tensors together and large ones a piece at a time."""
    total = sum(math.prod(each.stored.shape) for each in tensors)
    with progress_bar(progress=progress, total=total, unit="weight", unit_scale=True, desc="forces") as bar:
        batch: list[_Tensor] = []
        for each in tensors:
            pieces = [*pieces_of(each.stored.shape)]
            if len(pieces) > 1:
                parts = [_products([each], rows) for rows in pieces]
                whole = torch.stack(parts).sum(0)
                peak = PRODUCTS.index("u_max")
                whole[:, peak] = torch.stack([part[:, peak] for part in parts]).amax(0)
                yield [each], whole
            else:
                batch.append(each)
            if sum(math.prod(other.stored.shape) for other in batch) >= _BATCH:
                yield batch, _products(batch)
                batch = []
            bar.update(math.prod(each.stored.shape))
        if batch:
            yield batch, _products(batch)


def _products(tensors: Sequence[_Tensor], rows: tuple[int, int] | None = None) -> Tensor:
    """PRODUCTS of whole tensors, or of rows of one."""
    boxes = []
    for each in tensors:
        start, stop = rows or (0, each.stored.shape[0])
        boxes.append(
            Box((start, *(0,) * (len(each.stored.shape) - 1)), (stop - start, *each.stored.shape[1:]))
        )
    views = [box.clip(each.name.views) for box, each in zip(boxes, tensors, strict=True)]
    ranges = [(box.offset[0], box.offset[0] + box.shape[0]) for box in boxes]
    columns = [
        [read(each, *own) for each, own in zip(tensors, ranges, strict=True)]
        for read in (_weights_of, _first_of, _second_of)
    ]
    plan = Plan([box.shape for box in boxes], views, torch.device("cpu"))
    weights, first, second = columns
    return plan.moments(weights, first, second, [each.adam for each in tensors])


def _weights_of(each: _Tensor, start: int, stop: int) -> Tensor:
    return _wide(each.stored.read(start, stop))


def _first_of(each: _Tensor, start: int, stop: int) -> Tensor:
    return _moment(each.slot, MOMENTS[0] if MOMENTS[0] in each.slot.tensors else "1", start, stop)


def _second_of(each: _Tensor, start: int, stop: int) -> Tensor:
    """v, or with amsgrad the maximum that the update divided by."""
    key = MOMENTS[2] if each.amsgrad else MOMENTS[1]
    return _moment(each.slot, key if key in each.slot.tensors else "2", start, stop)


def _moment(slot: Slot, key: str, start: int, stop: int) -> Tensor:
    """Rows of a moment; of bitsandbytes' states it is the first or the second."""
    if key in MOMENTS:
        return _wide(slot.tensors[key].read(start, stop))
    codes = slot.tensors[f"state{key}"]
    values = codes.read(start, stop)
    if "qmap1" not in slot.tensors:
        return _wide(values)
    width = math.prod(codes.shape[1:])
    blocks = torch.arange(start * width, stop * width).div_(_BLOCK, rounding_mode="floor")
    values = (
        slot.tensors[f"qmap{key}"].read()[values.reshape(-1).long()]
        * slot.tensors[f"absmax{key}"].read()[blocks]
    )
    return values.view(stop - start, *codes.shape[1:])


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype.itemsize < 4 else values


class refused_state:
    """Turn what is wrong with a checkpoint's optimizer into a CheckpointError that names it."""

    def __init__(self, state: SavedState) -> None:
        self.state = state

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, ValueError) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self.state.place}: {error}") from None
