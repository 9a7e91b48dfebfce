"""Checkpoints in the branches of repositories on the hub: listed, fetched one at a time, checked, deleted.

The network fails in passing, so a request is made a bounded number of times; and it may crawl, so each file has
one time limit over all attempts, `TIME_LIMIT` seconds and one more for each `SLOWEST` bytes. A server that sends
more than the hub announced is cut off. What the hub gives a digest of is held against it, and what does not agree
is deleted, in the shared cache too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import itertools
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightdyn.core.checks import refuse
from weightdyn.core.progress import Progress, is_watched
from weightdyn.files.durable import lock_folder
from weightdyn.files.revisions import choose_series, shorten
from weightdyn.files.weightfiles import CheckpointError, choose_files, parse_json, read_text

if TYPE_CHECKING:
    import filelock

ATTEMPTS = 5
"""How often a request to the hub is made before it counts as failed."""

TIME_LIMIT = 600.0
"""Seconds that a request, or a file, may take over all attempts ..."""

SLOWEST = 100_000
"""... and bytes of a file for each of which it may take a second more."""

SMALL = 1 << 26
"""Bytes of an index or config beyond which it is not fetched."""

ENTRIES = 20_000
"""Files and folders of one checkpoint beyond which its listing is refused."""

_WAIT = 1.0  # seconds before the second attempt; doubled each time


Wanted = Collection[str] | Callable[[str], bool]
"""Files of a checkpoint that are asked for: their names, or what says of a name whether it is wanted."""


def check_inside(name: Any, where: str) -> str:
    """The name of a file, with / between folders, if it stays inside the folder of its checkpoint.

    Args:
        name: what an index, a listing or a caller says.
        where: the checkpoint, for the error.

    Raises:
        CheckpointError: it is absolute, goes up, or is no name on some system.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    good = all(part not in ("", ".", "..") for part in parts) and not re.search(
        r"[\\\x00-\x1f]|^[A-Za-z]:", name
    )
    # There the client keeps what it knows of its downloads.
    if not good or parts[0].lower() == ".cache":
        raise CheckpointError(
            f"{where}: {name!r} is no name of a file inside a checkpoint, as optim/0.pt is: it is not followed"
        )
    return name


def check_wanted(wanted: Any) -> Any:
    """Return `wanted` if it can say which files are."""
    if callable(wanted) or (isinstance(wanted, Collection) and not isinstance(wanted, str | bytes)):
        return wanted
    raise refuse(
        "wanted", "names of files, or a function that takes a name and returns True or False", wanted
    )


def choose_wanted(wanted: Wanted, sizes: Mapping[str, int], where: str) -> list[str]:
    """The names that are wanted of those that a checkpoint has, sorted; names that it lacks are left out.

    Raises:
        CheckpointError: a name leads out of the checkpoint.
    """
    if callable(wanted):
        return sorted(name for name in sizes if wanted(name))
    return sorted(name for name in {check_inside(name, where) for name in wanted} if name in sizes)


class RevisionError(CheckpointError):
    """One revision of a repository that cannot be had, and its step."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Hub:
    """Checkpoints on the hub, fetched one at a time: branches and tags of a repository, or of several.

    Args:
        source: owner/name, of whose branches and tags those are taken that are named like checkpoints; or
            {step: owner/name@revision}, where no revision is the branch main.
        keep: leave what is downloaded in the hub's own cache.
        endpoint: address of the hub; None for HF_ENDPOINT or the public one.
        stage: as `revisions.choose_series` has it, for owner/name.
    """

    def __init__(
        self,
        source: str | Mapping[int, str],
        keep: bool,
        endpoint: str | None,
        stage: str | Sequence[str] | None = None,
    ) -> None:
        try:
            import huggingface_hub
            import huggingface_hub.utils
        except ImportError as error:
            raise ImportError('hf:// needs huggingface_hub: pip install "weightdyn[hf]"') from error
        self._api = huggingface_hub.HfApi(endpoint=endpoint)
        self._hub: Any = huggingface_hub
        self._endpoint, self.keep = endpoint, keep
        self.places: dict[int, Revision] = {}
        self.refused: list[tuple[int, CheckpointError]] = []  # revisions that are left out, and why
        self.remarks: list[str] = []  # on the names
        self.counted = False
        self.hold: Collection[int] = ()
        self.progress: Progress = None
        self._listed: dict[int, dict[str, _Remote]] = {}
        self._everything: dict[int, dict[str, _Remote]] = {}
        self._chosen: dict[int, dict[str, int]] = {}
        self._here: dict[int, list[Path]] = {}
        self._whole: dict[int, dict[str, Path]] = {}  # what `fetch_files` fetched
        self._lock: filelock.BaseFileLock | None = None
        if isinstance(source, str):
            self.name, own = f"hf://{source}", source.replace("/", "--")
            self._find(source, stage)
        else:
            self.name = "the mapping given as source"
            repos = sorted({text.partition("@")[0] for text in source.values()})
            digest = hashlib.sha256("\n".join(repos).encode()).hexdigest()
            own = repos[0].replace("/", "--") if len(repos) == 1 else f"several-{digest[:12]}"
            self._look_up(source)
        self.cache = _user_cache() / own
        self.folder = self.cache / "download"

    def _find(self, repo: str, stage: str | Sequence[str] | None) -> None:
        """The checkpoints of one series among the branches and tags of a repository."""
        refs = self._refs(repo)
        found = choose_series([(revision.name, revision) for revision in refs], self.name, stage)
        if not found.places:
            raise FileNotFoundError(
                f"source: {self.name} has no branch named like a checkpoint (step1000, "
                f"stage1-step1000-tokens5B); it has {shorten([revision.name for revision in refs])}; give "
                "{step: 'hf://owner/name@revision'} for other names"
            )
        self.remarks, self.counted = found.remarks, found.counted
        for step, revision in found.places:
            if step >= 1 << 63:
                error = CheckpointError(f"{self.name}@{revision.name}: its step is beyond 2^63 - 1")
                self.refused.append((step, error))
            elif step not in self.places:
                self.places[step] = revision
            elif revision.commit != self.places[step].commit:
                error = f"step {step} is there twice, as {self.places[step].name} and {revision.name}"
                self.refused.append((step, CheckpointError(f"{self.name}: {error}")))

    def _look_up(self, source: Mapping[int, str]) -> None:
        """The revisions that a user named."""
        refs: dict[str, dict[str, Revision]] = {}
        for step, text in source.items():
            repo, mark, name = text.partition("@")
            if mark and not name:
                raise ValueError(f"source: hf://{text} names no revision after @; without @ it is main")
            name = name or "main"
            if repo not in refs:
                refs[repo] = {revision.name: revision for revision in self._refs(repo)}
            if name in refs[repo]:
                self.places[step] = refs[repo][name]
            elif re.fullmatch("[0-9a-f]{40}", name):
                self.places[step] = Revision(repo, name, name)
            else:
                raise FileNotFoundError(
                    f"source: hf://{repo} has no branch or tag {name!r}; it has {shorten(list(refs[repo]))}"
                )

    def _refs(self, repo: str) -> list[Revision]:
        """The branches and tags of a repository."""
        where = f"hf://{repo}"
        if repo.count("/") != 1 or "@" in repo:
            raise ValueError(f"source must be hf://owner/name, got {where}")
        try:
            refs = self._again(lambda: self._api.list_repo_refs(repo), f"the branches of {where}", repo=where)
        except self._hub.utils.HFValidationError as error:
            raise ValueError(f"source must be hf://owner/name, got {where}: {error}") from error
        return [Revision(repo, ref.name, ref.target_commit) for ref in (*refs.branches, *refs.tags)]

    def remote(self, step: int) -> bool:
        """Whether a checkpoint is on the hub, and fetched to be read."""
        return step in self.places

    def download_to(self, folder: Path) -> None:
        """Put what is downloaded in a folder of its own."""
        self.folder = folder

    def where(self, step: int) -> str:
        """What to call a checkpoint."""
        revision = self.places[step]
        return f"hf://{revision.repo}@{revision.name}"

    def config(self, step: int) -> Any:
        """What the checkpoint's config.json holds; None if it has none."""
        with self._of(step):
            if "config.json" not in self._tree(step):
                return None
            text = self._read(step, "config.json")
            return parse_json(text, f"{self.where(step)}/config.json", "pass config=")

    @contextlib.contextmanager
    def _of(self, step: int) -> Iterator[None]:
        """Errors of one revision say which."""
        try:
            yield
        except CheckpointError as error:
            raise RevisionError(str(error), step) from error

    def _tree(self, step: int) -> dict[str, _Remote]:
        """The files of the checkpoint's own folder."""
        if step not in self._listed:
            self._listed[step] = {name: it for name, it in self._list(step).items() if "/" not in name}
        return self._listed[step]

    def _all(self, step: int) -> dict[str, _Remote]:
        """The same with those of its subfolders."""
        if step not in self._everything:
            self._everything[step] = self._list(step, recursive=True)
        return self._everything[step]

    def _list(self, step: int, recursive: bool = False) -> dict[str, _Remote]:
        repo, _, commit = self.places[step]

        def listed() -> list[Any]:
            entries = self._api.list_repo_tree(repo, revision=commit, recursive=recursive)
            return list(itertools.islice(entries, ENTRIES + 1))

        entries = self._again(listed, f"the files of {self.where(step)}")
        if len(entries) > ENTRIES:
            raise CheckpointError(
                f"{self.where(step)} lists more than {ENTRIES:,} files and folders, which no checkpoint has"
            )
        found = {}
        for entry in entries:
            if isinstance(getattr(entry, "size", None), int) and entry.size >= 0:  # a file, no folder
                with contextlib.suppress(CheckpointError):  # what lies outside is never seen again
                    name = check_inside(entry.path, self.where(step))
                    found[name] = _Remote(entry.size, entry.lfs.sha256 if entry.lfs else None)
        return found

    def _read(self, step: int, name: str) -> str:
        """The text of a small file."""
        if (size := self._tree(step)[name].size) > SMALL:
            raise CheckpointError(
                f"{self.where(step)}/{name} has {size:,} bytes, which no index or config has"
            )
        return read_text(self._download(step, name, self.folder / "small"))

    def files(self, step: int) -> dict[str, int]:
        """The checkpoint's weight files by name, with their sizes in bytes."""
        if step not in self._chosen:
            tree = self._tree(step)
            names = choose_files(tree, self.where(step), lambda name: self._read(step, name))
            self._chosen[step] = {name: tree[name].size for name in names}
        return self._chosen[step]

    def fetch(self, step: int) -> list[Path]:
        """The checkpoint's files on the disk; all others that were fetched are deleted, but those on `hold`."""
        if step not in self._here:
            self.release(self.hold)
            self._acquire()
            with self._of(step):
                self._check_room(step, sum(self.files(step).values()))
            target = self._target(step)
            self._here[step] = [self._download(step, name, target) for name in self.files(step)]
        return self._here[step]

    def sizes(self, step: int) -> dict[str, int]:
        """All files of the checkpoint, of subfolders too: name -> bytes."""
        with self._of(step):
            return {name: remote.size for name, remote in self._all(step).items()}

    def fetch_files(self, step: int, wanted: Wanted) -> dict[str, Path]:
        """Files of the checkpoint on the disk, as `fetch`; beside those that were fetched of it before."""
        names = choose_wanted(wanted, self.sizes(step), self.where(step))
        if step not in self._whole:
            self.release({*self.hold, step})
            self._acquire()
        here = self._whole.setdefault(step, {})
        target = self._target(step)
        with self._of(step):
            self._check_room(step, sum(self._all(step)[name].size for name in names if name not in here))
            for name in names:
                if name not in here:
                    here[name] = self._download(step, name, target)
        return {name: here[name] for name in names}

    def _target(self, step: int) -> Path | None:
        return None if self.keep else self.folder / f"step-{step}"

    def _check_room(self, step: int, size: int) -> None:
        """A checkpoint that cannot fit is not begun."""
        if not self.keep and size > (free := shutil.disk_usage(self.folder).free):
            raise CheckpointError(
                f"{self.where(step)} has {size:,} bytes, and the disk of {self.folder} has {free:,} left; give "
                "cache= a folder on a larger one"
            )

    def fingerprint(self, step: int) -> str:
        """The commit: what a measurement that was stored is checked against."""
        return self.places[step].commit

    def release(self, steps: Collection[int] = ()) -> None:
        """Delete what was fetched, but the given steps, and what a killed process left."""
        kept = {*self._here, *self._whole} if self.keep else set(steps)
        self._here = {step: paths for step, paths in self._here.items() if step in kept}
        self._whole = {step: paths for step, paths in self._whole.items() if step in kept}
        if self.folder.is_dir():
            here = {f"step-{step}" for step in (*self._here, *self._whole)}
            self._acquire()
            for path in self.folder.iterdir():
                if path.is_dir() and path.name not in here:
                    shutil.rmtree(path, ignore_errors=True)
        if not steps and self._lock is not None:
            self._lock.release()
            self._lock = None

    def _acquire(self) -> None:
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = lock_folder(self.folder)
            except BlockingIOError:
                raise FileExistsError(
                    f"another process is downloading to {self.folder}: wait for it, or give another cache"
                ) from None

    def _download(self, step: int, name: str, folder: Path | None) -> Path:
        """Download a file, whole and sound; a file that is neither is fetched again, a few times."""
        remote = (self._everything.get(step) or self._tree(step))[name]
        place = {"local_dir": folder} if folder else {}
        fresh = False

        def attempt() -> Path:
            nonlocal fresh
            repo, _, commit = self.places[step]
            path = Path(
                self._hub.hf_hub_download(
                    repo,
                    name,
                    revision=commit,
                    endpoint=self._endpoint,
                    force_download=fresh,
                    **place,
                    **self._bounded(remote.size),
                )
            )
            fresh = True
            if path.stat().st_size != remote.size:
                fault = f"it has {path.stat().st_size} bytes of {remote.size}"
            elif remote.sha256 is not None and _sha256(path) != remote.sha256:
                fault = "its content does not have the digest that the hub says it has"
            else:
                return path
            # In the hub's own cache the path is a link: what it points to is what must not stay.
            for each in {path, path.resolve()}:
                each.unlink(missing_ok=True)
            raise OSError(fault)

        with self._bars():  # here, and not in a thread that may be left behind with them switched off
            return self._again(attempt, f"{self.where(step)}/{name}", _limit(remote.size))

    def _bounded(self, size: int) -> dict[str, Any]:
        """What makes the client stop when a server sends more than it announced: a bar that counts.

        Clients that take no bar of ours see it when the server is done, or the time is over.
        """
        if "tqdm_class" not in inspect.signature(self._hub.hf_hub_download).parameters:
            return {}

        class Bar(self._hub.utils.tqdm):
            """The client's own, which is told of each block before it is written."""

            def __init__(self, *args: Any, **options: Any) -> None:
                self.seen = options.get("initial") or 0  # the base keeps none where it is not shown
                super().__init__(*args, **options)

            def update(self, n: float | None = 1) -> bool | None:
                self.seen += n or 0
                if self.seen > size:
                    raise _TooLong(f"it sends more than the {size:,} bytes that it announced")
                return super().update(n)

        return {"tqdm_class": Bar}

    @contextlib.contextmanager
    def _bars(self) -> Iterator[None]:
        """Without the client's bars where no progress is wanted."""
        utils = self._hub.utils
        silent = not is_watched(self.progress) and not utils.are_progress_bars_disabled()
        if silent:
            utils.disable_progress_bars()
        try:
            yield
        finally:
            if silent:
                utils.enable_progress_bars()

    def _within(self, call: Callable[[], Any], seconds: float, what: str) -> Any:
        """Call, and wait so long: the client's own limits are between two bytes, and those may trickle for ever."""
        outcome: list[tuple[bool, Any]] = []

        def work() -> None:
            try:
                outcome.append((True, call()))
            except BaseException as error:
                outcome.append((False, error))

        thread = threading.Thread(target=work, name=f"fetching {what}", daemon=True)
        thread.start()
        try:
            thread.join(max(seconds, 0.0))
        finally:
            if thread.is_alive():  # too slow, or the user wants to stop: its connection is closed under it
                close = getattr(self._hub.utils, "close_session", None) or getattr(
                    self._hub.utils, "reset_sessions", None
                )
                if close is not None:
                    close()
        if not outcome:
            raise _TooSlow
        good, found = outcome[0]
        if good:
            return found
        raise found

    def _again(
        self, call: Callable[[], Any], what: str, limit: float | None = None, repo: str | None = None
    ) -> Any:
        """Call, a bounded number of times and seconds, until no passing fault of the network comes."""
        limit = TIME_LIMIT if limit is None else limit
        end = time.monotonic() + limit
        attempt = 1
        while True:
            try:
                return self._within(call, end - time.monotonic(), what)
            except Exception as error:
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", None)
                if isinstance(error, self._hub.utils.RepositoryNotFoundError):
                    raise FileNotFoundError(
                        f"source: there is no repository {repo or self.name}, or it is private (hf auth login): "
                        f"{error}"
                    ) from error
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise OSError(
                        errno.ENOSPC, f"{what}: the disk is full; give cache= a folder on a larger one"
                    ) from error
                if isinstance(error, _TooSlow):
                    raise CheckpointError(
                        f"{what} was not there after {limit:,.0f} seconds, the server is too slow; {_LATER}"
                    ) from error
                if isinstance(error, _TooLong):
                    raise CheckpointError(f"{what} is not to be had from the hub: {error}") from error
                if status is not None and 400 <= status < 500 and status not in (408, 429):
                    raise CheckpointError(
                        f"{what} is not to be had from the hub, it answers {status} ({type(error).__name__}): look "
                        "whether the revision is still whole"
                    ) from error
                if isinstance(error, self._hub.utils.HFValidationError):
                    raise
                if isinstance(error, ValueError):
                    raise CheckpointError(
                        f"{what}: the answer is none of a hub's ({error}); does a login stand between, or is "
                        "endpoint= wrong?"
                    ) from error
                if attempt == ATTEMPTS:
                    raise CheckpointError(
                        f"{what} could not be fetched in {ATTEMPTS} attempts ({type(error).__name__}: {error}); "
                        + _LATER
                    ) from error
            time.sleep(max(0.0, min(_WAIT * 2 ** (attempt - 1), end - time.monotonic())))
            attempt += 1


def _limit(size: int) -> float:
    return min(TIME_LIMIT + size / SLOWEST, threading.TIMEOUT_MAX)


_LATER = "what was measured before is stored, and a later call goes on from there"


class _TooSlow(Exception):
    pass


class _TooLong(Exception):
    pass


class Revision(NamedTuple):
    """A branch or tag of a repository."""

    repo: str
    name: str
    commit: str


class _Remote(NamedTuple):
    size: int
    sha256: str | None


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "weightdyn"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
