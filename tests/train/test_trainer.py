"""The reference trainer against plain loops, torch's own schedulers, and the kill that it must survive."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from typer.testing import CliRunner

from weightdyn.cli import app
from weightdyn.files.durable import write_file
from weightdyn.record.runlog import RunLog, RunLogError, RunWriter
from weightdyn.train import trainer
from weightdyn.train.corpus import HELD_OUT, Corpus
from weightdyn.train.models import MODELS, make_model
from weightdyn.train.trainer import DEMO, TrainConfig, train

SMALL = TrainConfig(
    steps=20, batch_size=2, seq_len=16, warmup=3, weibull_every=5, eval_every=10, save_every=7, device="cpu"
)


@pytest.fixture(scope="module", autouse=True)
def _small_and_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of small tensors, more threads only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "EVAL_SEQUENCES", 4)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(SMALL, out, progress=False)
    return out


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: every row, every checkpoint, the state of the optimizer."""
    one, other = RunLog(a), RunLog(b)
    for kind in ("metrics", "forces", "weibull"):
        mine, yours = getattr(one, kind)(), getattr(other, kind)()
        # What momentum remembers is taken up again from the log's last row, to rounding.
        taken_up = [name for name in ("memory_null", "lr_memory", "fresh", "signal") if name in mine]
        pd.testing.assert_frame_equal(mine[taken_up], yours[taken_up], rtol=1e-12, atol=1e-18)
        pd.testing.assert_frame_equal(
            mine.drop(columns=taken_up), yours.drop(columns=taken_up), check_exact=True
        )
    names = sorted(path.name for path in (a / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (b / "checkpoints").iterdir())
    for name in names:
        assert (a / "checkpoints" / name).read_bytes() == (b / "checkpoints" / name).read_bytes()
    states = [torch.load(path / "resume.pt", weights_only=True)["optimizer"]["state"] for path in (a, b)]
    for mine, yours in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(mine[name], yours[name]) for name in mine)


# --- learning rate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup", "floor"), [(50, 10, 0.1), (37, 2, 0.0)])
def test_the_learning_rate_is_torchs_warmup_and_cosine(steps, warmup, floor):
    config = TrainConfig(lr=0.3, steps=steps, warmup=warmup, floor=floor)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=steps - warmup, eta_min=floor * config.lr
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[warmup - 1])
    for update in range(1, steps + 1):
        assert config.recipe.lr_at(update) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if update < steps:
            schedule.step()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_recipe_drives_a_lambda_lr(schedule):
    config = TrainConfig(lr=0.02, steps=30, warmup=5, schedule=schedule)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    by_torch = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: config.recipe.lr_at(min(n + 1, config.steps)) / config.lr
    )
    for update in range(1, config.steps + 1):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(config.recipe.lr_at(update), rel=1e-12)
        optimizer.step()
        by_torch.step()


def test_the_schedule_has_its_ends():
    config = TrainConfig(lr=2.0, steps=100, warmup=10, floor=0.25)
    assert config.recipe.lr_at(1) == 0.2
    assert config.recipe.lr_at(10) == 2.0
    assert config.recipe.lr_at(100) == 0.5
    assert TrainConfig(lr=2.0, steps=100, warmup=0, schedule="constant").recipe.lr_at(1) == 2.0
    assert TrainConfig(lr=2.0, steps=10, warmup=10).recipe.lr_at(10) == 2.0
    with pytest.raises(ValueError, match="updates are counted from 1, got 0"):
        config.recipe.lr_at(0)


# --- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "gpt-5"),
        ("steps", 0),
        ("steps", 1.5),
        ("batch_size", True),
        ("seq_len", 4096),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", "high"),
        ("schedule", "linear"),
        ("warmup", 3000),
        ("floor", 1.5),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("decayed", "none"),
        ("clip", 0.0),
        ("seed", -1),
        ("save_every", 0),
    ],
)
def test_a_value_out_of_range_is_named_at_the_door(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        TrainConfig(**{name: value})


def test_a_corpus_may_be_one_path():
    assert (
        TrainConfig(corpus="a/book.txt").corpus
        == TrainConfig(corpus=[Path("a/book.txt")]).corpus
        == ("a/book.txt",)
    )


# --- text ---------------------------------------------------------------------------------------------------


def test_the_default_corpus_is_pythons_own_source():
    corpus = Corpus.read()
    text = corpus.train.numpy().tobytes()
    assert len(text) > 5_000_000
    assert Path(dataclasses.__file__).read_bytes() in text + corpus.held_out.numpy().tobytes()
    assert not any("site-packages" in path.parts for path in corpus.train_files + corpus.held_out_files)
    assert 0.01 < len(corpus.held_out) / len(text) < 0.2
    assert Corpus.read() is corpus


def test_held_out_files_are_not_trained_on():
    corpus = Corpus.read()
    assert not set(corpus.train_files) & set(corpus.held_out_files)
    held_out = b"".join(path.read_bytes() for path in corpus.held_out_files)
    assert held_out == corpus.held_out.numpy().tobytes()
    assert len(corpus.train) == sum(path.stat().st_size for path in corpus.train_files)


def test_a_folder_is_read_in_the_order_of_its_names_without_what_is_no_text(tmp_path):
    texts = {"b.txt": b"bb" * 30, "a/z.txt": b"az" * 30, "c.txt": b"cc" * 30}
    for name, text in {**texts, ".hidden": b"no", "image.bin": b"a\0b", ".git/config": b"no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    joined = texts["a/z.txt"] + texts["b.txt"] + texts["c.txt"]
    corpus = Corpus.read(tmp_path, tmp_path / "b.txt")  # named twice, read once
    assert corpus.train.numpy().tobytes() + corpus.held_out.numpy().tobytes() == joined
    assert len(corpus.held_out) == len(joined) // HELD_OUT


def test_a_changed_file_is_read_anew(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("once upon a time " * 20)
    before = Corpus.read(file)
    file.write_text("call me Ishmael. " * 30)
    after = Corpus.read(file)
    assert after.train.numpy().tobytes().startswith(b"call me")
    assert before.sha256 != after.sha256


def test_a_missing_or_empty_corpus_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere"):
        Corpus.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no text files"):
        Corpus.read(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match=r"too small for seq_len=16: its training part .*has 5"):
        train(dataclasses.replace(SMALL, corpus=(str(tmp_path),)), tmp_path / "run")


def test_a_batch_depends_on_seed_and_update_alone():
    corpus = Corpus.read()
    later = corpus.batch(0, 7, 3, 16)
    batches = {update: corpus.batch(0, update, 3, 16) for update in (9, 8, 7)}
    assert torch.equal(batches[7], later)
    assert not torch.equal(batches[7], batches[8])
    assert not torch.equal(batches[7], corpus.batch(1, 7, 3, 16))
    assert later.shape == (3, 17)
    text = corpus.train.numpy().tobytes()
    assert all(bytes(row.tolist()) in text for row in later)


def test_evaluation_spans_the_held_out_text():
    corpus = Corpus.read()
    sequences = corpus.evaluation(8, 16)
    assert torch.equal(sequences[0], corpus.held_out[:17].long())
    assert torch.equal(sequences[-1], corpus.held_out[-17:].long())


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_shapes_that_their_names_promise(name):
    with torch.device("meta"):
        model = make_model(name, 0)
    shape = MODELS[name]
    h, width = shape["hidden_size"], shape["intermediate_size"]
    kv = shape.get("num_key_value_heads", shape["num_attention_heads"]) / shape["num_attention_heads"]
    mlp = 3 if shape["model_type"] == "llama" else 2
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert (
        matrices == shape["num_hidden_layers"] * (2 * h * h + 2 * kv * h * h + mlp * h * width) + 2 * 256 * h
    )


def test_weights_depend_on_the_seed_and_leave_torchs_random_state_alone():
    state = torch.get_rng_state()
    one, same, other = (make_model("tiny", seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"name must be 'tiny', .*got 'huge'"):
        make_model("huge", 0)


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "weightdyn\[hf\]"'):
        make_model("tiny", 0)


# --- training -----------------------------------------------------------------------------------------------


def test_training_is_the_plain_loop(whole):
    model = make_model("tiny", SMALL.seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": rest, "weight_decay": 0.0}],
        lr=SMALL.lr,
        betas=SMALL.betas,
        weight_decay=SMALL.weight_decay,
    )
    corpus, losses, drifts = Corpus.read(), [], []
    for update in range(1, SMALL.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = float(SMALL.recipe.lr_at(update))
        text = corpus.batch(SMALL.seed, update, SMALL.batch_size, SMALL.seq_len)
        loss = F.cross_entropy(model(text[:, :-1]).logits.reshape(-1, 256), text[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SMALL.clip)
        before = [p.detach().double() for p in model.parameters()]
        optimizer.step()
        losses.append(loss.item())
        drifts.append(0.0)
        for group in optimizer.param_groups:
            eta = group["lr"]
            for p in group["params"]:
                (w,) = (old for old, each in zip(before, model.parameters(), strict=True) if each is p)
                v_hat = optimizer.state[p]["exp_avg_sq"].double() / (1 - SMALL.betas[1] ** update)
                pull = (w * p.grad.double() / (v_hat.sqrt() + group["eps"])).sum().item()
                drifts[-1] -= 2 * eta * (1 - eta * group["weight_decay"]) * pull
    trained = load_file(whole / "checkpoints" / "step-000020.safetensors")
    assert trained.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-7)
    assert RunLog(whole).metrics()["loss"].dropna().tolist() == pytest.approx(losses, rel=1e-5)
    logged = RunLog(whole).forces(by="model")
    scale = logged["alignment"].abs().max()
    np.testing.assert_allclose(logged["drift"], drifts, atol=1e-3 * scale)


def test_the_run_records_every_update_and_the_recipe(whole):
    run = RunLog(whole)
    assert TrainConfig.from_info(run.info) == SMALL
    metrics = run.metrics().set_index("step")
    assert metrics.index.tolist() == list(range(SMALL.steps + 1))
    assert metrics["eval_loss"].dropna().index.tolist() == [0, 10, 20]
    assert metrics["eval_loss"][20] < metrics["eval_loss"][0]
    forces = run.forces()
    assert sorted(set(forces["step"])) == list(range(1, SMALL.steps + 1))
    expected = forces["step"].map(lambda step: float(SMALL.recipe.lr_at(step)))
    pd.testing.assert_series_equal(forces["lr"], expected, check_names=False)
    assert set(forces["weight_decay"][forces["component"].isin(["norm", "bias"])]) == {0.0}
    assert set(forces["weight_decay"][~forces["component"].isin(["norm", "bias"])]) == {SMALL.weight_decay}
    assert run.info["train"]["architecture"]["model_type"] == "gpt_neox"
    assert sorted(set(run.weibull()["step"])) == [0, 5, 10, 15, 20]


def test_checkpoints_come_at_powers_of_two_and_then_evenly(whole):
    steps = [int(path.stem.removeprefix("step-")) for path in sorted((whole / "checkpoints").iterdir())]
    assert steps == [0, 1, 2, 4, 7, 8, 14, 16, 20]
    first = load_file(whole / "checkpoints" / "step-000000.safetensors")
    assert all(
        torch.equal(first[name], tensor) for name, tensor in make_model("tiny", 0).state_dict().items()
    )


def test_the_same_seed_trains_the_same_run_and_another_seed_another(tmp_path, whole):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    train(SMALL, tmp_path / "same", progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_run(whole, tmp_path / "same")
    other = train(dataclasses.replace(SMALL, seed=1, steps=5), tmp_path / "other", progress=False)
    assert not set(other.metrics()["loss"].dropna()) & set(RunLog(whole).metrics()["loss"].dropna())


def test_everything_decays_and_nothing_is_clipped_on_request(tmp_path):
    config = dataclasses.replace(SMALL, model="tiny-llama", steps=2, warmup=1, decayed="all", clip=None)
    run = train(config, tmp_path, progress=False)
    assert set(run.forces()["weight_decay"]) == {SMALL.weight_decay}
    assert {"q", "k", "v", "gate"} <= set(run.forces()["component"])
    assert "grad_norm" not in run.metrics()


def test_where_nobody_watches_nothing_of_the_bar_is_printed_or_computed(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(trainer, "_alignment_share", lambda logger: pytest.fail("no bar needs it"))
    train(dataclasses.replace(SMALL, steps=3), tmp_path)  # under pytest stderr is no terminal
    assert capfd.readouterr().err == ""


def test_the_bar_shows_loss_and_alignment(tmp_path, capfd):
    train(dataclasses.replace(SMALL, steps=3), tmp_path, progress=True)
    assert "alignment" in capfd.readouterr().err


# --- interruption -------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
from weightdyn.train import trainer
torch.set_num_threads(1)
trainer.EVAL_SEQUENCES = 4
batch = trainer.Corpus.batch
def kill(self, seed, update, *shape):
    if update == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, seed, update, *shape)
trainer.Corpus.batch = kill
trainer.train(trainer.TrainConfig(**eval(sys.argv[3])), sys.argv[1], progress=False)
"""


def test_a_killed_run_continues_bit_for_bit(tmp_path, whole):
    arguments = [str(tmp_path), "13", repr(dataclasses.asdict(SMALL))]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert RunLog(tmp_path).metrics()["step"].max() == 8  # the last save: rows since then died in the buffer
    train(SMALL, tmp_path, resume="must", progress=False)
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("update", [1, 14])
def test_a_run_that_dies_between_its_rows_and_its_state_continues_bit_for_bit(
    tmp_path, whole, monkeypatch, update
):
    save = trainer.save_state

    def die(path, step, *rest):
        if step == update:
            raise KeyboardInterrupt
        save(path, step, *rest)

    monkeypatch.setattr(trainer, "save_state", die)
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, tmp_path, progress=False)
    monkeypatch.undo()
    assert RunLog(tmp_path).metrics()["step"].max() == update
    train(SMALL, tmp_path, progress=False)
    assert_same_run(whole, tmp_path)


def test_a_half_written_file_is_never_seen(tmp_path):
    path = tmp_path / "resume.pt"
    path.write_bytes(b"whole")

    def dies(temporary: Path) -> None:
        temporary.write_bytes(b"ha")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_file(path, dies)
    assert path.read_bytes() == b"whole"


def test_a_finished_run_is_returned_as_it_is(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    run = train(SMALL, whole, progress=False)
    assert run.metrics()["step"].max() == SMALL.steps
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}


def test_another_configuration_is_refused_by_the_names_of_its_fields(whole):
    with pytest.raises(
        ValueError, match=r"another configuration: lr \(was 0.001, is 0.002\), seed \(was 0, is 5\);"
    ):
        train(dataclasses.replace(SMALL, lr=0.002, seed=5), whole)


def test_another_text_is_refused(tmp_path, whole):
    (tmp_path / "book.txt").write_text("all work and no play " * 100)
    with pytest.raises(ValueError, match="corpus_sha256"):
        train(dataclasses.replace(SMALL, corpus=(str(tmp_path),)), whole)


def test_resume_says_what_it_wants(tmp_path, whole):
    with pytest.raises(ValueError, match="resume must be 'auto', 'must' or 'never', got True"):
        train(SMALL, tmp_path, resume=True)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="no run to continue"):
        train(SMALL, tmp_path, resume="must")
    with pytest.raises(FileExistsError, match="holds a run"):
        train(SMALL, whole, resume="never")


def test_a_run_of_another_kind_is_left_alone(tmp_path):
    writer = RunWriter(tmp_path)
    writer.append("metrics", {"step": 1, "loss": 1.0})
    writer.close()
    with pytest.raises(FileExistsError, match="did not write"):
        train(SMALL, tmp_path)
    with pytest.raises(ValueError, match="sections"):
        TrainConfig.from_info(RunLog(tmp_path).info)


def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"device must be 'auto' or .*got 'abacus'"):
        train(dataclasses.replace(SMALL, device="abacus"), tmp_path)


def test_the_demo_has_time_to_relax():
    assert DEMO.steps > 4 / (DEMO.lr * DEMO.weight_decay)


# --- the state that a run continues from --------------------------------------------------------------------


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """A run that died behind its save at update 8."""
    out, batch = tmp_path_factory.mktemp("runs") / "died", Corpus.batch

    def die(self, seed, update, *shape):
        if update == 10:
            raise KeyboardInterrupt
        return batch(self, seed, update, *shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Corpus, "batch", die)
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, out)
    return out


@pytest.fixture
def half(died, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(died, tmp_path / "half"))


def test_must_refuses_a_run_whose_state_is_gone_and_leaves_it(half):
    (half / "resume.pt").unlink()
    before = RunLog(half).metrics()
    with pytest.raises(FileNotFoundError, match=r"resume\.pt is gone.* of 9 updates .*resume='auto'"):
        train(SMALL, half, resume="must")
    pd.testing.assert_frame_equal(RunLog(half).metrics(), before)


def test_auto_says_that_it_begins_again_where_the_state_is_gone(half, whole):
    (half / "resume.pt").unlink()
    with pytest.warns(UserWarning, match=r"half/resume\.pt is gone.*begins again at update 0"):
        train(SMALL, half)
    assert_same_run(whole, half)


class Hostile:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def edited(change):
    def edit(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return edit


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def transposed_moments(state):
    moments = state["optimizer"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"].T


DAMAGE = {
    "cut": (cut, "cut short or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "cut short or damaged"),
    "text": (lambda path: path.write_text("<html>sign in</html>"), "cut short"),
    "code": (lambda path: torch.save({"step": Hostile()}, path), "more than tensors and numbers"),
    "a list": (lambda path: torch.save([1, 2], path), "it lacks step, model, optimizer, rng"),
    "no moments": (edited(lambda state: state.pop("optimizer")), "it lacks optimizer"),
    "a step of text": (edited(lambda state: state.update(step="8")), "it lacks step"),
    "a step behind the end": (
        edited(lambda state: state.update(step=99)),
        "of update 99, and the run has 20",
    ),
    "a step below zero": (edited(lambda state: state.update(step=-1)), "of update -1"),
    "no weights": (edited(lambda state: state.update(model={})), "another model or optimizer.*Missing key"),
    "other shapes": (
        edited(lambda state: state["model"].update({"gpt_neox.embed_in.weight": torch.zeros(2, 2)})),
        "another model or optimizer.*size mismatch",
    ),
    "other moments": (edited(transposed_moments), r"its exp_avg has the shape \(128, 256\)"),
    "no groups": (edited(lambda state: state["optimizer"].pop("param_groups")), "another model or optimizer"),
    "odd random numbers": (edited(lambda state: state.update(rng={"cpu": torch.zeros(3)})), "another model"),
    "fifo": (fifo, "no regular file"),
}


@pytest.mark.skipif(os.name != "posix", reason="makes a FIFO")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_named_with_what_to_do_and_runs_no_code(half, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, reason = DAMAGE[damage]
    spoil(half / "resume.pt")
    with pytest.raises(
        RunLogError, match=rf"(?s)half/resume\.pt cannot be continued from: .*{reason}.*backup"
    ):
        train(SMALL, half)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("corpus", None),
        ("corpus", (3,)),
        ("betas", None),
        ("device", None),
        ("lr", None),
        ("lr", float("inf")),
    ],
)
def test_a_value_of_another_kind_is_named_at_the_door(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be .*, got "):
        TrainConfig(**{name: value})


def test_wrong_arguments_of_the_trainer_are_named(tmp_path):
    with pytest.raises(TypeError, match="config must be a TrainConfig, got None"):
        train(None, tmp_path)  # type: ignore[arg-type]
    for out in ("", None):
        with pytest.raises((TypeError, ValueError), match="out must be the path of a run directory"):
            train(SMALL, out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="update must be a whole number >= 0"):
        Corpus.read().batch(0, -1, 2, 8)
    with pytest.raises(TypeError, match="info must be the info of a run"):
        TrainConfig.from_info([])  # type: ignore[arg-type]


def test_the_command_warms_up_no_longer_than_it_trains(tmp_path):
    (tmp_path / "book.txt").write_text("all work and no play " * 100)
    options = ["--steps", "2", "--batch-size", "1", "--seq-len", "8", "--corpus", str(tmp_path / "book.txt")]
    result = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), *options])
    assert result.exit_code == 0, result.output
    assert RunLog(tmp_path / "run").metrics()["lr"].dropna().tolist() == [0.0005, 0.001]
