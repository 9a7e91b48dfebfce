import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config
from safetensors.torch import save_file
from torch import nn

from weightdyn.core.tables import FIT_TABLE
from weightdyn.files.weightfiles import read_matrices
from weightdyn.record.runlog import RunLog, RunWriter
from weightdyn.weibull.fit import LAM0, fit_weibull
from weightdyn.weibull.laws import tails
from weightdyn.weibull.magnitudes import MagnitudeHistogram
from weightdyn.weibull.weights import fit_weights, shape_drift

HIDDEN, HEADS = 48, 4


@pytest.fixture(scope="module")
def neox():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=96,
        vocab_size=100,
        initializer_range=0.5,
    )
    return transformers.GPTNeoXForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def split_by_the_model(model):
    """q, k and v of the first layer as (head, head_dim, hidden), by the model's own attention code.

    The rows of the identity, each alone at position 0, where rotary embeddings do nothing, come out of the fused
    projection as the columns of W_q, W_k and W_v.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = {}

    def record(module, query, key, value, attention_mask, **kwargs):
        seen.update(q=query, k=key, v=value)
        return torch.zeros_like(query).transpose(1, 2), None

    attention = model.gpt_neox.layers[0].attention
    implementation = attention.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("record", record)
    attention.config._attn_implementation = "record"
    try:
        with torch.no_grad():
            hidden = torch.eye(HIDDEN).unsqueeze(1)
            rotary = model.gpt_neox.rotary_emb(hidden, torch.zeros(HIDDEN, 1, dtype=torch.long))
            bias = attention.query_key_value.bias.clone()
            attention.query_key_value.bias.zero_()
            attention(hidden, attention_mask=None, position_embeddings=rotary)
            attention.query_key_value.bias.copy_(bias)
    finally:
        attention.config._attn_implementation = implementation
    return {part: out[:, :, 0].permute(1, 2, 0) for part, out in seen.items()}


def numbers(table):
    return table.drop(columns="tensor").reset_index(drop=True)


def test_fused_matrices_are_fitted_as_the_model_splits_them(neox):
    parts = split_by_the_model(neox)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    table = fit_weights(neox).set_index("tensor")
    for part, weight in parts.items():
        row = table.loc[f"{name}[{part}]"]
        fit = fit_weibull(weight)
        assert (row["k"], row["lam"], row["r_squared"], row["ks"], row["n"]) == (
            fit.k,
            fit.lam,
            fit.r_squared,
            fit.ks,
            weight.numel(),
        )
        assert (row["component"], row["layer"]) == (part, 0)
    heads = fit_weights(neox, views="head").set_index("tensor")
    for part, weight in parts.items():
        for head in range(HEADS):
            assert heads.loc[f"{name}[{part}.{head}]", "k"] == fit_weibull(weight[head]).k
    assert name in fit_weights(neox, views=False)["tensor"].tolist()


def test_every_matrix_has_a_row_and_nothing_else(llama):
    table = fit_weights(llama)
    expected = [name for name, p in llama.named_parameters() if p.ndim > 1]
    assert table["tensor"].tolist() == expected
    assert list(table) == list(FIT_TABLE)
    assert str(table["layer"].dtype) == "Int64"
    assert pd.isna(table.loc[0, "layer"])
    assert table["role"].tolist()[1:8] == [
        "selection",
        "selection",
        "value",
        "transmission",
        "transmission",
        "transmission",
        "transmission",
    ]
    assert table["numel"].sum() == sum(p.numel() for p in llama.parameters() if p.ndim > 1)


def test_a_row_holds_the_fit_and_the_tails_of_its_matrix():
    torch.manual_seed(0)
    x = torch.randn(80, 100) * 0.02
    x[:3] = 0
    x[4, 4] = math.nan
    row = fit_weights({"layers.3.up_proj.weight": x}, method="mle", trim=(0.2, 0.8)).iloc[0]
    fit, measures = fit_weibull(x, "mle", (0.2, 0.8)), tails(x)
    assert (row["k"], row["lam"], row["r_squared"]) == (fit.k, fit.lam, fit.r_squared)
    assert row["note"].startswith(f"{fit.note}; ‖W‖² is nan")
    assert [row[name] for name in measures._fields] == list(measures)
    assert (row["numel"], row["n"]) == (8000, 8000 - 300 - 1)
    rms = math.sqrt(float((x.double().nan_to_num() ** 2).sum()) / 7999)
    assert row["rms"] == pytest.approx(rms, rel=1e-12)
    assert row["lam_over_rms"] == pytest.approx(fit.lam / rms)


def test_normal_weights_have_the_ratio_of_the_anchor():
    torch.manual_seed(0)
    assert fit_weights({"w": torch.randn(1500, 1000)})["lam_over_rms"][0] == pytest.approx(LAM0, rel=2e-3)


def test_models_state_dicts_and_files_give_one_table(llama, tmp_path):
    expected = fit_weights(llama)
    state = llama.state_dict()
    pd.testing.assert_frame_equal(fit_weights(state, config=llama.config), expected)
    torch.save({"model": state, "step": 3}, tmp_path / "checkpoint.pt")
    torch.save(state, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    for name in ("checkpoint.pt", "legacy.bin"):
        pd.testing.assert_frame_equal(fit_weights(tmp_path / name, config=llama.config), expected)

    def by_name(table):
        return table.astype({"tensor": str}).sort_values("tensor", ignore_index=True)

    llama.save_pretrained(tmp_path / "whole")
    llama.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("whole", "shards", "whole/model.safetensors"):
        table = fit_weights(str(tmp_path / name), views="head")
        pd.testing.assert_frame_equal(
            by_name(table), by_name(fit_weights(llama, views="head")), check_categorical=False
        )


@pytest.mark.parametrize(
    ("bad", "message"),
    [(math.nan, "‖W‖² is nan"), (math.inf, "‖W‖² is nan"), (1e30, "rms is .*e\\+28")],
)
def test_weights_that_cannot_be_sound_are_named_with_their_file(tmp_path, bad, message):
    state = {"a.weight": torch.randn(40, 40), "b.weight": torch.randn(40, 40)}
    state["b.weight"][3, 3] = bad
    save_file(state, tmp_path / "model.safetensors")
    table = fit_weights(tmp_path).set_index("tensor")
    assert table.loc["a.weight", "note"] == ""
    assert re.search(message + r" in model\.safetensors", table.loc["b.weight", "note"])
    assert re.search(message, fit_weights(state).set_index("tensor").loc["b.weight", "note"])


def test_a_safetensors_file_is_read_in_the_order_of_its_layers(tmp_path):
    state = {f"layers.{i}.up_proj.weight": torch.randn(8, 8) for i in (10, 2, 0)}
    save_file(
        {**state, "layers.0.norm.weight": torch.ones(8), "ids": torch.ones(2, 2).int()},
        tmp_path / "m.safetensors",
    )
    assert fit_weights(tmp_path)["layer"].tolist() == [0, 2, 10]


def test_a_folder_says_which_file_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        fit_weights(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no weights"):
        fit_weights(tmp_path)
    for step in (1, 2):
        save_file({"w": torch.ones(2, 2)}, tmp_path / f"step-{step}.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 weight files and no index \(step-1.safetensors, step-2"):
        fit_weights(tmp_path)


def test_the_config_beside_a_checkpoint_splits_its_matrices(neox, tmp_path):
    save_file({k: v.clone() for k, v in neox.state_dict().items()}, tmp_path / "model.safetensors")
    assert "qkv" in fit_weights(tmp_path)["component"].tolist()
    (tmp_path / "config.json").write_text(json.dumps(neox.config.to_dict()))
    components = fit_weights(tmp_path)["component"].tolist()
    assert components.count("q") == components.count("k") == components.count("v") == 2
    assert "qkv" not in components


def test_tied_weights_count_once(llama):
    state = llama.state_dict()
    assert "lm_head.weight" in state
    names = [matrix.name for matrix in read_matrices(state)[0]]
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names)) == len(read_matrices(llama)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", ["layer", "component", "role", "model"])
def test_pooled_weights_are_fitted_as_one_sample(llama, pool, dtype):
    table = fit_weights(llama)
    state = {name: p.detach().to(dtype) for name, p in llama.named_parameters()}
    pooled = fit_weights(state, by=pool, config=llama.config)
    keys = {"layer": ["stack", "layer"], "component": ["component"], "role": ["role"], "model": []}[pool]
    assert list(pooled)[: len(keys) + 2] == [*keys, "tensors", "numel"]
    table["group"] = [tuple(row) for row in table[keys].fillna({"layer": -1}).to_numpy().tolist()]
    assert len(pooled) == table["group"].nunique()
    for group, (_, found) in zip(table["group"].unique(), pooled.iterrows(), strict=True):
        names = table.loc[[mine == group for mine in table["group"]], "tensor"]
        fit = fit_weibull(torch.cat([state[name].reshape(-1) for name in names]))
        np.testing.assert_allclose(
            [found["k"], found["lam"], found["ks"]], [fit.k, fit.lam, fit.ks], rtol=1e-12
        )
        assert found["tensors"] == len(names)
        assert tuple(-1 if pd.isna(found[key]) else found[key] for key in keys) == group


def test_large_pools_and_mixed_types_are_counted_in_bins():
    torch.manual_seed(0)
    state = {"a.up_proj.weight": torch.randn(700, 700), "b.up_proj.weight": torch.randn(300, 300).bfloat16()}
    row = fit_weights(state, by="model").iloc[0]
    whole = MagnitudeHistogram.from_tensor(torch.cat([w.float().reshape(-1) for w in state.values()]))
    assert row["k"] == fit_weibull(whole).k
    assert row["numel"] == 580_000


def test_only_the_tensors_that_are_asked_for(llama):
    table = fit_weights(llama, tensors=r"layers\.1\.mlp")
    assert table["component"].tolist() == ["gate", "up", "down"]
    with pytest.raises(ValueError, match=r"tensors='nothing' is found in none of"):
        fit_weights(llama, tensors="nothing")


def test_rules_name_what_is_unknown():
    state = {"block7.weird": torch.randn(10, 10)}
    row = fit_weights(state, rules={r"block(?P<layer>\d+)\.weird": "down"}).iloc[0]
    assert (row["layer"], row["component"], row["role"]) == (7, "down", "transmission")


def test_parallel_work_changes_nothing(llama):
    expected = fit_weights(llama, n_jobs=1)
    pd.testing.assert_frame_equal(fit_weights(llama, n_jobs=2), expected)
    with parallel_config(backend="sequential"):
        pd.testing.assert_frame_equal(fit_weights(llama), expected)


def test_progress_is_shown_when_asked_for(llama, capsys):
    fit_weights(llama)
    assert capsys.readouterr().err == ""
    fit_weights(llama, progress=True)
    assert "100%" in capsys.readouterr().err


def test_errors_name_what_was_given():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"by='head'.*use 'model', None, or any of"):
        fit_weights(model, by="head")
    with pytest.raises(ValueError, match=r"tensors must be a regular expression, got '\('"):
        fit_weights(model, tensors="(")
    with pytest.raises(TypeError, match=r"source must be a torch.nn.Module.*got list"):
        fit_weights([model])
    with pytest.raises(ValueError, match="no matrix of a float type"):
        fit_weights(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="no matrix of a float type"):
        fit_weights({"w": torch.ones(2, 2, dtype=torch.int8), "step": 3})


def test_a_file_that_is_no_state_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt cannot be read.*it holds a list"):
        fit_weights(tmp_path / "list.pt")


# Trajectories.


def rms(k, lam):
    """√⟨x²⟩ of a Weibull law, by its quantiles."""
    f = (np.arange(2_000_000) + 0.5) / 2_000_000
    return math.sqrt(np.mean((lam * (-np.log1p(-f)) ** (1 / k)) ** 2))


@pytest.mark.parametrize(
    ("k", "lam", "severity", "explained_by"),
    [
        ((1.2, 1.205), (0.02, 0.03), "invariant", "lam"),
        ((1.2, 1.1), (0.02, 0.025), "mild", "both"),
        ((1.2, 0.8), (0.02, 0.02), "strong", "k"),
        ((1.2, 0.7), (0.02, 0.01), "strong", "both"),
        ((1.2, 1.2), (0.02, 0.02), "invariant", "neither"),
    ],
)
def test_drift_splits_the_growth_of_sigma(k, lam, severity, explained_by):
    table = pd.DataFrame({"step": [5, 900], "k": k, "lam": lam})
    row = shape_drift(table).iloc[0]
    assert (row["severity"], row["explained_by"]) == (severity, explained_by)
    assert row["sigma_growth"] == pytest.approx(math.log(rms(k[1], lam[1]) / rms(k[0], lam[0])), abs=1e-3)
    assert row["sigma_growth"] == pytest.approx(row["lam_growth"] + row["k_growth"])
    assert row["k_drift"] == pytest.approx(k[1] / k[0] - 1)


def test_drift_is_taken_from_first_to_last_step_of_each_group():
    table = pd.DataFrame(
        {
            "step": [20, 0, 10, 0, 10, 20, 30],
            "tensor": pd.Categorical(["b", "b", "b", "a", "a", "a", "a"]),
            "layer": pd.array([None, None, None, 1, 1, 1, 1], dtype="Int64"),
            "k": [1.0, 1.2, 0.5, 1.2, 1.3, 1.21, math.nan],
            "lam": [2.0, 1.0, 1.0, 1.0, 1.0, 3.0, 1.0],
            "other": "x",
        }
    )
    found = shape_drift(table)
    assert found["tensor"].tolist() == ["b", "a"]
    assert found[["start_step", "end_step"]].to_numpy().tolist() == [[0, 20], [0, 20]]
    assert found[["k_start", "k_end"]].to_numpy().tolist() == [[1.2, 1.0], [1.2, 1.21]]
    np.testing.assert_allclose(found["lam_growth"], np.log([2, 3]))
    assert found["severity"].tolist() == ["mild", "invariant"]
    assert shape_drift(table.iloc[:0]).empty


def test_drift_refuses_two_rows_of_one_group_at_one_step():
    table = pd.DataFrame({"step": [0, 9, 9], "tensor": "w", "lam": [0.01, 0.02, 0.03], "k": 1.2})
    with pytest.raises(ValueError, match="table has two rows of tensor w at step 9; do not join"):
        shape_drift(table)
    with pytest.raises(ValueError, match="table has two rows of one group at step 9"):
        shape_drift(table.drop(columns="tensor"))
    with pytest.raises(TypeError, match=r"must be a Weibull table .* or a RunLog, got list"):
        shape_drift([1, 2])
    assert len(shape_drift(table.assign(tensor=["a", "a", "b"]))) == 2


def test_drift_tells_the_stacks_of_a_model_apart():
    table = pd.DataFrame(
        {
            "step": [0, 0, 9, 9],
            "stack": ["encoder", "decoder"] * 2,
            "layer": 0,
            "lam": 0.02,
            "k": [1.2, 1.2, 1.2, 1.0],
        }
    )
    found = shape_drift(table)
    assert found["stack"].tolist() == ["encoder", "decoder"]
    np.testing.assert_allclose(found["k_drift"], [0, 1 / 1.2 - 1], atol=1e-12)


def test_drift_takes_a_run(tmp_path):
    writer = RunWriter(tmp_path / "run", 0, {"tensors": {"w": {"layer": 0, "component": "up", "numel": 4}}})
    for step, k in ((0, 1.2), (9, 1.0)):
        row = {"tensor": ["w"], "lam": [0.02], "k": [k], "r_squared": [1.0], "ks": [0.0], "n": [4]}
        writer.append("weibull", {"step": step, **row})
    writer.close()
    run = RunLog(tmp_path / "run")
    pd.testing.assert_frame_equal(shape_drift(run), shape_drift(run.weibull()))
    assert shape_drift(run)["k_drift"].item() == pytest.approx(1 / 1.2 - 1)


def test_drift_says_which_column_is_missing():
    with pytest.raises(ValueError, match=r"lacks the columns \['lam'\]"):
        shape_drift(pd.DataFrame({"step": [1], "k": [1.0]}))
