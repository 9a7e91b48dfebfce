"""The callbacks of Lightning's Trainer, on real trainings of a LLaMA of 4,000 weights."""

import importlib
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
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
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import weightdyn as wd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of others, when it is imported
    pl = pytest.importorskip("lightning.pytorch")
    from weightdyn.integrations.lightning import ForceCallback, RescaleCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:lightning"),
    pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning"),
]
NAMES = [f"model.{name}" for name, _ in tiny_llama().named_parameters()]


def automatic(base):
    class Module(base):
        def __init__(self, model=None):
            super().__init__()
            self.model = tiny_llama() if model is None else model
            self.truth = Truth()

        def training_step(self, batch, index):
            loss = self.model(batch, labels=batch).loss
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", self.model(batch, labels=batch).loss)

        def configure_gradient_clipping(self, optimizer, **options):  # the last event before the step
            super().configure_gradient_clipping(optimizer, **options)
            if isinstance(optimizer, torch.optim.AdamW):
                self.truth.before(optimizer, self, self.global_step + 1)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

    return Module


Module = automatic(pl.LightningModule)


class ByHand(Module):
    """Manual optimization: an update at every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        if index % 2:
            self.truth.before(optimizer, self, self.global_step + 1)
            optimizer.step()
            optimizer.zero_grad()


class Stop(pl.Callback):
    def __init__(self, at, act):
        self.at, self.act = at, act

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.at:
            self.act()


class Kept(pl.loggers.logger.Logger):
    """A logger that keeps what it is told."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


def make_trainer(folder, callbacks, trainer=pl.Trainer, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    arguments = {"max_steps": 6, "log_every_n_steps": 2, "logger": False, "accelerator": "cpu", **quiet}
    return trainer(default_root_dir=folder, callbacks=callbacks, **{**arguments, **options})


def fit(trainer, module=None, **options):
    data = DataLoader(TOKENS, batch_size=4), DataLoader(TOKENS[:4], batch_size=4)
    trainer.fit(Module() if module is None else module, *data, **options)


def train(folder, kill=None, resume=None):
    """Also what the process that is killed calls; it reaches update 7 of 10, and its checkpoint is of update 4."""
    module, force = Module(), ForceCallback(out=f"{folder}/run")
    checkpoints = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    callbacks = [force, checkpoints, *([Stop(kill, kill_this_process)] if kill else [])]
    fit(make_trainer(folder, callbacks, max_steps=10, enable_checkpointing=True), module, ckpt_path=resume)
    return module.truth


def raises(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("way", ["automatic", "by hand", "bf16-mixed"])
def test_the_forces_of_a_module_are_those_of_a_float64_loop(tmp_path, name, way):
    package = pytest.importorskip(name)
    if way == "by hand" and package is not pl:
        pytest.skip("the module of the other package is the same")
    options = {"automatic": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, "by hand": {}}
    options["bf16-mixed"] = {"precision": "bf16-mixed"}
    trainer = make_trainer(tmp_path, [ForceCallback()], package.Trainer, **options[way])
    module = ByHand() if way == "by hand" else automatic(package.LightningModule)()
    fit(trainer, module)
    table = wd.RunLog(tmp_path / "weightdyn").forces()
    assert_every_update_is_there_once(table, NAMES, 6)
    assert len(module.truth.forces) == 6 * len(NAMES)
    assert_forces_are_true(table, module.truth)


class Adversaries(pl.LightningModule):
    """Two optimizers that take turns, in manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.truth = Truth()

    def training_step(self, batch, index):
        x = batch[:, :4].float() / 32
        for turn, optimizer in enumerate(self.optimizers()):
            loss = (self.other(self.one(x)) - 1).square().mean() * (1 - 2 * turn)
            self.manual_backward(loss)
            self.truth.before(optimizer, self, index + 1)
            optimizer.step()
            for each in self.optimizers():
                each.zero_grad()

    def configure_optimizers(self):
        return [
            torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0.1) for each in (self.one, self.other)
        ]


def test_several_optimizers_make_one_run(tmp_path):
    module, force = Adversaries(), ForceCallback()
    make_trainer(tmp_path, [force], max_steps=12).fit(module, DataLoader(TOKENS, batch_size=4))
    table = force.logger.run.forces()
    for name, _ in module.named_parameters():
        expected = np.array([module.truth.forces[step, name] for step in range(1, 7)])
        found = table[table["tensor"] == name].sort_values("step")[[*wd.FORCES]].to_numpy()
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).sum(axis=1).min()


def test_loggers_get_the_forces_with_the_loss_and_the_run_their_metrics(tmp_path):
    kept, force = Kept(), ForceCallback()
    options = {"accumulate_grad_batches": 2, "val_check_interval": 4}
    trainer = make_trainer(tmp_path, [force], logger=kept, **options)
    fit(trainer)
    shares = wd.budget(force.logger.run, by="role").set_index(["step", "role"])["alignment_share"]
    name = "forces/transmission/alignment_share"
    told = {step + 1: row for step, row in kept.rows if "train_loss" in row}
    assert sorted(told) == [2, 4, 6]
    for step, row in told.items():
        assert row[name] == pytest.approx(shares[step, "transmission"], rel=1e-6)  # Lightning keeps float32
    assert name in trainer.callback_metrics
    metrics = force.logger.run.metrics().set_index("step")
    assert list(metrics) == ["train_loss", "val_loss"]
    assert metrics["train_loss"].to_dict() == {step: row["train_loss"] for step, row in told.items()}
    validated = {step + 1: row["val_loss"] for step, row in kept.rows if "val_loss" in row}
    assert metrics["val_loss"].to_dict() == validated


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_exception_leaves_a_whole_log_that_is_closed(tmp_path, error):
    stopped = SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError
    interrupt = signal.getsignal(signal.SIGINT)  # which Lightning takes away when it is interrupted
    with pytest.raises(stopped):
        fit(make_trainer(tmp_path, [ForceCallback(), Stop(3, raises(error))]))
    signal.signal(signal.SIGINT, interrupt)
    run = wd.RunLog(tmp_path / "weightdyn")
    assert_every_update_is_there_once(run.forces(), NAMES, 3)
    fit(make_trainer(tmp_path, [ForceCallback(overwrite=True)]))  # nobody holds the directory
    assert_every_update_is_there_once(run.forces(), NAMES, 6)


def test_a_training_that_is_killed_and_resumes_logs_every_update_once(killed):
    folder = killed["lightning"]
    assert wd.RunLog(folder / "run").forces()["step"].max() == 4  # flushed with the checkpoint
    truth = train(folder, resume=folder / "step=4.ckpt")
    table = wd.RunLog(folder / "run").forces()
    assert_every_update_is_there_once(table, NAMES, 10)
    assert {step for step, _ in truth.forces} == set(range(5, 11))
    assert_forces_are_true(table, truth)


def test_an_optimizer_that_does_not_count_goes_on_where_the_callbacks_state_says(tmp_path):
    class Sgd(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    trainer = make_trainer(tmp_path, [ForceCallback(source="displacement")], max_steps=3)
    fit(trainer, Sgd())
    trainer.save_checkpoint(tmp_path / "sgd.ckpt")
    resumed = make_trainer(tmp_path, [ForceCallback(source="displacement")])
    fit(resumed, Sgd(), ckpt_path=tmp_path / "sgd.ckpt")
    assert_every_update_is_there_once(wd.RunLog(tmp_path / "weightdyn").forces(), NAMES, 6)


def test_the_config_of_the_one_model_inside_tells_the_heads(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    force = ForceCallback()
    fit(make_trainer(tmp_path, [force], max_steps=1), Module(GPTNeoXForCausalLM(config)))
    assert {"q", "k", "v"} <= set(force.logger.latest()["component"])


def test_a_rescaling_while_lightning_trains_is_that_of_a_plain_loop(tmp_path):
    module, plain = Module(), tiny_llama()
    force = ForceCallback()
    rescale = RescaleCallback(at=(0,), every=2, forces=force)
    fit(make_trainer(tmp_path, [force, rescale]), module)
    assert sorted(set(rescale.schedule.events["step"])) == [0, 2, 4, 6]
    assert force.logger.run.metrics().set_index("step")["event"].dropna().index.tolist() == [0, 2, 4, 6]
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    wd.wisca.rescale_(plain, optimizer)
    for step in range(1, 7):
        batch = TOKENS[4 * step - 4 : 4 * step]
        plain(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            wd.wisca.rescale_(plain, optimizer)
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=3e-4)


def test_rescaling_with_several_optimizers_is_refused(tmp_path):
    class Two(ByHand):
        def configure_optimizers(self):
            return [torch.optim.AdamW([p]) for p in list(self.parameters())[:2]]

    with pytest.raises(ValueError, match="follows one optimizer, and there are 2"):
        fit(make_trainer(tmp_path, [RescaleCallback(every=2)]), Two())


def test_forces_that_stand_behind_the_rescaling_are_refused(tmp_path):
    forces = ForceCallback()
    with pytest.raises(ValueError, match="in front of the RescaleCallback"):
        fit(make_trainer(tmp_path, [RescaleCallback(every=2, forces=forces), forces]))


@pytest.mark.parametrize(
    ("module", "missing"),
    [("lightning", ["lightning", "pytorch_lightning"]), ("transformers", ["transformers"])],
)
def test_a_missing_framework_is_told_with_what_to_install(module, missing, monkeypatch):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.pytorch", None)
    monkeypatch.delitem(sys.modules, f"weightdyn.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match="pip install"):
        importlib.import_module(f"weightdyn.integrations.{module}")


class Sharded(Module):
    def configure_model(self):
        for part in (*self.model.model.layers, self.model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def configure_gradient_clipping(self, optimizer, **options):
        """The truth is the other training's, of the same data."""


def distributed(folder):
    """What each of two processes calls."""
    sharded = ForceCallback(Path(folder) / "sharded")
    strategy = pl.strategies.ModelParallelStrategy(2, 1, process_group_backend="gloo")
    fit(make_trainer(folder, [sharded], strategy=strategy, devices=2), Sharded())
    assert sharded.logger is not None  # each has its part
    module, force, kept = Module(), ForceCallback(), Kept()
    trainer = make_trainer(folder, [force], strategy="ddp", devices=2, logger=kept)
    fit(trainer, module)
    assert trainer.world_size == 2
    assert (force.logger is not None) == trainer.is_global_zero
    if trainer.is_global_zero:
        table = wd.RunLog(Path(folder) / "weightdyn").forces()
        assert_every_update_is_there_once(table, NAMES, 6)
        assert len(module.truth.forces) == 6 * len(NAMES)
        assert_forces_are_true(table, module.truth)
        assert len([row for _, row in kept.rows if "forces/other/norm" in row]) == 3
        whole = wd.RunLog(Path(folder) / "sharded").forces()
        pd.testing.assert_frame_equal(whole, table, rtol=1e-5, check_categorical=False)
        (Path(folder) / "done").touch()


@pytest.mark.slow
def test_two_processes_log_one_run_and_so_do_those_that_shard(tmp_path):
    torchrun("test_lightning", tmp_path)
