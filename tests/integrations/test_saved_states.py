"""Forces from what real trainers save, against the logger's rows of the same updates."""

import json
import shutil
import warnings

import pytest
import torch
from frameworks import TOKENS, tiny_llama

import weightdyn as wd
from weightdyn.core.tables import FORCES

TOLERANCE = 1e-4  # of a row's budget
DATA = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]


def error_against(log, table):
    """The largest difference of a force from the logger's, as a part of its row's budget."""
    both = table.merge(log, on=["step", "tensor"], suffixes=("", "_log"))
    assert len(both) == len(table) > 0
    size = both[[f"{force}_log" for force in FORCES]].abs().sum(axis=1)
    return max(((both[force] - both[f"{force}_log"]).abs() / size).max(skipna=False) for force in FORCES)


# --- transformers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Trainer with a cosine and a warm-up that dies, and one that resumes it; three checkpoints, and the log."""
    from transformers import Trainer, TrainingArguments

    from weightdyn.integrations.transformers import ForceCallback

    folder = tmp_path_factory.mktemp("transformers")
    for resume in (False, True):
        args = TrainingArguments(
            str(folder), max_steps=9, logging_steps=2, save_steps=3, per_device_train_batch_size=4,
            learning_rate=1e-2, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=4, use_cpu=True,
            report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        force = ForceCallback(out=folder / "run")
        trainer = Trainer(tiny_llama(), args, train_dataset=DATA, callbacks=[force])
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6") if resume else None)
        if not resume:
            shutil.rmtree(folder / "checkpoint-9")
    return folder


def test_a_trainers_checkpoints_have_the_forces_of_the_log(trained):
    log = wd.RunLog(trained / "run").forces()
    table = wd.forces_from_states(trained)
    assert table["step"].unique().tolist() == [3, 6, 9]
    assert set(table["lr_from"]) == {"schedule"}
    assert error_against(log, table) <= TOLERANCE
    assert set(table["weight_decay"]) == {0.0, 0.1}
    series = wd.forces_from_states(wd.Checkpoints(trained))
    assert error_against(log, series) <= TOLERANCE
    assert error_against(log.assign(step=log["step"] - 1), table[table["step"] < 9]) > 100 * TOLERANCE


def test_without_the_arguments_the_trainers_log_tells_the_rate(trained, tmp_path):
    log = wd.RunLog(trained / "run").forces()
    folder = tmp_path / "checkpoint-6"  # an update that was logged
    shutil.copytree(trained / "checkpoint-6", folder)
    (folder / "training_args.bin").unlink()
    table = wd.forces_from_states(folder, optimizer="AdamW")
    assert set(table["lr_from"]) == {"log"}
    assert error_against(log, table) <= TOLERANCE
    state = json.loads((folder / "trainer_state.json").read_text())
    following = torch.load(folder / "scheduler.pt")["_last_lr"][0]
    for entry in state["log_history"]:  # as transformers before 4.51 logged it
        entry["learning_rate"] = following if entry["step"] == 6 else 0.0
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="keeps its law to itself"):
        assert wd.forces_from_states(folder, optimizer="AdamW")["alignment"].isna().all()


def test_a_trainers_checkpoint_without_a_config_is_not_matched_but_by_a_model(trained, tmp_path):
    log = wd.RunLog(trained / "run").forces()
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(trained / "checkpoint-3", folder)
    (folder / "config.json").unlink()
    with pytest.raises(wd.CheckpointError, match="pass model="):
        wd.forces_from_states(folder)
    assert error_against(log, wd.forces_from_states(folder, model=tiny_llama())) <= TOLERANCE


# --- Accelerate -------------------------------------------------------------------------------------------


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 2e-2], total_steps=20)


def warm_cosine(optimizer):
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, 3, 12)


@pytest.mark.parametrize("schedule", [one_cycle, warm_cosine])
def test_accelerates_state_has_the_forces_of_the_log(tmp_path, schedule):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.GradientState._reset_state()  # which earlier trainings of this process share
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = tiny_llama()
    gains = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": matrices}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.2)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, schedule(optimizer))
    with wd.ForceLogger(optimizer, model) as logger:
        for index in range(12):
            with accelerator.accumulate(model):
                batch = TOKENS[4 * index : 4 * index + 4]
                accelerator.backward(model(batch, labels=batch).loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.save_state(str(tmp_path / "state"))
    log = logger.run.forces()
    if schedule is one_cycle:
        table = wd.forces_from_states(tmp_path / "state", model=model)
        assert set(table["lr_from"]) == {"schedule"}
    else:
        with pytest.warns(UserWarning, match="keeps its law to itself"):
            assert wd.forces_from_states(tmp_path / "state", model=model)["alignment"].isna().all()
        recipe = wd.Recipe(lr=wd.recipe.cosine(1e-2, 12, 3, first=0))
        table = wd.forces_from_states(tmp_path / "state", model=model, lr=recipe)
    assert table["step"].unique().tolist() == [6]
    assert error_against(log, table) <= TOLERANCE
    for name in ("model_1.safetensors", "optimizer_1.bin"):
        (tmp_path / "state" / name).write_bytes(b"")
        with pytest.raises(wd.CheckpointError, match="several models or optimizers"):
            wd.forces_from_states(tmp_path / "state", model=model)
        (tmp_path / "state" / name).unlink()


# --- Lightning --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::Warning:lightning")
@pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_lightnings_checkpoints_have_the_forces_of_the_log(tmp_path, interval):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others, when it is imported
        pl = pytest.importorskip("lightning.pytorch")
        from torch.utils.data import DataLoader

        from weightdyn.integrations.lightning import ForceCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"folder": tmp_path})
            self.model = tiny_llama()

        def training_step(self, batch, index):
            return self.model(batch, labels=batch).loss

        def configure_optimizers(self):
            adamw = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 15)
            return {"optimizer": adamw, "lr_scheduler": {"scheduler": cosine, "interval": interval}}

    saves = pl.callbacks.ModelCheckpoint(
        dirpath=tmp_path / "saved", every_n_train_steps=4, save_top_k=-1, save_last=True
    )
    ends = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "ends", every_n_epochs=1, save_top_k=-1)
    for epochs, resume in ((1, None), (3, tmp_path / "saved" / "epoch=0-step=4.ckpt")):
        trainer = pl.Trainer(
            max_epochs=epochs, limit_train_batches=5, default_root_dir=tmp_path, logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[ForceCallback(out=tmp_path / "run"), saves, ends],
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(TOKENS, batch_size=4), ckpt_path=resume, weights_only=False)
    log = wd.RunLog(tmp_path / "run").forces()
    table = wd.forces_from_states(tmp_path / "saved")
    assert table["step"].unique().tolist() == [4, 8, 12]
    assert set(table["lr_from"]) == {"schedule"}
    assert error_against(log, table) <= TOLERANCE
    table = wd.forces_from_states(tmp_path / "ends").query("step > 5")  # which was made again
    assert table["step"].unique().tolist() == [10, 15]
    assert error_against(log, table) <= TOLERANCE
