"""A sharded training that loses a rank: RANK=… WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… lost.py FOLDER HOW

Rank 1 goes in its sixth update, between the backward pass and the step, and the others are left alone with what
they have begun. Rank 0 says when it learned of it and when it was out of the logger's code.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import stacks
import torch.distributed as dist

import weightdyn as wd

GOES = 5
TIMEOUTS = {"hang": 4}  # seconds of the process group


def go(how):
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise RuntimeError("rank 1 fails")
    time.sleep(60)  # it hangs


def main(folder, how):
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUTS.get(how, 1800)))
    model, optimizer, called, part = stacks.way("fsdp")
    learned = time.monotonic()

    def before(*_):
        if dist.get_rank() == 1 and log.step == GOES:
            go(how)

    def after(step):
        nonlocal learned
        if step == GOES:
            learned = time.monotonic()
            print("alone", flush=True)
            if how == "alone":
                raise RuntimeError("rank 0 fails beside a rank that hangs")
            if how == "term":
                time.sleep(60)  # until the signal
            if how == "flush":
                log.flush()  # until the signal, for the sums of this update never come

    optimizer.register_step_pre_hook(before)
    try:
        with wd.ForceLogger(optimizer, model, config=stacks.CONFIG, out=Path(folder) / "run") as log:
            try:
                stacks.train(called, optimizer, part, steps=20, after=after)
            except Exception:
                learned = time.monotonic()
                raise
    finally:
        print(f"left after {time.monotonic() - learned:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
