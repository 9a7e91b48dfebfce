"""A run directory loses nothing that was flushed, whatever becomes of its writer, and says what is wrong."""

import contextlib
import errno
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import weightdyn
from weightdyn.core.tables import FORCE_TABLE, LOG_TABLE, WEIBULL_TABLE
from weightdyn.files import durable
from weightdyn.files.parquet import read_parquet, write_parquet
from weightdyn.record import runlog
from weightdyn.record.runlog import KINDS, RunLog, RunLogError, RunWriter

TENSORS = {
    "b.weight": {"layer": 0, "component": "q", "role": "selection", "numel": 40},
    "a.weight": {"layer": 1, "component": "o", "role": "transmission", "numel": 30},
    "norm.weight": {"layer": None, "component": "norm", "role": "other", "numel": 5},
}


@pytest.fixture(params=["directory", "memory"])
def out(request, tmp_path):
    return tmp_path / "run" if request.param == "directory" else None


@pytest.fixture
def writing():
    """Opens writers, and closes them at the end of the test."""
    with contextlib.ExitStack() as stack:

        def open_writer(*arguments, **keywords):
            writer = RunWriter(*arguments, **keywords)
            stack.callback(writer._release)
            return writer

        yield open_writer


def products(step, tensor=tuple(TENSORS), **columns):
    """Columns of forces rows, with plain numbers where a test does not care."""
    plain = {"lr": 0.1, "weight_decay": 0.2, "dot_wu": 1.0, "u_sq": 2.0, "norm_sq": 4.0, "norm_sq_after": 3.0}
    return {"step": step, "tensor": list(tensor), **plain, **columns}


def record(writer, steps, **columns):
    for step in steps:
        writer.append("forces", products(step, **columns))
        writer.append("metrics", {"step": step, "loss": 1 / (step + 1)})
    writer.flush()


def parts(path):
    return sorted(str(part.relative_to(path)) for part in Path(path).rglob("*.parquet"))


# --- what comes back ----------------------------------------------------------------------------------------


def test_a_run_holds_three_kinds_of_rows():
    assert KINDS == ("forces", "weibull", "metrics")


def adamw(rng, n, lr, weight_decay):
    """One update done by hand: w, u and w' as lists of Python floats."""
    w, u = rng.normal(size=n).tolist(), rng.normal(size=n).tolist()
    return w, u, [(1 - lr * weight_decay) * x - lr * y for x, y in zip(w, u, strict=True)]


def dot(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


@pytest.fixture
def logged(out, writing):
    """A run of three updates of three tensors, and w, u, w', lr, weight_decay of each by (step, tensor)."""
    rng = np.random.default_rng(0)
    truth = {}
    writer = writing(out, info={"tensors": TENSORS})
    for step in (1, 2, 3):
        for name, entry in TENSORS.items():
            lr, weight_decay = float(rng.uniform(0.01, 0.3)), 0.0 if name == "norm.weight" else 0.4
            w, u, after = adamw(rng, entry["numel"], lr, weight_decay)
            truth[step, name] = (w, u, after, lr, weight_decay)
            audit = dot(w, w) + 0.5 if step == 2 else math.nan
            sums = {"dot_wu": dot(w, u), "u_sq": dot(u, u), "norm_sq": dot(w, w)}
            sums["norm_sq_after"] = dot(after, after)
            extra = {"m_rms": 0.25, "v_mean": 0.5, "u_max": max(map(abs, u)), "norm_sq_audit": audit}
            rates = {"lr": lr, "weight_decay": weight_decay}
            writer.append("forces", {"step": step, "tensor": name, **rates, **sums, **extra})
        writer.flush()
    return writer.run(), truth


@pytest.mark.parametrize("order", ["exact", "leading"])
@pytest.mark.parametrize("at", ["before", "after"])
def test_forces_are_those_of_a_hand_computation(logged, order, at):
    run, truth = logged
    table = run.forces(order=order, at=at)
    assert list(zip(table["step"], table["tensor"], strict=True)) == list(truth)
    for row in table.itertuples():
        w, u, after, lr, weight_decay = truth[row.step, row.tensor]
        at_w = w if at == "before" else after
        shrink, rate = 1 - lr * weight_decay, 2 * lr * weight_decay
        if order == "leading":
            shrink = 1
        else:
            rate -= (lr * weight_decay) ** 2
        forces = (-2 * lr * shrink * dot(at_w, u), lr**2 * dot(u, u), -rate * dot(at_w, at_w))
        assert (row.alignment, row.injection, row.decay) == pytest.approx(forces, rel=1e-12)
        assert (row.norm_sq, row.norm_sq_after) == pytest.approx((dot(w, w), dot(after, after)), rel=1e-12)
        assert (row.u_sq, row.dot_wu) == pytest.approx((dot(u, u), dot(w, u)), rel=1e-11)
        cosine = dot(w, after) / math.sqrt(dot(w, w) * dot(after, after))
        assert row.angle == pytest.approx(math.acos(cosine), rel=1e-8)
        assert row.relative_update == pytest.approx(lr * math.sqrt(dot(u, u) / dot(w, w)))
        assert row.u_rms == pytest.approx(math.sqrt(dot(u, u) / len(u)))
        assert (row.m_rms, row.v_mean, row.u_max) == pytest.approx((0.25, 0.5, max(map(abs, u))), rel=1e-6)
        measured = dot(after, after) - (dot(w, w) + 0.5) if row.step == 2 else math.nan
        assert row.residual == pytest.approx(measured - sum(forces), rel=1e-9, nan_ok=True)


def test_exact_forces_sum_to_the_change_and_the_residual_is_what_they_miss(logged):
    table = logged[0].forces()
    change = table["norm_sq_after"] - table["norm_sq"]
    np.testing.assert_allclose(table[["alignment", "injection", "decay"]].sum(axis=1), change, atol=1e-12)
    audited = table["step"] == 2
    np.testing.assert_allclose(table["residual"][audited], -0.5, rtol=1e-12)
    assert table["residual"][~audited].isna().all()


def test_groups_are_sums_of_the_hand_computation(logged):
    run, truth = logged
    by_role = run.forces(by="role").set_index(["step", "role"])
    assert list(by_role.columns) == [c for c in FORCE_TABLE if c in by_role]
    for (step, name), (w, u, _, lr, weight_decay) in truth.items():
        row = by_role.loc[(step, TENSORS[name]["role"])]
        assert row["alignment"] == pytest.approx(-2 * lr * (1 - lr * weight_decay) * dot(w, u), rel=1e-12)
        assert row["numel"] == TENSORS[name]["numel"]
    whole = run.forces(by="model", order="leading")
    for step, decay in zip(whole["step"], whole["decay"], strict=True):
        mine = [(w, lr, wd) for (t, _), (w, _, _, lr, wd) in truth.items() if t == step]
        assert decay == pytest.approx(sum(-2 * lr * wd * dot(w, w) for w, lr, wd in mine), rel=1e-12)


def test_the_force_table_has_its_columns_types_and_order(logged):
    table = logged[0].forces()
    assert list(table.columns) == [*FORCE_TABLE, *LOG_TABLE]
    types = {"step": "int64", "span": "int64", "layer": "Int64", "numel": "int64"}
    types |= dict.fromkeys(("tensor", "stack", "component", "role"), "category")
    assert {name: str(kind) for name, kind in table.dtypes.items()} == {
        name: types.get(name, "float64") for name in table.columns
    }
    assert list(table["tensor"][:3]) == list(TENSORS)  # the model's order, not the alphabet's
    assert list(table["tensor"].cat.categories) == list(TENSORS)
    assert table["layer"][:2].tolist() == [0, 1]
    assert table["layer"][2] is pd.NA


def test_an_empty_run_has_the_columns_and_types_of_a_full_one(out, writing, logged):
    empty = writing(None if out is None else out.parent / "empty").run()
    full = logged[0]
    pd.testing.assert_series_equal(empty.forces().dtypes.astype(str), full.forces().dtypes.astype(str))
    assert list(empty.weibull()) == list(WEIBULL_TABLE)
    assert list(empty.metrics()) == ["step"]
    for table in (empty.forces(), empty.weibull(), empty.metrics(), empty.forces(by="role")):
        assert len(table) == 0


def test_weibull_fits_come_back_with_the_names_of_their_tensors(out, writing):
    writer = writing(out, info={"tensors": TENSORS})
    fit = {"k": [1.2, 1.3], "lam": [0.5, math.nan], "r_squared": 0.99, "ks": 0.01, "n": 40}
    writer.append("weibull", {"step": 0, "tensor": ["a.weight", "b.weight"], **fit})
    table = writer.run().weibull()
    assert table["tensor"].tolist() == ["b.weight", "a.weight"]
    assert table["component"].tolist() == ["q", "o"]
    assert table["k"].tolist() == [1.3, 1.2]
    assert math.isnan(table["lam"][0])
    assert (str(table["n"].dtype), table["n"].tolist()) == ("int64", [40, 40])


def test_a_tensor_that_nobody_described_is_other(out, writing):
    writer = writing(out, info={"tensors": TENSORS})
    writer.append("forces", products(1, ["a.weight", "stray"]))
    table = writer.run().forces()
    assert table["tensor"].tolist() == ["a.weight", "stray"]
    assert table["component"].tolist() == ["o", "other"]
    assert table["role"].tolist() == ["transmission", "other"]
    assert table["layer"][1] is pd.NA
    assert table["numel"][1] is pd.NA
    assert math.isnan(table["u_rms"][1])


def test_nan_and_inf_are_kept_and_do_not_warn(out, writing):
    writer = writing(out)
    bad = [math.nan, math.inf, -math.inf]
    writer.append("forces", products(1, "abc", dot_wu=bad, u_sq=np.array([1, 0, 1]), u_max=[1e300, 1, 1]))
    writer.append("forces", products(2, "a", norm_sq_after=0.0, u_sq=0.0, lr=5.0))  # ηλ = 1 erases w
    writer.append("metrics", {"step": 1, "loss": math.nan, "grad_norm": math.inf})
    run = writer.run()
    alignment = run.forces()["alignment"].tolist()
    assert math.isnan(alignment[0])
    assert alignment[1:3] == [-math.inf, math.inf]
    assert run.forces()["u_max"][0] == math.inf
    assert math.isnan(run.metrics()["loss"][0])
    assert run.metrics()["grad_norm"][0] == math.inf


def test_metrics_of_any_plain_type_stand_in_one_row_per_step(out, writing):
    writer = writing(out)
    writer.append("metrics", {"step": 2, "loss": 2.5, "tokens": 7, "note": "warm-up", "ok": True, "odd": 1})
    writer.append("metrics", {"step": 1, "loss": np.float32(0.5), "tokens": np.int64(3)})
    writer.flush()
    writer.append(
        "metrics", {"step": 2, "eval_loss": 9.0, "odd": 0.5, "mixed": 3, "never": None}
    )  # appears later
    writer.append(
        "metrics", {"step": 2, "loss": None, "mixed": "three"}
    )  # not recorded: the earlier one stays
    writer.append("metrics", {"step": 3, "loss": math.nan, "note": "\udc80", "tokens": 2**62})
    writer.append("metrics", {"step": [4, 5], "loss": [np.float32(0.25), 0.125]})
    writer.flush()
    writer.append("metrics", {"step": 4, "loss": 4})  # the later one wins
    table = writer.run().metrics()
    assert list(table) == ["step", "loss", "tokens", "note", "ok", "odd", "eval_loss", "mixed"]
    assert table["step"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(table["loss"], [0.5, 2.5, math.nan, 4.0, 0.125])
    assert table["tokens"].tolist() == [3, 7, 2**62, pd.NA, pd.NA]
    assert table["note"].dropna().tolist() == ["warm-up", "\\udc80"]
    assert (str(table["ok"].dtype), table["ok"][1]) == ("boolean", True)
    assert table["odd"][1] == 0.5
    assert table["mixed"][1] == "three"


def test_rows_recorded_twice_count_once_and_the_later_one_wins(out, writing):
    writer = writing(out)
    writer.append("forces", products([1, 1], "ab", u_sq=[1.0, 2.0]))
    writer.append("forces", products([1, 1], "aa", u_sq=[3.0, 4.0]))
    writer.flush()
    writer.append("forces", products([1], "b", u_sq=[5.0]))
    assert writer.run().forces()["u_sq"].tolist() == [4.0, 5.0]


def test_the_writer_keeps_no_reference_to_the_callers_arrays(out, writing):
    writer = writing(out)
    u_sq, tensor = np.array([1.0, 2.0]), np.array(["a", "b"], dtype=object)
    writer.append("forces", products(1) | {"tensor": tensor, "u_sq": u_sq})
    u_sq[:], tensor[:] = 9, "x"
    table = writer.run().forces()
    assert (table["tensor"].tolist(), table["u_sq"].tolist()) == (["a", "b"], [1.0, 2.0])


def test_two_thousand_small_parts_read_as_one_table(tmp_path, writing, monkeypatch):
    monkeypatch.setattr(durable.os, "fsync", lambda descriptor: None)  # only their number matters here
    writer = writing(tmp_path / "run")
    for step in range(1, 2001):
        writer.append("forces", products(step, "ab", u_sq=[step, -step]))
        writer.flush()
    run = RunLog(tmp_path / "run")
    assert len(parts(run.path)) == 2000
    table = run.forces()
    assert table["u_sq"].tolist() == [sign * step for step in range(1, 2001) for sign in (1, -1)]
    assert "4,000 rows, updates 1–2,000 (2,000 recorded)" in repr(run)


# --- run.json and the parts ---------------------------------------------------------------------------------


def test_run_json_is_merged_section_by_section_and_tensors_key_by_key(out, writing):
    writer = writing(out, info={"optimizer": {"name": "AdamW", "betas": (0.9, np.float32(0.5))}})
    writer.describe(tensors={"a": {"layer": 0, "shape": np.array([2, 3])}}, train={"seed": 1, "lr": 0.1})
    writer.describe(tensors={"b": {"layer": None}}, train={"seed": 2})
    info = writer.run().info
    assert info["optimizer"] == {"name": "AdamW", "betas": [0.9, 0.5]}
    assert info["tensors"] == {"a": {"layer": 0, "shape": [2, 3]}, "b": {"layer": None}}
    assert info["train"] == {"seed": 2}
    assert info["format"] == 1
    assert set(info["versions"]) == {"torch", "numpy", "python"}
    assert info["versions"]["numpy"] == np.__version__
    with pytest.raises(ValueError, match="'sessions'"):
        writer.describe(sessions=[])


def test_units_and_meanings_stand_in_the_parquet_schema(tmp_path, writing):
    writer = writing(tmp_path / "run", start_step=3)
    record(writer, [4])
    writer.append("weibull", {"step": 4, "tensor": "a", "k": 1, "lam": 1, "r_squared": 1, "ks": 0, "n": 2})
    writer.close()
    assert parts(tmp_path / "run") == [f"{kind}/part-0000-000000.parquet" for kind in sorted(KINDS)]
    for kind in KINDS:
        schema = pq.read_schema(tmp_path / "run" / kind / "part-0000-000000.parquet")
        about = {name: schema.metadata[name] for name in (b"format", b"kind", b"session", b"start_step")}
        assert about == {b"format": b"1", b"kind": kind.encode(), b"session": b"0", b"start_step": b"3"}
        assert b"weightdyn" in schema.metadata
        assert all(field.metadata[b"meaning"] for field in schema)
    schema = pq.read_schema(tmp_path / "run/forces/part-0000-000000.parquet")
    types = "int64 int32 dictionary<values=string, indices=int32, ordered=0> "
    types += "double double double double double double double float float float "
    types += "double double double double double"
    assert " ".join(str(field.type) for field in schema) == types
    assert "‖u‖²" in schema.field("u_sq").metadata[b"meaning"].decode()


def test_what_was_not_recorded_yet_when_a_part_was_written_is_missing(tmp_path, writing):
    record(writing(tmp_path / "run"), [1])
    path = tmp_path / "run/forces/part-0000-000000.parquet"
    table = read_parquet(path)
    write_parquet(path, table.drop_columns(["dot_wg", "dot_ug", "g_sq", "lr_memory", "fresh", "u_max"]))
    forces = RunLog(tmp_path / "run").forces()
    assert forces[["drift", "memory", "memory_null", "signal", "u_max"]].isna().all(axis=None)
    assert forces["alignment"].notna().all()


def test_pandas_alone_reads_a_part(tmp_path, writing):
    record(writing(tmp_path / "run"), [1])
    part = pd.read_parquet(tmp_path / "run/forces/part-0000-000000.parquet")
    assert part["tensor"].tolist() == list(TENSORS)


@pytest.mark.parametrize(
    ("kind", "columns", "error", "says"),
    [
        ("force", {"step": 1}, ValueError, "'force'"),
        ("forces", {"step": 1, "tensor": "a"}, ValueError, "missing ['lr'"),
        ("forces", products(1) | {"beta": 1}, ValueError, "unknown ['beta']"),
        ("forces", products(1) | {"u_sq": [1.0, 2.0]}, ValueError, "'u_sq': 2"),
        ("forces", products(1) | {"u_sq": np.ones((3, 1))}, ValueError, "'u_sq'"),
        ("forces", products(1) | {"lr": "high"}, TypeError, "'lr'"),
        ("forces", products(1.5), TypeError, "'step'"),
        ("forces", products(1, [None, "a"]), TypeError, "'tensor'"),
        ("metrics", {"loss": 1.0}, ValueError, "step"),
        ("metrics", {"step": 1, "loss": [1.0, 2.0]}, TypeError, "'loss'"),
        ("metrics", {"step": 1, "loss": {"a": 1}}, TypeError, "'loss'"),
        ("metrics", {"step": 1, "seed": 2**64}, ValueError, "'seed'"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name_and_leave_nothing(writing, kind, columns, error, says):
    writer = writing(None)
    with pytest.raises(error) as caught:
        writer.append(kind, columns)
    assert says in str(caught.value)
    assert writer.buffered == 0


# --- sessions -----------------------------------------------------------------------------------------------


def seen(run):
    """{step: u_sq} of the forces and {step: loss} of the metrics; no (step, tensor) may be there twice."""
    table = run.forces()
    assert not table.duplicated(["step", "tensor"]).any()
    metrics = run.metrics()
    assert metrics["step"].is_unique
    return dict(zip(table["step"], table["u_sq"], strict=True)), dict(
        zip(metrics["step"], metrics["loss"], strict=True)
    )


def test_resuming_supersedes_what_lies_behind_the_checkpoint_and_deletes_nothing(tmp_path, writing):
    path = tmp_path / "run"
    first = writing(path)
    record(first, range(1, 11), tensor="a", u_sq=1.0)
    first.close()
    stored = parts(path)
    second = writing(path, start_step=6)
    assert len(RunLog(path).forces()) == 10  # not before the new session has stored a row
    second.append("forces", products(7, "a", u_sq=2.0))
    second.flush()
    forces, metrics = seen(RunLog(path))
    assert forces == {**dict.fromkeys(range(1, 7), 1.0), 7: 2.0}
    assert list(metrics) == list(range(1, 7))  # also where the new session has recorded nothing of this kind
    second.close()
    third = writing(path, start_step=3)
    record(third, [4, 5], tensor="a", u_sq=3.0)
    assert seen(RunLog(path))[0] == {1: 1.0, 2: 1.0, 3: 1.0, 4: 3.0, 5: 3.0}
    assert set(stored) < set(parts(path))
    assert [session["start_step"] for session in RunLog(path).info["sessions"]] == [0, 6, 3]


def test_rewinding_within_a_process_leaves_no_step_twice(out, writing):
    writer = writing(out)
    record(writer, range(1, 6), tensor="a", u_sq=1.0)
    writer.append("forces", products([6, 7], "aa", u_sq=1.0))  # in the buffer: 6 stays, 7 was never made
    writer.restart(6)
    assert writer.buffered == 1
    record(writer, [7], tensor="a", u_sq=2.0)
    assert seen(writer.run())[0] == {**dict.fromkeys(range(1, 7), 1.0), 7: 2.0}
    writer.restart(2)
    record(writer, [3], tensor="a", u_sq=3.0)
    assert seen(writer.run())[0] == {1: 1.0, 2: 1.0, 3: 3.0}
    writer.restart(10)  # on from a later update: what is there stays
    record(writer, [11], tensor="a", u_sq=4.0)
    assert seen(writer.run())[0] == {1: 1.0, 2: 1.0, 3: 3.0, 11: 4.0}
    assert [session["start_step"] for session in writer.run().info["sessions"]] == [0, 6, 2, 10]


def test_starting_at_zero_on_a_used_directory_is_refused_at_the_first_row(tmp_path, writing):
    path = tmp_path / "run"
    first = writing(path, info={"train": {"seed": 1}})
    record(first, range(1, 8))
    first.close()
    before = (path / "run.json").read_text()
    writer = writing(path, info={"train": {"seed": 2}})
    message = (
        r"run already holds updates 1–7: choose another out, give overwrite=True .*, or resume .*"
        r"start_step= the step of the checkpoint that you loaded"
    )
    for kind, columns in (("forces", products(1)), ("metrics", {"step": 1, "loss": 0})):
        with pytest.raises(FileExistsError, match=message):
            writer.append(kind, columns)
    with pytest.raises(FileExistsError, match=message):
        writer.begin()
    writer.close()
    assert (path / "run.json").read_text() == before


def test_the_state_may_be_loaded_after_the_writer_was_made(tmp_path, writing):
    path = tmp_path / "run"
    first = writing(path)
    record(first, range(1, 8), tensor="a", u_sq=1.0)
    first.close()
    writer = writing(path, info={"train": {"seed": 2}})
    writer.restart(5)
    record(writer, [6], tensor="a", u_sq=2.0)
    assert seen(RunLog(path))[0] == {**dict.fromkeys(range(1, 6), 1.0), 6: 2.0}
    assert RunLog(path).info["train"] == {"seed": 2}


def test_a_run_that_died_before_its_first_update_may_begin_again(tmp_path, writing):
    first = writing(tmp_path / "run")
    first.append("metrics", {"step": 0, "eval_loss": 5.5})
    first.close()
    second = writing(tmp_path / "run")
    second.append("metrics", {"step": 0, "eval_loss": 5.0})
    second.append("metrics", {"step": 1, "eval_loss": 4.5})
    assert second.run().metrics()["eval_loss"].tolist() == [5.0, 4.5]


def test_an_explicit_restart_at_zero_begins_again(tmp_path, writing):
    first = writing(tmp_path / "run")
    record(first, [1, 2], tensor="a", u_sq=1.0)
    first.close()
    second = writing(tmp_path / "run")
    second.restart(0)
    record(second, [1], tensor="a", u_sq=2.0)
    assert seen(RunLog(tmp_path / "run"))[0] == {1: 2.0}


def test_a_session_that_stored_nothing_hides_nothing(tmp_path, writing, monkeypatch):
    path = tmp_path / "run"
    first = writing(path)
    record(first, range(1, 8), tensor="a", u_sq=1.0)
    first.close()
    second = writing(path, start_step=2)
    second.append("forces", products(3, "a"))
    second._session = (
        second._begin_session()
    )  # as far as a kill between run.json and the first part lets it come
    second._save_info()
    second._release()
    assert len(RunLog(path).info["sessions"]) == 2
    assert list(seen(RunLog(path))[0]) == list(range(1, 8))


def test_a_copy_whose_run_json_is_older_than_its_parts_reads_and_resumes(tmp_path, writing):
    path = tmp_path / "run"
    first = writing(path)
    record(first, range(1, 8), tensor="a", u_sq=1.0)
    first.close()
    older = (path / "run.json").read_text()
    second = writing(path, start_step=4)
    record(second, [5, 6], tensor="a", u_sq=2.0)
    second.close()
    (path / "run.json").write_text(older)
    assert seen(RunLog(path))[0] == {**dict.fromkeys(range(1, 5), 1.0), 5: 2.0, 6: 2.0}
    third = writing(path, start_step=5)
    record(third, [6], tensor="a", u_sq=3.0)
    assert seen(RunLog(path))[0] == {**dict.fromkeys(range(1, 5), 1.0), 5: 2.0, 6: 3.0}
    assert [session["start_step"] for session in RunLog(path).info["sessions"]] == [0, 4, 5]


# --- deaths and full disks ----------------------------------------------------------------------------------

# Imports once, then forks a writer per command: each is a process of its own, to be killed at any moment from its
# first instruction on, and none waits for the imports.
TRAINER = """
import os, random, signal, sys, time
from pathlib import Path
from weightdyn.record.runlog import RunWriter

def train(folder, attempt):
    checkpoint, ledger = folder / "checkpoint", os.open(folder / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    chance = random.Random(attempt)
    writer = RunWriter(folder / "run", step)
    writer.restart(step)
    while True:
        step += 1
        rows = {"step": step, "tensor": ["a", "b", "c"], "lr": attempt, "weight_decay": 0.0}
        rows |= {"dot_wu": [step, 2 * step, 3 * step], "u_sq": 1.0, "norm_sq": 1.0, "norm_sq_after": 1.0}
        writer.append("forces", rows)
        writer.append("metrics", {"step": step, "loss": 0.5 * step, "attempt": attempt})
        if chance.random() < 0.5:
            writer.flush()
            os.write(ledger, f"{attempt} {step}\\n".encode())
            if chance.random() < 0.3:
                (folder / "new").write_text(str(step))
                os.replace(folder / "new", checkpoint)

child = None
print("ready", flush=True)
for line in sys.stdin:
    match line.split():
        case ["start", folder, attempt]:
            child = os.fork()
            if child == 0:
                try:
                    train(Path(folder), int(attempt))
                finally:
                    os._exit(1)
            print("started", flush=True)
        case ["kill"]:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            child = None
            print("killed" if os.WIFSIGNALED(status) else f"ended by itself, status {status}", flush=True)
if child is not None:
    os.kill(child, signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def trainer():
    """Call with "start FOLDER ATTEMPT" or "kill"; answers when that is done."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(weightdyn.__file__).parents[1],
    )
    with process:
        answers = process.stdout
        assert answers is not None

        def command(line):
            print(line, file=process.stdin, flush=True)
            return answers.readline().strip()

        assert answers.readline() == "ready\n"
        yield command


def flushed_by(attempt, ledger):
    """Steps behind which an attempt noted that it had flushed everything so far."""
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return [int(step) for who, step in map(str.split, lines) if int(who) == attempt]


def test_twenty_kills_at_random_moments_lose_nothing_that_was_flushed(trainer, tmp_path):
    chance = random.Random(0)
    certain = {}  # step -> the attempt that must be seen there
    for attempt in range(1, 21):
        checkpoint = tmp_path / "checkpoint"
        start = int(checkpoint.read_text()) if checkpoint.exists() else 0
        assert trainer(f"start {tmp_path} {attempt}") == "started"
        # After so many flushes, however slow the machine is, and then at any moment of what follows.
        flushes, deadline = chance.choice([0, 0, 1, 2, 5, 9]), time.monotonic() + 5
        while len(flushed_by(attempt, tmp_path / "ledger")) < flushes and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        assert trainer("kill") == "killed"

        if not (tmp_path / "run/run.json").exists():
            continue
        run = RunLog(tmp_path / "run")
        forces, metrics = run.forces(), run.metrics()
        assert not forces.duplicated(["step", "tensor"]).any()
        attempts = forces.groupby("step")["lr"].agg(["min", "max", "size"])
        assert list(attempts.index) == list(range(1, len(attempts) + 1))  # no hole
        assert (attempts["size"] == 3).all()
        assert (attempts["min"] == attempts["max"]).all()
        assert attempts["max"].is_monotonic_increasing  # nothing superseded behind what superseded it
        shown = dict(attempts["max"].astype(int))
        assert forces["dot_wu"].tolist() == [step * i for step in shown for i in (1, 2, 3)]
        flushed = flushed_by(attempt, tmp_path / "ledger")
        if flushed or attempt in shown.values() or attempt in metrics.get("attempt", pd.Series()).tolist():
            certain = {step: who for step, who in certain.items() if step <= start}
            certain |= dict.fromkeys(range(start + 1, max(flushed, default=start) + 1), attempt)
        assert certain.items() <= shown.items()
        if len(metrics):
            recorded = dict(zip(metrics["step"], metrics["attempt"], strict=True))
            assert certain.items() <= recorded.items()
            assert metrics["attempt"].is_monotonic_increasing
            assert metrics["loss"].tolist() == [0.5 * step for step in metrics["step"]]
    assert len(certain) > 20

    # The next writer cleans up behind the killed ones, and goes on.
    start = int((tmp_path / "checkpoint").read_text())
    writer = RunWriter(tmp_path / "run", start)
    assert not list((tmp_path / "run").rglob(".*.tmp"))
    record(writer, range(start + 1, start + 4))
    writer.close()
    assert RunLog(tmp_path / "run").forces()["step"].unique().tolist() == list(range(1, start + 4))


def test_a_run_reads_while_another_process_writes_it(trainer, tmp_path):
    assert trainer(f"start {tmp_path} 1") == "started"
    deadline = time.monotonic() + 30
    steps, reads = 0, 0
    while (steps < 40 or reads < 10) and time.monotonic() < deadline:
        if (tmp_path / "run/run.json").exists():
            run = RunLog(tmp_path / "run")
            table = run.forces()
            assert table["step"].tolist() == [step for step in range(1, len(table) // 3 + 1) for _ in "abc"]
            assert len(table) // 3 >= steps
            steps, reads = len(table) // 3, reads + 1
            metrics = run.metrics()
            assert metrics["step"].tolist() == list(range(1, len(metrics) + 1))
            assert "RunLog" in repr(run)
    assert trainer("kill") == "killed"
    assert steps >= 40


def test_files_that_a_killed_writer_left_are_ignored_and_then_removed(tmp_path, writing):
    path = tmp_path / "run"
    first = writing(path)
    record(first, [1, 2])
    first.close()
    left = [path / ".run.json.tmp", path / "forces/.part-0000-000001.parquet.tmp"]
    others = [path / "forces/.part-notes.tmp", path / "forces/notes.parquet", path / "notes.tmp"]
    for file in left + others:
        file.write_bytes(b"half a fi")
    assert len(RunLog(path).forces()) == 6
    assert all(file.exists() for file in left)
    writing(path, start_step=2)
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in others)  # not ours


@contextlib.contextmanager
def full_disk(monkeypatch, how):
    """Every write fails, the way a full disk does: at the write itself, at the sync, or at the rename."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if how == "write":  # by the kernel: no file may grow beyond 64 bytes
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        else:
            patch.setattr(durable.os, how, fail)
            yield


@pytest.mark.parametrize("how", ["write", "fsync", "replace"])
def test_a_full_disk_keeps_the_rows_for_a_later_flush(tmp_path, writing, monkeypatch, how):
    path = tmp_path / "run"
    writer = writing(path)
    record(writer, [1], tensor="a", u_sq=1.0)
    before = sorted(path.rglob("*"))
    writer.restart(1)  # a new session, so that run.json has to be written as well
    for step in (2, 3):
        writer.append("forces", products(step, "a", u_sq=2.0))
        writer.append("metrics", {"step": step, "loss": 0.5})
        with full_disk(monkeypatch, how), pytest.raises(OSError, match=r"No space|too large"):
            writer.flush()
        assert writer.buffered == 2 * (step - 1)
        assert sorted(path.rglob("*")) == before  # nothing half written stays to fill the disk
        assert list(seen(RunLog(path))[0]) == [1]
    with full_disk(monkeypatch, how), pytest.raises(OSError, match=r"No space|too large"):
        writer.close()
    writer.append("metrics", {"step": 4, "loss": 0.25})  # still open
    writer.close()
    assert writer.buffered == 0
    forces, metrics = seen(RunLog(path))
    assert forces == {1: 1.0, 2: 2.0, 3: 2.0}
    assert metrics == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.25}


def test_a_disk_that_fills_between_two_kinds_stores_neither_twice(tmp_path, writing, monkeypatch):
    writer = writing(tmp_path / "run")
    writer.append("forces", products(1, "a"))
    writer.append("metrics", {"step": 1, "loss": 0.5})
    whole = runlog._Folder.write

    def only_forces(self, part, table):
        if part.kind != "forces":
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, part, table)

    with monkeypatch.context() as patch:
        patch.setattr(runlog._Folder, "write", only_forces)
        with pytest.raises(OSError, match="No space"):
            writer.flush()
    assert writer.buffered == 1
    writer.close()
    assert parts(tmp_path / "run") == ["forces/part-0000-000000.parquet", "metrics/part-0000-000000.parquet"]


# --- what can be wrong with a directory, each with the file and the remedy -----------------------------------


def test_a_second_writer_is_told_of_the_first(tmp_path, writing):
    writer = writing(tmp_path / "run")
    record(writer, [1])
    with pytest.raises(RunLogError, match=r"run is being written by another logger.*\.lock.*close that one"):
        RunWriter(tmp_path / "run", start_step=1)
    record(writer, [2])  # the first is not disturbed
    writer.close()
    second = writing(tmp_path / "run", start_step=2)
    record(second, [3])
    assert list(seen(RunLog(tmp_path / "run"))[1]) == [1, 2, 3]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, None])
def test_a_file_system_without_locks_is_no_reason_to_fail(tmp_path, writing, monkeypatch, code):
    def refuse(self, *_, **__):
        raise NotImplementedError if code is None else OSError(code, "no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    writer = writing(tmp_path / "run")
    record(writer, [1])
    writer.close()
    assert len(RunLog(tmp_path / "run").forces()) == 3


def test_a_directory_that_may_not_be_locked_says_so(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(PermissionError):
        RunWriter(tmp_path / "run")


def test_no_directory_and_no_run_in_it_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: give the directory"):
        RunLog(tmp_path / "nowhere")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"run\.json does not exist, so .* is no run: give the directory"
    ):
        RunLog(str(tmp_path))
    with pytest.raises(RunLogError, match=r"model\.bin is a file: give the directory"):
        RunLog(tmp_path / "model.bin")
    with pytest.raises(NotADirectoryError, match=r"model\.bin is a file.*choose another out"):
        RunWriter(tmp_path / "model.bin")


def test_a_directory_with_other_things_in_it_takes_a_run(tmp_path, writing):
    (tmp_path / "checkpoints").mkdir()
    writer = writing(tmp_path)
    record(writer, [1])
    assert "checkpoints" in repr(writer.run())


@pytest.mark.parametrize("content", ['{"learning_rate": 0.1}', "[1, 2]", '{"format": "x", "weightdyn": "1"}'])
def test_a_foreign_run_json_is_left_alone(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    for opening in (RunLog, RunWriter):
        with pytest.raises(RunLogError, match=r"run\.json was not written by weightdyn.*another"):
            opening(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == content


def test_a_newer_format_asks_for_a_newer_weightdyn(tmp_path, writing):
    record(writing(tmp_path), [1])
    info = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(info | {"format": 2, "weightdyn": "9.0"}))
    for opening in (RunLog, RunWriter):
        with pytest.raises(
            RunLogError, match=r"run\.json has format 2, written by weightdyn 9\.0.*pip install"
        ):
            opening(tmp_path)


@pytest.mark.parametrize("keep", [0, 40])
def test_a_run_json_cut_short_says_where_to_get_it(tmp_path, writing, keep):
    record(writing(tmp_path), [1])
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text[:keep])
    for opening in (RunLog, RunWriter):
        with pytest.raises(RunLogError, match=r"run\.json is cut short or damaged .*copy it again"):
            opening(tmp_path)


def test_parts_without_a_run_json_are_not_written_over(tmp_path, writing):
    first = writing(tmp_path)
    record(first, [1])
    first.close()
    (tmp_path / "run.json").unlink()
    stored = parts(tmp_path)
    with pytest.raises(
        RunLogError, match=r"run\.json does not exist, but forces/part-0000-000000\.parquet does"
    ):
        RunWriter(tmp_path)
    assert parts(tmp_path) == stored


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_a_truncated_part_is_named_and_the_rest_stays_readable(tmp_path, writing, keep):
    writer = writing(tmp_path)
    record(writer, [1])
    record(writer, [2])
    part = tmp_path / "forces/part-0000-000001.parquet"
    part.write_bytes(part.read_bytes()[:keep])
    run = RunLog(tmp_path)
    with pytest.raises(
        RunLogError, match=r"forces/part-0000-000001\.parquet is cut short or damaged.*move it out"
    ):
        run.forces()
    assert run.metrics()["step"].tolist() == [1, 2]
    assert "part-0000-000001.parquet is cut short" in repr(run)  # to look at it does not fail
    part.unlink()
    assert run.forces()["step"].unique().tolist() == [1]


def test_a_parquet_file_of_someone_else_is_named(tmp_path, writing):
    record(writing(tmp_path), [1])
    pd.DataFrame({"x": [1.0]}).to_parquet(tmp_path / "forces/part-0000-000009.parquet")
    with pytest.raises(
        RunLogError, match=r"part-0000-000009\.parquet .*no checksum.*not written by weightdyn"
    ):
        RunLog(tmp_path).forces()


def test_a_run_json_that_was_deleted_is_written_back_at_the_next_flush(tmp_path, writing):
    writer = writing(tmp_path, info={"tensors": TENSORS})
    record(writer, [1])
    content = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").unlink()
    record(writer, [2])
    assert json.loads((tmp_path / "run.json").read_text()) == content
    assert list(seen(RunLog(tmp_path))[1]) == [1, 2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sessions": 3}, "'sessions' must be a list, got 3"),
        ({"sessions": [{}]}, "'start_step'"),
        ({"sessions": [{"start_step": "x"}]}, "'start_step'"),
        ({"sessions": [{"start_step": -1}]}, "'start_step'"),
        ({"sessions": [{"start_step": True}]}, "'start_step'"),
        ({"sessions": [{"start_step": 2**63}]}, "'start_step'"),
        ({"tensors": ["a"]}, "'tensors'"),
        ({"tensors": {"a": 3}}, "entry of a"),
        ({"tensors": {"a": {"layer": "first"}}}, "layer of a must be a whole number or null, got 'first'"),
        ({"tensors": {"a": {"layer": 0.5}}}, "layer of a"),
        ({"tensors": {"a": {"numel": 1e30}}}, "numel of a"),
        ({"tensors": {"a": {"numel": 10**30}}}, "numel of a"),
        ({"tensors": {"a": {"role": None}}}, "role of a must be a string"),
        ({"tensors": {"a": {"stack": ["encoder"]}}}, "stack of a must be a string"),
    ],
)
def test_a_run_json_of_wrong_types_is_named_with_what_is_wrong(tmp_path, writing, change, says):
    record(writing(tmp_path / "run"), [1])
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for opening in (RunLog, RunWriter):
        with pytest.raises(RunLogError, match=r"run\.json is cut short or damaged .*copy it again") as caught:
            opening(path.parent)
        assert says in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "\xff\xfe",
        "<html>Please log in</html>",
        '{"format": ' + "9" * 5000 + "}",
    ],
    ids=["lists", "objects", "bytes", "html", "digits"],
)
def test_a_run_json_that_is_none_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    for opening in (RunLog, RunWriter):
        with pytest.raises(RunLogError, match=r"run\.json is cut short or damaged"):
            opening(tmp_path)


def test_five_hundred_mutated_run_jsons_are_named_and_none_gives_a_wrong_number(tmp_path, writing):
    record(writing(tmp_path, info={"tensors": TENSORS}), range(1, 4))
    run = RunLog(tmp_path)
    want, info = run.forces(), run.info
    path = tmp_path / "run.json"
    data, chance = path.read_bytes(), random.Random(0)
    for _ in range(500):
        at, damaged = chance.randrange(len(data)), bytearray(data)
        how = chance.choice(["bit", "digit", "cut", "gone"])
        if how == "bit":
            damaged[at] ^= 1 << chance.randrange(8)
        elif how == "digit":
            digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
            damaged[chance.choice(digits)] = ord(str(chance.randrange(10)))
        elif how == "cut":
            del damaged[at:]
        else:
            del damaged[at : at + chance.randrange(1, 40)]
        path.write_bytes(damaged)
        try:
            run = RunLog(tmp_path)
        except RunLogError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:  # white space, or the word "checksum" itself
            assert {name: run.info.get(name) for name in info} == info
            assert run.forces().equals(want)


def test_a_run_json_that_was_edited_says_how_to_keep_the_edit(tmp_path, writing):
    record(writing(tmp_path), [1])
    path = tmp_path / "run.json"
    edited = json.loads(path.read_text()) | {"notes": "mine"}
    path.write_text(json.dumps(edited))
    for opening in (RunLog, RunWriter):
        with pytest.raises(RunLogError, match=r"run\.json was changed after .*delete its line 'checksum'"):
            opening(tmp_path)
    path.write_text(
        json.dumps({name: value for name, value in edited.items() if name != "checksum"}, indent=4)
    )
    assert RunLog(tmp_path).info["notes"] == "mine"


def test_a_deeply_nested_section_is_named_or_read(tmp_path, writing):
    record(writing(tmp_path), [1])
    path = tmp_path / "run.json"
    for depth in (500, 900, 5000, 100_000):
        path.write_text(
            '{"format": 1, "weightdyn": "0", "sessions": [], "tensors": '
            + '{"a": ' * depth
            + "1"
            + "}" * depth
            + "}"
        )
        try:
            assert repr(RunLog(tmp_path)).startswith("RunLog(")
        except RunLogError as error:
            assert "run.json is cut short or damaged" in str(error)  # noqa: PT017


def test_pipes_and_folders_in_the_place_of_files_are_refused_at_once(tmp_path, writing):
    record(writing(tmp_path / "run"), [1])
    part = tmp_path / "run/forces/part-0000-000000.parquet"
    for place, says in ((part, "not a regular file"), (tmp_path / "run/run.json", "not a regular file")):
        for make in (os.mkfifo, os.mkdir):
            place.rename(tmp_path / "aside")
            make(place)
            with pytest.raises(RunLogError, match=says) as caught:
                RunLog(tmp_path / "run").forces()
            assert place.name in str(caught.value)
            place.rmdir() if place.is_dir() else place.unlink()
            (tmp_path / "aside").rename(place)
    (tmp_path / "run/weibull").write_text("")
    with pytest.raises(RunLogError, match="weibull is a file, where a run has a folder"):
        RunLog(tmp_path / "run").weibull()


def rewritten(path, change):
    """Put a changed table in the place of a part."""
    write_parquet(path, change(pq.read_table(path)))


def _retype(name, kind):
    return lambda table: table.set_column(
        table.column_names.index(name), name, pa.chunked_array([pa.array([None] * len(table), kind)])
    )


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("forces", _retype("lr", pa.string()), r"has string in the column 'lr', which must hold double"),
        ("forces", _retype("lr", pa.float64()), r"has missing values in the column 'lr'"),
        ("forces", _retype("step", pa.float64()), r"has double in the column 'step'"),
        ("forces", _retype("tensor", pa.string()), r"has string in the column 'tensor'"),
        ("forces", lambda table: table.drop_columns(["u_sq"]), r"lacks the columns \['u_sq'\]"),
        ("metrics", lambda table: table.drop_columns(["step"]), r"lacks the column 'step'"),
        ("metrics", _retype("loss", pa.list_(pa.int64())), r"has list<.*> in the column 'loss'"),
        ("metrics", _retype("step", pa.int64()), r"has missing values in the column 'step'"),
    ],
)
def test_a_part_of_wrong_columns_is_named_with_the_column(tmp_path, writing, kind, change, says):
    record(writing(tmp_path), [1])
    rewritten(tmp_path / kind / "part-0000-000000.parquet", change)
    with pytest.raises(RunLogError, match=rf"{kind}/part-0000-000000\.parquet {says}.*move it out"):
        getattr(RunLog(tmp_path), kind)()


def test_a_part_of_an_unknown_session_that_does_not_say_its_start_is_named(tmp_path, writing):
    record(writing(tmp_path), [1])
    stray = tmp_path / "forces/part-0007-000000.parquet"
    shutil.copy(tmp_path / "forces/part-0000-000000.parquet", stray)
    for metadata in ({}, {"start_step": "soon"}, {"start_step": "-3"}, {"start_step": "9" * 40}):
        rewritten(stray, lambda table, metadata=metadata: table.replace_schema_metadata(metadata))
        with pytest.raises(RunLogError, match=r"part-0007-000000\.parquet does not say .* move it out"):
            RunLog(tmp_path).metrics()


def test_a_part_that_claims_more_rows_than_its_bytes_can_mean_is_refused(tmp_path, writing):
    record(writing(tmp_path), [1])
    path = tmp_path / "forces/part-0000-000000.parquet"
    many = 20_000_000
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(many, np.int32)), ["a"])
    zeros = {"tensor": same, "step": pa.array(np.ones(many, np.int64))}
    write_parquet(path, pa.table(zeros))
    with pytest.raises(RunLogError, match=r"part-0000-000000\.parquet .*20,000,000 rows in"):
        RunLog(tmp_path).forces()


def test_five_hundred_mutated_parts_are_named_and_none_gives_a_wrong_number(tmp_path, writing):
    record(writing(tmp_path), range(1, 4))
    want = RunLog(tmp_path).forces()
    path = tmp_path / "forces/part-0000-000000.parquet"
    data, chance = path.read_bytes(), random.Random(0)
    for _ in range(500):
        at, damaged = chance.randrange(len(data)), bytearray(data)
        how = chance.choice(["bit", "byte", "cut", "zeros", "more"])
        if how == "bit":
            damaged[at] ^= 1 << chance.randrange(8)
        elif how == "byte":
            damaged[at] = chance.randrange(256)
        elif how == "cut":
            del damaged[at:]
        elif how == "zeros":
            damaged[at : at + 16] = bytes(len(damaged[at : at + 16]))
        else:
            damaged[at:at] = bytes([chance.randrange(256)])
        path.write_bytes(damaged)
        try:
            table = RunLog(tmp_path).forces()
        except RunLogError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert bytes(damaged) == data
            assert table.equals(want)


# --- beginning anew -----------------------------------------------------------------------------------------


def test_overwriting_removes_the_old_run_with_the_first_row_and_nothing_else(tmp_path, writing):
    first = writing(tmp_path, info={"train": {"seed": 1}, "tensors": TENSORS})
    record(first, range(1, 8))
    first.close()
    others = [
        tmp_path / "notes.txt",
        tmp_path / "forces/notes.parquet",
        tmp_path / "snapshots/mine.safetensors",
    ]
    (tmp_path / "snapshots").mkdir()
    for file in others:
        file.write_text("not ours")
    (tmp_path / "snapshots/step-000003.safetensors").write_text("of the old run")
    before = (tmp_path / "run.json").read_text()
    second = writing(tmp_path, info={"optimizer": {"name": "SGD"}}, overwrite=True)
    assert (tmp_path / "run.json").read_text() == before
    second.close()  # no row came: all is as it was
    assert RunLog(tmp_path).forces()["step"].max() == 7
    third = writing(tmp_path, info={"optimizer": {"name": "SGD"}}, overwrite=True)
    with pytest.raises(RunLogError, match="is being written by another logger"):
        RunWriter(tmp_path, overwrite=True)
    assert RunLog(tmp_path).forces()["step"].max() == 7
    record(third, [1, 2], tensor="b")
    run = RunLog(tmp_path)
    assert run.forces()["step"].tolist() == [1, 2]
    assert run.metrics()["step"].tolist() == [1, 2]
    assert set(run.info) == {"format", "weightdyn", "versions", "created", "sessions", "optimizer"}
    assert run.info["sessions"] == [{"start_step": 0}]
    assert all(file.read_text() == "not ours" for file in others)
    assert not (tmp_path / "snapshots/step-000003.safetensors").exists()


def test_overwriting_leaves_a_run_that_is_resumed(tmp_path, writing):
    first = writing(tmp_path, info={"train": {"seed": 1}})
    record(first, range(1, 8), tensor="a", u_sq=1.0)
    first.close()
    second = writing(tmp_path, 5, overwrite=True)
    record(second, [6], tensor="a", u_sq=2.0)
    second.close()
    third = writing(tmp_path, overwrite=True)
    third.restart(6)  # the optimizer's state was loaded later
    record(third, [7], tensor="a", u_sq=3.0)
    assert seen(RunLog(tmp_path))[0] == {**dict.fromkeys(range(1, 6), 1.0), 6: 2.0, 7: 3.0}
    assert RunLog(tmp_path).info["train"] == {"seed": 1}


@pytest.mark.parametrize("start_step", [0, 2])
def test_an_overwriting_that_was_interrupted_leaves_no_run_with_holes(
    tmp_path, writing, monkeypatch, start_step
):
    first = writing(tmp_path)
    record(first, [1])
    record(first, [2])
    first.close()
    second = writing(tmp_path, overwrite=True)
    whole, removed = Path.unlink, []

    def killed(self, missing_ok=False):
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(self)
        whole(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            second.append("forces", products(1))
    second._release()
    with pytest.raises(FileNotFoundError, match=r"run\.json does not exist"):
        RunLog(tmp_path)
    with pytest.raises(RunLogError, match="overwrite=True to remove it"):
        writing(tmp_path)
    third = writing(tmp_path, overwrite=True)
    if start_step:
        third.restart(start_step)
    record(third, [start_step + 1])
    assert RunLog(tmp_path).metrics()["step"].tolist() == [start_step + 1]


def test_wrong_arguments_are_named(writing, logged):
    for opening in (RunLog, RunWriter):
        with pytest.raises(ValueError, match=r"path must be .* got ''"):
            opening("")
    with pytest.raises(ValueError, match="overwrite must be True or False, got 1"):
        RunWriter(None, overwrite=1)
    with pytest.raises(ValueError, match=r"start_step .* -1"):
        RunWriter(None, start_step=-1)
    with pytest.raises(ValueError, match="at must be 'before' or 'after', got 'during'"):
        logged[0].forces(at="during")
    with pytest.raises(ValueError, match="order must be"):
        logged[0].forces(order="third")
    with pytest.raises(ValueError, match="by='head'"):
        logged[0].forces(by="head")
    writer = writing(None)
    record(writer, [1])
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.append("metrics", {"step": 2})
    assert len(writer.run().metrics()) == 1


# --- looking at it ------------------------------------------------------------------------------------------


def test_the_repr_says_what_is_there(out, writing):
    writer = writing(out, info={"tensors": TENSORS, "optimizer": {"name": "AdamW"}})
    record(writer, range(10, 1001, 10))
    writer.append(
        "weibull", {"step": 0, "tensor": "a.weight", "k": 1, "lam": 1, "r_squared": 1, "ks": 0, "n": 3}
    )
    run = writer.run()
    assert run.path == out
    assert repr(run).splitlines() == [
        "RunLog in memory" if out is None else f"RunLog('{out}')",
        "  optimizer   AdamW",
        "  tensors     3 with 75 weights",
        "  forces      300 rows, updates 10–1,000 (100 recorded)",
        "  weibull     1 rows, updates 0–0 (1 recorded)",
        "  metrics     100 rows, updates 10–1,000 (100 recorded): loss",
    ]
    writer.describe(optimizer={"name": "<b>"})
    page = run._repr_html_()
    assert "&lt;b&gt;" in page
    assert "300 rows, updates 10–1,000" in page
    assert page.count("<tr>") == page.count("</tr>") == 5
