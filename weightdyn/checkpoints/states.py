"""The exact forces of the updates that made checkpoints, from the optimizer's state in them.

Behind an update AdamW's moments and the weights tell its three products in closed form, and a checkpoint that a
training can resume from has both. So each such checkpoint holds one row of the log that nobody kept. The arithmetic
is the logger's own; what is new here is to know which moments belong to which weights, and at which learning rate the
update was made, and to say so where that cannot be known.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from weightdyn.checkpoints.matching import match_slots
from weightdyn.checkpoints.measure import pieces_of
from weightdyn.checkpoints.rates import Given, Rate, find_rates
from weightdyn.checkpoints.series import Checkpoints
from weightdyn.core.checks import check_choice, check_path, refuse
from weightdyn.core.naming import TensorName, Views, bare_names, check_config, check_views, describe
from weightdyn.core.progress import Progress, is_watched, progress_bar
from weightdyn.core.tables import force_table
from weightdyn.files.statefiles import MOMENTS, SavedState, Slot, find_format, read_state
from weightdyn.files.weightfiles import CheckpointError, Stored, config_beside, doubt
from weightdyn.record.book import Book, ProductsAfter, Round
from weightdyn.record.moments import Adam, Plan, u_max_column
from weightdyn.record.runlog import RunLog
from weightdyn.record.shards import Box

Optimizer = Literal["AdamW", "Adam"]

Source = RunLog | Checkpoints | str | os.PathLike[str] | Mapping[int, str | os.PathLike[str]]

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
    progress: Progress = None,
) -> pd.DataFrame:
    """The exact forces of the updates that made checkpoints, from the optimizer's state in them.

        ⟨w,u⟩ = (⟨w',u⟩ + η‖u‖²)/(1−ηλ)      ‖w‖² = (‖w'‖² + 2η⟨w',u⟩ + η²‖u‖²)/(1−ηλ)²,     u = m̂/(√v̂+ε)

    with w', m and v as they are stored, behind the update: what `ForceLogger` would have logged of it.

    Args:
        source: a checkpoint: a folder of transformers' Trainer (`checkpoint-500`) or of Accelerate's `save_state`,
            Lightning's `.ckpt`, a file of `torch.save` with model and optimizer under usual keys (or two files in
            a folder), a snapshot of `ForceLogger`; or several: a run directory or `RunLog` (its `resume.pt` and
            snapshots), a folder of checkpoints, {step: path}, or a series, `Checkpoints`. No code of a file runs.
        names: the names of the parameters in the order of the optimizer's groups, where the match of weights and
            states is not certain otherwise.
        model: the model, for the same: its order of parameters tells. Without either, names in the file count, or
            the order of a state dict that was pickled, or that of the transformers model that config.json names.
        config: the model's config, which says how fused matrices are split; None looks for it beside.
        rules: {regular expression: component} for names that are not known, as in `describe`.
        lr: η of the update, where the checkpoint does not tell it: a number, a function of update numbers, a
            `Recipe`, or a list with one of these for each of the optimizer's groups. What it says is checked.
        optimizer: "AdamW" or "Adam", where the checkpoint does not say which made it. They differ in what their
            weight decay does.
        views: True splits fused tensors, "head" into heads, False leaves them whole.
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
    if optimizer is not None:
        check_choice("optimizer", optimizer, ("AdamW", "Adam"))
    asked = _Asked(names, model, config, rules, lr, optimizer, views)
    places = _places(source)
    found: list[_Update] = []
    bar = progress_bar(places, progress=progress, unit="checkpoint", desc="forces", disable=None) if len(places) > 1 else places
    for step, place in bar:
        state = read_state(place)
        update = _update(state, step, asked, progress if len(places) == 1 else False)
        if update is not None:
            found.append(update)
    if not found:
        raise CheckpointError(f"{places[0][1]} is of a training that has made no update yet: it has no forces")
    return _table(found)
