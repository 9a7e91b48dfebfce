"""A training that is killed at any moment and resumes from its own checkpoints logs as if it had never died."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import weightdyn as wd

# Imports once, then forks a training per command. It saves its own checkpoints and never flushes the log.
TRAINER = """
import os, random, signal, sys, time
from pathlib import Path
import torch, weightdyn as wd

def train(folder, attempt, updates):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    chance, done = random.Random(attempt), 0
    if (folder / "checkpoint").exists():
        saved = torch.load(folder / "checkpoint", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    logger = wd.ForceLogger(optimizer, model, out=folder / "run", overwrite=True)
    ledger = os.open(folder / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step in range(done + 1, updates + 1):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        logger.record(loss=float(step))
        os.write(ledger, f"{attempt} {step}\\n".encode())
        if chance.random() < 0.15:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(saved, folder / "new")
            os.replace(folder / "new", folder / "checkpoint")
    logger.close()

# What is imported at the first use is imported here.
import filelock
p = torch.nn.Parameter(torch.ones(2))
p.grad = torch.ones(2)
optimizer = torch.optim.AdamW([p])
with wd.ForceLogger(optimizer):
    optimizer.step()

child = None
print("ready", flush=True)
for line in sys.stdin:
    match line.split():
        case ["start", folder, attempt, updates]:
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    train(Path(folder), int(attempt), int(updates))
                    status = 0
                finally:
                    os._exit(status)
            print("started", flush=True)
        case ["end", *number]:
            if number:
                os.kill(child, int(number[0]))
            status, child = os.waitpid(child, 0)[1], None
            print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
if child is not None:
    os.kill(child, signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def trainer():
    """Call with "start FOLDER ATTEMPT UPDATES" or "end [SIGNAL]", which answers with the exit status."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(wd.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        answers = process.stdout
        assert answers is not None

        def command(line):
            print(line, file=process.stdin, flush=True)
            return answers.readline().strip()

        assert answers.readline() == "ready\n"
        yield command


def made(folder, attempt):
    """Updates that the training of an attempt had behind it."""
    ledger = folder / "ledger"
    lines = [line.split() for line in ledger.read_text().splitlines()] if ledger.exists() else []
    mine = [what for who, what in lines if who == str(attempt)]
    return [int(what) for what in mine]


def killed(trainer, folder, kills, updates):
    """Kill a training so often, at random moments and by both signals, check it each time, and let it end."""
    chance = random.Random(kills)
    for attempt in range(1, kills + 1):
        number = chance.choice([signal.SIGKILL, signal.SIGTERM])
        assert trainer(f"start {folder} {attempt} 1000000000") == "started"
        wanted, deadline = chance.choice([0, 1, 5, 20]), time.monotonic() + 20
        while len(made(folder, attempt)) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        assert trainer(f"end {int(number)}") == str(-int(number))
        stored = wd.RunLog(folder / "run").forces() if (folder / "run/run.json").exists() else None
        steps = [] if stored is None else stored["step"].unique().tolist()
        assert steps == list(range(1, len(steps) + 1))  # no hole
        assert stored is None or not stored.duplicated(["step", "tensor"]).any()
        behind = made(folder, attempt)
        if number == signal.SIGTERM and behind:
            assert steps[-1] >= behind[-1]  # nothing is lost at all
    last = max(step for attempt in range(1, kills + 1) for step in [0, *made(folder, attempt)])
    assert trainer(f"start {folder} 0 {last + updates}") == "started"
    assert trainer("end") == "0"
    return last + updates


def check(trainer, tmp_path, kills):
    (tmp_path / "killed").mkdir()
    (tmp_path / "straight").mkdir()
    updates = killed(trainer, tmp_path / "killed", kills, 10)
    assert trainer(f"start {tmp_path / 'straight'} 0 {updates}") == "started"
    assert trainer("end") == "0"
    got, want = (wd.RunLog(tmp_path / name / "run") for name in ("killed", "straight"))
    assert got.metrics()["loss"].tolist() == list(range(1, updates + 1))
    left, right = got.forces(), want.forces()
    assert left["step"].unique().tolist() == list(range(1, updates + 1))
    assert left[["step", "tensor"]].astype(str).equals(right[["step", "tensor"]].astype(str))
    for name in ("norm_sq", "alignment", "injection", "decay"):
        np.testing.assert_array_equal(left[name], right[name])
    assert len(got.info["sessions"]) > 1


def test_six_kills_leave_the_log_of_a_training_that_was_never_killed(trainer, tmp_path):
    check(trainer, tmp_path, 6)


@pytest.mark.slow
def test_sixty_kills_leave_the_log_of_a_training_that_was_never_killed(trainer, tmp_path):
    check(trainer, tmp_path, 60)
