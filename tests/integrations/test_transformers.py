"""The callbacks of transformers' Trainer, on real trainings of a LLaMA of 4,000 weights."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from frameworks import (
    TOKENS,
    Truth,
    assert_every_update_is_there_once,
    assert_forces_are_true,
    kill_this_process,
    tiny_llama,
    torchrun,
)
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

import weightdyn as wd
from weightdyn.integrations.transformers import ForceCallback, RescaleCallback

DATA = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]
NAMES = [name for name, _ in tiny_llama().named_parameters()]


class Watch(TrainerCallback):
    """Holds the truth beside the logger, by the trainer's own events."""

    def __init__(self):
        self.truth = Truth()

    def on_pre_optimizer_step(self, args, state, control, *, model, optimizer, **kwargs):
        self.truth.before(optimizer, model, state.global_step + 1)


class Stop(TrainerCallback):
    def __init__(self, at, act):
        self.at, self.act = at, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.act()


def make_trainer(folder, callbacks, model=None, train_data=DATA, **options):
    arguments = {
        "max_steps": 6, "logging_steps": 2, "save_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "constant", "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**arguments, **options})
    model = tiny_llama() if model is None else model
    return Trainer(model, args, train_dataset=train_data, eval_dataset=DATA[:4], callbacks=callbacks)


def train(folder, resume=False, kill=None, save_only_model=False):
    """Also what the process that is killed calls; it reaches update 7 of 10, and its checkpoint is of update 4."""
    watch, force = Watch(), ForceCallback(out=Path(folder) / "run")
    callbacks = [watch, force] + ([Stop(kill, kill_this_process)] if kill else [])
    trainer = make_trainer(folder, callbacks, max_steps=10, save_only_model=save_only_model)
    trainer.train(resume_from_checkpoint=resume or None)
    return watch.truth, force


def raises(error):
    def act():
        raise error

    return act


def test_the_forces_of_a_trainer_are_those_of_a_float64_loop(tmp_path):
    watch, force = Watch(), ForceCallback()
    trainer = make_trainer(tmp_path, [watch, force], gradient_accumulation_steps=2, max_grad_norm=0.1)
    trainer.train()
    run = wd.RunLog(tmp_path / "weightdyn")
    assert_every_update_is_there_once(run.forces(), NAMES, 6)
    assert len(watch.truth.forces) == 6 * len(NAMES)
    assert_forces_are_true(run.forces(), watch.truth)
    logged = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    metrics = run.metrics().set_index("step")
    for name in ("loss", "grad_norm", "learning_rate"):
        assert metrics[name].to_dict() == {step: row[name] for step, row in logged.items()}
    assert not any("/" in name for name in metrics)


def test_reporters_get_the_forces_with_the_loss(tmp_path, monkeypatch):
    written = {}

    class SummaryWriter:  # TensorBoard's, which transformers' own callback writes to
        def __init__(self, log_dir):
            pass

        def add_scalar(self, name, value, step):
            written[name, step] = value

        add_text = add_hparams = flush = close = lambda *args, **kwargs: None

    tensorboard = ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    force = ForceCallback(weibull_every=4)
    trainer = make_trainer(tmp_path, [force], report_to=["tensorboard"], eval_strategy="steps", eval_steps=3)
    trainer.train()
    run = force.logger.run
    shares = wd.budget(run, by="role").set_index(["step", "role"])
    rows = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert sorted(rows) == [2, 4, 6]
    for step, row in rows.items():
        for name in ("alignment_share", "injection_share", "decay_share"):
            key = f"forces/transmission/{name}"
            expected = pytest.approx(shares.loc[(step, "transmission"), name], rel=1e-9)
            assert row[key] == written[f"train/{key}", step] == expected
    fits = wd.pool_weibull(run, by="role").query("role == 'value'").set_index("step")["lam"]
    assert [rows[step]["weibull/value/lam"] for step in rows] == [fits[0], fits[4], fits[4]]  # the latest
    others = [row for row in trainer.state.log_history if "loss" not in row]
    assert len(others) == 3  # two evaluations and the summary
    assert not any("/" in name for row in others for name in row)


def test_an_update_that_was_reported_is_not_reported_again(tmp_path, capsys):
    trainer = make_trainer(tmp_path, [ForceCallback(tmp_path / "run", every=4)])
    trainer.train()
    assert wd.RunLog(tmp_path / "run").forces()["step"].unique().tolist() == [4]
    printed = capsys.readouterr().out
    assert "'loss'" in printed
    assert "forces/" not in printed  # lines for eyes stay as short as they were
    told = [row["step"] for row in trainer.state.log_history if "forces/other/norm" in row]
    assert told == [4]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_exception_leaves_a_whole_log_that_is_closed(tmp_path, error):
    with pytest.raises(type(error)):
        make_trainer(tmp_path, [ForceCallback(), Stop(3, raises(error))]).train()
    run = wd.RunLog(tmp_path / "weightdyn")
    assert_every_update_is_there_once(run.forces(), NAMES, 3)
    make_trainer(tmp_path, [ForceCallback(overwrite=True)]).train()  # nobody holds the directory
    assert_every_update_is_there_once(run.forces(), NAMES, 6)


@pytest.mark.slow
def test_a_batch_that_was_too_large_is_tried_again_and_the_run_goes_on(tmp_path):
    tried = []

    def too_large():
        if not tried:
            tried.append(True)
            raise RuntimeError("CUDA out of memory.")

    force = ForceCallback()
    trainer = make_trainer(tmp_path, [force, Stop(3, too_large)], auto_find_batch_size=True)
    trainer.train()
    table = wd.RunLog(tmp_path / "weightdyn").forces()
    assert_every_update_is_there_once(table, NAMES, 9)  # 3, and 6 that its optimizer made behind them


def test_a_full_disk_is_told_and_does_not_end_the_training(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    force = ForceCallback()
    fill = Stop(2, lambda: monkeypatch.setattr("weightdyn.record.runlog.write_parquet", full))
    with pytest.warns(RuntimeWarning, match="No space left"):
        make_trainer(tmp_path, [force, fill]).train()
    monkeypatch.undo()
    force.logger.close()
    assert_every_update_is_there_once(wd.RunLog(tmp_path / "weightdyn").forces(), NAMES, 6)


def test_a_second_training_goes_on_in_the_run(tmp_path):
    force = ForceCallback()
    trainer = make_trainer(tmp_path, [force], max_steps=3)
    trainer.evaluate()  # before and after a training there is nothing to record into
    trainer.train()
    trainer.evaluate()
    trainer.train()
    assert_every_update_is_there_once(wd.RunLog(tmp_path / "weightdyn").forces(), NAMES, 6)


def test_the_best_model_at_the_end_and_its_evaluations(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, [ForceCallback()], **options)
    trainer.train()
    run = wd.RunLog(tmp_path / "weightdyn")
    assert_every_update_is_there_once(run.forces(), NAMES, 6)
    evaluated = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert run.metrics().set_index("step")["eval_loss"].dropna().to_dict() == evaluated


@pytest.mark.parametrize("saved", ["", ", the model only"])
def test_a_training_that_is_killed_and_resumes_logs_every_update_once(saved, killed):
    folder = killed[f"transformers{saved}"]
    assert wd.RunLog(folder / "run").forces()["step"].max() == 4  # flushed with the checkpoint
    truth, _ = train(folder, resume=True, save_only_model=bool(saved))
    table = wd.RunLog(folder / "run").forces()
    assert_every_update_is_there_once(table, NAMES, 10)
    assert {step for step, _ in truth.forces} == set(range(5, 11))
    assert_forces_are_true(table, truth)


def test_sgd_does_not_count_its_updates_and_resumes_all_the_same(tmp_path):
    def sgd(max_steps, resume):
        force = ForceCallback(source="displacement", drift=False)
        trainer = make_trainer(
            tmp_path, [force], optim="sgd", weight_decay=0.0, save_steps=3, max_steps=max_steps
        )
        trainer.train(resume_from_checkpoint=resume)

    sgd(3, None)
    sgd(6, True)
    assert_every_update_is_there_once(wd.RunLog(tmp_path / "weightdyn").forces(), NAMES, 6)


def test_an_unknown_option_is_refused_at_once():
    with pytest.raises(TypeError, match="evry"):
        ForceCallback(evry=10)
    with pytest.raises(ValueError, match="out must be"):
        ForceCallback(out=3)
    with pytest.raises(ValueError, match="by='head'"):
        ForceCallback(by="head")  # type: ignore[arg-type]


def test_a_rescaling_while_a_trainer_trains_is_that_of_a_plain_loop(tmp_path):
    model, plain = tiny_llama(), tiny_llama()
    force = ForceCallback()
    rescale = RescaleCallback(at=(0,), every=2, forces=force)
    options = {"max_grad_norm": 0.0, "weight_decay": 0.0, "train_data": 4 * DATA[:1]}
    make_trainer(tmp_path, [force, rescale], model, **options).train()
    assert sorted(set(rescale.schedule.events["step"])) == [0, 2, 4, 6]
    assert force.logger.run.metrics().set_index("step")["event"].dropna().index.tolist() == [0, 2, 4, 6]
    assert_every_update_is_there_once(force.logger.run.forces(), NAMES, 6)

    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    wd.wisca.rescale_(plain, optimizer)
    for step in range(1, 7):
        batch = TOKENS[[0, 0, 0, 0]]
        plain(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            wd.wisca.rescale_(plain, optimizer)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=3e-4)


def distributed(folder):
    """What each of two processes calls."""
    watch, force = Watch(), ForceCallback()
    trainer = make_trainer(folder, [watch, force], ddp_backend="gloo")
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    first = trainer.args.process_index == 0
    assert (force.logger is not None) == first
    if first:
        run = wd.RunLog(Path(folder) / "weightdyn")
        assert_every_update_is_there_once(run.forces(), NAMES, 6)
        assert len(watch.truth.forces) == 6 * len(NAMES)
        assert_forces_are_true(run.forces(), watch.truth)
        rows = [row["step"] for row in trainer.state.log_history if "forces/other/norm" in row]
        assert rows == [2, 4, 6]
        (Path(folder) / "done").touch()


@pytest.mark.slow
def test_two_processes_log_one_run(tmp_path):
    torchrun("test_transformers", tmp_path)
