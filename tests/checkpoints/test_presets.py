"""Recipes of published models against the formulas of the code that trained them, written out in scalars.

The numbers here are those of the files that `data/presets.md` names, in the files' own units (tokens, if theirs).
"""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from weightdyn.checkpoints.recipe import PRESETS, Recipe, constant
from weightdyn.checkpoints.recovery import recover_forces

PAGE = Path(__file__).parents[2] / "data" / "presets.md"


def olmo(now, peak, warmup, end, floor=0.1, lowest=None, shape="cosine"):
    """olmo/optim.py: `CosWithWarmup` and `LinearWithWarmup`, `now` counted before the optimizer's step."""
    lowest = 0.1 * peak if lowest is None else lowest
    if now < warmup:
        return lowest + (peak - lowest) * now / warmup
    if now >= end:
        return floor * peak
    turn = (now - warmup) / (end - warmup)
    if shape == "linear":
        return peak - (peak - floor * peak) * turn
    return floor * peak + (peak - floor * peak) * (1 + math.cos(math.pi * turn)) / 2


def olmo_7b(update):
    if update <= 501_000:
        return olmo(update, 3e-4, 5000, 476_837, shape="linear")
    if update <= 556_000:
        return olmo(update, 0.00003, 501_000, 700_000, shape="linear")
    return olmo(update, 0.000023, 556_000, 557_000, floor=0.001, shape="linear")


def olmo_1_7(update, until, left):
    if update <= until:
        return olmo(update * 1024 * 4096, 3e-4, 10_485_760_000, 3e12)
    return olmo(update - until, left, 0, math.ceil(50e9 / (1024 * 4096)), floor=0, shape="linear")


def olmo2(update, peak, sequences, end=5e12, warmup=8_388_608_000):
    return olmo(update * sequences * 4096, peak, warmup, end, lowest=0.0)


def olmo2_second(update, peak, sequences, tokens):
    return olmo(update, peak, 0, math.ceil(tokens / (sequences * 4096)), floor=0, shape="linear")


def amber(update, total=1_706_976 // 2240 * 360):
    """main.py: the rate of step 0 is set before the first update."""
    step = update - 1
    if step < 2000:
        return 3e-4 * step / 2000
    if step > total:
        return 3e-5
    return 3e-5 + 0.5 * (1 + math.cos(math.pi * (step - 2000) / (total - 2000))) * (3e-4 - 3e-5)


def nanotron(update, peak, begin, decay, warmup=2000):
    """src/nanotron/helpers.py, a LambdaLR that is stepped after the optimizer."""
    step = update - 1
    if step <= warmup:
        return peak * step / warmup
    if step < begin:
        return peak
    return peak * (decay - (step - begin)) / decay if step < begin + decay else 0.0


WRITTEN = {
    "olmo-1b": lambda k: olmo(k, 4e-4, 2000, 739_328),
    "olmo-7b": olmo_7b,
    "olmo-7b-0424": lambda k: olmo_1_7(k, 477_000, 0.00009785),
    "olmo-7b-0724": lambda k: olmo_1_7(k, 639_650, 0.00003743),
    "olmoe-1b-7b-0924": lambda k: olmo(k * 1024 * 4096, 4e-4, 10_485_760_000, 5e12),
    "olmo-2-0425-1b": lambda k: olmo2(k, 4e-4, 512),
    "olmo-2-0425-1b-stage2": lambda k: olmo2_second(k, 0.000074487, 512, 50e9),
    "olmo-2-1124-7b": lambda k: olmo2(k, 3e-4, 1024),
    "olmo-2-1124-7b-stage2": lambda k: olmo2_second(k, 0.000061499, 1024, 50e9),
    "olmo-2-1124-13b": lambda k: olmo2(k, 9e-4, 2048),
    "olmo-2-1124-13b-stage2": lambda k: olmo2_second(k, 9e-5, 2048, 100e9),
    "olmo-2-1124-13b-stage2-300b": lambda k: olmo2_second(k, 9e-5, 2048, 300e9),
    "olmo-2-0325-32b": lambda k: olmo2(k, 6e-4, 2048, end=6.5e12, warmup=2000 * 2048 * 4096),
    "olmo-2-0325-32b-stage2": lambda k: olmo2_second(k, olmo(721_901, 6e-4, 2000, 774_861), 2048, 100e9),
    "olmo-2-0325-32b-stage2-300b": lambda k: olmo2_second(k, olmo(721_901, 6e-4, 2000, 774_861), 2048, 300e9),
    "amber": amber,
    "smollm2-135m": lambda k: nanotron(k, 0.003, 1_600_000, 400_000),
    "smollm2-360m": lambda k: nanotron(k, 0.003, 2_080_000, 520_000),
    "smollm2-1.7b": lambda k: nanotron(k, 0.0005, 4_716_000, 524_000),
    "smollm3-3b": lambda k: nanotron(k, 0.0002, 4_198_001, 522_000),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_presets_rates_are_those_of_the_code_that_trained_it(name):
    recipe = Recipe.preset(name)
    assert recipe.steps is not None
    turns = {1, 2, 1000, 1999, 2000, 2001, 2499, 2500, 2501, 4000, 4999, 5000, 5001}
    for at in (
        477_000,
        476_837,
        501_000,
        556_000,
        557_000,
        639_650,
        1_600_000,
        2_080_000,
        4_198_001,
        4_716_000,
    ):
        turns |= {at - 1, at, at + 1, at + 2}
    turns |= {int(recipe.steps * part) for part in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)}
    turns |= {recipe.steps - 20, recipe.steps - 1, recipe.steps}
    updates = np.array(sorted(at for at in turns if at <= recipe.steps))
    # A schedule of tokens ends within an update: that moves a rate by a few 1e-7 of itself.
    truth = np.array([WRITTEN[name](int(at)) for at in updates])
    np.testing.assert_allclose(recipe.lr_at(updates), truth, rtol=3e-6, atol=1e-6 * truth.max())


def test_olmo_7b_was_taken_to_zero_in_two_changes_of_plan():
    lr = Recipe.preset("allenai/OLMo-7B").lr_at(
        [1, 5000, 476_837, 501_000, 556_000, 556_001, 556_500, 557_000]
    )
    fell = 3e-5 - 2.7e-5 * 55_000 / 199_000  # from 3e-5 at 501,000 to a tenth of it at 700,000
    truth = [3e-4 * (0.1 + 0.9 / 5000), 3e-4, 3e-5, 3e-5, fell]
    truth += [2.3e-5 * (1 - 0.999 / 1000), 2.3e-5 * (1 - 0.999 / 2), 2.3e-8]
    np.testing.assert_allclose(lr, truth, rtol=1e-12)
    assert Recipe.preset("olmo-7b").batch_tokens == 2160 * 2048


STAGES = {  # the rate that the second stage's file starts from, and where the first one was left
    "olmo-7b-0424": (477_000, 9.785e-5, 1e-4),
    "olmo-7b-0724": (639_650, 3.743e-5, 1e-4),
    "olmo-2-0425-1b": (1_907_359, 7.4487e-5, 1e-4),
    "olmo-2-1124-7b": (928_646, 6.1499e-5, 3e-3),  # read from a log some 650 updates before
    "olmo-2-1124-13b": (596_057, 9e-5, 1e-4),
    "olmo-2-0325-32b": (721_901, 6.62323e-5, 1e-4),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_second_stage_starts_where_the_first_stages_schedule_was_left(name):
    at, left, within = STAGES[name]
    assert Recipe.preset(name).lr_at(at) == pytest.approx(left, rel=within)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        # steps × tokens of an update, against the tokens that each model's card or checkpoint names
        ("pythia-70m", 299.9e9),
        ("amber", 1259.13e9),
        ("olmo-1b", 3.1e12),
        ("olmo-7b", 2464e9),
        ("olmo-2-1124-7b", 3896e9),
        ("olmo-2-1124-13b", 5001e9),
        ("olmo-2-0425-1b", 4001e9),
        ("olmo-2-0325-32b", 6056e9),
        ("smollm2-135m", 2e12),
        ("smollm2-360m", 4e12),
        ("smollm2-1.7b", 11e12),
        ("smollm3-3b", 11.2e12),
    ],
)
def test_updates_times_tokens_are_the_tokens_that_the_model_was_trained_on(name, tokens):
    recipe = Recipe.preset(name)
    assert recipe.steps is not None
    assert recipe.batch_tokens is not None
    assert recipe.steps * recipe.batch_tokens == pytest.approx(
        tokens, rel=0.05 if tokens % 1e11 == 0 else 1e-3
    )


@pytest.mark.parametrize(
    ("name", "matrix", "norm", "embed", "eps", "z_loss"),
    [
        ("pythia-160m-seed3", 0.1, 0, 0.1, 1e-8, None),
        ("amber", 0.1, 0.1, 0.1, 1e-8, None),
        ("olmo-1b", 0.1, 0, 0, 1e-5, None),
        ("olmo-7b", 0.1, 0, 0, 1e-5, None),
        ("olmo-7b-0424", 0.1, 0.1, 0.1, 1e-5, None),
        ("olmoe-1b-7b-0924", 0.1, 0.1, 0.1, 1e-8, None),
        ("olmo-2-1124-13b-stage2", 0.1, 0.1, 0, 1e-8, 1e-5),
        ("smollm2-1.7b", 0.01, 0.01, 0.01, 1e-8, None),
        ("smollm3-3b", 0.1, 0.1, 0, 1e-8, None),
    ],
)
def test_what_decays_is_what_the_files_say(name, matrix, norm, embed, eps, z_loss):
    recipe = Recipe.preset(name)
    found = [recipe.decay_of(component, "x") for component in ("q", "unembed", "norm", "embed")]
    assert found == [matrix, matrix, norm, embed]
    assert (recipe.betas, recipe.eps, recipe.clip, recipe.z_loss) == ((0.9, 0.95), eps, 1.0, z_loss)


def test_a_preset_is_found_under_the_name_of_the_repository_that_has_the_checkpoints():
    for name, known in [
        ("LLM360/Amber", "amber"),
        ("allenai/OLMo-7B-0724-hf", "olmo-7b-0724"),
        ("HuggingFaceTB/SmolLM3-3B-checkpoints", "smollm3-3b"),
        ("HuggingFaceTB/SmolLM2-1.7B-intermediate-checkpoints", "smollm2-1.7b"),
        ("EleutherAI/pythia-410m-seed9", "pythia-410m-seed9"),
        ("allenai/OLMo-2-0325-32B", "olmo-2-0325-32b"),
    ]:
        assert Recipe.preset(name) == PRESETS[known]
    with pytest.raises(ValueError, match="the nearest is 'olmo-2-1124-7b'"):
        Recipe.preset("OLMo2-1124-7B")
    with pytest.raises(ValueError, match="name must be one of pythia-14m"):
        Recipe.preset("pythia-1b-seed1")


def test_every_preset_prints_in_one_line_that_says_what_differs_from_the_defaults():
    for name in PRESETS:
        assert re.fullmatch(r"Recipe\(lr=\w+\(.+\), weight_decay=[\d.]+, .+\)", repr(PRESETS[name])), name
    assert "0x" not in "".join(map(repr, PRESETS.values()))


def test_the_page_of_sources_has_every_preset():
    page = PAGE.read_text(encoding="utf-8")
    missing = [name for name in PRESETS if name not in page and not re.search("^pythia", name)]
    assert missing == []


def test_an_update_scale_is_in_the_injection_that_is_recovered():
    """Adam whose bias corrections stay those of t = 1, as OLMo-core's SkipStepAdamW had them, on pure noise."""
    rng = np.random.default_rng(0)
    n, lr, decay, (beta1, beta2) = 4000, 1e-3, 0.1, (0.9, 0.95)
    w, m, v = rng.normal(0, 0.02, n), np.zeros(n), np.ones(n) * (1 - beta2)
    norms, injected = {}, 0.0
    for update in range(1, 601):
        g = rng.normal(0, 1, n)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        u = m / (1 - beta1) / np.sqrt(v / (1 - beta2))
        w = (1 - lr * decay) * w - lr * u
        if update % 100 == 0:
            norms[update] = float(w @ w)
        if update > 100:
            injected += lr**2 * float(u @ u) / 500
    table = pd.DataFrame({"step": list(norms), "tensor": "w", "stack": "", "component": "up", "numel": n})
    table = table.assign(role="transmission", layer=pd.array([0] * len(norms), dtype="Int64"))
    table = table.assign(norm_sq=list(norms.values()))
    found = {}
    for scale in (1.0, math.sqrt(1 - beta2) / (1 - beta1)):
        recipe = Recipe(constant(lr), decay, (beta1, beta2), update_scale=scale)
        found[scale] = recover_forces(table, recipe, progress=False)["injection"].mean()
    one, true = found.values()
    assert true == pytest.approx(injected, rel=0.1)  # E[1/v] of 20 gradients is some percent above 1/E[v]
    assert true == pytest.approx(5 * one), "the scale is sqrt(5), the injection goes with its square"
