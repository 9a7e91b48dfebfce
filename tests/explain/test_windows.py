"""Windows of a run and their standard errors, against plain loops and simulated noise."""

import numpy as np
import pandas as pd
import pytest

import weightdyn as wd


def table(steps=100, every=1, tensors=("a", "b"), seed=0):
    rng = np.random.default_rng(seed)
    step = np.arange(every, steps * every + 1, every)
    parts = []
    for name in tensors:
        values = {force: rng.normal(size=steps) for force in ("drift", "memory", "injection", "decay")}
        part = pd.DataFrame(
            {"step": step, "span": 1, "tensor": name, "role": "value", "lr": step * 1e-3, **values}
        )
        norm = 50 + np.cumsum(rng.random(steps))
        parts.append(
            part.assign(
                alignment=part["drift"] + part["memory"],
                memory_null=2.0,
                signal=0.1,
                numel=7,
                norm_sq=norm,
                norm_sq_after=norm + 0.5,
                weight_decay=0.1,
            )
        )
    return pd.concat(parts).sort_values("step", ignore_index=True)


@pytest.mark.parametrize("every", [1, 10])
def test_windows_are_means_of_their_rows(every):
    rows = table(100, every)
    smooth = wd.smooth(rows, windows=4)
    assert len(smooth) == 8
    for i, (_, window) in enumerate(rows.groupby((rows["step"] - every) * 4 // (100 * every))):
        for name in ("a", "b"):
            own = window[window["tensor"] == name]
            got = smooth[smooth["tensor"] == name].iloc[i]
            for column in (
                "alignment",
                "injection",
                "decay",
                "drift",
                "memory",
                "memory_null",
                "signal",
                "lr",
            ):
                assert got[column] == pytest.approx(own[column].mean(), rel=1e-12), column
            assert got["diffusion"] == pytest.approx((own["injection"] + own["memory"]).mean())
            assert got["kappa"] == pytest.approx(own["memory"].sum() / own["memory_null"].sum())
            assert (got["norm_sq"], got["norm_sq_after"]) == (
                own["norm_sq"].iloc[0],
                own["norm_sq_after"].iloc[-1],
            )
            assert got["step"] == own["step"].max()
            assert got["span"] == own["step"].max() - own["step"].min() + 1
            assert got["rows"] == len(own) == 25
    np.testing.assert_allclose(smooth["alignment"], smooth["drift"] + smooth["memory"], rtol=1e-12)


def test_windows_of_a_number_of_updates_end_at_its_multiples():
    smooth = wd.smooth(table(95), by="model", updates=30)
    assert smooth["step"].tolist() == [30, 60, 90, 95]
    assert smooth["rows"].tolist() == [30, 30, 30, 5]
    assert smooth["drift_se"].isna().tolist() == [False, False, False, True]  # five rows tell nothing


def test_rows_that_cover_many_updates_count_for_as_many():
    rows = pd.DataFrame({"step": [1, 4, 8], "span": [1, 3, 4], "norm_sq": 1.0, "alignment": [8.0, 1.0, 2.0]})
    smooth = wd.smooth(rows.assign(injection=0.0, decay=0.0), windows=1)
    assert smooth["alignment"].item() == pytest.approx((8 + 3 * 1 + 4 * 2) / 8)
    assert smooth["span"].item() == 8
    assert "drift_se" not in smooth


def test_the_standard_error_of_drift_covers_its_mean_also_where_drift_moves():
    hits = 0
    for seed in range(400):
        rows = table(60, tensors=("a",), seed=seed)
        rows["drift"] += 0.05 * rows["step"]
        got = wd.smooth(rows, windows=1).iloc[0]
        hits += abs(got["drift"] - 0.05 * 30.5) <= 2 * got["drift_se"]
    assert 0.92 <= hits / 400 <= 0.98  # 95.4 % of a normal law, 95 % of Student's with 58


def test_the_standard_error_of_memory_knows_that_its_noise_cancels_and_errs_to_the_large_side():
    rng = np.random.default_rng(1)
    errors, said = [], []
    for _ in range(200):
        noise = rng.normal(size=1100)
        m = np.zeros(1100)
        for t in range(1, 1100):
            m[t] = 0.9 * m[t - 1] + 0.1 * noise[t]
        values = (m - noise)[100:]  # alignment's noise less drift's: their sums nearly agree
        rows = table(1000, tensors=("a",)).assign(memory=values)
        got = wd.smooth(rows, windows=1).iloc[0]
        errors.append(got["memory"])
        said.append(got["memory_se"])
    assert np.std(errors) <= np.mean(said) <= values.std() / np.sqrt(1000) / 1.5


def test_groups_are_summed_first_and_a_run_is_taken():
    rows = table()
    pd.testing.assert_frame_equal(
        wd.smooth(rows, by="role", windows=3), wd.smooth(wd.aggregate(rows, "role"), windows=3)
    )
    assert wd.smooth(rows.iloc[:0]).empty


def test_a_first_update_has_no_signal_and_takes_none_from_its_window():
    rows = table(40, tensors=("a",))
    rows["signal"] = np.append(np.nan, np.arange(39.0))
    assert wd.smooth(rows, windows=2)["signal"].tolist() == pytest.approx([9.0, 28.5])
    assert wd.smooth(rows.assign(signal=np.nan), windows=2)["signal"].isna().all()


def test_without_memory_there_is_no_kappa():
    assert wd.smooth(table().assign(memory_null=0.0))["kappa"].isna().all()


@pytest.mark.parametrize(
    ("arguments", "message"), [({"windows": 0}, "windows must be"), ({"updates": 0}, "updates must be")]
)
def test_wrong_windows_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        wd.smooth(table(), **arguments)


# --- what the other functions make of the parts ---------------------------------------------------------------


def test_the_budget_of_drift_diffusion_and_decay():
    rows = table()
    got = wd.budget(rows, kind="drift")
    diffusion = rows["injection"] + rows["memory"]
    total = rows["drift"].abs() + diffusion.abs() + rows["decay"].abs()
    np.testing.assert_allclose(got["diffusion_share"], diffusion.abs() / total)
    np.testing.assert_allclose(got["drift_share"], rows["drift"].abs() / total)
    np.testing.assert_allclose(got["decay_share"], rows["decay"].abs() / total)
    np.testing.assert_allclose(got["net"], rows["drift"] + diffusion + rows["decay"])
    assert "alignment_share" not in got
    assert wd.budget(rows, by="model", kind="drift")["net"].sum() == pytest.approx(got["net"].sum())


def test_a_table_that_knows_no_drift_says_how_to_come_by_one():
    for rows in (table().assign(drift=np.nan), table().drop(columns=["drift", "memory"])):
        with pytest.raises(
            ValueError, match=r"table has no drift: it is measured by ForceLogger\(drift=True\)"
        ):
            wd.budget(rows, kind="drift")
    some = table()
    some.loc[some["tensor"] == "a", "drift"] = np.nan
    assert wd.budget(some, kind="drift")["drift_share"].isna().sum() == 100
    assert wd.aggregate(some, "model")["drift"].isna().all()  # a sum over what is not known is not known


def test_what_each_part_has_added_adds_up_to_the_norm():
    rows = table(tensors=("a",))
    path = wd.integrate(rows)
    for name in ("alignment", "injection", "decay", "drift", "memory"):
        np.testing.assert_allclose(path[name], rows[name].cumsum(), rtol=1e-9)
    total = rows["norm_sq"].iloc[0] + path[["drift", "memory", "injection", "decay"]].sum(axis=1)
    np.testing.assert_allclose(path["norm_sq_predicted"], total, rtol=1e-12)
    sparse = wd.integrate(rows.assign(drift=3.0, step=rows["step"] * 10))
    assert sparse["drift"].iloc[-1] == pytest.approx(3.0 * (99 * 10 + 1))


def test_closure_tells_kappa():
    rows = table()
    got = wd.closure(rows)
    want = rows.groupby("tensor")["memory"].sum() / rows.groupby("tensor")["memory_null"].sum()
    np.testing.assert_allclose(got["kappa"], want, rtol=1e-12)
    assert wd.closure(rows, by="model")["kappa"].item() == pytest.approx(rows["memory"].sum() / 400)
    assert wd.closure(rows.assign(memory_null=0.0))["kappa"].isna().all()


def test_phases_say_what_drives_a_rise():
    t = np.arange(1, 101)
    norm = 10 + np.minimum(t, 60) - 0.3 * np.maximum(t - 60, 0)
    rows = pd.DataFrame({"step": t, "span": 1, "norm_sq": norm, "injection": 0.1, "decay": -0.1})
    grows = rows.assign(drift=0.9, memory=0.1, alignment=1.0)
    assert wd.phases(grows, "norm_sq")["driven_by"].item() == "drift"
    wanders = rows.assign(drift=-0.2, memory=1.2, alignment=1.0)
    assert wd.phases(wanders, "norm_sq")["driven_by"].item() == "diffusion"
    assert wd.phases(rows.assign(alignment=1.0), "norm_sq")["driven_by"].isna().all()
    weibull = pd.DataFrame({"step": t, "lam": norm, "k": 1.2})
    assert wd.phases(weibull)["driven_by"].isna().all()
    assert wd.phases(weibull, forces=wanders)["driven_by"].item() == "diffusion"
    falls = weibull.assign(lam=-norm + 90 - t)
    assert wd.phases(falls, forces=wanders)["driven_by"].isna().all()


def test_what_drives_a_rise_is_not_decided_by_where_the_log_is_dense():
    step = np.array([*range(1, 51), *range(100, 501, 50)])
    early = step <= 50
    rows = pd.DataFrame({"step": step, "span": 1, "norm_sq": 10.0 + step, "injection": 0.0, "decay": 0.0})
    rows = rows.assign(drift=np.where(early, 1.0, 0.0), memory=np.where(early, 0.0, 1.0))
    rows = rows.assign(
        alignment=rows["drift"] + rows["memory"]
    )  # 51 of 60 rows, and 60 of 500 updates, drift
    assert wd.phases(rows, "norm_sq")["driven_by"].item() == "diffusion"


def test_what_drives_a_rise_is_told_of_tensors_with_spans_of_their_own():
    a = pd.DataFrame({"tensor": "a", "step": [100, 200], "span": 100, "drift": 1.0, "memory": 0.0})
    b = pd.DataFrame({"tensor": "b", "step": [200], "span": 200, "drift": 0.0, "memory": 1.5})
    rows = pd.concat([a, b]).assign(role="value", norm_sq=1.0, injection=0.0, decay=0.0)
    rows = rows.assign(alignment=rows["drift"] + rows["memory"])
    lam = pd.DataFrame({"step": [0, 100, 200], "role": "value", "lam": [1.0, 2.0, 3.0], "k": 1.2})
    assert wd.phases(lam, forces=rows)["driven_by"].item() == "diffusion"
    with pytest.raises(ValueError, match=r"forces lacks the columns \['role'\]"):
        wd.phases(lam, forces=rows.drop(columns="role"))


def test_kappa_has_its_error_wherever_it_stands():
    rows = table()
    got = wd.closure(rows).set_index("tensor")
    want = wd.smooth(rows, windows=1).set_index("tensor")
    for name in ("kappa", "kappa_se"):
        np.testing.assert_allclose(got[name], want[name].reindex(got.index), rtol=1e-12)
    some = rows.copy()
    some.loc[some["tensor"] == "a", "memory"] = np.nan
    assert wd.closure(some).set_index("tensor")["kappa"].isna().to_dict() == {"a": True, "b": False}
    assert wd.closure(rows.assign(memory=np.nan))["kappa_se"].isna().all()


def test_what_is_inferred_stays_so_in_sums_and_windows():
    rows = table()
    mixed = rows.assign(split=np.where(rows["tensor"] == "a", "white noise", None))
    assert set(wd.aggregate(mixed, "model")["split"]) == {"white noise"}
    assert set(wd.budget(mixed, by="role", kind="drift")["split"]) == {"white noise"}
    assert set(wd.smooth(mixed, windows=2).query("tensor == 'a'")["split"]) == {"white noise"}
    assert set(wd.smooth(mixed, by="model", windows=2)["split"]) == {"white noise"}
    assert wd.aggregate(rows.assign(split=None), "model")["split"].isna().all()
    assert "split" not in wd.aggregate(rows, "model")
