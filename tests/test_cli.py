"""The commands as a user runs them: what they print, what they leave behind, and how they refuse."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import weightdyn as wd
from weightdyn import cli
from weightdyn.cli import app
from weightdyn.explain.summary import summarize
from weightdyn.record.runlog import RunLog, RunWriter
from weightdyn.train import trainer
from weightdyn.train.trainer import DEMO, TrainConfig

FIGURES = ["drift_budget.png", "drift_shares.png", "force_budget.png", "force_shares.png", "loss.png"]
FIGURES += ["overview.png", "weibull_trajectory.png"]
PNG = b"\x89PNG\r\n"


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", autouse=True)
def _small_and_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of small tensors, more threads only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "EVAL_SEQUENCES", 4)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of 30 updates, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    result = call("demo", "--out", out, "--steps", 30, "--batch-size", 2, "--seq-len", 16)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_the_demo_leaves_a_run_and_its_figures(demo):
    out, printed = demo
    for name in FIGURES:
        assert (out / "figures" / name).read_bytes().startswith(PNG)
        assert str(out / "figures" / name) in printed
    config = TrainConfig.from_info(RunLog(out).info)
    assert (config.steps, config.lr, config.weight_decay) == (30, DEMO.lr, DEMO.weight_decay)


def test_the_demo_prints_the_course_of_each_role_and_a_closure_of_rounding_only(demo):
    _, printed = demo
    for role in ("selection", "transmission", "value"):
        assert re.search(
            rf"^ *{role} +0\.\d+ +0\.\d+ .*(drift|diffusion|decay|unknown) ", printed, re.MULTILINE
        )
    pooled = re.search(r"pooled closure.*: (\S+)", printed)
    assert pooled is not None
    assert float(pooled[1]) < 1e-4


def test_the_demo_prints_the_signed_shares_of_drift_diffusion_and_decay(demo):
    out, printed = demo
    forces = RunLog(out).forces()
    last = forces[(forces["step"] >= 27) & (forces["role"] == "transmission")]
    sums = np.array([last["drift"].sum(), (last["injection"] + last["memory"]).sum(), last["decay"].sum()])
    words = re.findall(r"^ *transmission(?: +(?:[+-]\d+%|–)){3}((?: +[+-]\d+%){3})$", printed, re.MULTILINE)
    shown = [float(word.rstrip("%")) for word in words[0].split()]
    np.testing.assert_allclose(shown, 100 * sums / np.abs(sums).sum(), atol=0.51)
    kappa = re.search(r"^ *transmission +0\.\d.* (\d\.\d\d) +\S+$", printed, re.MULTILINE)
    own = forces[forces["role"] == "transmission"]
    known = own.dropna(subset=["memory", "memory_null"])
    assert float(kappa[1]) == pytest.approx(known["memory"].sum() / known["memory_null"].sum(), abs=0.0051)


def test_a_second_demo_draws_without_training_again(demo):
    out, printed = demo
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    for name in FIGURES:
        (out / "figures" / name).unlink()
    again = call("demo", "--out", out, "--steps", 30, "--batch-size", 2, "--seq-len", 16)
    assert again.exit_code == 0
    assert again.stdout == printed
    for name in FIGURES:
        assert (out / "figures" / name).read_bytes().startswith(PNG)
    assert {path: path.stat().st_mtime_ns for path in written if path.suffix != ".png"} == {
        path: time for path, time in written.items() if path.suffix != ".png"
    }


def test_nothing_but_the_report_is_printed_where_nobody_watches(tmp_path, demo):
    _, printed = demo
    small = ("--steps", 2, "--warmup", 1, "--batch-size", 1, "--seq-len", 8)
    commands = [
        ("train", "--out", tmp_path / "run", "--model", "tiny", *small),
        ("fit", tmp_path / "run"),
        ("measure", tmp_path / "run"),
        ("recover", tmp_path / "run"),
        ("plot", tmp_path / "run"),
        (
            "wisca",
            "compare",
            "--out",
            tmp_path / "pairs",
            "--seeds",
            1,
            "--arm",
            "none",
            "--arm",
            "init",
            *small,
        ),
    ]
    for command in commands:
        result = call(*command)
        assert result.exit_code == 0, result.output
        assert "\r" not in result.output
        assert result.stderr == "", command
    assert len(printed.splitlines()) < 40


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


@pytest.mark.parametrize(("command", "expected"), [("train", TrainConfig()), ("demo", DEMO)])
def test_a_command_without_options_trains_the_configuration_that_the_library_has(
    tmp_path, monkeypatch, command, expected
):
    class Trained(Exception):
        pass

    asked = []

    def train(config, out):
        asked.append((config, out))
        raise Trained

    monkeypatch.setattr("weightdyn.cli.train", train)
    assert isinstance(call(command, "--out", tmp_path / "run").exception, Trained)
    assert asked == [(expected, tmp_path / "run")]


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
    # Nobody measured the drift.
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "force_budget.png",
        "force_shares.png",
    ]


def test_plot_draws_no_drift_of_sums_that_miss_some_of_it(demo, tmp_path):
    forces = RunLog(demo[0]).forces()
    torn = forces.assign(drift=forces["drift"].where(forces["component"] != "norm"))
    run = SimpleNamespace(
        path=demo[0],
        info={},
        forces=lambda: torn,
        weibull=RunLog(demo[0]).weibull,
        metrics=RunLog(demo[0]).metrics,
    )
    cli._draw(run, tmp_path / "model", "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {*FIGURES} - {*FIGURES[:2]}
    cli._draw(run, tmp_path / "role", "role")
    assert {path.name for path in (tmp_path / "role").iterdir()} == {*FIGURES}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A run of four tensors in two layers: a panel for each is drawn quickly."""
    out = tmp_path_factory.mktemp("runs") / "few"
    model = torch.nn.ModuleDict()
    for layer in range(2):
        model[f"layers_{layer}"] = torch.nn.ModuleDict(
            {name: torch.nn.Linear(8, 8, bias=False) for name in ("q_proj", "up_proj")}
        )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    rules = {r"layers_\d\.q_proj": "q", r"layers_\d\.up_proj": "up"}
    with wd.ForceLogger(optimizer, model, out=out, weibull_every=2, rules=rules) as logger:
        for _ in range(12):
            loss = sum(p.pow(2).sum() + p.sum() for p in model.parameters())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            logger.record(loss=loss.detach())
    return out


@pytest.mark.parametrize("by", ["tensor", "layer,role", "component", "model"])
def test_plot_groups_as_tables_do(few, tmp_path, monkeypatch, by):
    from weightdyn import plot

    drawn = []
    budget = plot.force_budget
    monkeypatch.setattr(plot, "force_budget", lambda *a, **k: drawn.append(k["by"]) or budget(*a, **k))
    monkeypatch.setattr(plot.runs, "NAMED_LINES", 99)
    result = call("plot", few, "--by", by, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    expected = {"tensor": None, "layer,role": ["layer", "role"]}.get(by, by)
    assert drawn == [expected] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == FIGURES


COMMANDS = [["train"], ["demo"], ["plot"], ["fit"], ["diagnose"], ["measure"], ["recover"], ["audit"], ["wisca"],
            ["wisca", "rescale"], ["wisca", "compare"]]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert " ".join(["Usage:", "root", *command]) in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--out", "OUT", "--model", "huge"], "model must be 'tiny', 'tiny-llama'"),
        (["train", "--out", "OUT", "--corpus", "nowhere.txt"], "no file or folder nowhere.txt"),
        (["train", "--out", "OUT", "--steps", "many"], "--steps"),
        (["train", "--out", "FILE"], "is a file; name a folder"),
        (["demo", "--out", "FILE"], "is a file; name a folder"),
        (["train"], "--out"),
        (["demo", "--out", "OUT", "--steps", "-1"], "steps must be a whole number >= 1, got -1"),
        (["demo", "--out", "DEMO", "--seed", "9"], "another configuration"),
        (["plot", "nowhere"], "nowhere"),
        (
            ["plot", "DEMO", "--out", "OUT", "--by", "colour"],
            "--by must be tensor, or some of layer, component",
        ),
        (
            ["plot", "DEMO", "--out", "OUT", "--by", "layer,"],
            "--by must be tensor, or some of layer, component",
        ),
        (["plot", "DEMO", "--out", "OUT", "--by", "tensor"], "by=None makes"),
        (["plot", "DEMO", "--out", "FILE"], "is a file; name a folder"),
        (["plot", "DEMO", "--out", "FILE/deeper"], "is a file; name a folder"),
        (["fit", "DEMO", "--by", "colour"], "--by must be"),
        (["fit", "DEMO", "--views", "heads"], "--views must be one of true, false, head, got 'heads'"),
        (["diagnose", "DEMO", "--views", "1"], "--views must be one of"),
        (
            ["measure", "DEMO", "--steps", "1,x"],
            "--steps must be whole numbers such as 0,1000,2000, got '1,x'",
        ),
        (["measure", "DEMO", "--steps", "99"], "99"),
        (["measure", "DEMO", "--gram", "all"], "gram must be 'none', 'band' or 'full', got 'all'"),
        (["measure", "DEMO", "--views", "no"], "--views must be one of"),
        (["measure", "DEMO", "--out", "table.csv"], "--out must end in .parquet, got table.csv"),
        (["measure", "nowhere"], "nowhere"),
        (["recover", "DEMO", "--method", "guess"], "--method must be one of"),
        (["recover", "DEMO", "--steps", ""], "--steps must be whole numbers"),
        (["recover", "DEMO", "--every", "0"], "--every"),
        (["recover", "DEMO", "--recipe", "pythia-7m"], "pythia-7m"),
        (["recover", "DEMO", "--out", "nowhere/table.parquet"], "the folder nowhere does not exist"),
        (["recover", "DEMO", "--figure", "figure.txt"], "--figure must end in .png or .pdf or .svg"),
        (["recover", "FOLDER"], "--recipe is needed"),
        (["wisca", "rescale", "nowhere", "--out", "OUT"], "nowhere"),
        (["wisca", "compare", "--out", "OUT", "--by", "colour"], "--by must be"),
        (
            ["wisca", "compare", "--out", "OUT", "--by", "tensor"],
            "--by tensor would be a figure for each tensor",
        ),
        (["wisca", "compare", "--out", "OUT", "--arm", "sideways"], "sideways"),
        (["wisca", "compare", "--out", "OUT", "--seeds", "0"], "--seeds"),
        (["wisca", "compare", "--out", "OUT", "--device", "abacus"], "abacus"),
        (["wisca", "compare", "--out", "FILE"], "is a file; name a folder"),
        (["dance"], "dance"),
    ],
)
def test_a_wrong_argument_ends_in_exit_code_2_and_one_line_before_anything_is_written(
    tmp_path, demo, monkeypatch, arguments, says
):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (tmp_path / "FILE").write_text("a file")
    (tmp_path / "FOLDER").mkdir()
    places = {
        "OUT": tmp_path / "run",
        "DEMO": demo[0],
        "FILE": tmp_path / "FILE",
        "FOLDER": tmp_path / "FOLDER",
    }
    places["FILE/deeper"] = tmp_path / "FILE" / "deeper"
    before = sorted(demo[0].rglob("*"))
    result = call(*(places.get(word, word) for word in arguments))
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output
    told = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1
    if "Usage:" not in result.output:
        assert result.output.splitlines() == told
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["FILE", "FOLDER", "here"]
    assert sorted(demo[0].rglob("*")) == before


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


def test_a_wrong_type_is_told_as_a_wrong_value_is(tmp_path, monkeypatch):
    def picky(*_: object):
        raise TypeError("config must be a mapping,\ngot list")

    monkeypatch.setattr("weightdyn.cli.train", picky)
    result = call("train", "--out", tmp_path)
    assert result.exit_code == 2
    assert result.output == "Error: config must be a mapping, got list\n"
