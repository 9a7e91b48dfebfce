"""The commands as a user runs them: what they print, what they leave behind, and how they refuse."""

import re
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from weightdyn.cli import app
from weightdyn.explain.summary import summarize
from weightdyn.record.runlog import RunLog, RunWriter
from weightdyn.train import trainer as selftrain
from weightdyn.train.trainer import DEMO, TrainConfig

FIGURES = ["force_budget.png", "force_shares.png", "loss.png", "overview.png", "weibull_trajectory.png"]
PNG = b"\x89PNG\r\n"


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", autouse=True)
def _small_and_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of small tensors, more threads only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftrain, "EVAL_SEQUENCES", 4)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of 30 updates, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    result = call("demo", "--out", out, "--steps", 30, "--batch-size", 2, "--seq-len", 16)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_the_demo_leaves_a_run_and_its_figures(demo):
    out, printed = demo
    for name in FIGURES:
        assert (out / "figures" / name).read_bytes().startswith(PNG)
        assert str(out / "figures" / name) in printed
    config = TrainConfig.from_info(RunLog(out).info)
    assert (config.steps, config.lr, config.weight_decay) == (30, DEMO.lr, DEMO.weight_decay)


def test_the_demo_prints_a_row_for_each_role_and_a_closure_of_rounding_only(demo):
    _, printed = demo
    for role in ("selection", "transmission", "value"):
        assert re.search(rf"^ *{role} +\d+%", printed, re.MULTILINE)
    pooled = re.search(r"pooled closure.*: (\S+)", printed)
    assert pooled is not None
    assert float(pooled[1]) < 1e-4


def test_a_second_demo_draws_without_training_again(demo):
    out, printed = demo
    before = (out / "resume.pt").stat().st_mtime_ns
    again = call("demo", "--out", out, "--steps", 30, "--batch-size", 2, "--seq-len", 16)
    assert again.exit_code == 0
    assert set(again.output.splitlines()) <= set(printed.splitlines())
    assert (out / "resume.pt").stat().st_mtime_ns == before


def test_shares_are_those_of_the_summed_forces(demo):
    out, _ = demo
    table = summarize(RunLog(out)).set_index("role")
    forces = RunLog(out).forces()
    for role in ("selection", "transmission", "value"):
        sums = np.zeros(3)
        for row in forces.itertuples():
            if row.role == role and 27 <= row.step <= 30:
                sums += (row.alignment, row.injection, row.decay)
        assert table.loc[role, "end_share"] == pytest.approx(abs(sums[0]) / np.abs(sums).sum(), rel=1e-9)
        assert 0 < table.loc[role, "closure"] < 1e-3
    assert table["peak_step"].between(0, 30).all()


def test_train_takes_every_field_of_the_configuration(tmp_path):
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    given = {
        "model": "tiny-llama",
        "steps": 2,
        "batch_size": 1,
        "seq_len": 8,
        "lr": 0.002,
        "schedule": "constant",
        "warmup": 1,
        "floor": 0.2,
        "eps": 1e-7,
        "weight_decay": 0.3,
        "decayed": "all",
        "seed": 3,
        "device": "cpu",
        "log_every": 2,
        "weibull_every": 2,
        "eval_every": 2,
        "save_every": 2,
    }
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    more = ["--betas", 0.8, 0.9, "--clip", 0, "--corpus", tmp_path / "book.txt"]
    result = call("train", "--out", tmp_path / "run", *options, *more)
    assert result.exit_code == 0, result.output
    config = TrainConfig.from_info(RunLog(tmp_path / "run").info)
    expected = TrainConfig(**given, betas=(0.8, 0.9), clip=None, corpus=(str(tmp_path / "book.txt"),))
    assert config == expected
    assert all(getattr(expected, name) != getattr(TrainConfig(), name) for name in given)


def test_the_options_defaults_are_the_configurations():
    listed = call("train", "--help").output
    for name in ("steps", "lr", "weight-decay", "warmup"):
        default = re.search(rf"--{name} .*?\[default:\s+([^\]]+)\]", listed, re.DOTALL)
        assert default is not None
        assert float(default[1]) == getattr(TrainConfig(), name.replace("-", "_"))


def test_plot_draws_what_a_run_has(tmp_path):
    writer = RunWriter(tmp_path / "run")
    steps = np.arange(1, 9)
    forces = {
        "lr": 0.1,
        "weight_decay": 0.1,
        "dot_wu": -1.0,
        "u_sq": 1.0,
        "norm_sq": 4.0,
        "norm_sq_after": 4.1,
    }
    writer.append("forces", {"step": steps, "tensor": ["w"] * 8, **forces})
    writer.close()
    result = call("plot", tmp_path / "run", "--by", "model", "--out", tmp_path / "figures")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == FIGURES[:2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--out", "OUT", "--model", "huge"], "model must be one of"),
        (["train", "--out", "OUT", "--corpus", "nowhere.txt"], "no file or folder nowhere.txt"),
        (["train", "--out", "OUT", "--steps", "many"], "--steps"),
        (["train"], "--out"),
        (["demo", "--out", "OUT", "--steps", "-1"], "steps must be a whole number >= 1, got -1"),
        (["plot", "nowhere"], "nowhere"),
        (["plot", "DEMO", "--by", "colour"], "colour"),
        (["demo", "--out", "DEMO", "--seed", "9"], "another configuration"),
        (["dance"], "dance"),
    ],
)
def test_a_wrong_argument_ends_in_exit_code_2_and_one_message(tmp_path, demo, arguments, says):
    places = {"OUT": tmp_path / "run", "DEMO": demo[0]}
    result = call(*(places.get(word, word) for word in arguments))
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output


def test_without_transformers_the_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = call("demo", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert 'pip install "weightdyn[hf]"' in result.output
    assert not (tmp_path / "run").exists()


def test_a_bug_is_not_disguised_as_a_wrong_argument(tmp_path, monkeypatch):
    def broken(*_: object):
        raise KeyError("a bug")

    monkeypatch.setattr("weightdyn.cli.train", broken)
    result = call("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, KeyError)
