"""A small slice of `fuzz_files.py`, the same mutations every time; the script has the rest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_files import KINDS

SCRIPT = Path(__file__).with_name("fuzz_files.py")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_hundred_mutated_files_are_refused_by_name_or_read_right():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--count", "100"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 mutated folders, 0 wrong" in done.stdout
    for kind in KINDS:
        line = next(line for line in done.stdout.splitlines() if line.startswith(kind))
        assert "refused" in line, "mutations that mutate nothing would show nothing"
