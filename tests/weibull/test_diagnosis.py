import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from weightdyn.weibull.diagnosis import BANDS, diagnose
from weightdyn.weibull.fit import K0

REFERENCE = os.environ.get("WEIGHTDYN_REFERENCE")
needs_reference = pytest.mark.skipif(
    not REFERENCE, reason="WEIGHTDYN_REFERENCE is not set to a folder with the public data"
)
DATABASE = Path(REFERENCE or ".") / "database_v9_1" / "DATABASE_v9_1.csv"

SHAPES = {
    "q": (64, 64),
    "k": (16, 64),
    "v": (16, 64),
    "o": (64, 64),
    "gate": (96, 64),
    "up": (96, 64),
    "down": (64, 96),
}
CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}


def name(layer, component):
    block = "self_attn" if component in "qkvo" else "mlp"
    return f"model.layers.{layer}.{block}.{component}_proj.weight"


def model(layers=2, shapes=None, k=None, lam=0.02, scale=4):
    """A state dict of normal weights, or of Weibull quantiles with k and λ by component; sizes times scale²."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in range(layers):
        for component, (rows, columns) in (shapes or SHAPES).items():
            shape = (rows * scale, columns * scale)
            x = lam * torch.randn(shape, generator=generator) / 0.88749
            if k is not None:
                f = (torch.arange(x.numel(), dtype=torch.float64) + 0.5) / x.numel()
                x = (lam * (-torch.log1p(-f)) ** (1 / k[component])).reshape(shape).float()
            state[name(layer, component)] = x
    return state


def reasons(found, tensor):
    return found.table.set_index("tensor")["reasons"][tensor]


def test_a_fresh_model_has_nothing_that_stands_out():
    for seed in range(3):
        torch.manual_seed(seed)
        state = {tensor: torch.randn_like(x) for tensor, x in model(layers=6).items()}
        assert diagnose(state).flagged.empty


@pytest.mark.parametrize(
    ("component", "k", "side"),
    [("down", 1.15, "below"), ("q", 0.7, "below"), ("v", 1.3, "above"), ("k", 1.0, None)],
)
def test_a_k_out_of_the_band_of_its_role_is_flagged(component, k, side):
    shapes = {part: k if part == component else 1.195 for part in SHAPES}
    found = diagnose(model(k=shapes, scale=10))
    role = found.table.set_index("tensor")["role"][name(1, component)]
    low, high = BANDS[role]
    expected = f"k {k:.3f} {side} the {role} band {low:.3f}–{high:.3f}" if side else ""
    assert reasons(found, name(1, component)) == expected
    assert len(found.flagged) == (2 if side else 0)


def test_a_k_within_sampling_error_of_its_band_is_not_flagged():
    shapes = dict.fromkeys(SHAPES, 1.195) | {"down": 1.15}
    assert diagnose(model(k=shapes, scale=1)).flagged.empty


def test_a_second_population_is_flagged():
    state = model(scale=8)
    state[name(1, "gate")][:200] *= 1e-4
    found = diagnose(state)
    reason = reasons(found, name(1, "gate"))
    assert "second population: 26 % of the weights" in reason
    assert "the plot is not straight" in reason
    assert found.flagged["tensor"].tolist() == [name(1, "gate")]


def test_super_weights_are_flagged():
    state = model(scale=8)
    state[name(0, "down")][3, 5] = 20.0
    found = diagnose(state)
    assert found.flagged["tensor"].tolist() == [name(0, "down")]
    x = state[name(0, "down")].double()
    top = x.abs().reshape(-1).sort().values[-int(1e-4 * x.numel()) :]
    share = 100 * float((top**2).sum() / (x**2).sum())
    assert reasons(found, name(0, "down")) == f"super-weights: {share:.1f} % of ‖w‖² in 0.01 % of the weights"


def test_what_cannot_be_fitted_is_flagged():
    state = model()
    for layer in range(2):
        state[name(layer, "o")].zero_()
    state[name(1, "up")][0, 0] = math.nan
    found = diagnose(state)
    assert reasons(found, name(0, "o")) == "no non-zero finite magnitudes"
    assert reasons(found, name(1, "up")).startswith("1 NaN or infinite values left out; ‖W‖² is nan")
    assert found.table.set_index("tensor")["regime"][name(0, "o")] == "unknown"
    assert "nan" in str(found)


def fused(heads, kv_heads=None, size=64):
    rows = size + 2 * size // heads * (kv_heads or heads)
    return {"transformer.h.0.self_attention.query_key_value.weight": torch.randn(rows, size)}


@pytest.mark.parametrize(
    ("state", "config", "expected"),
    [
        (model(), {**CONFIG, "hidden_size": 256, "head_dim": 32}, "GQA 4:1"),
        (model(), None, "GQA 4:1"),
        (
            model(shapes=SHAPES | {"k": (8, 64), "v": (8, 64)}, scale=1),
            CONFIG | {"num_key_value_heads": 1},
            "MQA",
        ),
        (model(shapes=SHAPES | {"k": (64, 64), "v": (64, 64)}), None, "MHA"),
        (fused(8), {"num_attention_heads": 8, "hidden_size": 64}, "MHA, fused"),
        (fused(8, 2), CONFIG, "GQA 4:1, fused"),
        (fused(8, 1), CONFIG | {"num_key_value_heads": 1}, "MQA, fused"),
        (fused(8), None, "unknown, fused"),
        ({"fc.weight": torch.randn(30, 30)}, None, "unknown"),
    ],
)
def test_the_kind_of_attention_follows_from_names_shapes_and_config(state, config, expected):
    assert diagnose(state, config=config).attention == expected


def test_the_nearest_published_model_comes_first(tmp_path):
    k = {"q": 1.0, "k": 1.1, "v": 1.05, "o": 1.2, "gate": 1.19, "up": 1.2, "down": 1.18}
    published = pd.DataFrame(
        {
            "entry_id": ["far", "near", "no gate", "one component", "none"],
            **{
                f"k_median_{part}": [value + 0.1, value + 0.01, np.nan, np.nan, np.nan]
                for part, value in k.items()
            },
            **{f"lambda_median_{part}": [0.02, 0.04, np.nan, np.nan, np.nan] for part in k},
            "k_median_ffn_in": [np.nan, np.nan, 1.2, np.nan, np.nan],
            "k_median_ffn_out": [np.nan, np.nan, 1.18, np.nan, np.nan],
        }
    )
    published.loc[3, "k_median_q"] = 1.0
    published.to_csv(tmp_path / "database.csv", index=False)
    for database in (tmp_path / "database.csv", str(tmp_path / "database.csv"), published):
        nearest = diagnose(model(k=k), database=database).nearest
        assert nearest["model"].tolist() == ["near", "far"]
        np.testing.assert_allclose(nearest["distance"], [0.01, 0.1], atol=2e-3)
        assert nearest["components"].tolist() == [7, 7]
        np.testing.assert_allclose(nearest["lam_ratio"], [0.5, 1.0], rtol=1e-3)
    without_gate = {part: value for part, value in k.items() if part != "gate"}
    shapes = {part: SHAPES[part] for part in without_gate}
    nearest = diagnose(model(k=without_gate, shapes=shapes), database=published).nearest
    assert nearest["model"][0] == "no gate"
    assert nearest["components"][0] == 2


def test_fused_matrices_are_compared_as_they_are_stored():
    x = fused(8)["transformer.h.0.self_attention.query_key_value.weight"]
    x.view(8, 3, 8, 64)[:, 0] *= 0.01
    state = {"h.0.attention.query_key_value.weight": x, "h.0.attention.dense.weight": torch.randn(64, 64)}
    whole = diagnose(state).table.set_index("component")["k"]
    published = pd.DataFrame({"model": ["it"], "k_median_qkv": [whole["qkv"]], "k_median_o": [whole["o"]]})
    config = {"num_attention_heads": 8, "hidden_size": 64}
    for views in (True, "head"):
        found = diagnose(state, config=config, views=views, database=published)
        assert "qkv" not in found.table["component"].tolist()
        assert found.nearest["components"].tolist() == [2]
        assert found.nearest["distance"][0] == pytest.approx(0, abs=1e-12)


@needs_reference
def test_each_published_model_is_its_own_nearest():
    table = pd.read_csv(DATABASE).set_index("entry_id")
    for entry in ("olmo-1-7b", "mistral-7b", "qwen2.5-7b", "llama-3-8b"):
        k = {part: float(table.loc[entry, f"k_median_{part}"]) for part in SHAPES}
        nearest = diagnose(model(layers=1, k=k), database=DATABASE).nearest
        assert nearest["model"][0] == entry
        assert nearest["distance"][0] < 0.003
        assert not nearest["model"].str.startswith("pythia").any()


@needs_reference
def test_published_bands_hold_the_published_medians():
    table = pd.read_csv(DATABASE)
    medians = {part: table[f"k_median_{part}"].dropna() for part in ("q", "k", "v")}
    assert min(medians["q"].min(), medians["k"].min()) >= BANDS["selection"][0] - 5e-4
    assert medians["v"].min() >= BANDS["value"][0]
    assert max(series.max() for series in medians.values()) <= K0


def test_it_prints_in_a_terminal_and_in_a_notebook():
    state = model(scale=2, layers=26)
    for layer in range(25):
        state[name(layer, "down")][0, 0] = 30.0
    state["<odd>.weight"] = torch.full((20, 20), 0.5)
    published = pd.DataFrame({"m": ["<b>"], "k_median_q": [1.2], "k_median_o": [1.2]})
    found = diagnose(state, database=published)
    text, page = str(found), found._repr_html_()
    assert repr(found) == text
    assert text.startswith(
        f"state dict: 183 matrices, {found.table['numel'].sum():,} weights, attention GQA 4:1"
    )
    assert "26 flagged:" in text
    assert "… and 6 more, in .flagged" in text
    assert "Nearest published models, by rms difference in k: <b> (0." in text
    assert max(len(line) for line in text.splitlines()) < 200
    assert "<b>state dict" in page
    assert "&lt;b&gt;" in page
    assert name(0, "down") in page
    assert reasons(found, name(0, "down")) in page
    assert list(found.components.index) == ["q", "k", "v", "o", "gate", "up", "down", "other"]
    assert found.components.loc["down", "flagged"] == 25
    assert found.components.loc["q", "regime"] in ("transmission", "init baseline")


def test_a_healthy_model_prints_without_a_list(tmp_path):
    torch.save(model(layers=1), tmp_path / "small.pt")
    found = diagnose(tmp_path / "small.pt")
    assert str(found).startswith("small.pt: 7 matrices")
    assert str(found).endswith("0 flagged.")
    assert "0 flagged" in found._repr_html_()
    empty = diagnose(tmp_path / "small.pt", database=pd.DataFrame({"m": ["x"], "k_median_ffn": [1.0]}))
    assert "No published model shares two components" in str(empty)


def test_a_module_goes_by_its_class():
    assert str(diagnose(torch.nn.Linear(9, 9))).startswith("Linear: 1 matrix, 81 weights, attention unknown")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as one"),
        (b"\xff\xfe\x00", "cannot be read as one"),
        (b"m," + b"," * 1_000_000, "1,000,001 columns"),
        (b"m,k_median_q\na,high\n", "odd.csv: the column k_median_q must hold numbers"),
        (b"m,k_median_q\na,-1\n", "odd.csv: the column k_median_q must hold one finite number > 0"),
        (b"m,k_median_q\na,inf\n", "odd.csv: the column k_median_q must hold one finite number > 0"),
        (
            b"m,k_median_q,lambda_median_q\na,1,0\n",
            "the column lambda_median_q must hold one finite number > 0",
        ),
        (b"m,k\na,1\n", "odd.csv must have a row per model"),
    ],
)
def test_a_database_that_is_none_is_named(tmp_path, content, message):
    (tmp_path / "odd.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"database.*{message}"):
        diagnose(torch.nn.Linear(9, 9), database=tmp_path / "odd.csv")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_database_is_neither_a_pipe_nor_an_address(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ValueError, match=r"pipe\.csv is a pipe"):
        diagnose(torch.nn.Linear(9, 9), database=tmp_path / "pipe.csv")
    with pytest.raises(FileNotFoundError, match="http"):
        diagnose(torch.nn.Linear(9, 9), database="http://127.0.0.1:9/database.csv")
    with pytest.raises(TypeError, match=r"database must be a pandas.DataFrame or the path of a CSV file"):
        diagnose(torch.nn.Linear(9, 9), database=[1])


def test_a_foreign_database_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"columns k_median_<component>; got the columns \['a'\]"):
        diagnose(torch.nn.Linear(9, 9), database=pd.DataFrame({"a": [1]}))
    with pytest.raises(FileNotFoundError):
        diagnose(torch.nn.Linear(9, 9), database=tmp_path / "none.csv")
