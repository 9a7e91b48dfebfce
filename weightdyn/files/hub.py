"""Checkpoints in the branches of a repository on the hub: listed, fetched one at a time, checked, deleted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightdyn.files.weightfiles import CheckpointError, choose_files, unpickled

if TYPE_CHECKING:
    import filelock


class Hub:
    """Checkpoints in the branches and tags of a repository on the hub, fetched one at a time."""

    local = False

    def __init__(self, repo: str, keep: bool, endpoint: str | None) -> None:
        try:
            import huggingface_hub
            import huggingface_hub.utils
        except ImportError as error:
            raise ImportError('hf:// needs huggingface_hub: pip install "weightdyn[hf]"') from error
        self._api = huggingface_hub.HfApi(endpoint=endpoint)
        self._hub: Any = huggingface_hub
        self._endpoint, self.repo, self.keep = endpoint, repo, keep
        self.name = f"hf://{repo}"
        self.cache = _user_cache() / repo.replace("/", "--")
        self.folder = self.cache / "download"
        self.places: dict[int, _Revision] = {}
        self.twice: list[tuple[int, str, str]] = []
        self.hold: set[int] = set()
        self.progress = True
        self._listed: dict[int, dict[str, _Remote]] = {}
        self._chosen: dict[int, dict[str, int]] = {}
        self._here: dict[int, list[Path]] = {}
        self._lock: filelock.BaseFileLock | None = None
        refs = self._again(lambda: self._api.list_repo_refs(repo), f"the branches of {self.name}")
        for ref in (*refs.branches, *refs.tags):
            match = _REVISION.fullmatch(ref.name)
            if match is None:
                continue
            step = int(match[1])
            if step in self.places:
                self.twice.append((step, self.places[step].name, ref.name))
            else:
                self.places[step] = _Revision(ref.name, ref.target_commit)
        if not self.places:
            names = ", ".join(ref.name for ref in refs.branches[:5])
            raise FileNotFoundError(
                f"source: {self.name} has no branch named like a checkpoint (step1000, stage1-step1000-tokens5B); "
                f"it has {names}"
            )

    def where(self, step: int) -> str:
        return f"{self.name}@{self.places[step].name}"

    def config(self) -> Any:
        """The config.json of the first checkpoint."""
        if not hasattr(self, "_config"):
            step = min(self.places)
            self._config = None
            if "config.json" in self._tree(step):
                self._config = json.loads(self._read(step, "config.json"))
        return self._config

    def _tree(self, step: int) -> dict[str, _Remote]:
        if step not in self._listed:
            commit = self.places[step].commit
            listed = self._again(
                lambda: list(self._api.list_repo_tree(self.repo, revision=commit)),
                f"the files of {self.where(step)}",
            )
            self._listed[step] = {
                entry.path: _Remote(entry.size, entry.lfs.sha256 if entry.lfs else None)
                for entry in listed
                if getattr(entry, "size", None) is not None  # a file, no folder
            }
        return self._listed[step]

    def _read(self, step: int, name: str) -> str:
        return self._download(step, name, self.folder / "small").read_text(encoding="utf-8")

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
            target = None if self.keep else self.folder / f"step-{step}"
            self._here[step] = [self._download(step, name, target) for name in self.files(step)]
        return self._here[step]

    def fingerprint(self, step: int) -> str:
        return self.places[step].commit

    def release(self, steps: Collection[int] = ()) -> None:
        """Delete what was fetched, but the given steps, and what a killed process left."""
        kept = set(self._here) if self.keep else set(steps)
        self._here = {step: paths for step, paths in self._here.items() if step in kept}
        unpickled.cache_clear()
        if self.folder.is_dir():
            self._acquire()
            for path in self.folder.iterdir():
                if path.is_dir() and path.name not in {f"step-{step}" for step in self._here}:
                    shutil.rmtree(path, ignore_errors=True)
        if not steps and self._lock is not None:
            self._lock.release()
            self._lock = None

    def _acquire(self) -> None:
        import filelock  # here: whoever downloads nothing does without

        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock", timeout=0, thread_local=False)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise FileExistsError(
                    f"another process is downloading to {self.folder}: wait for it, or give another cache"
                ) from None
            self._lock = lock

    def _download(self, step: int, name: str, folder: Path | None) -> Path:
        """Download a file, whole and sound; a file that is neither is fetched again, a few times."""
        remote = self._tree(step)[name]
        place = {"local_dir": folder} if folder else {}
        fresh = False

        def attempt() -> Path:
            nonlocal fresh
            commit = self.places[step].commit
            with self._bars():
                path = Path(
                    self._hub.hf_hub_download(
                        self.repo,
                        name,
                        revision=commit,
                        endpoint=self._endpoint,
                        force_download=fresh,
                        **place,
                    )
                )
            fresh = True
            if path.stat().st_size != remote.size:
                raise OSError(f"it has {path.stat().st_size} bytes of {remote.size}")
            if remote.sha256 is not None and _sha256(path) != remote.sha256:
                path.unlink()
                raise OSError("its content does not have the digest that the hub says it has")
            return path

        return self._again(attempt, f"{self.where(step)}/{name}")

    @contextlib.contextmanager
    def _bars(self) -> Iterator[None]:
        """Without the client's bars where no progress is wanted."""
        utils = self._hub.utils
        silent = not self.progress and not utils.are_progress_bars_disabled()
        if silent:
            utils.disable_progress_bars()
        try:
            yield
        finally:
            if silent:
                utils.enable_progress_bars()

    def _again(self, call: Callable[[], Any], what: str) -> Any:
        """Call, a bounded number of times, until no passing fault of the network comes."""
        attempt = 1
        while True:
            try:
                return call()
            except Exception as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if isinstance(error, self._hub.utils.RepositoryNotFoundError):
                    raise FileNotFoundError(
                        f"source: there is no repository {self.name}, or it is private (hf auth login): {error}"
                    ) from error
                final = status is not None and 400 <= status < 500 and status not in (408, 429)
                if final or isinstance(error, ValueError) or getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                if attempt == ATTEMPTS:
                    raise CheckpointError(
                        f"{what} could not be fetched in {ATTEMPTS} attempts ({type(error).__name__}: {error}); "
                        "what was measured before is stored, and a later call goes on from there"
                    ) from error
            time.sleep(_WAIT * 2 ** (attempt - 1))
            attempt += 1


ATTEMPTS = 5
"""How often a request to the hub is made before it counts as failed."""

_WAIT = 1.0  # seconds before the second attempt; doubled each time
_REVISION = re.compile(r"(?:stage1-)?(?:global_?)?(?:step|checkpoint)[-_]?(\d+)(?:-tokens\d+[MB])?")


class _Revision(NamedTuple):
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
