"""Text as bytes: what a small model is trained on, from any folder or from Python's own library.

A byte-level model needs no tokenizer and no download, and every Python carries megabytes of text: its own source.
Which sequences an update sees is a function of the seed and of the update's number alone, so a run that resumes
sees what it would have seen.
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weightdyn.core.checks import check_path, check_whole

HELD_OUT = 20
"""One file in so many is held out for evaluation; of fewer files, the last 1/HELD_OUT of the text."""


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
            TypeError, ValueError: if something is no path.
        """
        files = _text_files([check_path("paths", path) for path in paths]) if paths else _standard_library()
        return _read(tuple((file, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files))

    def batch(self, seed: int, update: int, batch_size: int, seq_len: int) -> Tensor:
        """The sequences of an update: int64 of shape (batch_size, seq_len + 1), targets one byte on.

        Their places are drawn evenly from the training part, by a generator seeded with (seed, update) alone.

        Args:
            seed, update: whole numbers, 0 or more.
            batch_size: sequences.
            seq_len: bytes that a sequence predicts from.

        Raises:
            TypeError, ValueError: if an argument is out of its range, or the training part too short.
        """
        check_whole("seed", seed)
        check_whole("update", update)
        check_whole("batch_size", batch_size, 1)
        check_whole("seq_len", seq_len, 1)
        require_length(self.train, seq_len, "training")
        places = np.random.default_rng((seed, update)).integers(len(self.train) - seq_len, size=batch_size)
        return _sequences(self.train, places, seq_len)

    def evaluation(self, sequences: int, seq_len: int) -> Tensor:
        """`sequences` sequences evenly spaced over the held-out part; int64 of shape (sequences, seq_len + 1).

        Raises:
            TypeError, ValueError: if an argument is below 1, or the held-out part too short.
        """
        check_whole("sequences", sequences, 1)
        check_whole("seq_len", seq_len, 1)
        require_length(self.held_out, seq_len, "held-out")
        places = np.linspace(0, len(self.held_out) - seq_len - 1, sequences).astype(np.int64)
        return _sequences(self.held_out, places, seq_len)


def require_length(text: Tensor, seq_len: int, part: str) -> None:
    """Raise a ValueError if `text`, the `part` of a corpus, has no sequence of `seq_len` bytes and one more."""
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
