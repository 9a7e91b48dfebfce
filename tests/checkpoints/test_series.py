"""A measured series against NumPy on the whole tensors, and what happens to checkpoints that are not sound."""

import importlib.util
import json
import os
import pickle
import shutil

import joblib
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from weightdyn.checkpoints import measure as measuring
from weightdyn.checkpoints import series as checkpoints
from weightdyn.checkpoints.audit import audit_recipe
from weightdyn.checkpoints.measure import identical_steps
from weightdyn.checkpoints.recipe import Recipe
from weightdyn.checkpoints.recovery import recover_forces
from weightdyn.checkpoints.series import Checkpoints
from weightdyn.cli import app
from weightdyn.core.tables import CHECKPOINT_TABLE
from weightdyn.files.weightfiles import CheckpointError
from weightdyn.train.trainer import TrainConfig, train
from weightdyn.weibull.fit import fit_weibull

CONFIG = {"model_type": "gpt_neox", "hidden_size": 16, "num_attention_heads": 2}
QKV = "gpt_neox.layers.0.attention.query_key_value.weight"
UP = "gpt_neox.layers.10.mlp.dense_h_to_4h.weight"
O2 = "gpt_neox.layers.2.attention.dense.weight"
NORM = "gpt_neox.layers.0.input_layernorm.weight"
STEPS = [0, 1, 2, 100, 1000]


def weights(step):
    generator = torch.Generator().manual_seed(step)
    shapes = {UP: (40, 16), QKV: (48, 16), O2: (16, 16), NORM: (16,)}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def heads(qkv):
    """q, k and v of GPT-NeoX's fused rows (heads, 3, head_dim)."""
    parts = qkv.reshape(2, 3, 8, 16)
    return {f"{QKV}[{name}]": parts[:, i].reshape(-1) for i, name in enumerate("qkv")}


def save(step, folder, name="step{}.safetensors"):
    safetensors.torch.save_file(weights(step), folder / name.format(step))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    for step in STEPS:
        save(step, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def measure(source, gram="none", **options):
    series = source if isinstance(source, Checkpoints) else Checkpoints(source)
    return series.measure(gram, progress=False, n_jobs=2, **options)


@pytest.fixture
def read(monkeypatch):
    """Names of the files of which rows are read."""
    files = []
    rows = measuring.Stored.read

    def reading(stored, start=0, stop=None):
        files.append(stored.file.name)
        return rows(stored, start, stop)

    monkeypatch.setattr(measuring.Stored, "read", reading)
    return files


def test_norms_fits_and_inner_products_are_those_of_the_whole_tensors(folder):
    table = measure(folder, "full")
    assert list(table) == list(CHECKPOINT_TABLE)
    assert table["step"].drop_duplicates().tolist() == STEPS
    first = table[table["step"] == 0]
    names = [f"{QKV}[{part}]" for part in "qkv"]
    assert first["tensor"].tolist() == [*names, NORM, O2, UP], "layer 2 comes before layer 10"
    assert first["component"].tolist() == ["q", "k", "v", "norm", "o", "up"]
    assert first["layer"].tolist() == [0, 0, 0, 0, 2, 10]
    assert first["numel"].tolist() == [256, 256, 256, 16, 256, 640]
    every = [{**weights(step), **heads(weights(step)[QKV])} for step in STEPS]
    for name in first["tensor"]:
        rows = table[table["tensor"] == name]
        x = np.stack([found[name].double().numpy().ravel() for found in every])
        truth = x @ x.T
        for i, row in enumerate(rows.itertuples()):
            assert row.dot_steps.tolist() == STEPS[: i + 1]
            np.testing.assert_allclose(row.dots, truth[i, : i + 1], rtol=1e-13, atol=1e-15)
            assert row.norm_sq == pytest.approx(truth[i, i], rel=1e-14)
            fit = fit_weibull(every[i][name])
            assert (row.k, row.lam, row.n) == (fit.k, fit.lam, fit.n)


def test_a_band_has_neighbours_alone_and_none_has_nothing(folder):
    full, band = measure(folder, "full"), measure(folder, "band")
    for step, wide, narrow, steps in zip(
        full["step"], full["dots"], band["dots"], band["dot_steps"], strict=True
    ):
        assert steps.tolist() == STEPS[: STEPS.index(step) + 1][-2:]
        np.testing.assert_array_equal(narrow, wide[-2:])
    nothing = measure(folder)
    assert nothing[["dots", "dot_steps"]].isna().all(axis=None)


def test_tensors_that_are_read_in_pieces_give_the_same(folder, monkeypatch):
    whole = measure(folder, "full", cache=False)
    monkeypatch.setattr(measuring, "CHUNK", 100)
    monkeypatch.setattr(measuring, "_GRAM", 200)
    monkeypatch.setattr(checkpoints, "_BUNDLE", 300)
    pieces = measure(folder, "full", cache=False)
    for name, accuracy in {"norm_sq": 1e-13, "k": 1e-13, "lam": 1e-13, "n": 0, "rounding": 1e-6}.items():
        np.testing.assert_allclose(pieces[name], whole[name], rtol=accuracy)
    for a, b in zip(pieces["dots"], whole["dots"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    band = measure(folder, "band", cache=False)
    np.testing.assert_allclose(band["dots"].iloc[-1], whole["dots"].iloc[-1][-2:], rtol=1e-12)


@pytest.mark.parametrize("grid", ["float16", "bfloat16", "integers", "half of it", "none"])
def test_fits_of_large_tensors_in_pieces_are_those_of_the_whole(tmp_path, monkeypatch, grid):
    x = torch.randn(1200, 1000, generator=torch.Generator().manual_seed(0)) * 0.02
    if grid == "integers":
        x = (x * 2000).round() * 0.003
    elif grid == "half of it":  # the pieces that are exact join those in bins
        x[:600] = x[:600].half().float()
    elif grid != "none":
        x = x.to(getattr(torch, grid)).float()
    safetensors.torch.save_file({UP: x}, tmp_path / "step1.safetensors")
    monkeypatch.setattr(measuring, "CHUNK", 400_000)
    row = measure(tmp_path, cache=False).iloc[0]
    fit = fit_weibull(x.numpy().ravel())
    accuracy = 2e-4 if grid == "half of it" else 1e-9
    assert row["n"] == fit.n
    np.testing.assert_allclose([row["lam"], row["k"]], [fit.lam, fit.k], rtol=accuracy)


def test_heads_have_rows_of_their_own_for_norms_and_inner_products(folder):
    table = measure(folder, "band", views="head")
    rows = table[table["tensor"] == f"{QKV}[k.1]"]
    now, before = (weights(step)[QKV].reshape(2, 3, 8, 16)[1, 1].double() for step in (1000, 100))
    assert rows["norm_sq"].iloc[-1] == pytest.approx(float((now**2).sum()), rel=1e-14)
    assert rows["dots"].iloc[-1][-2] == pytest.approx(float((now * before).sum()), rel=1e-13)


def test_parts_that_lie_in_columns_are_cut_as_columns(tmp_path):
    name = "transformer.h.0.attn.c_attn.weight"
    wide = {step: torch.randn(16, 48, generator=torch.Generator().manual_seed(step)) for step in (0, 1)}
    for step, tensor in wide.items():
        safetensors.torch.save_file({name: tensor}, tmp_path / f"step{step}.safetensors")
    config = {"model_type": "gpt2", "n_embd": 16, "n_head": 2}
    table = measure(Checkpoints(tmp_path, config=config), "full", cache=False)
    k = [tensor[:, 16:32].double() for tensor in wide.values()]
    row = table[(table["step"] == 1) & (table["tensor"] == f"{name}[k]")].iloc[0]
    np.testing.assert_allclose(row["dots"], [float((k[1] * part).sum()) for part in k], rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_are_exact_in_every_float_type(tmp_path, dtype):
    x = (torch.randn(300, 300, dtype=torch.float64) * 1e-3).to(dtype)
    x[0, :50] = 0
    safetensors.torch.save_file({"w": x}, tmp_path / "step5.safetensors")
    row = measure(tmp_path, cache=False).iloc[0]
    assert row["norm_sq"] == pytest.approx(float((x.double() ** 2).sum()), rel=1e-13)
    assert row["dtype"] == row["precision"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("scale", [1.0, 1e-2, 2e-5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_the_error_that_rounding_makes(tmp_path, dtype, scale):
    exact = torch.randn(400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    safetensors.torch.save_file({"w": exact.to(dtype)}, tmp_path / "step5.safetensors")
    error = float(((exact.to(dtype).double() - exact) ** 2).sum())
    assert measure(tmp_path, weibull=False, cache=False)["rounding"].item() == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("coarse", [torch.float16, torch.bfloat16])
def test_a_float32_copy_of_something_coarser_is_recognised(tmp_path, coarse):
    exact = torch.randn(200, 200, generator=torch.Generator().manual_seed(1)) * 1e-2
    tensors = {"copy": exact.to(coarse).float(), "true": exact.clone(), "ones": torch.ones(500)}
    safetensors.torch.save_file(tensors, tmp_path / "step5.safetensors")
    table = measure(tmp_path, cache=False).set_index("tensor")
    assert table["dtype"].unique().tolist() == ["float32"]
    name = str(coarse).removeprefix("torch.")
    assert table["precision"].astype(str).to_dict() == {"copy": name, "ones": "float32", "true": "float32"}
    error = float(((exact.to(coarse).double() - exact.double()) ** 2).sum())
    assert table.loc["copy", "rounding"] == pytest.approx(error, rel=0.02)


def shards(folder, tensors, stem, ending, write):
    first = {QKV: tensors[QKV]}
    rest = {name: tensor for name, tensor in tensors.items() if name != QKV}
    names = {}
    for i, part in enumerate((first, rest), 1):
        file = f"{stem}-0000{i}-of-00002.{ending}"
        write(part, folder / file)
        names |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": names}))


def legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


FORMS = {
    "step-{:06d}.safetensors": safetensors.torch.save_file,
    "model_step{}.pt": torch.save,
    "step_{}.pth": legacy,
    "iter_{:07d}.bin": lambda tensors, path: torch.save({"model": tensors, "step": 3}, path),
    "checkpoint-{}": lambda tensors, path: safetensors.torch.save_file(tensors, path / "model.safetensors"),
    "step{}": lambda tensors, path: torch.save(tensors, path / "pytorch_model.bin"),
    "stage1-step{}-tokens5B": lambda tensors, path: shards(
        path, tensors, "model", "safetensors", safetensors.torch.save_file
    ),
    "step{}-unsharded": lambda tensors, path: shards(path, tensors, "pytorch_model", "bin", torch.save),
    "global_step{}": lambda tensors, path: torch.save(
        {"module": tensors}, path / "mp_rank_00_model_states.pt"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_are_found_under_all_these_names_and_forms(tmp_path, form):
    for step in (500, 20):
        path = tmp_path / form.format(step)
        if not path.suffix:
            path.mkdir()
            torch.save({"state": {}}, path / "optimizer.pt")
        FORMS[form](weights(step), path)
    series = Checkpoints(tmp_path)
    assert series.steps == [20, 500]
    assert len(series) == 2
    assert series.tensors()[UP] == ((40, 16), "float32")
    assert torch.equal(series.load(500, UP), weights(500)[UP])
    norms = measure(series, cache=False).set_index(["step", "tensor"])["norm_sq"]
    assert norms[20, O2] == pytest.approx(float((weights(20)[O2].double() ** 2).sum()), rel=1e-13)


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["epoch=0-step=500.ckpt", "epoch=1-step=1000.ckpt", "last.ckpt"], [500, 1000]),
        (["checkpoint-500/", "checkpoint-1000/", "runs/", "tokenizer.json"], [500, 1000]),
        (["step-500/.metadata", "step-1000/.metadata"], [500, 1000]),
        (["global_step500/mp_rank_00_model_states.pt", "global_step1000/", "latest"], [500, 1000]),
    ],
)
def test_folders_of_frameworks_are_found_by_their_steps(tmp_path, names, steps):
    for name in names:
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    assert Checkpoints(tmp_path).steps == steps


def test_the_weights_of_a_lightning_checkpoint_are_read(tmp_path):
    state = {"epoch": 0, "global_step": 500, "state_dict": weights(500), "optimizer_states": [{"state": {}}]}
    torch.save(state, tmp_path / "epoch=0-step=500.ckpt")
    assert torch.equal(Checkpoints(tmp_path).load(500, UP), weights(500)[UP])


def test_what_looks_like_a_checkpoint_and_is_left_out_is_told_once(tmp_path):
    for step in (1, 2):
        save(step, tmp_path)
        save(step, tmp_path, "ema_step{}.safetensors")
    save(1, tmp_path, "step-50K.safetensors")
    with pytest.warns(UserWarning, match="left out") as caught:
        series = Checkpoints(tmp_path)
    assert series.steps == [1, 2]
    assert series.load(1, UP).equal(weights(1)[UP])
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "left out: 'ema' (2 checkpoints, 1 to 2)" in texts[0]
    assert "left out, since they name no step: step-50K" in texts[1]
    assert all(warning.filename == __file__ for warning in caught)
    with pytest.warns(UserWarning, match="step-50K"):
        assert Checkpoints(tmp_path, stage="ema").steps == [1, 2]


def test_checkpoints_that_are_counted_are_said_to_be(tmp_path):
    for i in range(3):
        (tmp_path / f"checkpoint_{i}").mkdir()
        save(i, tmp_path / f"checkpoint_{i}", "model.safetensors")
    with pytest.warns(UserWarning, match=r"numbered 0, 1, …: a count of checkpoints, it seems"):
        series = Checkpoints(tmp_path)
    assert series.counted
    assert sorted(set(measure(series)["step"])) == [0, 1, 2]
    recipe = Recipe(lr=1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"seem to count checkpoints, and a recipe is of updates"):
        recover_forces(series, recipe)
    with pytest.raises(ValueError, match=r"seem to count checkpoints, and a recipe is of updates"):
        audit_recipe(series, recipe)
    updates = Checkpoints({100 * i: tmp_path / f"checkpoint_{i}" for i in range(3)})
    assert set(recover_forces(updates, recipe)["step"]) == {100, 200}
    for i in range(3):
        (tmp_path / f"checkpoint_{i}").rename(tmp_path / f"checkpoint-{i}")
    assert not Checkpoints(tmp_path).counted


def test_a_folder_without_checkpoints_says_what_it_holds(tmp_path):
    with pytest.raises(FileNotFoundError, match="it has none at all"):
        Checkpoints(tmp_path)
    for i in range(7):
        (tmp_path / f"run{i}").mkdir()
    with pytest.raises(FileNotFoundError, match=r"it has run0, run1, run2, run3, run4 … \(7 in all\)"):
        Checkpoints(tmp_path)


def test_other_names_are_given_as_a_mapping(tmp_path):
    for i, name in enumerate(["early", "late"]):
        save(i, tmp_path, name + ".safetensors")
    series = Checkpoints({1: tmp_path / "late.safetensors", 0: tmp_path / "early.safetensors"})
    assert series.steps == [0, 1]
    assert torch.equal(series.load(1, UP), weights(1)[UP])
    with pytest.raises(FileNotFoundError, match=r"give \{step: path\}"):
        Checkpoints(tmp_path)


def test_buffers_scalars_and_integers_are_left_out_and_tied_tensors_counted_once(tmp_path):
    tied = torch.randn(4, 4)
    state = {
        "embed_in.weight": tied,
        "embed_out.weight": tied,
        "attention.rotary_emb.inv_freq": torch.ones(4),
        "attention.masked_bias": torch.tensor(-1e9),
        "attention.bias": torch.ones(4, 4, dtype=torch.bool),
        "step": 3,
    }
    torch.save(state, tmp_path / "step1.pt")
    assert list(Checkpoints(tmp_path).tensors()) == ["embed_in.weight"]


def test_a_run_directory_has_the_norms_that_its_logger_saw(tmp_path):
    config = TrainConfig(steps=6, batch_size=1, seq_len=16, warmup=2, save_every=3, weibull_every=3)
    run = train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "measured").exists()
    for source in (run, tmp_path / "run"):
        table = measure(Checkpoints(source))
        assert sorted(set(table["step"])) == [0, 1, 2, 3, 4, 6]
        assert (tmp_path / "run" / "measured").is_dir()
        both = run.forces().merge(table, on=["step", "tensor"], suffixes=("", "_read"))
        assert len(both) == 5 * run.forces()["tensor"].nunique()
        np.testing.assert_allclose(both["norm_sq_read"], both["norm_sq_after"], rtol=1e-6)
        assert both["component"].astype(str).equals(both["component_read"].astype(str))
        shutil.rmtree(tmp_path / "run" / "measured")


# Cache.


def test_only_what_is_new_is_read(folder, read):
    once = measure(folder)
    assert set(read) == {f"step{step}.safetensors" for step in STEPS}
    assert len(read) == 4 * len(STEPS), "each tensor once"
    read.clear()
    pd.testing.assert_frame_equal(measure(folder), once)
    assert read == []
    save(2000, folder)
    more = measure(folder)
    assert set(read) == {"step2000.safetensors"}
    assert more["step"].max() == 2000
    read.clear()
    assert sorted(set(measure(Checkpoints(folder, [1, 2000]))["step"])) == [1, 2000]
    assert measure(folder, weibull=False)["k"].isna().all()
    assert read == []


def test_a_file_that_changed_is_read_again_and_so_are_its_inner_products(folder, read):
    before = measure(folder, "full")
    safetensors.torch.save_file(weights(77), folder / "step2.safetensors")
    read.clear()
    after = measure(folder, "none")
    assert set(read) == {"step2.safetensors"}
    assert after[after["step"] == 2]["hash"].iloc[0] != before[before["step"] == 2]["hash"].iloc[0]
    full = measure(folder, "full")
    row = full[(full["step"] == 1000) & (full["tensor"] == UP)].iloc[0]
    truth = float((weights(1000)[UP].double() * weights(77)[UP].double()).sum())
    assert row["dots"][2] == pytest.approx(truth, rel=1e-12)


def test_inner_products_of_a_longer_series_are_completed_not_begun_again(folder, read):
    measure(folder, "full")
    read.clear()
    measure(folder, "full")
    measure(folder, "band")
    assert read == []
    save(2000, folder)
    table = measure(folder, "full")
    row = table[(table["step"] == 2000) & (table["tensor"] == O2)].iloc[0]
    truth = [
        float((weights(2000)[O2].double() * weights(step)[O2].double()).sum()) for step in [*STEPS, 2000]
    ]
    np.testing.assert_allclose(row["dots"], truth, rtol=1e-12, atol=1e-15)


def test_a_measurement_that_was_cut_short_goes_on_where_it_stopped(folder, monkeypatch, read):
    monkeypatch.setattr(checkpoints, "_BATCH", 1)
    calls = []
    run = checkpoints.run_tasks

    def dies(tasks, weibull):
        calls.append(tasks)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(tasks, weibull)

    monkeypatch.setattr(checkpoints, "run_tasks", dies)
    with pytest.raises(KeyboardInterrupt):
        measure(folder)
    read.clear()
    assert sorted(set(measure(folder)["step"])) == STEPS
    assert set(read) == {"step100.safetensors", "step1000.safetensors"}


def test_a_stored_measurement_that_is_damaged_is_made_again(folder, read):
    table = measure(folder)
    part = next((folder / "measured").rglob("step-000002.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    read.clear()
    pd.testing.assert_frame_equal(measure(folder), table)
    assert set(read) == {"step2.safetensors"}


def test_measurements_go_where_the_user_says_or_nowhere(folder, tmp_path):
    measure(folder, cache=False)
    measure(folder, cache=tmp_path / "mine")
    assert not (folder / "measured").exists()
    parts = list((tmp_path / "mine").rglob("step-*.parquet"))
    assert len(parts) == len(STEPS)
    import pyarrow.parquet as pq

    assert b"accumulated" in pq.read_schema(parts[0]).field("norm_sq").metadata[b"meaning"]


def test_a_plan_tells_what_would_be_read(folder, read):
    plan = Checkpoints(folder).plan()
    assert plan["bytes"].tolist() == [(folder / f"step{step}.safetensors").stat().st_size for step in STEPS]
    assert not plan["measured"].any()
    measure(folder)
    assert Checkpoints(folder).plan()["measured"].all()
    band = Checkpoints(folder).plan("band").set_index("step")
    assert band["passes"].to_dict() == dict.fromkeys(STEPS, 1), "for the inner products, which are not there"
    assert not band["measured"].any()


def test_a_plan_and_the_measurement_with_the_same_arguments_agree_whatever_happened_before(folder, read):
    rng = np.random.default_rng(0)
    seen = set()
    for attempt in range(25):
        arguments = {"gram": str(rng.choice(["none", "band", "full"])), "weibull": bool(rng.integers(2))}
        steps = sorted(rng.choice(STEPS, rng.integers(1, 6), replace=False).tolist())
        change = rng.integers(4)
        if change == 0:
            step = int(rng.choice(STEPS))
            safetensors.torch.save_file(weights(step + 10 + attempt), folder / f"step{step}.safetensors")
        elif change == 1 and (stored := sorted((folder / "measured").rglob("*.parquet"))):
            stored[rng.integers(len(stored))].unlink()
        plan = Checkpoints(folder, steps).plan(**arguments, cache=True).set_index("step")
        read.clear()
        Checkpoints(folder, steps).measure(**arguments, n_jobs=1)
        times = {step: read.count(f"step{step}.safetensors") / 4 for step in steps}
        assert plan["passes"].to_dict() == times, (attempt, arguments)
        assert (plan["measured"] == (plan["passes"] == 0)).all()
        seen.update(times.values())
    assert seen == {0, 1, 2}


def test_fits_that_are_asked_for_later_leave_the_inner_products_stored(folder, read):
    measure(folder, "full", weibull=False)
    measure(folder, "none", weibull=True)
    read.clear()
    table = measure(folder, "full", weibull=True)
    assert read == []
    assert table["k"].notna().any()


def test_inner_products_are_found_by_step_after_filtering_joining_and_a_file(folder, tmp_path):
    recipe = Recipe(lr=1e-3, weight_decay=0.1, steps=1000)
    table = measure(folder, "full")
    few = table[table["step"].isin([1, 100, 1000])]
    truth = recover_forces(measure(Checkpoints(folder, [1, 100, 1000]), "full"), recipe, "spline")
    pd.testing.assert_frame_equal(recover_forces(few, recipe, "spline"), truth)
    few.to_parquet(tmp_path / "table.parquet")
    read_again = pd.read_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(recover_forces(read_again, recipe, "spline"), truth)
    parts = [few[few["step"] == step] for step in (1000, 1, 100)]
    joined = pd.concat(parts, ignore_index=True)
    joined["tensor"] = joined["tensor"].cat.set_categories(few["tensor"].cat.categories)
    pd.testing.assert_frame_equal(
        recover_forces(joined, recipe, "spline").sort_values(["step", "tensor"], ignore_index=True),
        truth.sort_values(["step", "tensor"], ignore_index=True),
        check_categorical=False,
    )
    band = measure(folder, "band")
    with pytest.raises(ValueError, match="needs the inner products"):
        recover_forces(band[band["step"] != 2], recipe, "two_point")


def test_workers_of_other_processes_measure_the_same(folder):
    truth = measure(folder, "full", cache=False)
    with joblib.parallel_config("loky", n_jobs=2):
        pd.testing.assert_frame_equal(Checkpoints(folder).measure("full", cache=False), truth)


def test_a_bar_is_shown_when_it_is_asked_for_and_none_where_nobody_watches(folder, capfd):
    Checkpoints(folder).measure("band", cache=False)
    Checkpoints(folder).plan("band")
    assert capfd.readouterr() == ("", "")
    Checkpoints(folder).measure("band", cache=False, progress=True)
    assert "measure: 100%" in capfd.readouterr().err


# Checkpoints that are not sound.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def reshape(path):
    safetensors.torch.save_file({**weights(2), UP: torch.zeros(41, 16)}, path)


def rename(path):
    state = weights(2)
    state["other.weight"] = state.pop(UP)
    safetensors.torch.save_file(state, path)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "cut short, damaged"),
        (empty, "cut short, damaged"),
        (reshape, r"has the shape \(41, 16\), and in step 0 \(40, 16\)"),
        (rename, r"other tensors than step 0: it lacks .*dense_h_to_4h.*other.weight"),
    ],
)
def test_a_bad_checkpoint_is_named_with_its_file_and_the_rest_is_usable(folder, spoil, message):
    spoil(folder / "step2.safetensors")
    with pytest.raises(CheckpointError, match=message) as raised:
        measure(folder, cache=False)
    assert str(folder / "step2.safetensors") in str(raised.value)
    series = Checkpoints(folder, errors="skip")
    with pytest.warns(UserWarning, match=f"left out: .*{message}"):
        table = measure(series, "full")
    assert series.steps == [0, 1, 100, 1000]
    assert list(series.skipped) == [2]
    assert str(folder / "step2.safetensors") in series.skipped[2]
    last = table[(table["step"] == 1000) & (table["tensor"] == UP)].iloc[0]
    assert last["dot_steps"].tolist() == [0, 1, 100, 1000], "those that are left"


def test_a_series_of_which_nothing_is_left_says_why(folder):
    for step in STEPS:
        truncate(folder / f"step{step}.safetensors")
    series = Checkpoints(folder, errors="skip")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(
            CheckpointError, match=r"no checkpoint that can be read .*step 0: .*step0\.safetensors"
        ),
    ):
        measure(series)


@pytest.mark.parametrize("name", [f"step{2**63}", f"step{10**60}"])
def test_a_step_that_no_table_can_hold_is_refused_by_name(folder, name):
    shutil.copy(folder / "step2.safetensors", folder / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors: the step {name[4:]} is not between"):
        Checkpoints(folder)
    with pytest.warns(UserWarning, match=f"left out: .*{name}"):
        series = Checkpoints(folder, errors="skip")
    assert series.steps == STEPS
    assert sorted(set(measure(series)["step"])) == STEPS
    largest = Checkpoints({2**63 - 1: folder / "step2.safetensors"})
    assert set(measure(largest, cache=False)["step"]) == {2**63 - 1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (float("nan"), "is nan in step2"),
        (float("inf"), "is inf in step2"),
        (1e30, "the weights' rms is .* in step2"),
    ],
)
def test_weights_that_cannot_be_sound_are_named_with_their_file_in_the_table_and_a_warning(
    folder, bad, message
):
    state = weights(2)
    state[O2][3, 3] = bad
    safetensors.torch.save_file(state, folder / "step2.safetensors")
    for _ in range(2):  # measured, and read from what was stored
        with pytest.warns(UserWarning, match=rf"1 rows are doubtful.*step2\.safetensors, {O2}: .*{message}"):
            table = measure(folder)
        noted = table[table["note"] != ""]
        assert noted[["step", "tensor"]].to_numpy().tolist() == [[2, O2]]


def test_a_truncated_pickle_is_named(folder):
    torch.save(weights(3), folder / "step3.pt")
    truncate(folder / "step3.pt")
    with pytest.raises(CheckpointError, match=r"step3\.pt cannot be read"):
        measure(folder)


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_not_obeyed(folder, tmp_path, zipped):
    if zipped:
        torch.save({"w": _Evil(tmp_path / "owned")}, folder / "step3.pt")
    else:
        (folder / "step3.pt").write_bytes(pickle.dumps({"w": _Evil(tmp_path / "owned")}))
    with pytest.raises(CheckpointError, match=r"step3\.pt cannot be read"):
        measure(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:\\x"]
)
def test_an_index_that_points_outside_its_folder_is_refused(folder, tmp_path, target):
    safetensors.torch.save_file(weights(3), tmp_path / "outside.safetensors")
    (folder / "step3").mkdir()
    (folder / "step3" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: target}}))
    with pytest.raises(CheckpointError, match=r"step3.*points outside its folder"):
        measure(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model.safetensors.index.json": json.dumps({"weight_map": {UP: "lost.safetensors"}})},
            "lacks the shards",
        ),
        ({"model.safetensors.index.json": "{"}, "model.safetensors.index.json is no JSON"),
        ({"model.safetensors.index.json": "{}"}, "is no index of shards"),
        ({"a.safetensors": "", "b.safetensors": ""}, "2 weight files and no index"),
        ({"optimizer.pt": "", "readme.txt": ""}, "holds no weights"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_named(folder, content, message):
    (folder / "step3").mkdir()
    for name, text in content.items():
        (folder / "step3" / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"step3.*{message}"):
        measure(folder)


def test_a_step_that_is_there_twice_is_refused_or_taken_once(folder):
    shutil.copy(folder / "step2.safetensors", folder / "step-000002.safetensors")
    with pytest.raises(CheckpointError, match=r"step 2 is there twice, as .*step-000002.* and .*step2\."):
        Checkpoints(folder)
    with pytest.warns(UserWarning, match="twice"):
        series = Checkpoints(folder, errors="skip")
    assert series.steps == STEPS


def test_identical_content_under_two_steps_is_reported(folder):
    shutil.copy(folder / "step2.safetensors", folder / "step3.safetensors")
    with pytest.warns(UserWarning, match="identical weights: 2 = 3$"):
        table = measure(folder)
    assert identical_steps(table) == [[2, 3]]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda folder: Checkpoints(folder / "nowhere"), FileNotFoundError, "a run directory, a folder of"),
        (
            lambda folder: Checkpoints(folder, [0, 3]),
            ValueError,
            r"no checkpoint of \[3\]; the nearest to 3 is 2",
        ),
        (lambda folder: Checkpoints(folder, errors="ignore"), ValueError, "errors must be"),
        (lambda folder: Checkpoints(None), TypeError, "source must be .* got None"),
        (lambda folder: Checkpoints(""), TypeError, "source must be .* got ''"),
        (
            lambda folder: Checkpoints(folder).measure(cache=3),
            TypeError,
            "cache must be a folder, True or False",
        ),
        (lambda folder: Checkpoints(folder, []), ValueError, "steps is empty"),
        (
            lambda folder: Checkpoints(folder, [1.5]),
            TypeError,
            "steps: a step must be a whole number, got 1.5",
        ),
        (
            lambda folder: Checkpoints({1.5: folder}),
            TypeError,
            "source: a step must be a whole number, got 1.5",
        ),
        (lambda folder: Checkpoints({-1: folder}), ValueError, "source: the step -1 is not between"),
        (lambda folder: Checkpoints(folder).plan("all"), ValueError, "gram must be"),
        (lambda folder: Checkpoints(folder).measure(views="heads"), ValueError, "views must be"),
        (lambda folder: Checkpoints({}), ValueError, "is empty"),
        (lambda folder: Checkpoints(folder).measure("all"), ValueError, "gram must be"),
        (lambda folder: Checkpoints(folder).load(3, UP), KeyError, "step 3 is not in the series"),
        (lambda folder: Checkpoints(folder).load(2, "w"), KeyError, "has no tensor 'w'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(folder, call, kind, message):
    with pytest.raises(kind, match=message):
        call(folder)


# Other files of a checkpoint.


def test_files_of_a_folder_or_of_a_single_file_are_found_where_they_are(tmp_path):
    place = tmp_path / "checkpoint-500"
    for name in ("optimizer.pt", "global_step500/rank0.pt", ".metadata", "a b/c.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    (place / "empty").mkdir()
    os.mkfifo(place / "pipe")
    (place / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "step600.ckpt").write_text("whole")
    series = Checkpoints({500: place, 600: tmp_path / "step600.ckpt", 700: tmp_path / "none"})
    names = {"optimizer.pt", "global_step500/rank0.pt", ".metadata", "a b/c.json"}
    assert series.file_sizes(500) == {name: len(name) for name in names}
    with series.files(500, names) as paths:
        assert paths == {name: place / name for name in names}
    with series.files(500, lambda name: name.endswith(".pt")) as paths:
        assert sorted(paths) == ["global_step500/rank0.pt", "optimizer.pt"]
    with series.files(600, lambda name: True) as paths:
        assert paths == {"step600.ckpt": tmp_path / "step600.ckpt"}
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*none"):
        series.file_sizes(700)
    assert (place / ".metadata").is_file(), "nothing of the user's is deleted"


def test_a_folder_of_more_files_than_a_checkpoint_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("weightdyn.checkpoints.series.ENTRIES", 3)
    (tmp_path / "step1").mkdir()
    for i in range(4):
        (tmp_path / "step1" / f"{i}.pt").touch()
    with pytest.raises(CheckpointError, match="step1 holds more than 3 files"):
        Checkpoints(tmp_path).file_sizes(1)


@pytest.mark.parametrize(
    ("step", "wanted", "kind", "message"),
    [
        (3, [], KeyError, "step 3 is not in the series"),
        ("2", [], ValueError, "step must be a whole number"),
        (2, "optimizer.pt", ValueError, "wanted must be names of files, or a function"),
        (2, None, TypeError, "wanted must be names of files, or a function"),
    ],
)
def test_files_that_cannot_be_asked_for_are_refused_by_name(folder, step, wanted, kind, message):
    with pytest.raises(kind, match=message):
        Checkpoints(folder).files(step, wanted)


# Elsewhere.


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("distributed"), reason="dask.distributed is not installed")
@pytest.mark.filterwarnings("ignore")  # dask's own
def test_two_workers_of_a_dask_cluster_do_the_work_unchanged(folder):
    from distributed import Client, LocalCluster

    truth = measure(folder, "full", cache=False)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        with joblib.parallel_config("dask"):
            found = Checkpoints(folder).measure("full", cache=False, progress=False)
        pids = set(client.run(os.getpid).values())
        assert len(pids) == 2
        done = client.run(lambda dask_worker: sum(1 for key in dask_worker.state.log if "_run" in str(key)))
    assert os.getpid() not in pids
    assert sum(done.values()) > 0, "the tasks ran in the workers"
    pd.testing.assert_frame_equal(found, truth)


def test_the_command_measures_a_folder_and_tells_what_is_wrong(folder, tmp_path):
    out = tmp_path / "table.parquet"
    result = CliRunner().invoke(app, ["measure", str(folder), "--steps", "0,100", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "12 rows: 2 steps, 6 tensors" in result.output
    assert len(pd.read_parquet(out)) == 12
    result = CliRunner().invoke(app, ["measure", str(folder), "--dry-run"])
    assert "to read: 3 of 5 checkpoints" in result.output
    truncate(folder / "step1.safetensors")
    result = CliRunner().invoke(app, ["measure", str(folder)])
    assert result.exit_code == 2
    assert "step1.safetensors cannot be read" in result.output
