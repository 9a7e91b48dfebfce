"""What all tests share."""

import os
import sys

# Before torch is imported: the threads of several workers on few cores wait for each other, four times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
