"""Paired runs: arms that must agree do, seeds are paired, and a killed comparison goes on where it was."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import wisca_models
from scipy import stats
from typer.testing import CliRunner

from weightdyn import plot, wisca
from weightdyn.cli import app
from weightdyn.core.tables import SHIFT_TABLE
from weightdyn.files.parquet import write_parquet
from weightdyn.record.runlog import RunLogError
from weightdyn.wisca import Comparison, compare

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 1}


def make_model(seed, family="llama", **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    if family != "llama":
        return wisca_models.make(family)
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 32, "num_hidden_layers": 1, **SMALL, **config}))


def make_optimizer(model, **options):
    decays = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **{"lr": 3e-3, "betas": (0.9, 0.95), **options})


def batches(seed, update):
    generator = torch.Generator().manual_seed(100_000 * seed + update)
    first = torch.randint(0, 32, (4, 1), generator=generator)
    return (first + 3 * torch.arange(10)) % 32


def run(arms, seeds=(0,), steps=6, **options):
    options = {"make_model": make_model, "make_optimizer": make_optimizer, "batches": batches} | options
    return compare(arms=arms, seeds=seeds, steps=steps, progress=False, **options)


def losses(found, arm):
    table = found.metrics()
    return table[table["arm"] == arm].pivot_table(index="step", columns="seed", values="loss").to_numpy()


def gap(found, first, second):
    return np.abs(losses(found, first) - losses(found, second)).max()


def test_a_learning_rate_per_tensor_reproduces_the_losses_of_a_rescaling():
    found = run(["none", "init", "lr_equivalent"], (0, 1), 200, log_every=100, weibull_every=200)
    assert gap(found, "lr_equivalent", "init") < 1e-4
    assert gap(found, "none", "init") > 5e-3


def test_of_powers_of_two_they_are_the_same_to_the_last_bit():
    found = run(["init power_of_two", "lr_equivalent power_of_two"], steps=50, weibull_every=50)
    assert set(found.rescales()["alpha"]) == {0.5}
    assert gap(found, "lr_equivalent power_of_two", "init power_of_two") == 0


def test_with_clipping_it_does_so_only_if_clipped_by_the_norm_of_the_rescaled_gradients():
    arms = ["init", "lr_equivalent", "lr_equivalent clip=rescaled"]
    found = run(arms, (0,), 200, clip=0.5, log_every=100, weibull_every=200)
    assert gap(found, "lr_equivalent", "init") > 1e-3
    assert gap(found, "lr_equivalent clip=rescaled", "init") < 1e-4
    norms = found.metrics().pivot_table(index="step", columns="arm", values="grad_norm")
    first = norms.loc[1]
    assert first["lr_equivalent"] != pytest.approx(first["init"], rel=1e-3)
    assert first["lr_equivalent clip=rescaled"] == pytest.approx(first["init"], rel=1e-5)


def test_epsilon_is_rescaled_too():
    def coarse(model):
        return make_optimizer(model, eps=1e-3)

    found = run(["init", "lr_equivalent", "none"], steps=100, make_optimizer=coarse, log_every=50)
    assert gap(found, "lr_equivalent", "init") < 1e-4 < gap(found, "none", "init")


def test_the_forces_of_lr_equivalent_are_those_of_init_in_units_of_its_own_weights():
    found = run(["init", "lr_equivalent"], steps=3)
    forces = found.forces().set_index(["arm", "step", "tensor"])
    alpha = found.rescales().query("arm == 'init' and pair == 'qk'")["alpha"].item()
    name = "model.layers.0.self_attn.q_proj.weight"
    ours, theirs = (forces.xs((arm, name), level=("arm", "tensor")) for arm in ("init", "lr_equivalent"))
    for force in ("alignment", "injection", "decay", "norm_sq"):
        np.testing.assert_allclose(ours[force], alpha**2 * theirs[force], rtol=1e-3)
    np.testing.assert_allclose(theirs["lr"] * theirs["weight_decay"], ours["lr"] * ours["weight_decay"])


def test_paired_runs_begin_with_the_same_weights_and_see_the_same_batches():
    seen = {}

    def spied(seed, update):
        batch = batches(seed, update)
        seen.setdefault((seed, update), []).append(batch)
        return batch

    found = run(["none", "every=4", "lr_equivalent"], (0, 1), batches=spied)
    assert all(torch.equal(each, group[0]) for group in seen.values() for each in group)
    assert set(seen) == {(seed, update) for seed in (0, 1) for update in range(1, 7)}
    first = found.metrics().query("step == 1").groupby("seed")["loss"]
    assert (first.min() == first.max()).all()
    assert found.runs["none", 0].start == found.runs["lr_equivalent", 0].start != found.runs["none", 1].start


def test_a_model_that_is_no_function_of_the_seed_is_refused():
    generator = torch.Generator().manual_seed(0)

    def restless(seed):
        model = make_model(seed)
        with torch.no_grad():
            model.lm_head.weight.add_(torch.rand(1, generator=generator))
        return model

    with pytest.raises(ValueError, match=r"functions of the seed: with seed 0 the arms 'none' and 'init'"):
        run(["none", "init"], steps=1, make_model=restless)


def test_every_n_rescales_behind_every_nth_update_and_says_so_in_the_log():
    found = run(["every=2 moments=reset", "init every=4", "none"], steps=5)
    rescales = found.rescales()
    steps = {arm: sorted(set(rows["step"])) for arm, rows in rescales.groupby("arm")}
    assert steps == {"every=2 moments=reset": [2, 4], "init every=4": [0, 4]}
    assert set(rescales["moments"]) == {"reset", "transport"}
    events = found.metrics().dropna(subset=["event"]).groupby("arm")["step"].agg(list)
    assert events.to_dict() == {"every=2 moments=reset": [2, 4], "init every=4": [0, 4]}


def test_random_scales_by_the_same_sizes_in_other_directions():
    seeds = tuple(range(6))
    rescales = run(["init", "random"], seeds, steps=1).rescales()
    init, random = (rescales.query(f"arm == '{arm}'")["alpha"].to_numpy() for arm in ("init", "random"))
    same, inverse = np.isclose(random, init), np.isclose(random, 1 / init)
    assert (same | inverse).all()
    assert same.any()
    assert inverse.any()


def test_an_arm_has_its_own_options():
    common = {"granularity": "tensor", "pairs": ("qk",)}
    found = run(["init", "norm=l2", "init power_of_two", "granularity=channel"], steps=1, **common)
    alpha = found.rescales().groupby("arm")["alpha"]
    assert alpha.first()["init"] == pytest.approx(0.5, rel=0.1)  # 1/√4 heads a group
    assert alpha.first()["norm=l2"] == pytest.approx(0.5**0.5, rel=0.1)
    assert alpha.first()["init power_of_two"] == 0.5
    assert alpha.size().to_dict() == {
        "granularity=channel": 2, "init": 1, "init power_of_two": 1, "norm=l2": 1,
    }  # fmt: skip


def test_shift_is_the_paired_difference_with_students_interval():
    found = run(["none", "init"], (0, 1, 2), weibull_every=3)
    shift = found.shift("init", by="component", confidence=0.9)
    forces, fits, metrics = found.forces(), found.weibull(), found.metrics()

    def seeds_of(table, column):
        wide = table.pivot_table(index="seed", columns="arm", values=column)
        return wide["init"].to_numpy(), wide["none"].to_numpy()

    q = forces.query("component == 'q' and step == 4").copy()
    total = q[["alignment", "injection", "decay"]].abs().sum(axis=1)
    q["decay_share"] = q["decay"].abs() / total
    expected = {
        "decay_share": seeds_of(q, "decay_share"),
        "alignment": seeds_of(q, "alignment"),
        "norm_sq": seeds_of(q, "norm_sq"),
        "lam": seeds_of(fits.query("component == 'q' and step == 3"), "lam"),
        "k": seeds_of(fits.query("component == 'q' and step == 3"), "k"),
        "loss": seeds_of(metrics.query("step == 4"), "loss"),
    }
    for quantity, (ours, theirs) in expected.items():
        step = 3 if quantity in ("lam", "k") else 4
        rows = shift.query(f"quantity == '{quantity}' and step == {step}")
        row = rows[rows["component"].isna() if quantity == "loss" else rows["component"] == "q"].squeeze()
        interval = stats.ttest_rel(ours, theirs).confidence_interval(0.9)
        assert row["difference"] == pytest.approx((ours - theirs).mean(), rel=1e-9, abs=1e-12)
        assert (row["low"], row["high"]) == pytest.approx(tuple(interval), rel=1e-6, abs=1e-12)
        assert (row["value"], row["control"]) == pytest.approx((ours.mean(), theirs.mean()))
        assert row["seeds"] == 3


def test_a_window_sums_the_forces_and_averages_the_rest():
    found = run(["none", "init"], (0,), steps=5, weibull_every=1)
    shift = found.shift("init", window=4)
    assert sorted(shift["step"].unique()) == [0, 4, 8]
    table = found.forces(by="model").query("arm == 'init' and step <= 4")
    sums = table[["alignment", "injection", "decay"]].sum().abs()
    row = shift.query("quantity == 'alignment_share' and step == 4").squeeze()
    assert row["value"] == pytest.approx(sums["alignment"] / sums.sum())
    row = shift.query("quantity == 'loss' and step == 4").squeeze()
    assert row["control"] == pytest.approx(losses(found, "none")[:4].mean())
    assert np.isnan(row["low"])  # of one seed


def test_drift_and_diffusion_are_compared_beside_the_forces():
    found = run(["none", "init"], (0, 1), steps=4)
    shift = found.shift("init", by="component", window=4)
    forces = found.forces().query("component == 'q'")
    expected = {}
    for arm in ("none", "init"):
        for seed in (0, 1):
            rows = forces[(forces["arm"] == arm) & (forces["seed"] == seed)]
            drift, memory, injection, decay, null = (
                rows[name].sum() for name in ("drift", "memory", "injection", "decay", "memory_null")
            )
            total = abs(drift) + abs(injection + memory) + abs(decay)
            expected[arm, seed] = {
                "drift_share": abs(drift) / total,
                "diffusion_share": abs(injection + memory) / total,
                "drift": drift / 4,
                "memory": memory / 4,
                "diffusion": (injection + memory) / 4,
                "kappa": memory / null,
            }
    for name in expected["none", 0]:
        row = shift.query(f"quantity == '{name}' and component == 'q'").squeeze()
        ours, theirs = (np.mean([expected[arm, seed][name] for seed in (0, 1)]) for arm in ("init", "none"))
        assert (row["value"], row["control"]) == pytest.approx((ours, theirs), rel=1e-9), name
        assert row["difference"] == pytest.approx(ours - theirs, abs=1e-12)
    single = found.shift("init", by="component")
    assert not single.query("step == 1")["quantity"].eq("kappa").any()  # no update before it to remember


def test_an_arm_that_is_trained_again_shifts_nothing_and_another_one_does():
    first, again = (run(["none", "init"], (0, 1), steps=3) for _ in range(2))
    runs = {**first.runs, **{("again", seed): again.runs["init", seed] for seed in (0, 1)}}
    found = Comparison(runs, first.info)
    same = found.shift("again", "init", by="layer")
    assert len(same)
    assert (same["difference"] == 0).all()
    there, back = found.shift("init", "none", by="role"), found.shift("none", "init", by="role")
    moved = there["quantity"].eq("norm_sq") & there["role"].eq("selection")
    assert (there["difference"][moved] != 0).all()
    np.testing.assert_array_equal(there["difference"], -back["difference"])


def test_by_none_compares_tensor_by_tensor_and_a_layer_has_its_stack():
    found = run(["none", "init"], (0, 1), steps=2)
    shift = found.shift("init", by=None)
    forces = found.forces().query("step == 2").set_index(["arm", "seed", "tensor"])["norm_sq"]
    name = "model.layers.0.self_attn.k_proj.weight"
    row = shift.query(f"step == 2 and quantity == 'norm_sq' and tensor == '{name}'").squeeze()
    ours, theirs = ([forces[arm, seed, name] for seed in (0, 1)] for arm in ("init", "none"))
    assert row["difference"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert list(shift) == list(SHIFT_TABLE)
    layers = found.shift("init", by="layer")
    assert list(layers) == [name for name in SHIFT_TABLE if name not in ("tensor", "component", "role")]
    assert set(layers["stack"].dropna()) == {"", "model"}


def test_a_folder_reads_back_as_it_was_and_is_not_run_again(tmp_path):
    calls = []

    def counted(seed, update):
        calls.append(update)
        return batches(seed, update)

    options = {"steps": 5, "out": tmp_path / "runs", "batches": counted, "weibull_every": 2}
    made = run(["none", "init every=2"], (0, 1), **options)
    read = Comparison.read(tmp_path / "runs")
    assert read.arms == made.arms
    assert read.seeds == made.seeds
    pd.testing.assert_frame_equal(read.shift("init every=2"), made.shift("init every=2"))
    memory = run(["none", "init every=2"], (0, 1), steps=5, weibull_every=2)
    pd.testing.assert_frame_equal(read.forces(), memory.forces(), check_categorical=False)
    pd.testing.assert_frame_equal(read.rescales(), memory.rescales(), check_dtype=False)
    before = len(calls)
    grown = run(["random"], (0, 2), **options)
    assert len(calls) - before == 2 * 6  # two runs of five updates; each looks at its first batch once more
    assert grown.arms == ["random"]
    assert Comparison.read(tmp_path / "runs").arms == ["none", "init every=2", "random"]
    with pytest.raises(ValueError, match=r"other settings: steps \(was 5, is 6\)"):
        run(["none"], **(options | {"steps": 6}))
    with pytest.raises(FileNotFoundError, match="give the folder passed to compare"):
        Comparison.read(tmp_path)


_KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_comparison as t

def deadly(seed, update):
    if (seed, update) == (1, 8):
        os.kill(os.getpid(), signal.SIGKILL)
    return t.batches(seed, update)

t.run(["init every=3 moments=keep"], (0, 1), 10, batches=deadly, out=sys.argv[1], save_every=4)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
@pytest.mark.slow
def test_a_killed_comparison_goes_on_from_its_last_save_and_ends_bit_for_bit_the_same(tmp_path):
    out = tmp_path / "runs"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = _KILLED.format(tests=os.path.dirname(__file__))
    died = subprocess.run(
        [sys.executable, "-c", script, str(out)], env={**os.environ, **threads}, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert [seed for _, seed in Comparison.read(out).runs] == [0]
    done = []

    def counted(seed, update):
        done.append((seed, update))
        return batches(seed, update)

    arm = "init every=3 moments=keep"
    found = run([arm], (0, 1), 10, batches=counted, out=out, save_every=4)
    assert set(done) == {(1, update) for update in (1, *range(5, 11))}
    whole = run([arm], (0, 1), 10)
    np.testing.assert_array_equal(losses(found, arm), losses(whole, arm))
    for column in ("alignment", "norm_sq"):
        np.testing.assert_array_equal(found.forces()[column], whole.forces()[column])
    pd.testing.assert_frame_equal(found.rescales(), whole.rescales(), check_dtype=False)
    assert not list(out.rglob("state.pt"))


@pytest.mark.slow
def test_runs_side_by_side_are_those_one_after_another():
    serial = run(["none", "random"], steps=3)
    parallel = run(["none", "random"], steps=3, n_jobs=2)
    np.testing.assert_allclose(losses(parallel, "random"), losses(serial, "random"), rtol=1e-5)
    assert list(parallel.runs) == list(serial.runs)


def test_schedule_and_evaluation_are_followed():
    found = run(
        ["none", "lr_equivalent"],
        steps=4,
        schedule=lambda update: update / 4,
        evaluate=lambda model: float(model(input_ids=batches(9, 9), labels=batches(9, 9)).loss),
        eval_every=3,
    )
    assert found.metrics().query("arm == 'none'").dropna(subset=["eval_loss"])["step"].tolist() == [0, 3, 4]
    lr = found.forces().query("arm == 'none'").groupby("step")["lr"].first()
    np.testing.assert_allclose(lr, 3e-3 * np.arange(1, 5) / 4)
    assert set(found.shift("lr_equivalent")["quantity"]) >= {"loss", "eval_loss", "lam", "decay_share"}


class Hostile:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A comparison of one run at its end."""
    out = tmp_path_factory.mktemp("runs") / "stored"
    run(["init"], steps=2, out=out)
    return out


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def index(**change):
    def edit(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return edit


INDEXES = {
    "cut": lambda path: path.write_text(path.read_text()[:30]),
    "html": lambda path: path.write_text("<html>sign in</html>"),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[1]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "no arms": index(arms=None),
    "arms of numbers": index(arms=[1]),
    "an arm that leads outside": index(arms=["../../elsewhere"]),
    "seeds of text": index(seeds=["0"]),
    "steps of text": index(steps="2"),
    "fifo": fifo,
}


@pytest.mark.skipif(os.name != "posix", reason="makes a FIFO")
@pytest.mark.parametrize("damage", INDEXES)
def test_a_damaged_index_of_a_comparison_is_named_with_what_to_do(stored, tmp_path, damage):
    out = tmp_path / "runs"
    shutil.copytree(stored, out)
    INDEXES[damage](out / "comparison.json")
    for call in (lambda: Comparison.read(out), lambda: run(["init"], steps=2, out=out)):
        with pytest.raises(RunLogError, match=r"(?s)comparison\.json cannot be read: .*call compare again"):
            call()
    (out / "comparison.json").unlink()  # the error's advice
    assert run(["init"], steps=2, out=out).arms == ["init"]


RESCALES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "text": lambda path: path.write_text("no parquet"),
    "without checksums": lambda path: pd.DataFrame({"step": [1]}).to_parquet(path),
    "other columns": lambda path: write_parquet(path, pa.table({"a": [1]})),
    "steps of text": lambda path: write_parquet(path, pa.table({"step": ["1"]})),
    "no alpha": lambda path: write_parquet(path, pa.table({"step": [1]})),
    "fifo": fifo,
}


@pytest.mark.skipif(os.name != "posix", reason="makes a FIFO")
@pytest.mark.parametrize("damage", RESCALES)
def test_a_damaged_table_of_rescalings_is_named_with_what_to_do(stored, tmp_path, damage):
    out = tmp_path / "runs"
    shutil.copytree(stored, out)
    RESCALES[damage](out / "init" / "seed-0" / "rescales.parquet")
    with pytest.raises(RunLogError, match=r"(?s)rescales\.parquet (is|has) .*or delete .*seed-0"):
        Comparison.read(out)


def test_a_flipped_byte_in_the_table_of_rescalings_is_seen(stored, tmp_path):
    out = tmp_path / "runs"
    shutil.copytree(stored, out)
    path = out / "init" / "seed-0" / "rescales.parquet"
    whole = pd.read_parquet(path)
    content = path.read_bytes()
    alpha = np.float64(whole["alpha"].iloc[0]).tobytes()
    at = content.index(alpha)  # in a page, plain or in its dictionary
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(RunLogError, match=r"rescales\.parquet is cut short or damaged"):
        Comparison.read(out)


def test_a_damaged_state_of_a_run_is_named_and_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def deadly(seed, update):
        if update == 4:
            raise KeyboardInterrupt
        return batches(seed, update)

    out = tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        run(["init"], steps=5, out=out, save_every=2, batches=deadly)
    place = out / "init" / "seed-0" / "state.pt"
    whole = place.read_bytes()
    for spoil, reason in [
        (lambda: place.write_bytes(whole[:500]), "cut short"),
        (lambda: torch.save({"step": Hostile()}, place), "more than tensors and numbers"),
        (lambda: torch.save({**torch.load(place, weights_only=True), "model": {}}, place), "another model"),
        (lambda: fifo(place), "no regular file"),
    ]:
        place.write_bytes(whole)
        spoil()
        with pytest.raises(RunLogError, match=rf"(?s)state\.pt cannot be continued from: .*{reason}"):
            run(["init"], steps=5, out=out)
        place.unlink()
    assert not (tmp_path / "executed").exists()
    np.testing.assert_array_equal(
        losses(run(["init"], steps=5, out=out), "init"), losses(run(["init"], steps=5), "init")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["sometimes"]}, "has the word 'sometimes'; an arm is made of the words none, init"),
        ({"arms": ["init random"]}, "is init and random at once"),
        ({"arms": ["random every=3"]}, "cannot be random and rescale on the way"),
        ({"arms": ["none norm=l2"]}, "rescales nothing"),
        ({"arms": ["init norm=l7"]}, "norm must be"),
        ({"arms": ["init clip=rescaled"]}, "is for lr_equivalent"),
        ({"arms": ["init", "init"]}, "each once"),
        ({"seeds": []}, "seeds must be one or more"),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"clip": 0}, "clip must be a number > 0"),
        ({"clip": float("nan")}, "clip must be a number > 0"),
        ({"seeds": [0.5]}, "seeds must be a whole number >= 0, got 0.5"),
        ({"seeds": [0, 0]}, "seeds must be one or more, each once"),
        ({"arms": "none"}, "arms must be several strings such as 'init', in a list"),
        ({"n_jobs": 0}, "n_jobs must be"),
        ({"out": ""}, "out must be the path of a folder"),
        ({"norm": "l7"}, "norm must be"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        run(**({"arms": ["none"]} | change))


@pytest.mark.parametrize(
    "name", ["make_model", "make_optimizer", "batches", "loss", "schedule", "evaluate", "seeds", "arms"]
)
def test_arguments_of_another_kind_are_named(name):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        run(**({"arms": ["none"]} | {name: 3}))


def test_what_the_functions_return_is_named():
    with pytest.raises(TypeError, match="make_model must return a Module, got int"):
        run(["none"], make_model=lambda seed: 3)
    with pytest.raises(TypeError, match="make_optimizer must return a Optimizer, got NoneType"):
        run(["none"], make_optimizer=lambda model: None)


def test_lr_equivalent_refuses_what_has_no_one_learning_rate():
    with pytest.raises(ValueError, match=r"query_key_value.* has more than one α"):
        run(["lr_equivalent"], make_model=lambda seed: make_model(seed, "gpt_neox"))

    def coupled(model):
        return torch.optim.Adam(model.parameters(), weight_decay=0.1)

    with pytest.raises(TypeError, match="AdamW, or Adam without decay, got Adam"):
        run(["lr_equivalent"], make_optimizer=coupled)


def test_shift_names_what_is_not_there():
    found = run(["none"], steps=1)
    with pytest.raises(ValueError, match="arm must be 'none', got 'init'"):
        found.shift("init")
    with pytest.raises(ValueError, match="confidence"):
        found.shift("none", confidence=1.0)
    with pytest.raises(ValueError, match="window must be a whole number"):
        found.shift("none", "none", window=0)
    assert "none: seeds [0]" in repr(found)
    assert wisca.compare is compare
    assert json.dumps(found.info)


@pytest.fixture(autouse=True)
def _figures_are_closed():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="module")
def three_seeds():
    return run(["none", "init"], (0, 1, 2), steps=8, weibull_every=2)


def test_the_figure_draws_differences_and_bands_of_the_named_group(three_seeds):
    shift = three_seeds.shift("init", by="component", window=2)
    panels = plot.wisca_shift(shift, group="k")
    rows = shift[(shift["component"] == "k") & (shift["quantity"] == "decay_share")]
    line = next(line for line in panels[0].lines if line.get_label() == "decay")
    np.testing.assert_allclose(line.get_ydata(), 100 * rows["difference"])
    assert line.get_color() == plot.FORCE_COLORS["decay"]
    band = panels[0].collections[2].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(100 * rows["low"].min())
    assert band[:, 1].max() == pytest.approx(100 * rows["high"].max())
    lam = shift[(shift["component"] == "k") & (shift["quantity"] == "lam")]
    np.testing.assert_allclose(panels[1].lines[-1].get_ydata(), lam["difference"])
    loss = shift[shift["quantity"] == "loss"]
    np.testing.assert_allclose(panels[3].lines[-1].get_ydata(), loss["difference"])


def test_a_figure_of_one_seed_has_no_bands_and_one_of_the_model_needs_no_group(three_seeds):
    alone = Comparison({key: each for key, each in three_seeds.runs.items() if key[1] == 0}, three_seeds.info)
    panels = plot.wisca_shift(alone.shift("init"))
    assert [len(panel.collections) for panel in panels] == [0, 0, 0, 0]
    assert panels[3].get_xlabel() == "update"


def test_the_figure_says_which_groups_there_are(three_seeds):
    with pytest.raises(ValueError, match=r"group must be one of \['other', 'selection', .* got None"):
        plot.wisca_shift(three_seeds.shift("init", by="role"))
    with pytest.raises(ValueError, match="whole model only"):
        plot.wisca_shift(three_seeds.shift("init"), group="q")
    with pytest.raises(ValueError, match=r"group must be one of \[\(0, .* got 'q'"):
        plot.wisca_shift(three_seeds.shift("init", by=["layer", "component"]), group="q")
    with pytest.raises(TypeError, match=r"Comparison.shift\(\) returns"):
        plot.wisca_shift(three_seeds)


def test_the_command_trains_prints_and_draws_and_goes_on_where_it_was(tmp_path):
    command = [
        "wisca",
        "compare",
        "--out",
        str(tmp_path),
        "--steps",
        "4",
        "--seeds",
        "2",
        "--batch-size",
        "2",
    ]
    command += ["--seq-len", "16", "--corpus", __file__, "--arm", "none", "--arm", "init power_of_two"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "init power_of_two, less none, last quarter:" in first.output
    assert re.search(r"transmission +drift_share ", first.output)
    assert sorted(each.name for each in (tmp_path / "figures").iterdir()) == [
        f"init_power_of_two_{role}.png" for role in ("other", "selection", "transmission", "value")
    ]
    stamps = {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*.parquet")}
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0
    assert {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*.parquet")} == stamps
    wrong = CliRunner().invoke(app, [*command, "--lr", "0.5"])
    assert wrong.exit_code == 2
    assert "holds runs of other settings: config (was {" in wrong.output
