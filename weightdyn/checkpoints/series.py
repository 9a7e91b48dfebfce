"""A series of checkpoints, measured once: what recovery needs to know of the weights of every step.

Published models come as folders or branches of checkpoints, each of which may take longer to fetch than to read.
So a series is read a tensor at a time, every step is measured on its own and stored as soon as it is done, and
what was stored is not read again: a killed measurement goes on where it stopped, and a longer series costs only
its new steps. From the hub a checkpoint is downloaded, checked against its digest, measured and deleted.

A row of the measurement is one part of one tensor at one step: its squared norm to float64, what the rounding of
the stored copy adds to it, its Weibull fit, and on request its inner products with the other steps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm import tqdm

from weightdyn.checkpoints.measure import (
    Gram,
    Measured,
    Sums,
    Task,
    check_same,
    identical_steps,
    inner_products,
    joined_digest,
    layout_of,
    pieces_of,
    run_tasks,
    series_table,
    table_row,
)
from weightdyn.core.naming import TensorRow, Views, describe
from weightdyn.files.hub import Hub
from weightdyn.files.weightfiles import (
    ENDINGS,
    CheckpointError,
    Stored,
    choose_files,
    list_tensors,
    refused,
    row_reader,
)
from weightdyn.record.runlog import RunLog

if TYPE_CHECKING:
    from joblib import Parallel

Errors = Literal["raise", "skip"]

_BUNDLE = 1 << 20  # weights of small tensors that make up one piece of work
_BATCH = 1 << 28  # bytes of whole checkpoints that are handed to the workers at a time
_STEP = re.compile(
    r"(?:^|[._-])(?:global[._-]?)?(?:step|checkpoint|ckpt|iter|update)[._-]?(\d+)(?=$|[._-])", re.IGNORECASE
)


# Where checkpoints are.


class _Folder:
    """Checkpoints on a disk."""

    local = keep = True
    progress = True
    hold: frozenset[int] | set[int] = frozenset()

    def __init__(self, places: dict[int, Path], name: str, cache: Path | None, config: Any) -> None:
        self.places, self.name, self.cache, self._config = places, name, cache, config

    def where(self, step: int) -> str:
        return str(self.places[step])

    def config(self) -> Any:
        """What the run says, or the config.json in or beside a checkpoint."""
        if self._config is not None:
            return self._config
        for place in self.places.values():
            for folder in (place, place.parent):
                if (folder / "config.json").is_file():
                    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return None

    def files(self, step: int) -> dict[str, int]:
        """The checkpoint's weight files by name, with their sizes in bytes."""
        return {str(path): path.stat().st_size for path in self.fetch(step)}

    def fetch(self, step: int) -> list[Path]:
        place = self.places[step]
        if place.is_file():
            return [place]
        if not place.is_dir():
            raise FileNotFoundError(f"step {step}: there is no file or folder {place}")
        names = [path.name for path in place.iterdir() if path.is_file()]
        read = lambda name: (place / name).read_text(encoding="utf-8")  # noqa: E731
        return [place / name for name in choose_files(names, str(place), read)]

    def fingerprint(self, step: int) -> str:
        """Names, sizes and times of change: what a measurement that was stored is checked against."""
        stats = [(path.name, path.stat()) for path in self.fetch(step)]
        return json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])

    def release(self, steps: Collection[int] = ()) -> None:
        """Nothing: the files are the user's."""


def _step_of(name: str) -> int | None:
    found = _STEP.findall(name)
    return int(found[-1]) if found else None


def _scan(folder: Path) -> list[tuple[int, Path]]:
    """Steps and places of the checkpoints in a folder, by step and name."""
    found = []
    for path in folder.iterdir():
        if path.name.startswith(".") or not (path.is_dir() or path.suffix in ENDINGS):
            continue
        step = _step_of(path.stem if path.is_file() else path.name)
        if step is not None:
            found.append((step, path))
    return sorted(found)


# The series.


class Checkpoints:
    """The checkpoints of one training, ordered by step, read a tensor at a time.

    Args:
        source: a run directory or `RunLog`; a folder with files or folders named step1000, step-001000,
            checkpoint-500, global_step1000, …; {step: file or folder}; or hf://owner/name, a repository on the
            hub with branches step1000, … (of OLMo's stages the first). A checkpoint is a safetensors file,
            shards with their index, pytorch_model.bin or its shards, or what torch.save wrote. Pickles are opened
            with weights_only=True alone.
        steps: the steps to take; None for all.
        config: the model's config (of transformers, or a dict), which says how fused matrices are split; None
            looks for it beside the checkpoints.
        rules: {regular expression: component} for names that are not known, as in `naming.describe`.
        errors: what to do with a checkpoint that is damaged, of other names or shapes than the first, or there
            twice: "raise" a CheckpointError that names its file, or "skip" it with a warning.
        keep: leave what is downloaded in the hub's own cache. False: at most one checkpoint is on the disk at a
            time (two for gram="band"), and none afterwards.
        endpoint: address of the hub; None for HF_ENDPOINT or the public one.

    Attributes:
        steps: the steps, ascending; those that were found to be damaged under errors="skip" drop out.
        skipped: {step: what is wrong with it}.

    Raises:
        FileNotFoundError: there is no such source, or nothing in it is a checkpoint.
        CheckpointError: two checkpoints of one step.

    >>> from safetensors.torch import save_file
    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> for step in (0, 100):
    ...     save_file({"mlp.up_proj.weight": torch.full((8, 8), 1.0 + step)}, folder / f"step{step}.safetensors")
    >>> series = Checkpoints(folder)
    >>> series.steps, series.tensors
    ([0, 100], {'mlp.up_proj.weight': ((8, 8), 'float32')})
    >>> series.measure(weibull=False, cache=False, progress=False)["norm_sq"].tolist()
    [64.0, 652864.0]
    """

    def __init__(
        self,
        source: RunLog | str | os.PathLike[str] | Mapping[int, str | os.PathLike[str]],
        steps: Iterable[int] | None = None,
        *,
        config: Any = None,
        rules: Mapping[str, str] | None = None,
        errors: Errors = "raise",
        keep: bool = False,
        endpoint: str | None = None,
    ) -> None:
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors must be 'raise' or 'skip', got {errors!r}")
        self.errors = errors
        self.rules = rules
        self.skipped: dict[int, str] = {}
        self._given_config = config
        self._store: _Folder | Hub = self._open(source, keep, endpoint)
        self.steps: list[int] = sorted(self._store.places)
        if steps is not None:
            wanted = sorted({int(step) for step in steps})
            if missing := [step for step in wanted if step not in self._store.places]:
                near = min(self.steps, key=lambda step: abs(step - missing[0]))
                raise ValueError(
                    f"steps: {self._store.name} has no checkpoint of {missing[:5]}; the nearest to {missing[0]} "
                    f"is {near} ({len(self.steps)} steps from {self.steps[0]} to {self.steps[-1]})"
                )
            self.steps = wanted

    def _open(self, source: Any, keep: bool, endpoint: str | None) -> _Folder | Hub:
        if isinstance(source, str) and source.startswith("hf://"):
            repo = source.removeprefix("hf://").strip("/")
            if repo.count("/") != 1:
                raise ValueError(f"source must be hf://owner/name, got {source!r}")
            hub = Hub(repo, keep, endpoint)
            for step, one, other in hub.twice:
                self._fail(
                    step, CheckpointError(f"step {step} is there twice, as {one} and {other}"), gone=False
                )
            return hub
        if isinstance(source, Mapping):
            places = {int(step): Path(path) for step, path in source.items()}
            if not places:
                raise ValueError("source: the mapping {step: path} is empty")
            return _Folder(places, "the mapping given as source", None, None)
        if isinstance(source, RunLog):
            if source.path is None:
                raise ValueError("source: a run in memory has no checkpoints; give a run directory")
            source = source.path
        folder, config, run = Path(source), None, False
        if (folder / "run.json").is_file():
            run = True
            config = RunLog(folder).info.get("train", {}).get("architecture")
            folder = folder / "checkpoints"
        if not folder.is_dir():
            what = "has no folder of checkpoints" if run else "is no folder"
            raise FileNotFoundError(
                f"source: {folder} {what}; accepted are a run directory, a folder of checkpoints, {{step: path}}, "
                "and hf://owner/name"
            )
        places: dict[int, Path] = {}
        for step, path in _scan(folder):
            if step not in places:
                places[step] = path
            else:
                self._fail(
                    step,
                    CheckpointError(f"step {step} is there twice, as {places[step]} and {path}"),
                    gone=False,
                )
        if not places:
            raise FileNotFoundError(
                f"source: nothing in {folder} is named like a checkpoint (step1000, step-001000.safetensors, "
                "checkpoint-500, global_step1000, …); give {step: path} for other names"
            )
        return _Folder(places, str(folder), (folder.parent if run else folder) / "measured", config)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        span = f", {self.steps[0]}–{self.steps[-1]}" if self.steps else ""
        return f"Checkpoints({self._store.name}: {len(self.steps)} steps{span})"

    def _fail(self, step: int, error: Exception, *, gone: bool = True) -> None:
        """Raise, or note that a step is not usable."""
        if self.errors == "raise":
            raise error
        warnings.warn(f"left out: {error}", stacklevel=3)
        self.skipped[step] = str(error)
        if gone:
            self.steps = [other for other in self.steps if other != step]

    @property
    def config(self) -> Any:
        """The model's config: the one given, or the one found beside the checkpoints, or None."""
        return self._given_config if self._given_config is not None else self._store.config()

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of the first checkpoint's float tensors, by name; buffers are left out."""
        while self.steps:
            step = self.steps[0]
            try:
                found = list_tensors(self._store.fetch(step))
                return {name: (stored.shape, stored.dtype) for name, stored in found.items()}
            except (CheckpointError, FileNotFoundError) as error:
                self._fail(step, error)
        raise CheckpointError(f"{self._store.name} holds no checkpoint that can be read")

    def load(self, step: int, name: str) -> Tensor:
        """One tensor of one checkpoint, as it is stored.

        Raises:
            KeyError: there is no such step or tensor.
            CheckpointError: the checkpoint is damaged.
        """
        if step not in self.steps:
            raise KeyError(f"step {step} is not in the series; it has {self.steps[:5]} … {self.steps[-1:]}")
        found = list_tensors(self._store.fetch(step))
        if name not in found:
            raise KeyError(f"step {step} has no tensor {name!r}; it has {list(found)[:5]} …")
        with refused(found[name].file):
            return row_reader(found[name].file, name)(0, found[name].shape[0])

    # Measuring.

    def measure(
        self,
        gram: Gram = "none",
        weibull: bool = True,
        views: Views = True,
        *,
        n_jobs: int = -1,
        cache: str | os.PathLike[str] | bool = True,
        progress: bool = True,
    ) -> pd.DataFrame:
        """Measure every tensor of every checkpoint, each checkpoint once.

        Steps are stored as they are done, so that a measurement that was cut short goes on where it stopped, and
        only steps that are new or whose files have changed are read.

        Args:
            gram: inner products ⟨W_i, W_j⟩ between steps i ≥ j: "none"; "band", those of neighbours and of each
                step with itself; "full", all. They take a second pass over the files, which holds 64 MB.
            weibull: fit a Weibull law to the magnitudes.
            views: True splits fused tensors, "head" makes a row for each head of q, k and v, False leaves all whole.
            n_jobs: pieces of work at a time, by threads; -1 for as many as there are cores. Under
                `joblib.parallel_config` another backend takes over: processes, or a cluster.
            cache: where measurements are stored: a folder of your own, True for `measured` in the run directory
                or in the folder of checkpoints, False for nowhere.
            progress: show a bar.

        Returns:
            The columns of `CHECKPOINT_TABLE`: one row per step and tensor, or per part of a fused tensor, sorted by
            step and then by name. `dots` holds None for gram="none"; else an array with an
            entry for each step of the series up to the row's own.

        Raises:
            CheckpointError: a checkpoint is damaged or does not belong to the series (unless errors="skip").
            OSError: the cache cannot be written.
        """
        if gram not in ("none", "band", "full"):
            raise ValueError(f"gram must be 'none', 'band' or 'full', got {gram!r}")
        if gram == "full" and not self._store.keep:
            raise ValueError(
                "gram='full' needs all checkpoints on the disk at once: give Checkpoints(…, keep=True)"
            )
        from joblib import Parallel  # where it is used: it is slow to load

        self._store.progress = progress
        folder = self._cache_folder(cache, views)
        parts = {step: part for step in self.steps if (part := self._stored(folder, step, weibull))}
        todo = [step for step in self.steps if step not in parts]
        sizes = self._sizes(todo)
        bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=not progress, desc="measure")
        try:
            with bar, Parallel(n_jobs=n_jobs, prefer="threads") as work:
                for batch in self._batches(todo, sizes):
                    if gram == "band":
                        self._store.hold = set([step for step in self.steps if step < batch[0]][-1:])
                    for step, part in self._measured(work, batch, parts, weibull, views):
                        parts[step] = part
                        part.write(folder)
                    if gram == "band" and not self._store.keep:
                        self._add_dots(work, parts, gram, views, folder, batch, progress=False)
                    bar.update(sum(sizes[step] for step in batch))
                if gram != "none":
                    for steps in [self.steps] if self._store.keep else [[step] for step in self.steps]:
                        self._add_dots(work, parts, gram, views, folder, steps, progress)
        finally:
            self._store.hold = set()
            self._store.release()
        table = series_table([parts[step] for step in self.steps], gram, weibull)
        if same := identical_steps(table):
            listed = ", ".join(" = ".join(map(str, steps)) for steps in same[:5])
            warnings.warn(f"{self._store.name}: some steps hold identical weights: {listed}", stacklevel=2)
        return table

    def plan(
        self,
        weibull: bool = True,
        views: Views = True,
        *,
        cache: str | os.PathLike[str] | bool = True,
        progress: bool = True,
    ) -> pd.DataFrame:
        """What `measure` with these arguments would read, or download, before it does.

        Returns:
            One row per step: `step`, `place` (path or revision), `files` (number of weight files), `bytes`, and
            `measured`: whether it is stored already, so that nothing of it would be read. A checkpoint without
            weights has no files.
        """
        folder = self._cache_folder(cache, views)
        rows = []
        for step in tqdm(self.steps, unit="checkpoint", disable=not progress, desc="plan"):
            try:
                files = self._store.files(step)
            except (CheckpointError, FileNotFoundError):
                files = {}
            measured = self._stored(folder, step, weibull) is not None
            rows.append((step, self._store.where(step), len(files), sum(files.values()), measured))
        return pd.DataFrame(rows, columns=["step", "place", "files", "bytes", "measured"])

    def _cache_folder(self, cache: str | os.PathLike[str] | bool, views: Views) -> Path | None:
        """Where the measurements of these views lie; None for nowhere."""
        folder = self._store.cache if cache is True else None if cache is False else Path(cache)
        if folder is not None and isinstance(self._store, Hub):
            self._store.folder = folder / "download"
        if folder is None:
            return None
        config = self.config
        config = config.to_dict() if hasattr(config, "to_dict") else config
        asked = json.dumps([views, self.rules, config], sort_keys=True, default=str)
        return folder / hashlib.sha256(asked.encode()).hexdigest()[:12]

    def _stored(self, folder: Path | None, step: int, weibull: bool) -> Measured | None:
        """The measurement of a step that was stored, if it still holds and has what is asked for."""
        if folder is None:
            return None
        part = Measured.read(folder, step)
        if part is None or (weibull and not part.weibull):
            return None
        try:
            return part if part.fingerprint == self._store.fingerprint(step) else None
        except (CheckpointError, FileNotFoundError):
            return None  # measuring it will say what is wrong

    def _sizes(self, steps: Sequence[int]) -> dict[int, int]:
        """Bytes of each step; from the hub, to save requests, the first step's for all."""
        if not self._store.local and steps:
            return dict.fromkeys(steps, self._size(steps[0]))
        return {step: self._size(step) for step in steps}

    def _size(self, step: int) -> int:
        try:
            return sum(self._store.files(step).values())
        except (CheckpointError, FileNotFoundError):
            return 0

    def _batches(self, steps: Sequence[int], sizes: Mapping[int, int]) -> Iterator[list[int]]:
        """Steps that are measured at a time: one from the hub, as many as fill the workers from a disk."""
        batch: list[int] = []
        for step in steps:
            batch.append(step)
            if not self._store.local or sum(sizes[other] for other in batch) >= _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _parts(self, layout: Mapping[str, Sequence[int]], views: Views) -> dict[str, tuple[TensorRow, ...]]:
        """The rows that each tensor has."""
        config = self.config
        return {
            name: describe(name, shape, config, views=views, rules=self.rules).rows(shape)
            for name, shape in layout.items()
        }

    def _measured(
        self,
        work: Parallel,
        batch: Sequence[int],
        parts: Mapping[int, Measured],
        weibull: bool,
        views: Views,
    ) -> Iterator[tuple[int, Measured]]:
        """Measure the steps of a batch; yields each that is sound."""
        found: dict[int, dict[str, Stored]] = {}
        for step in batch:
            try:
                found[step] = list_tensors(self._store.fetch(step))
                first = min([*parts, *found])
                layout = parts[first].layout if first in parts else layout_of(found[first])
                check_same(step, found[step], first, layout)
            except (CheckpointError, FileNotFoundError) as error:
                found.pop(step, None)
                self._fail(step, error)
        bundles: list[tuple[int, list[Task]]] = []
        for step, contents in found.items():
            rows = self._parts(layout_of(contents), views)
            size = _BUNDLE
            for name, stored in contents.items():
                for start, stop in pieces_of(stored.shape):
                    if size >= _BUNDLE:
                        bundles.append((step, []))
                        size = 0
                    bundles[-1][1].append(Task(stored.file, name, (start, stop), rows[name]))
                    size += math.prod(stored.shape) * (stop - start) // stored.shape[0]
        from joblib import delayed

        results = work(delayed(run_tasks)(tasks, weibull) for _, tasks in bundles)
        for step, contents in found.items():
            tensors: dict[str, tuple[list[Sums], list[bytes]]] = {}
            broken = None
            for (owner, tasks), result in zip(bundles, results, strict=True):
                if owner != step:
                    continue
                if isinstance(result, CheckpointError):
                    broken = result
                    break
                for task, (sums, digest) in zip(tasks, result, strict=True):
                    if task.name in tensors:
                        known, digests = tensors[task.name]
                        tensors[task.name] = (
                            [a + b for a, b in zip(known, sums, strict=True)],
                            [*digests, digest],
                        )
                    else:
                        tensors[task.name] = sums, [digest]
            if broken is not None:
                self._fail(step, broken)
                continue
            layout = layout_of(contents)
            rows = [
                table_row(part, sums, contents[name].dtype, joined_digest(tensors[name][1]))
                for name, parts_ in self._parts(layout, views).items()
                for part, sums in zip(parts_, tensors[name][0], strict=True)
            ]
            yield (
                step,
                Measured(step, self._store.fingerprint(step), weibull, layout, pd.DataFrame(rows), {}),
            )

    def _add_dots(
        self,
        work: Parallel,
        parts: dict[int, Measured],
        gram: Gram,
        views: Views,
        folder: Path | None,
        asked: Sequence[int],
        progress: bool,
    ) -> None:
        """Measure the inner products of the steps asked for that are wanted and not stored yet."""
        steps = self.steps
        wanted = {
            step: steps[max(0, i - 1) : i] if gram == "band" else steps[:i] for i, step in enumerate(steps)
        }
        missing = {
            step: [other for other in others if not parts[step].knows(parts[other])]
            for step, others in wanted.items()
            if step in asked and step in parts
        }
        new = [step for step in steps if missing.get(step)]
        if not new:
            return
        needed = sorted({*new, *(other for others in missing.values() for other in others)})
        place = {step: i for i, step in enumerate(needed)}
        self._store.hold = set(needed)
        found = {step: list_tensors(self._store.fetch(step)) for step in needed}
        layout = layout_of(found[needed[0]])
        rows = self._parts(layout, views)
        pairs = None
        if gram == "band":
            pairs = np.array([(place[step], place[missing[step][0]]) for step in new])
        against = (
            None if len(new) == len(needed) or pairs is not None else np.array([place[step] for step in new])
        )
        jobs = [(name, piece) for name, shape in layout.items() for piece in pieces_of(shape)]
        bar = tqdm(jobs, unit="tensor", disable=not progress, desc="inner products")
        from joblib import delayed

        results = work(
            delayed(inner_products)(
                [found[step][name].file for step in needed], name, piece, rows[name], pairs, against
            )
            for name, piece in bar
        )
        totals: dict[str, np.ndarray] = {}
        for (name, _), result in zip(jobs, results, strict=True):
            if isinstance(result, CheckpointError):
                raise result
            totals[name] = totals[name] + result if name in totals else result
        total = np.concatenate([totals[name] for name in layout])
        for i, step in enumerate(new):
            for other in missing[step]:
                dots = (
                    total[:, i]
                    if pairs is not None
                    else total[:, place[step] if against is None else i, place[other]]
                )
                parts[step].dots[other] = (parts[other].fingerprint, dots)
            parts[step].write(folder)
