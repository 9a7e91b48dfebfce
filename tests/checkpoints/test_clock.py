"""The decay clock against trainings whose schedule and tokens are known, and on rows planted to deceive it."""

import math
import warnings
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from weightdyn import CheckpointError, Checkpoints, Recipe, RunLog, decay_clock
from weightdyn.checkpoints.clock import row_motion
from weightdyn.core.tables import CLOCK_TABLE
from weightdyn.train.corpus import Corpus
from weightdyn.train.trainer import TrainConfig, train

mpl.use("Agg")

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EMBED = "gpt_neox.embed_in.weight"


def clock(source, **options):
    return decay_clock(source, progress=False, **options)


def save(folder, steps, dtype="float32", /, **tensors):
    """Checkpoints of tensors that are given for each step."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, step in enumerate(steps):
        content = {name.replace("__", "."): values[i] for name, values in tensors.items()}
        content = {name: torch.as_tensor(x).to(TYPES[dtype]).contiguous() for name, x in content.items()}
        save_file(content, folder / f"step{step}.safetensors")
    return folder


def rows_of(folder, source, name, rows):
    """The same checkpoints with some rows of a tensor alone."""
    folder.mkdir(exist_ok=True)
    for path in source.glob("*.safetensors"):
        content = load_file(path)
        save_file(content | {name: content[name][rows].contiguous()}, folder / path.name)
    return folder


# Trainings


SCHEDULES = ("cosine", "constant")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For each schedule a training whose bytes are counted, with the bytes that occur."""
    found = {}
    for schedule in SCHEDULES:
        out = tmp_path_factory.mktemp(schedule)
        text = out / "text.txt"
        plain = bytes(np.random.default_rng(0).choice(list(b"the quick brown fox"), 6000).tolist())
        rare = bytes(range(128, 168))  # each once in the text, so in some batches and not in others
        text.write_bytes(b"".join(plain[i * 150 : i * 150 + 150] + rare[i : i + 1] for i in range(40)))
        config = TrainConfig(
            corpus=(str(text),), steps=40, batch_size=2, seq_len=48, lr=8e-3, weight_decay=0.5, warmup=5,
            schedule=schedule, save_every=10, eval_every=1000, log_every=1000, weibull_every=1000, device="cpu",
        )  # fmt: skip
        train(config, out / "run", progress=False)
        corpus = Corpus.read(text)
        seen = [corpus.batch(0, update, 2, 48)[:, :-1].numpy().ravel() for update in range(1, 41)]
        found[schedule] = out / "run", np.bincount(np.concatenate(seen), minlength=256)
    return found


def copy_of(run, folder, dtype):
    folder.mkdir()
    for step in (0, 10, 20, 30, 40):
        content = load_file(run / "checkpoints" / f"step-{step:06d}.safetensors")
        content = {name: each.to(TYPES[dtype]) for name, each in content.items()}
        save_file(content, folder / f"step{step}.safetensors")
    return folder


def log_decay(recipe, row):
    """Σ −ln(1−ηλ) of the recipe over the gap of a row."""
    lr = recipe.lr_at(np.arange(row.step - row.span + 1, row.step + 1))
    return -np.log1p(-lr * recipe.weight_decay).sum()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weights_of_a_training_tell_its_decay_and_its_schedule(runs, schedule, dtype, tmp_path):
    run, counts = runs[schedule]
    recipe = Recipe.from_run(run)
    table = clock(copy_of(run, tmp_path / "copy", dtype))
    assert (table["tensor"] == EMBED).all()
    assert table["step"].tolist() == [10, 20, 30, 40]
    assert (table["rows"] == (counts == 0).sum()).all(), "every row of a byte that does not occur"
    assert (table["of"] == 256).all()
    assert (table["precision"] == dtype).all()
    for row in table.itertuples():
        true = log_decay(recipe, row)
        updates = np.arange(row.step - row.span + 1, row.step + 1)
        # λ with the Σ −ln(1−ηλ) measured over the Ση of the recipe, that of the logarithm's second order taken out
        lam = (1 - row.factor ** (1 / row.span)) * row.span / recipe.lr_at(updates).sum()
        off = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}[dtype]
        assert lam == pytest.approx(0.5, rel=off)
        assert -math.log(row.factor) == pytest.approx(true, rel=1e-5 if dtype == "float32" else off)
        assert row.factor_low < row.factor < row.factor_high
        error = (row.factor_high - row.factor_low) / 2 / true
        assert error < {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}[dtype]
        assert abs(row.factor - math.exp(-true)) < 2 * (row.factor_high - row.factor) + 1e-7


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_of_bytes_that_occur_never_leak_in(runs, schedule, dtype, tmp_path):
    run, counts = runs[schedule]
    assert (counts == 1).any()
    assert (counts == 2).any()
    whole = copy_of(run, tmp_path / "copy", dtype)
    with pytest.warns(UserWarning, match="no row .* tells ηλ"):
        table = clock(rows_of(tmp_path / "used", whole, EMBED, counts > 0))
    assert (table["rows"] == 0).all()
    assert table["factor"].isna().all()
    rare = np.flatnonzero((counts > 0) & (counts < 3))
    some = np.concatenate([rare, np.flatnonzero(counts == 0)[:2]])
    table = clock(rows_of(tmp_path / "few", whole, EMBED, np.sort(some)))
    assert (table["rows"] == 2).all(), "among rare bytes alone too"


# An embedding under AdamW, in float32, whose rows get a gradient when their token occurs


def adamw(
    occurs, updates, lr, decay, columns=128, sigma=0.02, seed=0, eps=1e-8, betas=(0.9, 0.95), scale=1.0
):
    """Weights of every step, float32; `occurs` is (updates, rows), `lr` a number or one for each update."""
    rng = np.random.default_rng(seed)
    rows = occurs.shape[1]
    w = (sigma * rng.normal(size=(rows, columns))).astype(np.float32)
    m, v = np.zeros_like(w), np.zeros_like(w)
    every = [w]
    for t in range(1, updates + 1):
        eta = np.broadcast_to(lr, (updates,))[t - 1]
        g = (scale * rng.normal(size=w.shape) * occurs[t - 1][:, None]).astype(np.float32)
        m = np.float32(betas[0]) * m + np.float32(1 - betas[0]) * g
        v = np.float32(betas[1]) * v + np.float32(1 - betas[1]) * g * g
        u = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        w = (w * np.float32(1 - eta * decay) - np.float32(eta) * u).astype(np.float32)
        every.append(w)
    return every


@pytest.fixture(scope="module")
def planted():
    """40 tokens that always occur, 30 that never do, and 24 that occur once or twice, from the first update on."""
    rng = np.random.default_rng(1)
    occurs = np.zeros((240, 94), bool)
    occurs[:, :40] = True
    for i, row in enumerate(range(70, 94)):
        first = [0, 39, 40, 41, 79, 80, 119, 228][i] if i < 8 else rng.integers(228)
        occurs[first, row] = True
        if i % 3 == 0:
            occurs[rng.integers(228), row] = True
    eta = 1e-3 * np.linspace(1, 0.1, 240)
    return adamw(occurs, 240, eta, 0.1), eta, occurs


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("gap", [10, 40, 120])
def test_a_token_that_occurs_once_is_told_from_one_that_never_does(planted, gap, dtype, tmp_path):
    weights, eta, _ = planted
    steps = range(0, 241, gap)
    table = clock(save(tmp_path / "all", steps, dtype, embed_in__weight=[weights[s] for s in steps]))
    assert (table["rows"] == 30).all()
    ends = table["step"].to_numpy()
    true = np.array([np.log1p(-eta[end - gap : end] * 0.1).sum() for end in ends])
    rates = [table[name] for name in ("lr_decay_low", "lr_decay_high")]
    inside = np.log1p(-rates[1]) * gap <= true
    inside &= true <= np.log1p(-rates[0]) * gap
    assert inside.sum() >= len(table) - max(1, len(table) // 8)
    used = [weights[s][np.r_[:40, 70:94]] for s in steps]
    with pytest.warns(UserWarning, match="no row"):
        table = clock(save(tmp_path / "used", steps, dtype, embed_in__weight=used))
    assert (table["rows"] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_in_the_very_last_update_is_seen(dtype, tmp_path):
    occurs = np.zeros((100, 60), bool)
    occurs[:, :30] = True
    occurs[-1, 30:45] = True
    weights = adamw(occurs, 100, 1e-3 * np.linspace(1, 0.1, 100), 0.1)
    table = clock(save(tmp_path / "s", (0, 50, 100), dtype, embed__weight=[weights[s] for s in (0, 50, 100)]))
    assert table["rows"].tolist() == [15, 15]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_copy_of_coarser_weights_is_judged_by_their_rounding(planted, dtype, tmp_path):
    weights, _, _ = planted
    coarse = [torch.as_tensor(weights[s]).to(TYPES[dtype]) for s in (0, 80, 160, 240)]
    steps = (0, 80, 160, 240)
    own = clock(save(tmp_path / "own", steps, dtype, embed_in__weight=coarse))
    copy = clock(save(tmp_path / "copy", steps, "float32", embed_in__weight=coarse))
    assert copy.equals(own)
    assert (copy["precision"] == dtype).all()


def test_a_series_that_changes_its_type_goes_on(planted, tmp_path):
    weights, _, _ = planted
    folder = save(tmp_path / "all", (0, 80), "float32", embed_in__weight=[weights[0], weights[80]])
    save(folder, (160, 240), "bfloat16", embed_in__weight=[weights[160], weights[240]])
    table = clock(folder)
    assert table["rows"].tolist() == [30, 30, 30]
    assert table["precision"].tolist() == ["float32", "bfloat16", "bfloat16"]


# What rounding makes of a row


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lr_decay", [1e-8, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("span", [1, 30, 1000])
def test_a_row_that_decays_in_float32_keeps_its_direction_within_rounding(span, lr_decay, dtype):
    w = (0.05 * np.random.default_rng(span).normal(size=(300, 64))).astype(np.float32)
    before = w.copy()
    for _ in range(span):
        w = w * np.float32(1 - lr_decay)
    copies = [torch.as_tensor(x).to(TYPES[dtype]).double().numpy() for x in (before, w)]
    motion = row_motion(*copies, span, (dtype, dtype))
    assert motion.keeps.all()
    np.testing.assert_array_equal(motion.equal, (copies[0] == copies[1]).all(1))
    true = float(np.float32(1 - lr_decay)) ** span
    worst = np.abs(motion.ratio.mean() - true) / np.sqrt(motion.variance.mean() / 300 + 1e-18)
    # what float32 takes of every weight at each update is told by the docstring, up to 2^-24
    assert worst < 4 or abs(motion.ratio.mean() - true) < span * 2.0**-25


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_said_to_be_the_least_that_is_seen_is_seen(dtype):
    rng = np.random.default_rng(0)
    w = 0.05 * rng.normal(size=(400, 64))
    noise = rng.normal(size=w.shape)
    noise -= (noise * w).sum(1, keepdims=True) / (w**2).sum(1, keepdims=True) * w
    noise /= np.sqrt((noise**2).mean(1, keepdims=True))

    def motion(size):
        copies = [torch.as_tensor(x).to(TYPES[dtype]).double().numpy() for x in (w, 0.97 * w + size * noise)]
        return row_motion(*copies, 10, (dtype, dtype))

    still = motion(0)
    assert still.keeps.all()
    assert motion(1.6 * still.least[:, None]).keeps.mean() < 0.01
    moved = motion(10 * still.least[:, None])
    np.testing.assert_allclose(moved.turned, 10 * still.least, rtol=0.1)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_interval_of_a_factor_holds_it_in_about_95_of_100(dtype, tmp_path):
    rng = np.random.default_rng(5)
    w = 0.02 * rng.normal(size=(60, 64))
    true = np.exp(-rng.uniform(1e-4, 0.05, size=80))
    every = [w]
    for factor in true:
        w = w * factor
        w = np.concatenate([w[:20], w[20:] + 0.01 * rng.normal(size=(40, 64))])
        every.append(w)
    table = clock(save(tmp_path / "s", range(0, 810, 10), dtype, embed_in__weight=every))
    assert (table["rows"] == 20).all()
    inside = table["factor"].sub(true).abs() < table["factor_high"] - table["factor"]
    # of float64 weights rounded to float32 once, rounding at each of ten updates is more than there was
    assert inside.mean() >= 0.88
    assert inside.mean() < 1 or dtype == "float32"


def test_decay_below_a_step_of_bfloat16_is_read_off_the_weights_that_pass_one(tmp_path):
    rng = np.random.default_rng(2)
    w = (0.02 * rng.normal(size=(250, 256))).astype(np.float32)
    every = [w * np.float32(0.9998) ** i for i in range(4)]
    for i, each in enumerate(every):
        each[:50] += 0.05 * i * rng.normal(size=(50, 256))
    table = clock(save(tmp_path / "s", (0, 10, 20, 30), "bfloat16", embed_in__weight=every))
    assert (table["rows"] == 200).all()
    assert table["factor"].between(0.99977, 0.99983).all()
    assert (table["factor_low"] < 0.9998).all()
    assert (table["factor_high"] > 0.9998).all()
    # By a binomial: entries pass a step with the probability ψ, and move their row by |w|u/‖w‖² when they do.
    stored = torch.as_tensor(every[0][50:]).bfloat16().double().numpy()
    steps = 2.0 ** (np.floor(np.log2(np.abs(stored))) - 7)
    psi = 2e-4 * np.abs(stored) / steps
    error = np.sqrt((psi * (1 - psi) * (stored * steps) ** 2).sum(1) / (stored**2).sum(1) ** 2)
    width = 4 * np.sqrt((error**2).mean() / 200)
    assert (table["factor_high"] - table["factor_low"]).between(0.95 * width, 1.2 * width).all()


def test_an_interval_of_a_few_entries_that_passed_a_step_has_room_for_some_more(tmp_path):
    rng = np.random.default_rng(8)
    every = [0.02 * rng.normal(size=(40, 64))]
    for _ in range(80):
        w = every[-1] * math.exp(-1.7e-5)
        w[20:] += 0.01 * rng.normal(size=(20, 64))
        every.append(w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = clock(save(tmp_path / "s", range(81), "bfloat16", embed_in__weight=every))
    assert (table["rows"] == 20).all()
    told = table[
        table["lr_decay"].notna()
    ]  # the others are bitwise equal: of 1,280 entries 4 pass in the mean
    assert len(told) > 70
    inside = (told["factor_low"] <= math.exp(-1.7e-5)) & (math.exp(-1.7e-5) <= told["factor_high"])
    assert inside.mean() > 0.95


# What is no clock


def test_an_embedding_that_is_not_decayed_says_zero_in_float32_and_nothing_in_bfloat16(tmp_path):
    occurs = np.zeros((30, 40), bool)
    occurs[:, :25] = True
    weights = adamw(occurs, 30, 1e-3, 0.0)
    given = {"embed_in__weight": [weights[s] for s in (0, 10, 20, 30)]}
    table = clock(save(tmp_path / "fine", (0, 10, 20, 30), **given))
    assert (table["rows"] == 15).all()
    assert (table["factor"] == 1).all()
    assert (table["lr_decay"] == 0).all()
    assert (table["lr_decay_high"] == 2.0**-24).all()
    assert table["note"].str.startswith("not decayed").all()
    with pytest.warns(UserWarning, match="trained in bfloat16"):
        table = clock(save(tmp_path / "coarse", (0, 10, 20, 30), "bfloat16", **given))
    assert (table["rows"] == 15).all()
    assert table["lr_decay"].isna().all()
    assert (table["lr_decay_low"] == 0).all()
    assert (table["lr_decay_high"] == 2.0**-8).all()


def test_a_decay_that_rounds_away_in_a_training_in_bfloat16_is_not_said_to_be_zero(tmp_path):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(40, 64).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(embedding.parameters(), lr=1e-2, weight_decay=0.1)
    every = [embedding.weight.detach().clone()]
    for _ in range(3):
        for _ in range(10):
            optimizer.zero_grad()
            (embedding(torch.arange(25)).float() * torch.randn(25, 64)).sum().backward()
            optimizer.step()
        every.append(embedding.weight.detach().clone())
    with pytest.warns(UserWarning, match="trained in bfloat16"):
        table = clock(save(tmp_path / "s", (0, 10, 20, 30), "bfloat16", embed__weight=every))
    assert (table["rows"] == 15).all()
    assert table["lr_decay"].isna().all()
    assert (table["lr_decay_high"] > 1e-3).all()


def test_tied_embeddings_have_no_such_rows_and_the_table_says_so(tmp_path):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(40, 64)
    torch.nn.init.normal_(embedding.weight, std=0.02)
    optimizer = torch.optim.AdamW(embedding.parameters(), lr=1e-3, weight_decay=0.1)
    every = [embedding.weight.detach().clone()]
    for _ in range(4):
        for _ in range(10):
            tokens = torch.randint(25, (64,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(embedding(tokens) @ embedding.weight.T, tokens).backward()
            optimizer.step()
        every.append(embedding.weight.detach().clone())
    for dtype in TYPES:
        with pytest.warns(UserWarning, match="tied"):
            table = clock(save(tmp_path / dtype, range(0, 50, 10), dtype, embed_in__weight=every))
        assert list(table) == list(CLOCK_TABLE)
        assert len(table) == 4
        assert (table["rows"] == 0).all()
        assert table[["factor", "lr_decay", "lr_decay_low"]].isna().all(axis=None)
        assert table["note"].str.contains("tied").all()


def test_a_tensor_that_never_moves_is_frozen_and_not_without_decay(planted, tmp_path):
    weights, _, _ = planted
    still = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    still[3] = 0
    given = {"embed_in__weight": [weights[s] for s in (0, 80, 160)], "adapter__weight": [still] * 3}
    table = clock(save(tmp_path / "s", (0, 80, 160), **given)).set_index("tensor")
    assert table.loc["adapter.weight", "lr_decay"].isna().all()
    assert table.loc["adapter.weight", "note"].str.contains("frozen").all()
    assert table.loc["embed_in.weight", "lr_decay"].notna().all()


def test_rows_of_zeros_tell_nothing_and_do_not_count(planted, tmp_path):
    weights, _, _ = planted
    padded = [weights[s].copy() for s in (0, 80, 160, 240)]
    for each in padded:
        each[40:45] = 0
    table = clock(save(tmp_path / "s", (0, 80, 160, 240), embed_in__weight=padded))
    assert (table["rows"] == 25).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_movement_that_rounding_hides_is_not_taken_for_decay(dtype, tmp_path):
    # Every row gets gradients and grows by 1e-5 a gap; the copies show neither that nor how they turn.
    rng = np.random.default_rng(3)
    w = (0.02 * rng.normal(size=(500, 128))).astype(np.float32)
    every = [w]
    for _ in range(3):
        every.append(every[-1] * np.float32(1 + 1e-5) + 1e-6 * rng.normal(size=w.shape).astype(np.float32))
    with pytest.warns(UserWarning, match="too coarse"):
        table = clock(save(tmp_path / "s", range(4), dtype, mlp__up_proj__weight=every))
    assert table["lr_decay"].isna().all()
    assert table["factor"].isna().all()
    # A tensor beside it that moves much faster does not vouch for one that grows along itself.
    every = [w * np.float32(1 + 1e-5) ** i for i in range(4)]
    seen = [rng.normal(size=(20, 64)) for _ in every]
    with pytest.warns(UserWarning, match="too coarse"):
        table = clock(
            save(tmp_path / "t", range(4), dtype, mlp__up_proj__weight=every, mlp__other__weight=seen)
        )
    assert table["lr_decay"].isna().all()


def test_a_gap_that_hides_single_gradients_speaks_only_where_most_of_the_series_shows_them(tmp_path):
    occurs = np.zeros((120, 60), bool)
    occurs[:, :30] = True
    for hidden, steps in ((slice(110, 120), (0, 55, 110, 120)), (slice(10, 120), (0, 5, 10, 120))):
        eta = np.full(120, 1e-3)
        eta[hidden] = 1e-7
        weights = adamw(occurs, 120, eta, 0.1)
        folder = save(
            tmp_path / str(steps[1]), steps, "bfloat16", embed_in__weight=[weights[s] for s in steps]
        )
        table = clock(folder)
        assert table["rows"].tolist() == [30, 30, 30]
        assert table["lr_decay"].notna().tolist()[:2] == [True, True]
        told = not table["note"].iloc[2].startswith("too coarse")
        assert told == (steps[1] == 55)
        assert np.isnan(table["factor"].iloc[2]) != told


def test_of_a_long_gap_it_is_asked_that_one_gradient_among_many_would_be_seen(tmp_path):
    # Rows that move in every update go as far in 34 updates as one gradient moves a row, and further in more.
    rng = np.random.default_rng(6)
    w = 0.02 * rng.normal(size=(60, 128))
    every = [w, 0.98 * w]
    every[1][:30] += 2e-3 * rng.normal(size=(30, 128))
    assert clock(save(tmp_path / "short", (0, 30), "bfloat16", embed__weight=every))["rows"].tolist() == [30]
    with pytest.warns(UserWarning, match="too coarse for the gap"):
        clock(save(tmp_path / "long", (0, 100_000), "bfloat16", embed__weight=every))


def test_rows_that_one_gradient_made_may_be_moved_along_themselves_and_are_refused(tmp_path):
    # Tied embeddings late in a training: rows of tokens that never occur all point away from the mean state, and
    # what pushes them there holds the balance with decay.
    rng = np.random.default_rng(4)
    common = rng.normal(size=128)
    w = 0.02 * (common + 0.1 * rng.normal(size=(60, 128)))
    every = [w * 0.9999**i for i in range(4)]
    for i, each in enumerate(every):
        each[:30] += 0.01 * i * rng.normal(size=(30, 128))
    with pytest.warns(UserWarning, match="one direction that they share"):
        table = clock(save(tmp_path / "s", (0, 10, 20, 30), embed_in__weight=every))
    assert table["factor"].isna().all()


def test_rows_that_keep_their_direction_and_shrink_differently_are_refused(planted, tmp_path):
    weights, _, _ = planted
    every = [weights[s].copy() for s in (0, 120, 240)]
    for i, each in enumerate(every):
        each[40:50] *= np.float32(1.01**i)
    with pytest.warns(UserWarning, match="shrink differently"):
        table = clock(save(tmp_path / "s", (0, 120, 240), embed_in__weight=every))
    assert table["lr_decay"].isna().all()
    for i, each in enumerate(every):  # of 30 rows two are left out, and the others speak
        each[42:50] /= np.float32(1.01**i)
    table = clock(save(tmp_path / "t", (0, 120, 240), embed_in__weight=every))
    assert table["rows"].tolist() == [28, 28]
    assert table["lr_decay"].notna().all()


# Other tensors, and other series


def test_positions_beyond_the_longest_sequence_and_dead_experts_are_clocks_too(tmp_path):
    occurs = np.zeros((60, 64), bool)
    occurs[:, :48] = True
    positions = adamw(occurs, 60, 2e-3, 0.1, seed=1)
    experts = adamw(occurs, 60, 2e-3, 0.1, columns=32, seed=2)
    alone = adamw(np.zeros((60, 24), bool), 60, 2e-3, 0.1, columns=32, seed=3)
    busy = adamw(np.ones((60, 24), bool), 60, 2e-3, 0.1, columns=32, seed=4)
    steps = (0, 20, 40, 60)
    given = {
        "transformer__wpe__weight": [positions[s] for s in steps],
        "mlp__experts__up_proj": [experts[s].reshape(4, 16, 32) for s in steps],
        "mlp__experts__7__up_proj__weight": [alone[s] for s in steps],
        "mlp__experts__8__up_proj__weight": [busy[s] for s in steps],
        "mlp__norm__weight": [busy[s][0] for s in steps],
    }
    for dtype in ("float32", "float16"):
        table = clock(save(tmp_path / dtype, steps, dtype, **given))
        rows = table.drop_duplicates("tensor").set_index("tensor")[["rows", "of"]].T.to_dict("list")
        assert rows == {
            "transformer.wpe.weight": [16, 64],
            "mlp.experts.up_proj": [16, 64],
            "mlp.experts.7.up_proj.weight": [24, 24],
        }
        np.testing.assert_allclose(table["lr_decay"], 2e-4, rtol=1e-3 if dtype == "float32" else 2e-2)


def test_what_a_checkpoint_of_another_training_hides_is_read_over_it(planted, tmp_path):
    weights, eta, _ = planted
    steps = range(0, 241, 40)
    every = [weights[s] for s in steps]
    every[2] = np.random.default_rng(9).normal(size=every[2].shape)
    table = clock(save(tmp_path / "s", steps, embed_in__weight=every))
    assert table["step"].tolist() == [40, 80, 120, 160, 200, 240]
    assert table["span"].tolist() == [40, 40, 80, 40, 40, 40]
    assert table["note"].str.contains("another training").tolist() == [False, True] + [False] * 4
    assert table["factor"].isna().tolist() == [False, True] + [False] * 4
    true = -np.log1p(-eta[40:120] * 0.1).sum()
    assert -math.log(table["factor"][2]) == pytest.approx(true, rel=1e-5)
    with pytest.warns(UserWarning, match="up to step 200 and lose it at step 240"):
        table = clock(
            save(tmp_path / "t", steps, embed_in__weight=[weights[s] for s in steps[:-1]] + [every[2]])
        )
    assert table["factor"].isna().all()


def test_a_copy_under_another_step_is_no_learning_rate_of_zero(planted, tmp_path):
    weights, _, _ = planted
    every = [weights[s] for s in (0, 0, 80, 160)]
    table = clock(save(tmp_path / "s", (0, 1, 80, 160), embed_in__weight=every))
    assert table["note"].str.contains("the same").tolist() == [True, False, False]
    assert table["lr_decay"].isna().tolist() == [True, False, False]
    assert table["factor"][0] == 1


def test_rows_are_read_in_pieces_as_in_one(planted, tmp_path, monkeypatch):
    weights, _, _ = planted
    folder = save(tmp_path / "s", (0, 80, 160), embed_in__weight=[weights[s] for s in (0, 80, 160)])
    whole = clock(folder)
    monkeypatch.setattr("weightdyn.checkpoints.clock._PIECE", 1000)
    np.testing.assert_allclose(clock(folder)["factor"], whole["factor"], rtol=1e-14)


def test_every_source_of_checkpoints_will_do(runs, tmp_path):
    run, _ = runs["constant"]
    table = clock(RunLog(run))
    assert clock(run).equals(table)
    assert clock(str(run / "checkpoints")).equals(table)
    assert clock(Checkpoints(run, steps=[0, 20, 40]))["span"].tolist() == [20, 20]
    paths = {s: run / "checkpoints" / f"step-{s:06d}.safetensors" for s in (0, 20, 40)}
    assert clock(paths).equals(clock(Checkpoints(run, steps=[0, 20, 40])))


def test_series_that_do_not_do_are_named(planted, tmp_path):
    weights, _, _ = planted
    folder = save(tmp_path / "s", (0, 80, 240), embed_in__weight=[weights[s] for s in (0, 80, 240)])
    with pytest.raises(ValueError, match="two checkpoints or more, got 1"):
        clock(Checkpoints(folder, steps=[80]))
    with pytest.raises(ValueError, match="16 entries or more"):
        clock(save(tmp_path / "v", (0, 80), norm__weight=[weights[0][0]] * 2))
    (folder / "step80.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match=r"step80\.safetensors"):
        clock(folder)
    with pytest.warns(UserWarning, match="left out"):
        table = clock(Checkpoints(folder, errors="skip"))
    assert table["span"].tolist() == [240]
    assert table["rows"].tolist() == [30]
    (folder / "step240.safetensors").write_bytes(b"cut short")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="fewer than two checkpoints that are sound"),
    ):
        clock(Checkpoints(folder, errors="skip"))


def test_a_recipe_is_held_against_the_factor(runs):
    """−ln(factor) is the recipe's sum to seven digits; the constant ηλ lies above the mean by half the variance."""
    run, _ = runs["cosine"]
    recipe = Recipe.from_run(run)
    table = clock(Checkpoints(run, steps=[0, 40]))
    (row,) = table.itertuples()
    eta = recipe.lr_at(np.arange(1, 41)) * 0.5
    assert -math.log(row.factor) == pytest.approx(-np.log1p(-eta).sum(), rel=1e-6)
    assert row.lr_decay - eta.mean() == pytest.approx(eta.var() / 2, rel=0.02)
    wrong = replace(recipe, weight_decay=0.05)
    assert log_decay(wrong, row) < -math.log(row.factor) / 9
