"""Schedules against loops written out by hand, torch's own schedulers, and the runs they describe."""

import json
import math
import os
import tracemalloc

import numpy as np
import pytest
import torch

from weightdyn.checkpoints import recipe
from weightdyn.checkpoints.recipe import PRESETS, Recipe
from weightdyn.record.runlog import RunWriter
from weightdyn.train.trainer import TrainConfig


def by_torch(factor, updates):
    """Learning rates of updates 1 … of a torch loop: step the optimizer, then the schedule."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def gpt_neox(update, peak=1e-3, floor=1e-4, warmup=1430, steps=143_000):
    """What GPT-NeoX did before 2023, step by step: the schedule is stepped after the update."""
    count = update - 1
    if count <= warmup:
        return peak * count / warmup
    behind = min(count, steps - warmup) - warmup
    return max(floor, peak / 2 * (math.cos(math.pi * behind / steps) + 1))


@pytest.mark.parametrize("update", [1, 2, 1430, 1431, 50_000, 115_139, 115_140, 115_141, 143_000])
def test_pythias_schedule_is_gpt_neox_as_it_was(update):
    for size in ("70m", "70m-deduped", "14m", "31m"):
        lr = Recipe.preset(f"pythia-{size}").lr_at(update)
        assert lr == pytest.approx(gpt_neox(update), rel=1e-14)


def test_pythias_schedule_has_the_values_that_its_configuration_implies():
    lr = Recipe.preset("EleutherAI/pythia-70m").lr_at(np.array([1, 1430, 50_000, 115_139, 143_000]))
    np.testing.assert_allclose(lr, [0, 9.993007e-4, 7.413676e-4, 1.0000603e-4, 1e-4], rtol=1e-6)
    everything = Recipe.preset("pythia-70m").lr_at(np.arange(1, 143_001))
    floor = 1 + np.flatnonzero(everything > 1e-4 * (1 + 1e-12))[-1]
    assert floor == 115_139, "flat over the last fifth"


def test_peaks_of_all_sizes_are_those_of_the_configuration_files():
    peaks = {
        "14m": 1e-3,
        "160m": 6e-4,
        "410m": 3e-4,
        "1b": 2.5e-4,
        "1.4b": 2e-4,
        "2.8b": 1.6e-4,
        "12b": 1.2e-4,
    }
    for size, peak in peaks.items():
        for twin in ("", "-deduped"):
            found = Recipe.preset(f"pythia-{size}{twin}")
            assert found.lr_at(1431) == pytest.approx(peak)
            assert (found.weight_decay, found.betas, found.steps) == (0.1, (0.9, 0.95), 143_000)
    assert len([name for name in PRESETS if name.startswith("pythia") and "seed" not in name]) == 20
    for size in ("14m", "410m"):
        assert Recipe.preset(f"EleutherAI/pythia-{size}-seed9") == Recipe.preset(f"pythia-{size}")


def test_a_tenth_of_the_decay_makes_the_weights_remember_ten_times_as_long():
    true, paper = Recipe.preset("pythia-70m"), Recipe.preset("pythia-70m", weight_decay=0.01)
    assert (round(true.tau), round(paper.tau)) == (10_000, 100_000)
    assert paper.lr_at(5000) == true.lr_at(5000)
    assert round(true.steps / true.tau, 2) == 14.3
    assert (true.decay_of("q", "attention.q"), true.decay_of("norm", "ln"), true.decay_of("bias", "b")) == (
        0.1,
        0,
        0,
    )


@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_torchs_lambdas_with_the_counter_at_zero(warmup):
    steps, updates = 40, np.arange(1, 51)

    def rise(n):
        return n / warmup if n < warmup else None

    def straight(n):
        return rise(n) if n < warmup else max(0.0, (steps - n) / (steps - warmup))

    def half_cosine(n):
        if n < warmup:
            return rise(n)
        turn = min((n - warmup) / (steps - warmup), 1)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * turn))

    def flat(n):
        return rise(n) if n < warmup else 1.0

    for schedule, factor in [
        (recipe.linear(1.0, steps, warmup, first=0), straight),
        (recipe.cosine(1.0, steps, warmup, 0.1, first=0), half_cosine),
        (recipe.constant(1.0, warmup, first=0), flat),
    ]:
        np.testing.assert_allclose(schedule(updates), by_torch(factor, 50), atol=1e-15)


def test_warm_up_stable_decay_rises_rests_and_falls():
    lr = recipe.warmup_stable_decay(2.0, steps=100, warmup=10, cooldown=20, floor=0.5)(np.arange(1, 121))
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10 * 2)
    assert set(lr[10:80]) == {2.0}
    np.testing.assert_allclose(lr[80:100], np.linspace(1.95, 1.0, 20))
    assert set(lr[100:]) == {1.0}


def reference_rate(update, schedule, warmup, steps=60, peak=3e-3, floor=0.3):
    """What the reference trainer's documentation says of its schedule, in scalars."""
    if update <= warmup:
        return peak * update / warmup
    if schedule == "constant" or warmup == steps:
        return peak
    angle = math.pi * (update - warmup) / (steps - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(angle)) / 2)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 13, 60])
def test_the_recipe_of_a_run_has_its_learning_rate_at_every_update(tmp_path, schedule, warmup):
    config = TrainConfig(
        steps=60, lr=3e-3, warmup=warmup, schedule=schedule, floor=0.3, weight_decay=0.2, decayed="all"
    )
    writer = RunWriter(tmp_path / "run", 0, {"train": json.loads(json.dumps(vars(config)))})
    writer.close()
    found = Recipe.from_run(tmp_path / "run")
    truth = [reference_rate(update, schedule, warmup) for update in range(1, 61)]
    np.testing.assert_allclose(found.lr_at(np.arange(1, 61)), truth, rtol=1e-14)
    assert (found.decay_of("norm", "x"), found.steps, found.betas) == (0.2, 60, (0.9, 0.95))


def test_a_trainer_state_gives_the_logged_rates_and_lines_between_them(tmp_path):
    history = [{"step": s, "learning_rate": 1e-3 * (1 - s / 100), "loss": 1.0} for s in range(10, 101, 10)]
    history.append({"step": 100, "train_runtime": 1.0})
    (tmp_path / "trainer_state.json").write_text(json.dumps({"max_steps": 100, "log_history": history}))
    found = Recipe.from_trainer_state(tmp_path, weight_decay=0.1)
    np.testing.assert_allclose(found.lr_at([10, 15, 100]), [9e-4, 8.5e-4, 0], atol=1e-18)
    assert (found.weight_decay, found.steps) == (0.1, 100)
    older = Recipe.from_trainer_state(tmp_path / "trainer_state.json", ahead=True)
    assert older.lr_at(11) == pytest.approx(9e-4)
    with pytest.raises(ValueError, match="log_history has no entry with a learning_rate"):
        Recipe.from_trainer_state({"log_history": [{"step": 1, "loss": 2.0}]})


ENTRY = {"step": 10, "learning_rate": 1e-3}
STATES = {
    "": "no JSON",
    "{": "no JSON",
    "<html>log in</html>": "a web page",
    "[" * 100_000: "no JSON",
    "[]": "holds a list",
    "3": "holds a int",
    json.dumps({"log_history": 3}): "log_history must be a list of records",
    json.dumps({"log_history": [3]}): "log_history must be a list of records",
    json.dumps({"log_history": [{"loss": 1.0}]}): "no entry with a learning_rate",
    json.dumps(
        {"log_history": [{**ENTRY, "learning_rate": math.nan}]}
    ): "learning_rate must be a number >= 0, got nan",
    json.dumps({"log_history": [{**ENTRY, "learning_rate": -1e-3}]}): "learning_rate must be",
    json.dumps({"log_history": [{**ENTRY, "learning_rate": "1e-3"}]}): "learning_rate must be",
    json.dumps({"log_history": [{**ENTRY, "learning_rate": None}]}): "learning_rate must be",
    json.dumps({"log_history": [{"learning_rate": 1e-3}]}): "step must be a whole number",
    json.dumps({"log_history": [{**ENTRY, "step": -1}]}): "step must be a whole number",
    json.dumps({"log_history": [{**ENTRY, "step": 1.5}]}): "step must be a whole number",
    json.dumps({"log_history": [{**ENTRY, "step": "10"}]}): "step must be a whole number",
    json.dumps({"log_history": [{**ENTRY, "step": 10**18}]}): "step must be a whole number",
    json.dumps({"log_history": [ENTRY], "max_steps": 10**18}): "max_steps must be a whole number",
    json.dumps({"log_history": [ENTRY], "max_steps": "many"}): "max_steps must be a whole number",
}


@pytest.mark.parametrize("text", STATES, ids=[text[:60] for text in STATES])
def test_a_trainer_state_that_cannot_be_is_named_with_its_remedy(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(
        ValueError, match=f"trainer_state.json.*{STATES[text]}.*(copy it again|give the schedule)"
    ):
        Recipe.from_trainer_state(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_trainer_state_that_is_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "trainer_state.json")
    with pytest.raises(ValueError, match=r"trainer_state\.json is a pipe"):
        Recipe.from_trainer_state(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Recipe.from_trainer_state(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="state must be a path"):
        Recipe.from_trainer_state(None)  # type: ignore[arg-type]


def test_the_longest_training_takes_no_memory():
    state = {
        "max_steps": 90_000_000,
        "log_history": [{"step": s, "learning_rate": 1e-3} for s in (1, 80_000_000)],
    }
    tracemalloc.start()
    try:
        found = Recipe.from_trainer_state(state, weight_decay=0.1)
        assert found.lr_at(85_000_000) == 1e-3
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    with pytest.raises(
        ValueError, match="update 90000001 lies behind the training, which has 90000000 updates"
    ):
        found.lr_at([1, 90_000_001])


def test_the_timescale_is_that_of_the_peak_wherever_it_lies(monkeypatch):
    monkeypatch.setattr(recipe, "_AT_A_TIME", 7)
    found = Recipe(recipe.cosine(1e-3, steps=100, warmup=33), 0.1, steps=100)
    assert found.tau == pytest.approx(1 / (1e-3 * 0.1))


@pytest.mark.parametrize(
    "change", [{"lr": None}, {"steps": 10**18}, {"warmup": -1}, {"schedule": "zigzag"}, {"betas": 3}]
)
def test_a_run_whose_settings_were_spoilt_is_named(tmp_path, change):
    RunWriter(tmp_path / "run", 0, {"train": {"lr": 1e-3, "steps": 10, **change}}).close()
    (name,) = change
    with pytest.raises(
        ValueError, match=f"run: .*run: the section 'train' of run.json cannot be used .*{name}"
    ):
        Recipe.from_run(tmp_path / "run")


def test_the_trainer_of_transformers_logs_what_the_recipe_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            "gpt_neox",
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            vocab_size=16,
        )
    )
    used = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            used.append(kwargs["optimizer"].param_groups[0]["lr"])

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, warmup_steps=2, learning_rate=1e-3, logging_steps=1, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, per_device_train_batch_size=1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 8
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Watch()])
    trainer.train()
    found = Recipe.from_trainer_state({"max_steps": 6, "log_history": trainer.state.log_history})
    np.testing.assert_allclose(found.lr_at(np.arange(1, 7)), used, atol=1e-18)
    np.testing.assert_allclose(recipe.linear(1e-3, 6, 2, first=0)(np.arange(1, 7)), used, atol=1e-18)


def test_a_number_an_array_and_a_function_are_learning_rates():
    assert Recipe(0.1).lr_at([1, 5]).tolist() == [0.1, 0.1]
    assert Recipe([0.1, 0.2]).lr_at(2) == 0.2
    assert Recipe(lambda t: 1 / t).lr_at(np.array([[1, 2]])).tolist() == [[1.0, 0.5]]
    with pytest.raises(ValueError, match="update 3 lies behind lr"):
        Recipe([0.1, 0.2]).lr_at([1, 3])
    with pytest.raises(ValueError, match="counted from 1, got 0"):
        Recipe(0.1).lr_at(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(-1.0), "lr must be"),
        (lambda: Recipe(0.1, weight_decay=-1), "weight_decay must be"),
        (lambda: Recipe(0.1, betas=(0.9, 1.0)), "betas must be"),
        (lambda: Recipe(0.1, eps=-1), "eps must be"),
        (lambda: Recipe(0.1, steps=-1), "steps must be"),
        (lambda: Recipe(0.1, steps=10**18), "steps must be"),
        (lambda: Recipe(0.1, batch_tokens=0), "batch_tokens must be a number > 0, or None .not known."),
        (lambda: Recipe(0.1, clip=-1.0), "clip must be"),
        (lambda: Recipe(0.1, z_loss=math.inf), "z_loss must be"),
        (lambda: Recipe(0.1, update_scale=0), "update_scale must be a number > 0, got 0"),
        (lambda: Recipe("fast"), "lr must be .* got 'fast'"),
        (lambda: Recipe(math.nan), "lr must be"),
        (lambda: Recipe(0.1, weight_decay="0.1"), "weight_decay must be a number >= 0, got '0.1'"),
        (lambda: Recipe(0.1, weight_decay=math.nan), "weight_decay must be"),
        (lambda: Recipe(0.1, betas=None), "betas must be two numbers"),
        (lambda: Recipe.preset(None), "name must be the name of a preset"),
        (lambda: recipe.cosine("1", 10), "peak must be a number"),
        (lambda: recipe.linear(1.0, 1.5), "steps must be a whole number"),
        (
            lambda: Recipe(lambda t: "fast").lr_at(1),
            "lr: the function must return one learning rate for each",
        ),
        (lambda: Recipe(lambda t: t[:2]).lr_at([1, 2, 3]), "lr: the function must return one learning rate"),
        (lambda: Recipe(0.1).lr_at([1.5]), "updates must be whole numbers"),
        (lambda: Recipe(0.1).lr_at("1"), "updates must be whole numbers, got '1'"),
        (lambda: Recipe.preset("gpt-5"), "name must be one of pythia-14m"),
        (lambda: recipe.cosine(1.0, 10, 10), "warmup must be from 0 to steps - 1 = 9"),
        (lambda: recipe.cosine(1.0, 10, 0, 2.0), "floor must be"),
        (lambda: recipe.warmup_stable_decay(1.0, 10, 5, 6), "cooldown must be from 1 to"),
        (lambda: recipe.constant(1.0, first=2), r"first must be a whole number in \[0, 1\]"),
        (lambda: Recipe(recipe.constant(1.0)).tau, "recipe with steps"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_by_name(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_decays_must_be_a_function():
    with pytest.raises(TypeError, match="matrices_decay"):
        Recipe(0.1, decays="matrices")  # type: ignore[arg-type]


def test_a_recipe_prints_what_differs_from_the_defaults():
    found = Recipe(recipe.linear(1e-3, 100), 0.1, decays=recipe.all_decay, clip=1, update_scale=2)
    assert repr(found) == (
        "Recipe(lr=linear(peak=0.001, steps=100), weight_decay=0.1, decays=all_decay, clip=1.0, update_scale=2.0)"
    )
    assert repr(Recipe(0.1)) == "Recipe(lr=0.1)"
    assert repr(Recipe([0.1, 0.2])) == "Recipe(lr=a float64 array of shape (2,))"
