"""A small slice of `fuzz_files.py`, the same mutations every time; the script has the rest."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_files.py")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_hundred_mutated_files_are_refused_by_name_or_read_right():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--count", "100"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 mutated folders, 0 wrong" in done.stdout
    kinds = [
        line for line in done.stdout.splitlines() if re.match(r"\w+ +\d+ \w", line) and "wrong" not in line
    ]
    assert len(kinds) == 14
    assert all("refused" in line for line in kinds), "mutations that mutate nothing would show nothing"
