"""Progress bars: shown where someone watches, silent in log files and pipes.

`progress=` means the same everywhere: None shows a bar in terminals and notebooks, True everywhere, False nowhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from weightdyn.core.checks import check_flag

Progress = bool | None
"""None: where someone watches. True: always. False: never."""


def is_watched(progress: Progress = None) -> bool:
    """Whether to show a bar: `progress` where it is given, else whether stderr is a terminal or a notebook."""
    if progress is not None:
        return check_flag("progress", progress)
    if "ipykernel" in sys.modules and "IPython" in sys.modules:
        shell = sys.modules["IPython"].get_ipython()
        if shell is not None and hasattr(shell, "kernel"):
            return True
    isatty = getattr(sys.stderr, "isatty", None)
    return bool(isatty is not None and isatty())


def progress_bar(iterable: Iterable[Any] | None = None, *, progress: Progress = None, **options: Any) -> Any:
    """A tqdm bar that follows `progress`.

    Args:
        iterable: what to go through; None for a bar that is moved by `update`.
        progress: as everywhere, see this module's opening.
        options: tqdm's: total, unit, desc, delay, ….
    """
    if is_watched(progress):
        from tqdm.auto import tqdm  # of notebooks or terminals; here, since it takes a while to load
    else:
        from tqdm import tqdm
    return tqdm(iterable, disable=not is_watched(progress), **options)
