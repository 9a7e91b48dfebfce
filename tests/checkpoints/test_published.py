import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from weightdyn.checkpoints.published import (
    NUMEL,
    read_published_forces,
    read_published_recovery,
    read_published_trajectory,
)
from weightdyn.core.tables import FORCE_TABLE, FORCES, budget
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
    assert list(table) == list(FORCE_TABLE)
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
        {"step": 1.5}, {"step": -1}, {"step": "5"}, {"eta": 0}, {"eta": math.nan}, {"rms": 0}, {"rms": -1},
        {"inj_full": -1}, {"true_align_full": math.inf}, {"dec_full": None},
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
