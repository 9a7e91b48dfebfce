import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from weightdyn.checkpoints.published import (
    NUMEL,
    NUMEL_LLAMA,
    NUMEL_SELECTION,
    read_published_forces,
    read_published_recovery,
    read_published_trajectory,
)
from weightdyn.core.tables import FORCE_TABLE, FORCES, PARTS, budget
from weightdyn.explain.trajectory import closure, integrate, phases

REFERENCE = os.environ.get("WEIGHTDYN_REFERENCE")
needs_reference = pytest.mark.skipif(
    not REFERENCE, reason="WEIGHTDYN_REFERENCE is not set to a folder with the public data"
)
DATA = Path(REFERENCE or ".") / "Weibull_WeightScale_dynamics" / "derived_data"
BASELINE = DATA / "self_train" / "baseline_force.jsonl"


@pytest.fixture
def logged(tmp_path):
    """A log in the published format, by a float64 loop that keeps the weights before each step."""
    rng = np.random.default_rng(0)
    w, weight_decay = rng.normal(size=50), 0.1
    lines, truth = [], []
    for step in range(1, 31):
        lr = 0.02 / step
        u = rng.normal(size=50) - 0.4 * w
        new = (1 - lr * weight_decay) * w - lr * u
        shrink = 1 - lr * weight_decay
        truth.append(
            {
                "norm_sq": w @ w,
                "norm_sq_after": new @ new,
                "alignment": -2 * lr * shrink * (w @ u),
                "injection": lr**2 * (u @ u),
                "decay": (shrink**2 - 1) * (w @ w),
            }
        )
        lines.append(
            {
                "step": step,
                "eta": lr,
                "true_align_sub": 0.0,
                "true_align_full": 2 * lr * (new @ u),
                "inj_full": lr**2 * (u @ u),
                "dec_full": 2 * lr * weight_decay * (new @ new),
                "rms": np.sqrt(new @ new / NUMEL),
            }
        )
        w = new
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path, pd.DataFrame(truth)


def test_a_log_of_after_step_products_yields_the_forces_before_the_step(logged):
    path, truth = logged
    table = read_published_forces(path, weight_decay=0.1)
    assert list(table) == [*FORCE_TABLE, "split"]
    assert np.allclose(table[list(truth)], truth, rtol=1e-9)
    assert table["role"].unique().tolist() == ["transmission"]
    assert (table["numel"] == NUMEL).all()
    assert closure(table)["closure"].item() < 1e-9


def test_the_uncorrected_alignment_is_too_large_by_twice_the_injection(logged):
    path, truth = logged
    after = read_published_forces(path, weight_decay=0.1, at="after")
    excess = after["alignment"] - truth["alignment"]
    rate = 0.1 * after["lr"]  # ηλ: what is left is that much smaller than the forces
    left = excess - 2 * truth["injection"]
    assert (left.abs() <= 2 * rate * (truth["alignment"].abs() + truth["injection"])).all()
    assert np.allclose(after["norm_sq"], truth["norm_sq"], rtol=1e-9)


@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.0])
def test_memory_is_that_of_white_noise_and_drift_the_rest(logged, beta1):
    table = read_published_forces(logged[0], weight_decay=0.1, beta1=beta1)
    lr = table["lr"].to_numpy()
    for t in range(1, 31):  # every update is in the log: the sum itself
        s = np.arange(1, t)
        rho = beta1**s * (1 + beta1 ** (t - s)) / (1 + beta1**t)
        kept = np.array([np.prod(1 - lr[t - k : t - 1] * 0.1) for k in s])
        null = 2 * (1 - lr[t - 1] * 0.1) * (rho * kept * lr[t - 1 - s]).sum() / lr[t - 1]
        row = table.iloc[t - 1]
        assert row["memory"] == pytest.approx(null * row["injection"], rel=1e-9, abs=1e-15)
    assert np.allclose(table["drift"] + table["memory"], table["alignment"], rtol=1e-12)
    assert (table["memory_null"] == table["memory"]).all()
    assert table["signal"].isna().all()
    assert (table["split"] == "white noise").all()
    assert np.allclose(budget(table, kind="drift").filter(like="_share").sum(axis=1), 1)


def test_a_log_with_gaps_takes_its_learning_rates_between_as_on_a_line_and_warms_up_from_zero(tmp_path):
    def log(steps, rate):
        norm = NUMEL * 0.02**2
        lines = [
            {
                "step": t,
                "eta": rate(t),
                "true_align_full": -1.0,
                "inj_full": 0.1,
                "dec_full": 0.02 * rate(t) * norm,
            }
            | {"rms": 0.02}
            for t in steps
        ]
        (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return read_published_forces(tmp_path / "log.jsonl").set_index("step")["memory"]

    def rate(t):
        return 1e-3 * min(t / 200, 1.0, (1200 - t) / 600)

    whole = log(range(1, 1001), rate)
    for steps in (range(50, 1001, 50), [300, 600, 1000]):
        some = log(steps, rate)
        assert np.allclose(some, whole[some.index], rtol=1e-9)


def test_the_parts_are_those_before_the_step_alone(logged):
    after = read_published_forces(logged[0], weight_decay=0.1, at="after")
    assert after[list(PARTS)].isna().all(axis=None)
    assert after["split"].isna().all()
    with pytest.raises(ValueError, match="has no drift"):
        budget(after, kind="drift")
    for beta1 in (1.0, -0.1, math.nan):
        with pytest.raises((TypeError, ValueError), match="beta1 must be a number"):
            read_published_forces(logged[0], weight_decay=0.1, beta1=beta1)


def test_queries_and_keys_are_rows_of_their_own_where_they_were_logged(tmp_path, logged):
    lines = [json.loads(line) for line in logged[0].read_text().splitlines() if line]
    scale = NUMEL / NUMEL_LLAMA  # the same norms in a LLaMA shape
    lines = [line | {"rms": line["rms"] * np.sqrt(scale)} for line in lines]
    names = {"true_align_full": "sel_align", "inj_full": "sel_inj", "dec_full": "sel_dec"}
    both = [
        line
        | {theirs: line[name] for name, theirs in names.items()}
        | {"sel_rms": line["rms"] * np.sqrt(NUMEL_LLAMA / NUMEL_SELECTION)}
        for line in lines
    ]
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, both)))
    table = read_published_forces(tmp_path / "both.jsonl", weight_decay=0.1)
    assert table["role"].tolist() == ["transmission", "selection"] * 30
    assert table["numel"].tolist() == [NUMEL_LLAMA, NUMEL_SELECTION] * 30
    sides = [table[table["role"] == role].reset_index(drop=True) for role in ("transmission", "selection")]
    for name in ("norm_sq", *FORCES, "drift", "memory"):
        assert np.allclose(sides[0][name], sides[1][name], rtol=1e-9)
    del both[7]["sel_inj"]
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, both)))
    with pytest.raises(ValueError, match=r"both\.jsonl, line 8, is not a record .*'sel_inj'"):
        read_published_forces(tmp_path / "both.jsonl", weight_decay=0.1)


def test_a_weight_decay_that_the_log_contradicts_is_refused(logged):
    path, _ = logged
    with pytest.raises(ValueError, match=r"weight_decay=0.01 does not agree .* λ = 0.1 there"):
        read_published_forces(path)
    with pytest.raises(ValueError, match="at must be 'before' or 'after', got 'during'"):
        read_published_forces(path, at="during")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("line", ['{"step": 1}', "[1, 2]", "nonsense", '{"step": null}'])
def test_a_foreign_line_is_named_by_file_and_number(tmp_path, logged, line):
    path = tmp_path / "foreign.jsonl"
    path.write_text(logged[0].read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"foreign\.jsonl, line 2, is not a record of a published force log"):
        read_published_forces(path, weight_decay=0.1)


RECORD = {"step": 5, "eta": 1e-3, "true_align_full": 0.1, "inj_full": 0.1, "dec_full": 0.1, "rms": 0.02}


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1.5}, {"step": -1}, {"step": "5"}, {"step": 10**12}, {"eta": 0}, {"eta": math.nan}, {"rms": 0},
        {"rms": -1}, {"inj_full": -1}, {"true_align_full": math.inf}, {"dec_full": None},
    ],
)  # fmt: skip
def test_a_record_with_a_number_that_cannot_be_is_named(tmp_path, change):
    (tmp_path / "odd.jsonl").write_text(json.dumps({**RECORD, **change}))
    with pytest.raises(ValueError, match=rf"odd\.jsonl, line 1, .*{next(iter(change))} must be"):
        read_published_forces(tmp_path / "odd.jsonl")


def test_two_records_of_one_step_are_refused(tmp_path):
    (tmp_path / "twice.jsonl").write_text(f"{json.dumps(RECORD)}\n{json.dumps(RECORD)}\n")
    with pytest.raises(ValueError, match=r"twice\.jsonl has two records of step 5: keep one"):
        read_published_forces(tmp_path / "twice.jsonl")


@pytest.mark.parametrize(
    "reader", [read_published_forces, read_published_recovery, read_published_trajectory]
)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b"\xff\xfe\x00", b"[[]]", b"[null]", b'{"step": 1}', b'[{"step": "a"}]'],
)
def test_foreign_files_are_named_with_the_remedy(tmp_path, reader, content):
    (tmp_path / "foreign.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign\.json.*(download|fetch|copy) it again"):
        reader(tmp_path / "foreign.json")
    with pytest.raises(FileNotFoundError):
        reader(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=f"{tmp_path.name} is a folder"):
        reader(tmp_path)
    with pytest.raises(TypeError, match="path must be a path"):
        reader(None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize(
    "reader", [read_published_forces, read_published_recovery, read_published_trajectory]
)
def test_pipes_are_refused_without_waiting(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json is a pipe"):
        reader(tmp_path / "pipe.json")


@pytest.mark.parametrize("number", [math.nan, math.inf, "1.2", None, -1.0])
def test_a_trajectory_with_what_is_no_fit_is_refused(tmp_path, number):
    fit = {"step": 5, "k": number, "lambda": 0.02, "sigma": 0.022}
    (tmp_path / "odd.json").write_text(json.dumps([fit]))
    with pytest.raises(ValueError, match=r"odd\.json is not a published trajectory.*k must be"):
        read_published_trajectory(tmp_path / "odd.json")


def test_an_empty_log_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no records"):
        read_published_forces(tmp_path / "empty.jsonl")


def test_a_trajectory_is_a_weibull_table_with_or_without_layers(tmp_path):
    fits = [{"k": 1.2, "lambda": 0.02, "sigma": 0.022}, {"k": 1.1, "lambda": 0.03, "sigma": 0.035}]
    pooled = [{"step": 20 - 10 * i, **fit, "lambda_over_sigma": 0.9} for i, fit in enumerate(fits)]
    layered = [{"step": 5, "layers": {"1": fits[0], "0": fits[1]}}]
    (tmp_path / "pooled.json").write_text(json.dumps(pooled))
    (tmp_path / "layered.json").write_text(json.dumps(layered))
    table = read_published_trajectory(tmp_path / "pooled.json")
    assert list(table) == ["step", "lam", "k", "sigma"]
    assert table.to_numpy().tolist() == [[10, 0.03, 1.1, 0.035], [20, 0.02, 1.2, 0.022]]
    table = read_published_trajectory(tmp_path / "layered.json")
    assert list(table) == ["step", "layer", "lam", "k", "sigma"]
    assert table["layer"].tolist() == [0, 1]
    assert table["lam"].tolist() == [0.03, 0.02]


@pytest.mark.parametrize("text", ["{", '{"1": 1.1}', '[{"step": 1}]', "[1]", "3"])
def test_a_foreign_trajectory_is_named(tmp_path, text):
    (tmp_path / "foreign.json").write_text(text)
    with pytest.raises(ValueError, match=r"foreign\.json is not a published trajectory"):
        read_published_trajectory(tmp_path / "foreign.json")


# The paper's data


def sigma_error(table):
    """Relative error of σ = ‖w‖/√n, integrated from the first row, at every row."""
    path = integrate(table)
    return np.sqrt(path["norm_sq_predicted"] / path["norm_sq_after"]).to_numpy() - 1


@needs_reference
def test_the_correction_closes_the_integration_offset_of_the_baseline():
    before = read_published_forces(BASELINE)
    after = read_published_forces(BASELINE, at="after")
    assert before["step"].tolist() == list(range(250, 20_001, 250))
    assert abs(sigma_error(before)[-1]) <= 0.002  # 0.10 %
    assert sigma_error(after)[-1] == pytest.approx(0.054, abs=0.001)  # 5.37 %
    assert abs(sigma_error(before)).max() <= 0.003  # on the way, too: 0.24 %


@needs_reference
def test_the_correction_closes_the_offset_at_a_third_of_the_learning_rate():
    path = DATA / "revision" / "eta_3e4" / "v1b_spline_true.jsonl"
    assert abs(sigma_error(read_published_forces(path))).max() <= 0.002  # 0.12 %
    assert sigma_error(read_published_forces(path, at="after"))[-1] == pytest.approx(0.030, abs=0.001)


@needs_reference
@pytest.mark.parametrize("at", ["before", "after"])
def test_alignment_is_88_to_94_percent_of_the_budget_in_the_rise(at):
    # The rise as `phases` has it: until σ is half-way up to its peak. Over the whole climb it is 85 %.
    table = read_published_forces(BASELINE, at=at)
    table["sigma"] = np.sqrt(table["norm_sq_after"] / table["numel"])
    rise = table[table["step"] <= phases(table, "sigma")["half_step"].item()]
    shares = budget(rise)["alignment_share"]
    assert shares.between(0.88, 0.94).all()
    assert 0.88 <= rise["alignment"].sum() / sum(rise[name].abs().sum() for name in FORCES) <= 0.94


@needs_reference
def test_force_log_and_weibull_trajectory_of_the_baseline_tell_of_one_run():
    forces = read_published_forces(BASELINE).set_index("step")
    weibull = read_published_trajectory(DATA / "self_train" / "lambda_trajectory_pythia2.json")
    both = weibull.set_index("step").join(forces, how="inner")
    assert len(both) == 20
    assert np.allclose(both["sigma"], np.sqrt(both["norm_sq_after"] / NUMEL), rtol=2e-4)
    layers = read_published_trajectory(DATA / "self_train" / "per_layer_lambda_pythia2.json")
    assert layers["layer"].unique().tolist() == list(range(6))
    mean_square = (layers["sigma"] ** 2).groupby(layers["step"]).mean()
    assert np.allclose(np.sqrt(mean_square), weibull.set_index("step")["sigma"], rtol=1e-3)


@needs_reference
def test_alignment_in_the_public_logs_is_near_the_memory_of_white_noise_and_queries_and_keys_are_below():
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("published_shares", benchmarks / "published_shares.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = module.published_shares(REFERENCE)
    assert table.groupby(["run", "role"], observed=True)["tenth"].apply(list).map(len).tolist() == [10] * 5
    early = table[table["tenth"] <= 6]
    matrices = early[early["role"] == "transmission"]
    assert matrices["share"].between(0.942, 0.959).all()
    assert np.allclose(matrices["white_noise"], 18 / 19, atol=2e-4)
    usual = matrices[~matrices["run"].str.contains("3e-4")]
    assert usual["of_2b"].between(0.91, 1.14).all()
    assert matrices[matrices["run"].str.contains("3e-4")]["of_2b"].between(1.15, 1.29).all()
    selection = early[early["role"] == "selection"].set_index("tenth")["kappa"]
    assert selection[1] < 0.6
    assert selection.is_monotonic_increasing
    # By hand, of the baseline's first tenth.
    log = pd.read_json(BASELINE, lines=True).query("step <= 2000")
    alignment = (-log["true_align_full"] - 2 * log["inj_full"]).sum()
    first = table.iloc[0]
    assert first["share"] == pytest.approx(alignment / (alignment + log["inj_full"].sum()), rel=1e-4)
    assert first["of_2b"] == pytest.approx(alignment / (18 * log["inj_full"].sum()), rel=1e-4)
