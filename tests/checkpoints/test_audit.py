"""The audit against trainings whose recipe is known: right recipes, recipes with one fault, and planted files."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from weightdyn import Checkpoints, Recipe, audit_recipe, describe, plot, recover_forces
from weightdyn.checkpoints.distances import STEADY, largest_update, noise_displacement
from weightdyn.checkpoints.recipe import (
    all_but_embeddings_decay,
    constant,
    cosine,
    matrices_decay,
    pieces,
    warmup_stable_decay,
)
from weightdyn.cli import app
from weightdyn.core.tables import AUDIT_TABLE
from weightdyn.train.corpus import Corpus

UPDATES, BETAS = 240, (0.9, 0.95)
EVEN = list(range(0, UPDATES + 1, 20))
LOG = [0, 1, 2, 4, 8, 16, 32, 64, 128, 192, 240]
SAVED = sorted({*EVEN, *LOG, 25, 50, 75, 100, 125, 150, 175, 200, 225})

RECIPES = {
    "neox": Recipe(cosine(2e-3, UPDATES, 20, 0.1), 0.5, BETAS, steps=UPDATES),
    "llama": Recipe(constant(1e-3, 10), 0.1, (0.9, 0.999), steps=UPDATES),
    "wsd": Recipe(warmup_stable_decay(2e-3, UPDATES, 20, 60), 0.5, BETAS, decays=all_but_embeddings_decay),
    "frozen": Recipe(cosine(2e-3, UPDATES, 20, 0.1), 0.5, BETAS, steps=UPDATES),
}


def architecture(name):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    kind = (
        {"model_type": "llama", "num_key_value_heads": 1} if name == "llama" else {"model_type": "gpt_neox"}
    )
    return kind | sizes | {"vocab_size": 256, "max_position_embeddings": 64, "use_cache": False}


def trained(name, folder, corpus, seed):
    """A training of 0.1 million weights by torch's AdamW; of "frozen", its counter of updates stays at 1."""
    recipe = RECIPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture(name))).train()
    groups = {recipe.weight_decay: [], 0.0: []}
    for label, weight in model.named_parameters():
        groups[recipe.decay_of(describe(label, weight.shape).component, label)].append(weight)
    groups = [{"params": each, "weight_decay": decay} for decay, each in groups.items() if each]
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas, foreach=True)
    for update in range(UPDATES + 1):
        if update:
            for group in optimizer.param_groups:
                group["lr"] = float(recipe.lr_at(update))
            text = corpus.batch(seed, update, 2, 32)
            logits = model(text[:, :-1]).logits
            functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            for state in optimizer.state.values() if name == "frozen" else ():
                state["step"].zero_()
        if update in SAVED:
            save_file(model.state_dict(), folder / f"step{update}.safetensors")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    corpus = Corpus.read()
    return {
        name: trained(name, tmp_path_factory.mktemp(name), corpus, seed) for seed, name in enumerate(RECIPES)
    }


def series(folder, steps=EVEN, **places):
    """Some of the checkpoints of a training; `step100=` another file in the place of that one."""
    files = {step: folder / f"step{step}.safetensors" for step in steps}
    return Checkpoints({**files, **{int(step.removeprefix("step")): path for step, path in places.items()}})


def audit(source, recipe):
    return audit_recipe(source, recipe, cache=False, progress=False)


def checks(found):
    """{check: verdict} of the findings."""
    order = {"unknown": 0, "agrees": 1, "contradicts": 2}
    rows = found.findings
    return {
        check: max(own["verdict"], key=order.__getitem__) for check, own in rows.groupby("check", sort=False)
    }


def sentence(found, check):
    return "; ".join(found.findings.loc[found.findings["check"] == check, "sentence"])


def halves(folder, target):
    for path in folder.glob("*.safetensors"):
        save_file({name: each.half() for name, each in load_file(path).items()}, target / path.name)
    return target


# Right recipes


@pytest.mark.parametrize(
    ("name", "steps", "half"),
    [
        ("neox", EVEN, False),
        ("neox", list(range(0, 226, 25)), True),
        ("neox", LOG, False),
        ("neox", [0, 120, 240], False),
        ("llama", list(range(0, 226, 25)), False),
        ("llama", EVEN, True),
        ("llama", LOG, True),
        ("wsd", EVEN, False),
        ("wsd", LOG, False),
    ],
)
def test_nothing_contradicts_a_right_recipe(runs, name, steps, half, tmp_path):
    folder = halves(runs[name], tmp_path) if half else runs[name]
    found = audit(series(folder, steps), RECIPES[name])
    assert found.contradictions == []
    assert found.verdict == "agrees"
    assert checks(found)["bound"] == checks(found)["order"] == checks(found)["decayed"] == "agrees"
    told = "unknown" if name == "wsd" else "agrees"  # of embeddings that are not decayed
    assert checks(found)["decay rate"] == told
    assert list(found.table) == list(AUDIT_TABLE)
    assert str(found).startswith("Checkpoints(")


def test_a_recipe_that_knows_of_the_frozen_counter_is_right(runs):
    scale = math.sqrt(1 - BETAS[1]) / (1 - BETAS[0])
    found = audit(series(runs["frozen"], SAVED), replace(RECIPES["frozen"], update_scale=scale))
    assert found.contradictions == []
    assert checks(found)["update size"] == checks(found)["first update"] == "agrees"


# One fault in the recipe


def wrong(name, **changes):
    return replace(RECIPES[name], **changes)


def later(name, by):
    """The recipe with update t at the learning rate of update t + by."""
    lr = RECIPES[name].lr_at(np.arange(1, UPDATES + 1))
    return wrong(name, lr=np.concatenate([lr[by:], lr[-1:]]) if by > 0 else np.append(0.0, lr[:-1]))


@pytest.mark.parametrize(("name", "true", "said"), [("neox", 0.5, 0.05), ("llama", 0.1, 1.0)])
@pytest.mark.parametrize("half", [False, True])
def test_a_decay_ten_times_off_is_told_from_a_learning_rate(runs, name, true, said, half, tmp_path):
    folder = halves(runs[name], tmp_path) if half else runs[name]
    found = audit(series(folder, EVEN), wrong(name, weight_decay=said))
    assert checks(found)["decay rate"] == "contradicts"
    assert checks(found)["update size"] == "agrees"
    factor = f"{true / said:.3g}"
    assert f"ηλ is {factor} times the recipe's in all 12 gaps" in sentence(found, "decay rate")
    assert f"λ was {true:.3g} where the recipe has {said:.3g}" in sentence(found, "decay rate")
    assert "or η was" not in sentence(found, "decay rate")
    sizes = [
        each.table.loc[each.table["check"] == "update size", "measured"].to_numpy(float)
        for each in (found, audit(series(folder, EVEN), RECIPES[name]))
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-2)


def test_a_decay_that_no_clock_tells_is_not_taken_for_a_learning_rate_alone(runs):
    found = audit(series(runs["wsd"]), wrong("wsd", weight_decay=5.0))
    assert checks(found)["update size"] == "contradicts"
    assert "or λ is smaller than the recipe's" in sentence(found, "update size")
    lr = 4 * RECIPES["wsd"].lr_at(np.arange(1, UPDATES + 1))
    assert "or λ is" not in sentence(audit(series(runs["wsd"]), wrong("wsd", lr=lr)), "update size")


def test_another_floor_is_read_off_the_clock(runs):
    found = audit(series(runs["neox"]), wrong("neox", lr=cosine(2e-3, UPDATES, 20, 0.3)))
    assert [check for check, verdict in checks(found).items() if verdict == "contradicts"] == ["decay rate"]
    assert "ηλ falls to 0.1 of its peak by step 240, where the recipe has 0.3" in sentence(
        found, "decay rate"
    )


@pytest.mark.parametrize(("by", "way"), [(1, "1 update later"), (-1, "1 update earlier")])
@pytest.mark.parametrize("steps", [EVEN, LOG])
def test_a_schedule_shifted_by_one_update_is_told(runs, by, way, steps):
    found = audit(series(runs["neox"], steps), later("neox", by))
    assert checks(found)["decay rate"] == "contradicts"
    assert f"the schedule lies {way} than the recipe's" in sentence(found, "decay rate")
    assert checks(found)["update size"] == "agrees"
    if steps is LOG:
        assert checks(found)["first update"] == "contradicts"


def test_another_warmup_and_a_change_in_mid_run_are_told(runs):
    lr = RECIPES["llama"].lr_at(np.arange(1, UPDATES + 1))
    assert "ηλ is the recipe's from step 40 on and" in sentence(
        audit(series(runs["llama"]), wrong("llama", lr=constant(1e-3, 40))), "decay rate"
    )
    change = wrong("llama", lr=lr * np.where(np.arange(1, UPDATES + 1) > 100, 0.5, 1))
    assert "; or ηλ is the recipe's up to step 100 and 2 times the recipe's from there on" in sentence(
        audit(series(runs["llama"]), change), "decay rate"
    )
    restart = wrong("neox", lr=pieces([(120, RECIPES["neox"].lr), (None, constant(2e-3))]))
    assert checks(audit(series(runs["neox"]), restart))["decay rate"] == "contradicts"


def test_embeddings_that_decay_or_do_not_are_told(runs):
    found = audit(series(runs["neox"]), wrong("neox", decays=all_but_embeddings_decay))
    assert found.verdict == "contradicts"
    assert (
        "gpt_neox.embed_in.weight that get no gradient shrink, so it decays; the recipe's λ of it is 0"
        in (sentence(found, "decayed"))
    )
    found = audit(series(runs["wsd"]), wrong("wsd", decays=matrices_decay))
    assert "stay as they are to the last bit, so it is not decayed; the recipe's λ of it is 0.5" in (
        sentence(found, "decayed")
    )
    assert checks(found)["decay rate"] == "unknown"


@pytest.mark.parametrize("name", ["neox", "llama"])
@pytest.mark.parametrize("factor", [2, 0.5])
def test_a_learning_rate_off_by_two_is_found_though_its_product_with_the_decay_is_right(runs, name, factor):
    recipe = RECIPES[name]
    lr = factor * recipe.lr_at(np.arange(1, UPDATES + 1))
    said = wrong(name, lr=lr, weight_decay=recipe.weight_decay / factor)
    found = audit(series(runs[name]), said)
    assert checks(found)["decay rate"] == "agrees"
    assert checks(found)["update size"] == "contradicts"
    assert "ηλ is the recipe's, so λ is off the other way" in sentence(found, "update size")
    early = audit(series(runs[name], [0, 1, 20, 40]), said)
    assert checks(early)["first update"] == "contradicts"
    measured = early.table.loc[early.table["check"] == "first update"].iloc[0]
    assert measured["measured"] / measured["expected"] == pytest.approx(1 / factor, rel=0.02)


def test_a_learning_rate_off_by_four_with_the_decay_is_told_from_a_decay(runs):
    lr = 4 * RECIPES["neox"].lr_at(np.arange(1, UPDATES + 1))
    found = audit(series(runs["neox"]), wrong("neox", lr=lr))
    assert "η was 0.25 times the recipe's, for updates are larger or smaller as well" in sentence(
        found, "decay rate"
    )


def test_bias_corrections_that_stay_those_of_the_first_update_are_named(runs):
    found = audit(series(runs["frozen"], sorted({*EVEN, 1})), RECIPES["frozen"])
    assert checks(found)["update size"] == "contradicts"
    assert checks(found)["first update"] == checks(found)["decay rate"] == "agrees"
    assert "√(1−β₂)/(1−β₁) = 2.24 (update_scale)" in sentence(found, "update size")


# Checkpoints that are not what they say


def place(runs, step, name="neox"):
    return runs[name] / f"step{step}.safetensors"


def test_a_copy_under_another_step_is_told(runs):
    found = audit(series(runs["neox"], step120=place(runs, 100)), RECIPES["neox"])
    assert "steps 100, 120 hold the same weights" in sentence(found, "order")
    assert checks(found)["decay rate"] == "agrees", "of the gaps beside them"
    assert len(found.contradictions) == 1


@pytest.mark.parametrize("first", [100, 220])
def test_swapped_checkpoints_are_told(runs, first):
    swapped = {f"step{first}": place(runs, first + 20), f"step{first + 20}": place(runs, first)}
    found = audit(series(runs["neox"], **swapped), RECIPES["neox"])
    assert f"steps {first} and {first + 20} stand in each other's place" in sentence(found, "order")
    assert checks(found)["decay rate"] == "agrees"
    assert len(found.contradictions) == 1


def test_swapped_checkpoints_are_told_without_a_clock(runs):
    swapped = series(runs["wsd"], step100=place(runs, 120, "wsd"), step120=place(runs, 100, "wsd"))
    assert "steps 100 and 120 stand in each other's place" in sentence(
        audit(swapped, RECIPES["wsd"]), "order"
    )


def test_a_checkpoint_of_another_training_is_told(runs):
    found = audit(series(runs["neox"], step100=place(runs, 100, "frozen")), RECIPES["neox"])
    assert "step 100 does not lie between 80 and 120" in sentence(found, "order")
    assert checks(found)["decay rate"] == "agrees"
    assert len(found.contradictions) == 1


def test_a_checkpoint_of_another_training_is_told_by_its_rows_where_distances_cannot(runs):
    stranger = series(runs["neox"], [0, 120, 240], step120=place(runs, 120, "frozen"))
    found = audit(stranger, RECIPES["neox"])
    assert "at step 120 no row without gradient has the direction" in sentence(found, "order")
    assert len(found.contradictions) == 1


def test_a_checkpoint_of_another_step_is_dated_by_the_clock(runs):
    found = audit(series(runs["neox"], step120=place(runs, 125)), RECIPES["neox"])
    assert "that checkpoint's weights are of about step 125" in sentence(found, "decay rate")


# What it does not know


def test_what_cannot_be_told_is_unknown_with_the_reason(runs):
    weights = {
        step: {name: w for name, w in load_file(place(runs, step)).items() if "embed" not in name}
        for step in (0, 200)
    }
    measured = pd.DataFrame(
        {"step": step, "tensor": "h.0.up_proj.weight", "component": "up", "numel": w.numel(),
         "norm_sq": float(w.double().square().sum())}
        for step, content in weights.items()
        for name, w in content.items()
        if name.endswith("0.mlp.dense_h_to_4h.weight")
    )  # fmt: skip
    found = audit_recipe(measured, RECIPES["neox"])
    assert found.verdict == "unknown"
    assert checks(found)["decay rate"] == checks(found)["update size"] == checks(found)["order"] == "unknown"
    assert "no inner products" in sentence(found, "update size")


def test_gradients_that_agree_for_long_are_not_taken_for_a_larger_learning_rate(tmp_path):
    generator = torch.Generator().manual_seed(0)
    way = torch.randn(64, 64, generator=generator)
    for step in range(0, 401, 50):  # straight on, at the pace of u = 0.5
        weights = {"model.layers.0.mlp.up_proj.weight": torch.randn(64, 64) * 0 + way.sign() * 5e-4 * step}
        save_file(weights, tmp_path / f"step{step}.safetensors")
    found = audit(Checkpoints(tmp_path), Recipe(1e-3))
    assert checks(found)["update size"] == "unknown"
    assert "gradients agree from one gap to the next" in sentence(found, "update size")


# The numbers behind it


@given(st.floats(0.5, 0.98), st.floats(0.9, 0.999), st.lists(st.floats(-1, 1), min_size=1, max_size=60))
def test_no_gradients_make_an_update_larger_than_the_bound(beta1, beta2, gradients):
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        if v > 1e-30:
            u = abs(m / (1 - beta1**t)) / math.sqrt(v / (1 - beta2**t))
            assert u <= largest_update((beta1, beta2)) * (1 + 1e-6)


def test_the_bound_is_reached_by_gradients_that_grow():
    beta1, beta2 = BETAS
    m = v = 0.0
    for t in range(400):
        g = (beta2 / beta1) ** (t - 400)  # Cauchy and Schwarz: in proportion to β₁ˢ/β₂ˢ
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    assert m / math.sqrt(v) == pytest.approx(largest_update(BETAS), rel=1e-6)
    assert largest_update((0.9, 0.8)) == math.inf


@pytest.mark.parametrize("start", [0, 7])
def test_noise_moves_weights_as_far_as_a_sum_over_its_gradients_says(start):
    lr, beta1, decay = np.linspace(0.3, 0.1, 12), 0.9, 0.4
    total = 0.0
    for s in range(1, start + len(lr) + 1):  # a gradient of one, at update s
        w, m = 0.0, 0.0
        for t in range(1, start + len(lr) + 1):
            m = beta1 * m + (1 - beta1) * (t == s)
            if t > start:
                eta = lr[t - start - 1]
                w = (1 - eta * decay) * w - eta * m / (1 - beta1**t)
        total += w * w
    assert noise_displacement(lr, beta1, decay, start) == pytest.approx(total, rel=1e-12)


# Beside recovery, and on the command line


def test_recovery_warns_where_the_recipe_is_wrong_and_not_where_it_is_right(runs):
    folder = runs["neox"]
    few = series(folder)
    recover_forces(few, RECIPES["neox"], progress=False)
    with pytest.warns(UserWarning, match="ηλ is 0.1 times the recipe's in all 12 gaps"):
        recover_forces(few, wrong("neox", weight_decay=5.0), progress=False)
    measured = few.measure("band", weibull=False, cache=False, progress=False)
    recover_forces(measured, RECIPES["neox"])
    lr = RECIPES["neox"].lr_at(np.arange(1, UPDATES + 1))
    with pytest.warns(UserWarning, match="of what white noise makes at the recipe's η"):
        recover_forces(measured, wrong("neox", lr=2 * lr, weight_decay=0.25))
    with pytest.warns(UserWarning, match="weights came farther than any gradients take them"):
        recover_forces(measured.drop(columns=["dots", "dot_steps"]), wrong("neox", lr=lr / 100))


def test_the_command_says_it_in_its_exit_code(runs, tmp_path):
    table, figure = tmp_path / "audit.parquet", tmp_path / "clock.png"
    arguments = ["audit", runs["llama"], "--recipe", "pythia-14m", "--steps", "0,20,40,60,80,100", "--cache",
                 tmp_path, "--out", table, "--figure", figure]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 1, done.output
    assert "weights and recipe contradict each other" in done.output
    assert list(pd.read_parquet(table)) == list(AUDIT_TABLE)
    assert figure.stat().st_size > 1000


@pytest.mark.filterwarnings("default")
def test_the_command_of_recovery_reads_the_clock_too_and_warns_in_one_line(runs, tmp_path):
    arguments = ["recover", runs["neox"], "--recipe", "pythia-14m", "--steps", "0,20,40,60,80,100", "--cache",
                 tmp_path]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    said = [line for line in done.output.splitlines() if "contradict" in line]
    assert len(said) == 1
    assert said[0].startswith("Warning: the weights contradict the recipe")
    assert "makes ηλ the recipe's" in said[0]
    assert "cli.py" not in done.output


def test_the_figure_of_an_audit_is_the_clock_with_the_recipe(runs):
    found = audit(series(runs["llama"]), RECIPES["llama"])
    assert plot.decay_clock(found.clock, RECIPES["llama"]).get_legend() is not None
    assert STEADY[0] < 1 < STEADY[1]
