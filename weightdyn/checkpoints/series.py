"""A series of checkpoints, measured once: what recovery needs to know of the weights of every step.

Published models come as folders or branches of checkpoints, each of which may take longer to fetch than to read.
So a series is read a tensor at a time, every step is measured on its own and stored as soon as it is done, and
what was stored is not read again: a killed measurement goes on where it stopped, and a longer series costs only
its new steps. From the hub a checkpoint is downloaded, checked against its digest, measured and deleted.

A row of the measurement is one part of one tensor at one step: its squared norm to float64, what the rounding of
the stored copy adds to it, its Weibull fit, and on request its inner products with the other steps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

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
    wanted_dots,
)
from weightdyn.core.checks import (
    check_choice,
    check_flag,
    check_jobs,
    check_mapping,
    check_path,
    check_text,
    check_whole,
    refuse,
)
from weightdyn.core.naming import TensorRow, Views, check_config, check_views, describe
from weightdyn.core.progress import Progress, progress_bar
from weightdyn.files.hub import ENTRIES, Hub, RevisionError, Wanted, check_wanted, choose_wanted
from weightdyn.files.revisions import choose_series, shorten
from weightdyn.files.weightfiles import (
    ENDINGS,
    CheckpointError,
    Stored,
    checkpoint_files,
    config_beside,
    list_tensors,
    refused,
)
from weightdyn.record.runlog import RunLog

if TYPE_CHECKING:
    from joblib import Parallel

Errors = Literal["raise", "skip"]

_BUNDLE = 1 << 20  # weights of small tensors that make up one piece of work
_BATCH = 1 << 28  # bytes of whole checkpoints that are handed to the workers at a time


# Where checkpoints are.


class _Folder:
    """Checkpoints on a disk."""

    keep = True
    progress: Progress = None
    hold: Collection[int] = ()

    def __init__(self, places: dict[int, Path], name: str, cache: Path | None, config: Any) -> None:
        self.places, self.name, self.cache, self._config = places, name, cache, config

    def where(self, step: int) -> str:
        return str(self.places[step])

    def remote(self, step: int) -> bool:
        return False

    def download_to(self, folder: Path) -> None:
        """Nothing: it is all here."""

    def config(self, step: int) -> Any:
        """What the run says, or what lies in or beside the checkpoint."""
        return self._config if self._config is not None else config_beside(self.places[step])

    def files(self, step: int) -> dict[str, int]:
        """The checkpoint's weight files by name, with their sizes in bytes."""
        return {str(path): stat.st_size for path, stat in self._stats(step)}

    def _stats(self, step: int) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.fetch(step):
            with refused(path):
                yield path, path.stat()

    def fetch(self, step: int) -> list[Path]:
        """The checkpoint's weight files."""
        return checkpoint_files(self.places[step])

    def sizes(self, step: int) -> dict[str, int]:
        """All files of the checkpoint, of subfolders too: name -> bytes; of a single file itself."""
        return {name: size for name, (_, size) in self._walk(step).items()}

    def fetch_files(self, step: int, wanted: Wanted) -> dict[str, Path]:
        """Where the files that are wanted lie."""
        found = self._walk(step)
        sizes = {name: size for name, (_, size) in found.items()}
        return {name: found[name][0] for name in choose_wanted(wanted, sizes, self.where(step))}

    def _walk(self, step: int) -> dict[str, tuple[Path, int]]:
        place, found = self.places[step], {}
        if not place.exists():
            raise FileNotFoundError(f"source: there is no file or folder {place}")
        with refused(place):
            if place.is_file():
                return {place.name: (place, place.stat().st_size)}
            seen = 0
            for folder, folders, names in os.walk(place, onerror=_refuse_folder):
                seen += len(folders) + len(names)
                if seen > ENTRIES:
                    raise CheckpointError(
                        f"{place} holds more than {ENTRIES:,} files, which no checkpoint does"
                    )
                for path in (Path(folder, name) for name in names):
                    if path.is_file():  # no pipe, no link that leads nowhere
                        found[path.relative_to(place).as_posix()] = (path, path.stat().st_size)
        return found

    def fingerprint(self, step: int) -> str:
        """Names, sizes and times of change: what a measurement that was stored is checked against."""
        return json.dumps([[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in self._stats(step)])

    def release(self, steps: Collection[int] = ()) -> None:
        """Nothing: the files are the user's."""


class _Mixed:
    """Checkpoints of a mapping of which some are on a disk and some on the hub."""

    def __init__(self, folder: _Folder, hub: Hub) -> None:
        self._folder, self._hub = folder, hub
        self.places = {**folder.places, **hub.places}
        self.name, self.cache, self.keep = folder.name, hub.cache, hub.keep
        self.remote, self.download_to, self.release = hub.remote, hub.download_to, hub.release

    def _at(self, step: int) -> _Folder | Hub:
        return self._hub if self.remote(step) else self._folder

    def where(self, step: int) -> str:
        return self._at(step).where(step)

    def config(self, step: int) -> Any:
        return self._at(step).config(step)

    def files(self, step: int) -> dict[str, int]:
        return self._at(step).files(step)

    def fetch(self, step: int) -> list[Path]:
        return self._at(step).fetch(step)

    def sizes(self, step: int) -> dict[str, int]:
        return self._at(step).sizes(step)

    def fetch_files(self, step: int, wanted: Wanted) -> dict[str, Path]:
        return self._at(step).fetch_files(step, wanted)

    def fingerprint(self, step: int) -> str:
        return self._at(step).fingerprint(step)

    @property
    def hold(self) -> Collection[int]:
        return self._hub.hold

    @hold.setter
    def hold(self, steps: Collection[int]) -> None:
        self._hub.hold = steps

    @property
    def progress(self) -> Progress:
        return self._hub.progress

    @progress.setter
    def progress(self, progress: Progress) -> None:
        self._hub.progress = progress


def _refuse_folder(error: OSError) -> None:
    raise error  # which os.walk would not tell


def _checked_step(step: Any, what: str) -> int:
    """A step that a table can hold."""
    if isinstance(step, bool) or not isinstance(step, int | np.integer):
        raise TypeError(f"{what}: a step must be a whole number, got {step!r}")
    if not 0 <= step < 1 << 63:
        raise CheckpointError(
            f"{what}: the step {step} is not between 0 and 2^63 - 1: rename it, or leave it out"
        )
    return int(step)


def _named(folder: Path) -> list[tuple[str, Path]]:
    """What in a folder may be a checkpoint, by name."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return [
        (path.name if path.is_dir() else path.stem, path)
        for path in paths
        if path.is_dir() or path.suffix in ENDINGS
    ]


# The series.


class _State(NamedTuple):
    """Where a measurement stands before anything is read."""

    folder: Path | None
    stored: dict[int, Measured]  # of the present files; some may lack the fits
    todo: list[int]  # the steps that are to be measured


class Checkpoints:
    """The checkpoints of one training, ordered by step, read a tensor at a time.

    Args:
        source: a run directory or `RunLog`; a folder with files or folders named step1000, step-001000,
            checkpoint-500, global_step1000, epoch=0-step=500.ckpt, …; hf://owner/name, a repository on the hub with
            branches or tags step1000, stage1-step1000-tokens5B, step-001000-2BT, …; or {step: place} for all other
            names, a place being a file, a folder, or hf://owner/name@revision (without @revision its branch main).
            A checkpoint is a safetensors file, shards with their index, pytorch_model.bin or its shards, or what
            torch.save wrote. No code of a file ever runs. The checksums of what torch.save wrote are verified;
            safetensors and the format of torch before 1.6 have none, so a changed bit among their weights shows at
            best in the column `note`.
        steps: the steps to take; None for all.
        stage: which series, where names tell several: "stage2", or a list of stages whose steps go on from each
            other, ["stage1", "stage2"]. None takes the names without a stage, else the lowest of stage1, stage2, …;
            a warning says what is left out.
        config: the model's config (of transformers, or a dict), which says how fused matrices are split; None
            looks for it beside the checkpoints.
        rules: {regular expression: component} for names that are not known, as in `naming.describe`.
        errors: what to do with a checkpoint that is damaged, not to be had from the hub, of other names or shapes
            than the first, or there twice: "raise" a CheckpointError that names its file, or "skip" it with a
            warning.
        keep: leave what is downloaded in the hub's own cache. False: at most one checkpoint is on the disk at a
            time (two for gram="band"), and none afterwards. Each file may take ten minutes and a second for every
            100 kB over all attempts (`files.hub.TIME_LIMIT`, `SLOWEST`); a slower server ends in an error.
        endpoint: address of the hub; None for HF_ENDPOINT or the public one.

    Steps are updates. Where names seem to count checkpoints instead (Amber's ckpt_000, Accelerate's checkpoint_0),
    a warning says so and `counted` is True: which updates they are must come from elsewhere. Amber's training code
    saves ckpt_k after k + 1 chunks of 1,706,976 examples, 2,240 an update (LLM360/amber-train, main.py and run.sh),
    so {762 * (k + 1): f"hf://LLM360/Amber@ckpt_{k:03}" for k in range(359)}, if no chunk was skipped or repeated.

    Attributes:
        steps: the steps, ascending; those that were found to be damaged under errors="skip" drop out.
        skipped: {step: what is wrong with it}.
        counted: whether the steps seem to count checkpoints, not updates.

    Raises:
        FileNotFoundError: there is no such source, or nothing in it is a checkpoint.
        ValueError: there is no such stage, the steps of several do not go on, or which is meant is unknown.
        CheckpointError: two checkpoints of one step, or a step beyond 2^63 - 1 (unless errors="skip").

    >>> from safetensors.torch import save_file
    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> for step in (0, 100):
    ...     save_file({"mlp.up_proj.weight": torch.full((8, 8), 1.0 + step)}, folder / f"step{step}.safetensors")
    >>> series = Checkpoints(folder)
    >>> series.steps, series.tensors()
    ([0, 100], {'mlp.up_proj.weight': ((8, 8), 'float32')})
    >>> series.measure(weibull=False, cache=False)["norm_sq"].tolist()
    [64.0, 652864.0]
    """

    def __init__(
        self,
        source: RunLog | str | os.PathLike[str] | Mapping[int, str | os.PathLike[str]],
        steps: Iterable[int] | None = None,
        *,
        stage: str | Sequence[str] | None = None,
        config: Any = None,
        rules: Mapping[str, str] | None = None,
        errors: Errors = "raise",
        keep: bool = False,
        endpoint: str | None = None,
    ) -> None:
        check_choice("errors", errors, ("raise", "skip"))
        check_flag("keep", keep)
        check_mapping("rules", rules, "{regular expression: component}")
        check_config(config)
        if endpoint is not None:
            check_text("endpoint", endpoint, "the address of a hub, or None")
        self.errors = errors
        self.rules = rules
        self.skipped: dict[int, str] = {}
        self.counted = False
        self._config: list[Any] = [] if config is None else [config]  # once it is known
        self._layout: tuple[int, dict[str, tuple[int, ...]]] | None = None  # of the first `contents`
        self._store: _Folder | Hub | _Mixed = self._open(source, stage, keep, endpoint)
        self.steps: list[int] = sorted(self._store.places)
        if steps is not None:
            if isinstance(steps, str) or not isinstance(steps, Iterable):
                raise refuse("steps", "step numbers, such as [0, 1000], or None for all", steps)
            wanted = sorted({_checked_step(step, "steps") for step in steps})
            if not wanted:
                raise ValueError("steps is empty; None takes all")
            if missing := [step for step in wanted if step not in self._store.places]:
                near = min(self.steps, key=lambda step: abs(step - missing[0]))
                raise ValueError(
                    f"steps: {self._store.name} has no checkpoint of {missing[:5]}; the nearest to {missing[0]} "
                    f"is {near} ({len(self.steps)} steps from {self.steps[0]} to {self.steps[-1]})"
                )
            self.steps = wanted

    def _open(self, source: Any, stage: Any, keep: bool, endpoint: str | None) -> _Folder | Hub | _Mixed:
        if isinstance(source, str) and source.startswith("hf://"):
            repo = source.removeprefix("hf://").strip("/")
            if "@" in repo:
                raise ValueError(
                    f"source must be hf://owner/name, got {source!r}; one revision is {{step: {source!r}}}"
                )
            hub = Hub(repo, keep, endpoint, stage)
            self._remark(hub.name, hub.remarks, hub.counted)
            for step, error in hub.refused:
                self._fail(step, error, gone=False)
            return hub
        if isinstance(source, Mapping):
            if stage is not None:
                raise ValueError(f"stage: a mapping says itself which checkpoints it means; got {stage!r}")
            return self._open_mapping(source, keep, endpoint)
        if isinstance(source, RunLog):
            if source.path is None:
                raise ValueError("source: a run in memory has no checkpoints; give a run directory")
            source = source.path
        if not isinstance(source, str | os.PathLike) or not str(source):
            raise TypeError(
                "source must be a run directory or RunLog, a folder of checkpoints, {step: path or "
                f"hf://owner/name@revision}}, or hf://owner/name; got {source!r}"
            )
        folder, config, run = Path(source), None, False
        if (folder / "run.json").is_file():
            run = True
            train = RunLog(folder).info.get("train")
            config = train.get("architecture") if isinstance(train, Mapping) else None
            folder = folder / "checkpoints"
        if not folder.is_dir():
            what = "has no folder of checkpoints" if run else "is no folder"
            raise FileNotFoundError(
                f"source: {folder} {what}; accepted are a run directory, a folder of checkpoints, {{step: path}}, "
                "and hf://owner/name"
            )
        names = _named(folder)
        found = choose_series(names, str(folder), stage)
        if not found.places:
            it_has = f"it has {shorten([path.name for _, path in names])}" if names else "it has none at all"
            raise FileNotFoundError(
                f"source: no folder and no weight file in {folder} is named like a checkpoint (step1000, "
                f"step-001000.safetensors, checkpoint-500, global_step1000, …); {it_has}; give {{step: path}} for "
                "other names"
            )
        self._remark(str(folder), found.remarks, found.counted)
        places: dict[int, Path] = {}
        for step, path in found.places:
            try:
                _checked_step(step, str(path))
                if step in places:
                    raise CheckpointError(f"step {step} is there twice, as {places[step]} and {path}")
            except CheckpointError as error:
                self._fail(step, error, gone=False)
            else:
                places[step] = path
        return _Folder(places, str(folder), (folder.parent if run else folder) / "measured", config)

    def _open_mapping(
        self, source: Mapping[Any, Any], keep: bool, endpoint: str | None
    ) -> _Folder | Hub | _Mixed:
        if not source:
            raise ValueError("source: the mapping {step: path} is empty")
        local: dict[int, Path] = {}
        remote: dict[int, str] = {}
        for step, place in source.items():
            step = _checked_step(step, "source")
            if isinstance(place, str) and place.startswith("hf://"):
                remote[step] = place.removeprefix("hf://")
            else:
                local[step] = check_path(
                    f"source: the place of step {step}", place, "a path or hf://owner/name@revision"
                )
        folder = _Folder(local, "the mapping given as source", None, None)
        if not remote:
            return folder
        hub = Hub(remote, keep, endpoint)
        return _Mixed(folder, hub) if local else hub

    def _remark(self, name: str, remarks: Sequence[str], counted: bool) -> None:
        """Tell what was noticed about the names of checkpoints."""
        self.counted = counted
        for remark in remarks:
            warnings.warn(f"{name}: {remark}", stacklevel=4)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        span = f", {self.steps[0]}–{self.steps[-1]}" if self.steps else ""
        return f"Checkpoints({self._store.name}: {len(self.steps)} steps{span})"

    def _fail(self, step: int, error: Exception, *, gone: bool = True) -> None:
        """Raise, or note that a step is not usable."""
        if self.errors == "raise" and isinstance(error, CheckpointError):
            raise CheckpointError(f"{error}; errors='skip' leaves the step out") from error
        if self.errors == "raise":
            raise error
        warnings.warn(f"left out: {error}", stacklevel=3)
        self.skipped[step] = str(error)
        if gone:
            self.steps = [other for other in self.steps if other != step]

    @property
    def local(self) -> bool:
        """Whether the checkpoints lie on a disk, so that reading them again downloads nothing."""
        return not any(self._store.remote(step) for step in self.steps)

    def config(self) -> Any:
        """The model's config: the one given, or the one found beside the checkpoints, or None.

        From the hub that of the first checkpoint is downloaded.

        Raises:
            CheckpointError: it is damaged.
        """
        while not self._config:
            try:
                here = [step for step in self.steps if not self._store.remote(step)]
                there = [step for step in self.steps if self._store.remote(step)]
                found = (self._store.config(step) for step in (*here, *there[:1]))
                self._config.append(next((config for config in found if config is not None), None))
            except RevisionError as error:
                self._fail(error.step, error)
        return self._config[0]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of the first checkpoint's float tensors, by name; buffers are left out.

        From the hub that checkpoint is downloaded.

        Raises:
            CheckpointError: it is damaged (under errors="skip": all are).
        """
        while self.steps:
            step = self.steps[0]
            try:
                found = list_tensors(self._store.fetch(step))
                return {name: (stored.shape, stored.dtype) for name, stored in found.items()}
            except (CheckpointError, FileNotFoundError) as error:
                self._fail(step, error)
        raise self._nothing_left()

    def _nothing_left(self) -> CheckpointError:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in list(self.skipped.items())[:3])
        return CheckpointError(f"{self._store.name} holds no checkpoint that can be read ({reasons})")

    def load(self, step: int, name: str) -> Tensor:
        """One tensor of one checkpoint, as it is stored.

        Raises:
            KeyError: there is no such step or tensor.
            TypeError, ValueError: `step` is no whole number, or `name` no string.
            CheckpointError: the checkpoint is damaged.
        """
        check_text("name", name, "the name of a tensor")
        step = self._known(step)
        found = list_tensors(self._store.fetch(step))
        if name not in found:
            raise KeyError(f"name: step {step} has no tensor {name!r}; it has {list(found)[:5]} …")
        return found[name].read()

    def file_sizes(self, step: int) -> dict[str, int]:
        """All files of one checkpoint, those of subfolders too: name (with / between folders) -> bytes.

        Nothing but the listing is read. A checkpoint that is a single file has its own name alone.

        Raises:
            KeyError: there is no such step.
            TypeError, ValueError: `step` is no whole number.
            CheckpointError: the checkpoint cannot be listed.
        """
        return self._store.sizes(self._known(step))

    def files(self, step: int, wanted: Wanted) -> contextlib.AbstractContextManager[dict[str, Path]]:
        """Files of one checkpoint, weights or others, on the disk while the `with` lasts.

        From the hub they are downloaded, each checked against its size and digest, and deleted afterwards (unless
        keep=True); another checkpoint that was there is deleted first. What is asked for inside of another `with`
        of the same step is added to it. Files of a folder are where they are, and stay.

        Args:
            step: the step.
            wanted: names of files as `file_sizes` has them, or a function that takes such a name and returns
                whether it is wanted.

        Returns:
            A context: {name: path} of the files that are wanted and there; what the checkpoint lacks is left out.
            The paths lie under one folder as their names say.

        Raises:
            KeyError: there is no such step.
            TypeError, ValueError: `step` is no whole number, `wanted` neither names nor a function.
            CheckpointError: a file cannot be had, or a name leads out of the checkpoint.

        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "checkpoint-500"
        >>> folder.mkdir()
        >>> _ = (folder / "trainer_state.json").write_text('{"global_step": 500}')
        >>> series = Checkpoints(folder.parent)
        >>> with series.files(500, ["trainer_state.json", "optimizer.pt"]) as paths:
        ...     json.loads(paths["trainer_state.json"].read_text()), list(paths)
        ({'global_step': 500}, ['trainer_state.json'])
        """
        return self._fetched(self._known(step), check_wanted(wanted))

    @contextlib.contextmanager
    def _fetched(self, step: int, wanted: Wanted) -> Iterator[dict[str, Path]]:
        before = self._store.hold
        self._store.hold = {*before, step}
        try:
            yield self._store.fetch_files(step, wanted)
        finally:
            self._store.hold = before
            self._store.release(before)

    def _known(self, step: Any) -> int:
        check_whole("step", step)
        if step not in self.steps:
            raise KeyError(f"step {step} is not in the series; it has {self.steps[:5]} … {self.steps[-1:]}")
        return int(step)

    def contents(
        self, step: int, *, beside: Collection[int] = (), progress: Progress = None
    ) -> dict[str, Stored] | None:
        """The tensors of a checkpoint by name, listed and not read: `Stored.read(start, stop)` reads rows.

        From the hub the checkpoint is downloaded, and what was downloaded before is deleted, but the steps `beside`
        it: two checkpoints that are read together take no more of the disk than two. `release` deletes the last.

        Args:
            step: one of `steps`.
            beside: steps whose tensors are still to be read.
            progress: show the bars of downloads; None: where someone watches.

        Returns:
            name -> `files.weightfiles.Stored`; None under errors="skip" where the checkpoint is damaged, which is
            warned of, and the step drops out of `steps`.

        Raises:
            KeyError: there is no such step.
            TypeError, ValueError: `step` is no whole number.
            CheckpointError: the checkpoint is damaged, or has other tensors than the first that was listed.

        >>> from safetensors.torch import save_file
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_file({"up_proj.weight": torch.eye(4)}, folder / "step10.safetensors")
        >>> Checkpoints(folder).contents(10)["up_proj.weight"].read(1, 2).tolist()
        [[0.0, 1.0, 0.0, 0.0]]
        """
        step = self._known(step)
        if isinstance(beside, str | bytes) or not isinstance(beside, Collection):
            raise refuse("beside", "step numbers, such as [0]", beside)
        self._store.hold = {_checked_step(each, "beside") for each in beside}
        self._store.progress = progress
        try:
            found = list_tensors(self._store.fetch(step))
            if self._layout is None:
                self._layout = step, layout_of(found)
            check_same(step, found, *self._layout)
        except (CheckpointError, FileNotFoundError) as error:
            self._fail(step, error)
            return None
        return found

    def release(self) -> None:
        """Delete what `contents` downloaded; of a folder nothing."""
        self._store.hold = set()
        self._store.release()

    # Measuring.

    def measure(
        self,
        gram: Gram = "none",
        weibull: bool = True,
        views: Views = True,
        *,
        n_jobs: int = -1,
        cache: str | os.PathLike[str] | bool = True,
        progress: Progress = None,
    ) -> pd.DataFrame:
        """Measure every tensor of every checkpoint, each checkpoint once.

        Steps are stored as they are done, so that a measurement that was cut short goes on where it stopped, and
        only steps that are new or whose files have changed are read.

        Args:
            gram: inner products ⟨W_i, W_j⟩ between steps i ≥ j: "none"; "band", those of neighbours and of each
                step with itself; "full", all. They take a second pass over the files, which holds 64 MB.
            weibull: fit a Weibull law to the magnitudes.
            views: True splits fused tensors, "head" makes a row for each head of q, k and v, False splits nothing.
            n_jobs: pieces of work at a time, by threads; -1 for as many as there are cores. Under
                `joblib.parallel_config` another backend takes over: processes, or a cluster.
            cache: where measurements are stored: a folder of your own, True for `measured` in the run directory
                or in the folder of checkpoints, False for nowhere.
            progress: show bars; None: where someone watches.

        Returns:
            The columns of `CHECKPOINT_TABLE`: one row per step and tensor, or per part of a fused tensor, sorted by
            step and then by name. `dots` holds a float64 array of inner products, and `dot_steps` an int64 array
            of the steps that they are with: each row says so for itself, and may be moved and filtered. Both hold
            None for gram="none". `note` names rows whose ‖W‖² cannot be that of sound weights; so does a warning.

        Raises:
            CheckpointError: a checkpoint is damaged or does not belong to the series (unless errors="skip").
            OSError: the cache cannot be written.
        """
        from joblib import Parallel  # where it is used: it is slow to load

        check_jobs("n_jobs", n_jobs)
        state = self._state(gram, weibull, views, cache, progress)
        folder, parts, todo = state.folder, state.stored, state.todo
        sizes = self._sizes(todo)
        bar = progress_bar(
            progress=progress, total=sum(sizes.values()), unit="B", unit_scale=True, desc="measure"
        )
        try:
            with bar, Parallel(n_jobs=n_jobs, prefer="threads") as work:
                for batch in self._batches(todo, sizes):
                    if gram == "band":
                        self._store.hold = [step for step in self.steps if step < batch[0]][-1:]
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
            self._store.hold = ()
            self._store.release()
        if not self.steps:
            raise self._nothing_left()
        table = series_table([parts[step] for step in self.steps], gram, weibull)
        if same := identical_steps(table):
            listed = ", ".join(" = ".join(map(str, steps)) for steps in same[:5])
            warnings.warn(f"{self._store.name}: some steps hold identical weights: {listed}", stacklevel=2)
        if len(odd := table[table["note"] != ""]):
            listed = "; ".join(
                f"{self._store.where(row.step)}, {row.tensor}: {row.note}" for row in odd.head(3).itertuples()
            )
            warnings.warn(f"{len(odd)} rows are doubtful (column note): {listed}", stacklevel=2)
        return table

    def plan(
        self,
        gram: Gram = "none",
        weibull: bool = True,
        views: Views = True,
        *,
        n_jobs: int = -1,
        cache: str | os.PathLike[str] | bool = True,
        progress: Progress = None,
    ) -> pd.DataFrame:
        """What `measure` with these arguments would read, or download, before it does.

        Args:
            gram, weibull, views, n_jobs, cache, progress: as in `measure`; nothing is measured, so n_jobs is idle.

        Returns:
            One row per step: `step`, `place` (path or revision), `files` (number of weight files), `bytes`,
            `passes`: how often its files would be read, once to be measured and once for inner products that are
            missing (from the hub they are downloaded once), and `measured`: whether nothing of it would be read.
            A checkpoint without weights has no files. What only reading shows, a damaged file, is not foreseen.
        """
        state = self._state(gram, weibull, views, cache, progress)
        _, needed = self._missing_dots(state.stored, gram, self.steps)
        rows = []
        for step in progress_bar(self.steps, progress=progress, unit="checkpoint", desc="plan"):
            try:
                files = self._store.files(step)
            except (CheckpointError, FileNotFoundError):
                files = {}
            passes = (step in state.todo) + (step in needed)
            rows.append((step, self._store.where(step), len(files), sum(files.values()), passes, passes == 0))
        return pd.DataFrame(rows, columns=["step", "place", "files", "bytes", "passes", "measured"])

    def _state(self, gram: Gram, weibull: bool, views: Views, cache: Any, progress: Progress) -> _State:
        """Check the arguments of `measure`, and find what is stored and what is to be done."""
        check_choice("gram", gram, ("none", "band", "full"))
        check_flag("weibull", weibull)
        check_views(views)
        if gram == "full" and not self._store.keep:
            raise ValueError(
                "gram='full' needs all checkpoints on the disk at once: give Checkpoints(…, keep=True)"
            )
        if not isinstance(cache, bool | str | os.PathLike) or cache == "":
            raise TypeError(f"cache must be a folder, True or False, got {cache!r}")
        self._store.progress = progress
        folder = self._cache_folder(cache, views)
        stored = {step: part for step in self.steps if (part := self._stored(folder, step))}
        todo = [step for step in self.steps if step not in stored or (weibull and not stored[step].weibull)]
        return _State(folder, stored, todo)

    def _cache_folder(self, cache: str | os.PathLike[str] | bool, views: Views) -> Path | None:
        """Where the measurements of these views lie; None for nowhere."""
        folder = self._store.cache if cache is True else None if cache is False else Path(cache)
        if folder is None:
            return None
        self._store.download_to(folder / "download")
        config = self.config()
        config = config.to_dict() if hasattr(config, "to_dict") else config
        asked = json.dumps([views, self.rules, config], sort_keys=True, default=str)
        return folder / hashlib.sha256(asked.encode()).hexdigest()[:12]

    def commit(self, step: int) -> str | None:
        """The commit of a checkpoint on the hub; None of one on a disk."""
        return self._store.fingerprint(step) if self._store.remote(step) else None

    def cache_folder(self, cache: str | os.PathLike[str] | bool, what: str) -> Path | None:
        """Where something else that was measured of the series lies, and its downloads beside; None for nowhere."""
        if not isinstance(cache, bool | str | os.PathLike) or cache == "":
            raise TypeError(f"cache must be a folder, True or False, got {cache!r}")
        folder = self._store.cache if cache is True else None if cache is False else Path(cache)
        if folder is None:
            return None
        self._store.download_to(folder / "download")
        return folder / what

    def _stored(self, folder: Path | None, step: int) -> Measured | None:
        """The measurement of a step that was stored, if it is of the present files."""
        part = None if folder is None else Measured.read(folder, step)
        return part if part is not None and part.fingerprint == self._fingerprint(step) else None

    def _fingerprint(self, step: int) -> str | None:
        try:
            return self._store.fingerprint(step)
        except (CheckpointError, FileNotFoundError, NotADirectoryError):
            return None  # measuring it will say what is wrong

    def _sizes(self, steps: Sequence[int]) -> dict[int, int]:
        """Bytes of each step; from the hub, to save requests, the first step's for all."""
        first = next((self._size(step) for step in steps if self._store.remote(step)), 0)
        return {step: first if self._store.remote(step) else self._size(step) for step in steps}

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
            if self._store.remote(step) or sum(sizes[other] for other in batch) >= _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _parts(self, layout: Mapping[str, Sequence[int]], views: Views) -> dict[str, tuple[TensorRow, ...]]:
        """The rows that each tensor has."""
        config = self.config()
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
        import joblib

        found: dict[int, dict[str, Stored]] = {}
        for step in batch:
            try:
                found[step] = list_tensors(self._store.fetch(step))
                first = min([*(step for step in self.steps if step in parts), *found])
                layout = parts[first].layout if first in parts else layout_of(found[first])
                check_same(step, found[step], first, layout)
            except (CheckpointError, FileNotFoundError) as error:
                found.pop(step, None)
                self._fail(step, error)
        rows = {step: self._parts(layout_of(contents), views) for step, contents in found.items()}
        bundles: list[tuple[int, list[Task]]] = []
        for step, contents in found.items():
            size = _BUNDLE
            for name, stored in contents.items():
                for start, stop in pieces_of(stored.shape):
                    if size >= _BUNDLE:
                        bundles.append((step, []))
                        size = 0
                    bundles[-1][1].append(Task(stored, (start, stop), rows[step][name]))
                    size += math.prod(stored.shape) * (stop - start) // stored.shape[0]
        results = work(joblib.delayed(run_tasks)(tasks, weibull) for _, tasks in bundles)
        done: dict[int, dict[str, tuple[list[Sums], list[bytes]]]] = {step: {} for step in found}
        broken: dict[int, CheckpointError] = {}
        for (step, tasks), result in zip(bundles, results, strict=True):
            if isinstance(result, CheckpointError):
                broken.setdefault(step, result)
                continue
            for task, (sums, digest) in zip(tasks, result, strict=True):
                known, digests = done[step].get(task.stored.name, ([Sums()] * len(sums), []))
                added = [a + b for a, b in zip(known, sums, strict=True)]
                done[step][task.stored.name] = added, [*digests, digest]
        for step, contents in found.items():
            if step in broken:
                self._fail(step, broken[step])
                continue
            table = [
                table_row(part, sums, contents[name], joined_digest(done[step][name][1]))
                for name, own in rows[step].items()
                for part, sums in zip(own, done[step][name][0], strict=True)
            ]
            fingerprint = self._store.fingerprint(step)
            # Measured again for its fits, it is still the checkpoint that its inner products are of.
            before = parts.get(step)
            dots = before.dots if before is not None and before.fingerprint == fingerprint else {}
            yield (
                step,
                Measured(step, fingerprint, weibull, layout_of(contents), pd.DataFrame(table), dots),
            )

    def _missing_dots(
        self, parts: Mapping[int, Measured], gram: Gram, asked: Iterable[int]
    ) -> tuple[dict[int, list[int]], list[int]]:
        """Inner products that are wanted and not stored, step -> earlier steps; and all steps read for them."""
        marks = {step: self._fingerprint(step) for step in self.steps} if gram != "none" else {}
        wanted = wanted_dots(self.steps, gram)
        missing = {}
        for step in asked:
            known = parts.get(step)
            others = [
                other
                for other in wanted.get(step, [])
                if known is None or known.fingerprint != marks[step] or not known.knows(other, marks[other])
            ]
            if others:
                missing[step] = others
        return missing, sorted({*missing, *(other for others in missing.values() for other in others)})

    def _add_dots(
        self,
        work: Parallel,
        parts: dict[int, Measured],
        gram: Gram,
        views: Views,
        folder: Path | None,
        asked: Sequence[int],
        progress: Progress,
    ) -> None:
        """Measure the inner products of the steps asked for that are wanted and not stored yet."""
        import joblib

        missing, needed = self._missing_dots(parts, gram, [step for step in asked if step in parts])
        if not missing:
            return
        new = list(missing)
        place = {step: i for i, step in enumerate(needed)}
        self._store.hold = needed
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
        bar = progress_bar(jobs, progress=progress, unit="tensor", desc="inner products")
        results = work(
            joblib.delayed(inner_products)(
                [found[step][name] for step in needed], piece, rows[name], pairs, against
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


def check_updates(series: Checkpoints) -> None:
    """Refuse a series whose steps seem to count checkpoints, for what needs the updates."""
    if series.counted:
        raise ValueError(
            f"source: the steps of {series!r} seem to count checkpoints, and a recipe is of updates; give "
            "{update: place} to Checkpoints"
        )


def open_series(
    series: Checkpoints | RunLog | str | os.PathLike[str] | Mapping[int, str | os.PathLike[str]],
    *,
    argument: str = "series",
) -> Checkpoints:
    """The series itself, or what `Checkpoints` opens; an error names the argument."""
    if isinstance(series, Checkpoints):
        return series
    try:
        return Checkpoints(series)
    except CheckpointError:
        raise
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise type(error)(f"{argument}: {error}") from error
