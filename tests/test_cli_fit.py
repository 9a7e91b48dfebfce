"""`weightdyn fit` and `weightdyn diagnose`, on model folders, checkpoint files and runs."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from weightdyn.cli import app
from weightdyn.core.tables import FIT_TABLE
from weightdyn.record.runlog import RunWriter
from weightdyn.weibull.diagnosis import diagnose
from weightdyn.weibull.weights import fit_weights

HIDDEN, HEADS = 48, 4
CONFIG = {"model_type": "gpt_neox", "hidden_size": HIDDEN, "num_attention_heads": HEADS}
FUSED = "gpt_neox.layers.0.attention.query_key_value.weight"


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        FUSED: (3 * HIDDEN, HIDDEN),
        "gpt_neox.layers.0.attention.dense.weight": (HIDDEN, HIDDEN),
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": (2 * HIDDEN, HIDDEN),
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": (HIDDEN, 2 * HIDDEN),
    }
    return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder whose second MLP matrix has a dead quarter."""
    folder = tmp_path_factory.mktemp("model")
    state = weights(0)
    state["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"][:12] *= 1e-5
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints at the steps 2 and 10, as the reference trainer lays them out."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    RunWriter(out, 0, {"train": {"architecture": CONFIG}}).close()
    (out / "checkpoints").mkdir()
    for step in (2, 10):
        save_file(weights(step), out / "checkpoints" / f"step-{step:06d}.safetensors")
    return out


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("views", [True, "head"])
def test_fit_writes_the_table_that_the_library_returns(model, tmp_path, suffix, views):
    out = tmp_path / f"table{suffix}"
    result = call("fit", model, "--views", str(views).lower(), "-o", out)
    assert result.exit_code == 0, result.output
    expected = fit_weights(model, views=views)
    assert f"{out}: {len(expected)} rows" in result.output
    written = pd.read_csv(out, keep_default_na=False) if suffix == ".csv" else pd.read_parquet(out)
    assert list(written) == list(FIT_TABLE)
    assert written["tensor"].tolist() == expected["tensor"].tolist()
    numbers = expected.select_dtypes("float").columns
    np.testing.assert_allclose(written[numbers].astype(float), expected[numbers], rtol=1e-12)
    assert len(expected) == (3 * HEADS if views == "head" else 3) + 3


def test_fit_prints_a_line_for_each_matrix(model):
    result = call("fit", model / "model.safetensors")
    assert result.exit_code == 0, result.output
    table = fit_weights(model)
    header, *lines = result.output.splitlines()
    assert header.split() == ["numel", "lam", "k", "r_squared", "ks", "lam_over_rms", "top_share"]
    for line, row in zip(lines, table.itertuples(), strict=True):
        name, numel, lam, k = line.split()[:4]
        assert name == row.tensor
        assert numel == f"{row.numel:,}"
        assert float(k) == pytest.approx(row.k, abs=5e-5)
        assert float(lam) == pytest.approx(row.lam, rel=5e-3)


def test_fit_pools_what_by_names(model, tmp_path):
    out = tmp_path / "table.csv"
    assert call("fit", model, "--by", "layer,role", "-o", out).exit_code == 0
    expected = fit_weights(model, by=["layer", "role"])
    written = pd.read_csv(out, keep_default_na=False)
    assert list(written) == list(expected)
    np.testing.assert_allclose(written["lam"], expected["lam"])
    printed = call("fit", model, "--by", "role").output.splitlines()[1:]
    assert [line.split()[0] for line in printed] == fit_weights(model, by="role")["role"].tolist()
    assert len(call("fit", model, "--by", "model").output.splitlines()) == 2


def test_what_makes_a_fit_doubtful_is_printed_beside_it(tmp_path):
    save_file({"a.weight": torch.ones(64, 64), "b.weight": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    result = call("fit", tmp_path)
    assert re.search(r"^a\.weight .*nan.* all magnitudes are equal$", result.output, re.MULTILINE)


def test_of_a_run_the_last_checkpoint_is_fitted_and_split_by_its_record(run, tmp_path):
    expected = fit_weights(weights(10), config=CONFIG)
    assert f"{FUSED}[q]" in expected["tensor"].tolist()
    for path in (run, run / "checkpoints" / "step-000010.safetensors"):
        out = tmp_path / "table.parquet"
        assert call("fit", path, "-o", out).exit_code == 0
        written = pd.read_parquet(out).set_index("tensor")
        order = expected["tensor"].tolist()
        np.testing.assert_array_equal(written.loc[order, "k"], expected["k"])
    first = call("fit", run / "checkpoints" / "step-000002.safetensors").output
    assert first != call("fit", run).output


def test_diagnose_prints_what_the_library_finds(model, run, tmp_path):
    result = call("diagnose", model)
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(diagnose(model))
    assert "attention MHA, fused" in result.output
    assert re.search(r"dense_4h_to_h\.weight: .*second population: 25 %", result.output)
    assert call("diagnose", run).output.startswith("mine, step-000010: 6 matrices")
    database = pd.DataFrame({"model": ["near", "far"], "k_median_o": [1.2, 0.5], "k_median_q": [1.2, 0.5]})
    database.to_csv(tmp_path / "database.csv", index=False)
    nearest = call("diagnose", model, "--database", tmp_path / "database.csv").output
    assert re.search(r"Nearest published models.*: near .*, far ", nearest)
    assert f": {3 * HEADS + 3} matrices" in call("diagnose", run, "--views", "head").output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit"], "Missing argument"),
        (["fit", "nowhere"], "no file or folder nowhere"),
        (["fit", "MODEL", "-o", "table.xlsx"], "must end in .parquet or .csv, got table.xlsx"),
        (["fit", "MODEL", "-o", "nowhere/table.csv"], "the folder nowhere does not exist"),
        (["fit", "TEXT"], "no checkpoint (a whole safetensors file, or a state dict"),
        (["fit", "CUT"], "no checkpoint (a whole safetensors file, or a state dict"),
        (["fit", "EMPTY"], "holds no weights"),
        (["fit", "BARE"], "holds no checkpoints/step-*.safetensors"),
        (["fit", "CONFIG"], "config.json is no JSON"),
        (["diagnose", "nowhere"], "no file or folder nowhere"),
        (["diagnose", "MODEL", "--database", "nowhere.csv"], "database: there is no file nowhere.csv"),
        (["diagnose", "MODEL", "--database", "MODEL"], "database must be a CSV file"),
        (["diagnose", "MODEL", "--database", "TEXT"], "k_median_<component>"),
    ],
)
def test_a_wrong_argument_ends_in_exit_code_2_and_one_message(model, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": model, "TEXT": tmp_path / "notes.pt", "CUT": tmp_path / "cut.safetensors"}
    places["TEXT"].write_text("a,b\n1,2\n")
    places["CUT"].write_bytes((model / "model.safetensors").read_bytes()[:100])
    places |= {"EMPTY": tmp_path / "empty", "BARE": tmp_path / "bare", "CONFIG": tmp_path / "broken"}
    places["EMPTY"].mkdir()
    RunWriter(places["BARE"]).close()
    places["CONFIG"].mkdir()
    (places["CONFIG"] / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (places["CONFIG"] / "config.json").write_text("{")
    result = call(*(places.get(word, word) for word in arguments))
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "table.xlsx").exists()
