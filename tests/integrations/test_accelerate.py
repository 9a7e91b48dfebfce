"""Accelerate needs no module of ours: the logger, attached behind `prepare`, in real trainings."""

import pytest
import torch
from frameworks import (
    TOKENS,
    Truth,
    assert_every_update_is_there_once,
    assert_forces_are_true,
    kill_this_process,
    tiny_llama,
)

import weightdyn as wd

accelerate = pytest.importorskip("accelerate")
NAMES = [name for name, _ in tiny_llama().named_parameters()]


class Kept(accelerate.tracking.GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory = "kept", False

    def __init__(self):
        super().__init__()
        self.rows = {}

    @property
    def tracker(self):
        return self

    def log(self, values, step, **kwargs):
        self.rows[step] = values


def train(folder, kill=None, resume=False, updates=6, accumulate=2):
    """Also what the process that is killed calls; its checkpoint is of update 4."""
    kept, truth = Kept(), Truth()
    accelerate.state.GradientState._reset_state()  # which earlier trainings of this process share
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulate, cpu=True, log_with=kept)
    accelerator.init_trackers("run")
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    log = wd.ForceLogger(optimizer, model, out=f"{folder}/run")
    accelerator.register_for_checkpointing(log)
    if resume:
        accelerator.load_state(f"{folder}/checkpoint")
    for index in range(log.step * accumulate, updates * accumulate):
        with accelerator.accumulate(model):
            batch = TOKENS[4 * index % 64 : 4 * index % 64 + 4]
            accelerator.backward(model(batch, labels=batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                truth.before(optimizer, accelerator.unwrap_model(model), log.step + 1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accelerator.log(log.scalars(), step=log.step)
        if accelerator.sync_gradients and log.step == 4:
            accelerator.save_state(f"{folder}/checkpoint")
        if accelerator.sync_gradients and log.step == kill:
            kill_this_process()
    log.close()
    accelerator.end_training()
    return truth, kept


def test_the_forces_behind_prepare_are_those_of_a_float64_loop(tmp_path):
    truth, kept = train(tmp_path)
    run = wd.RunLog(tmp_path / "run")
    assert_every_update_is_there_once(run.forces(), NAMES, 6)
    assert len(truth.forces) == 6 * len(NAMES)
    assert_forces_are_true(run.forces(), truth)
    shares = wd.budget(run, by="role").set_index(["step", "role"])["decay_share"]
    told = [row["forces/value/decay_share"] for step, row in kept.rows.items() if step]
    assert told == pytest.approx(shares[:, "value"].tolist(), rel=1e-9)


def test_a_training_that_is_killed_and_loads_its_state_logs_every_update_once(killed):
    folder = killed["accelerate"]
    assert wd.RunLog(folder / "run").forces()["step"].max() == 4  # flushed with the checkpoint
    truth, _ = train(folder, resume=True, updates=10)
    table = wd.RunLog(folder / "run").forces()
    assert_every_update_is_there_once(table, NAMES, 10)
    assert {step for step, _ in truth.forces} == set(range(5, 11))
    assert_forces_are_true(table, truth)
