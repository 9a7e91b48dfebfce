"""Bars are shown where someone watches."""

import io
import sys
from types import SimpleNamespace

import pytest

from weightdyn.core.progress import is_watched, progress_bar


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("progress", "stderr", "shown"),
    [
        (None, Screen(), True),
        (None, io.StringIO(), False),
        (None, None, False),
        (True, io.StringIO(), True),
        (False, Screen(), False),
    ],
)
def test_none_follows_the_screen_and_true_and_false_decide(monkeypatch, progress, stderr, shown):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert is_watched(progress) is shown
    if stderr is not None:
        bar = progress_bar(range(3), progress=progress, desc="fit", file=stderr)
        assert list(bar) == [0, 1, 2]
        assert ("fit" in stderr.getvalue()) is shown


def test_a_notebook_watches_without_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1))
    )
    assert is_watched()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not is_watched()
