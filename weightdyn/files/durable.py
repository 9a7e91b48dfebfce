"""The one way to write a file: whole or not at all, and on the disk before its name is; the lock of a folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import filelock


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Put a file under `path` whole or not at all, and on the disk, not only in its cache.

    Args:
        path: where the file shall be.
        write: called with a temporary path in the same folder, which it writes.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the disk may be full: give the space back
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. Windows cannot open a directory and has no need to."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> filelock.BaseFileLock | None:
    """Hold `folder` for one writer by its file `.lock`; None where the file system knows no locks.

    Raises:
        BlockingIOError: another one holds it.
        OSError: the lock cannot be made, for want of a permission for one.
    """
    import filelock  # here, for it takes a fifth of a second and readers do without

    lock = filelock.FileLock(folder / ".lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(errno.EAGAIN, "another writer holds the lock", str(folder / ".lock")) from None
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        return None
    return lock
