"""Schedules against transformers' and torch's schedulers and loops written out by hand; pieces of several."""

import inspect
import math
import pickle

import numpy as np
import pytest
import torch

from weightdyn.checkpoints import schedules
from weightdyn.checkpoints.recipe import Recipe


def used_by(make, updates):
    """Learning rates of updates 1 … of a loop that steps the optimizer and then the scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [1, 6])
def test_schedules_are_those_of_transformers(warmup):
    optimization = pytest.importorskip("transformers.optimization")
    given = {
        "get_constant_schedule_with_warmup": schedules.constant(2.0, warmup, first=0),
        "get_linear_schedule_with_warmup": schedules.linear(2.0, 40, warmup, first=0),
        "get_cosine_schedule_with_warmup": schedules.cosine(2.0, 40, warmup, first=0),
        "get_inverse_sqrt_schedule": schedules.inverse_sqrt(2.0, warmup, first=0),
    }
    for name, schedule in given.items():
        make = getattr(optimization, name)
        told = {"num_warmup_steps": warmup, "num_training_steps": 40}
        told = {key: value for key, value in told.items() if key in inspect.signature(make).parameters}
        truth = used_by(lambda optimizer, make=make, told=told: make(optimizer, **told), 41)
        np.testing.assert_allclose(schedule(np.arange(1, 42)), truth, atol=1e-14, err_msg=name)


def test_warm_up_stable_decay_is_that_of_transformers():
    make = pytest.importorskip("transformers.optimization").get_wsd_schedule
    if "decay_type" not in inspect.signature(make).parameters:
        pytest.skip("this version of transformers decays with a cosine only")
    truth = used_by(lambda o: make(o, 6, 10, num_stable_steps=24, decay_type="linear"), 50)
    found = schedules.warmup_stable_decay(2.0, 40, 6, 10, first=0)(np.arange(1, 51))
    np.testing.assert_allclose(found, truth, atol=1e-14)


@pytest.mark.parametrize("first", [0, 1])
def test_the_inverse_root_is_its_formula_at_every_update(first):
    found = schedules.inverse_sqrt(3e-3, warmup=7, first=first)(np.arange(1, 200))
    truth = []
    for update in range(1, 200):
        n = update - 1 + first
        truth.append(3e-3 * min(n / 7, math.sqrt(7 / n) if n else 1))
    np.testing.assert_allclose(found, truth, rtol=1e-14)


def test_pieces_of_cosines_are_torchs_warm_restarts():
    truth = used_by(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=10, T_mult=2, eta_min=0.2), 70
    )
    cosines = [schedules.cosine(2.0, length, floor=0.1, first=0) for length in (10, 20, 40)]
    found = schedules.pieces([(10, cosines[0]), (30, cosines[1]), (None, cosines[2])])
    np.testing.assert_allclose(found(np.arange(1, 71)), truth, rtol=1e-12)


def test_each_piece_counts_from_its_own_beginning_and_its_last_update_is_its_own():
    parts = [
        (5, schedules.constant(1.0, 3)),
        (9, schedules.linear(0.8, 4)),
        (None, schedules.inverse_sqrt(0.5, 2)),
    ]
    lr = schedules.pieces(parts)
    truth = []
    for update in range(1, 41):
        if update <= 5:
            truth.append(min(update / 3, 1.0))
        elif update <= 9:
            truth.append(0.8 * (1 - (update - 5) / 4))
        else:
            n = update - 9
            truth.append(0.5 * (n / 2 if n < 2 else math.sqrt(2 / n)))
    np.testing.assert_allclose(lr(np.arange(1, 41)), truth, atol=1e-15)
    assert lr(np.array(6)) == pytest.approx(0.6), "a number too"
    assert lr(np.array([[9, 5], [12, 1]])).tolist() == [[truth[8], truth[4]], [truth[11], truth[0]]]
    within = schedules.pieces([(20, lr), (None, lr)])
    np.testing.assert_allclose(
        within(np.arange(1, 41)), truth[:20] * 2, atol=1e-15, err_msg="pieces in pieces"
    )


def test_a_recipe_of_pieces_knows_its_peak_wherever_it_lies():
    lr = schedules.pieces([(50, schedules.constant(1e-3)), (None, schedules.cosine(4e-3, 50, 10))])
    assert Recipe(lr, 0.1, steps=100).tau == pytest.approx(1 / (4e-3 * 0.1))
    assert Recipe(lr, 0.1, steps=50).tau == pytest.approx(1 / (1e-3 * 0.1))


def test_schedules_print_as_they_were_made_and_survive_a_pickle():
    cosine = schedules.cosine(1e-3, 100, warmup=10, floor=0.1, first=0)
    assert repr(cosine) == "cosine(peak=0.001, steps=100, warmup=10, floor=0.1, first=0)"
    lr = schedules.pieces([(100, cosine), (None, schedules.constant(1e-4))])
    assert repr(lr) == f"pieces([(100, {cosine!r}), (None, constant(peak=0.0001))])"
    made = [
        cosine,
        schedules.constant(0.0),
        schedules.linear(1.0, 9),
        schedules.neox_cosine(1e-3, 100, 10, 0.1),
        schedules.warmup_stable_decay(2.0, 100, 10, 20, floor=0.5),
        schedules.inverse_sqrt(1.0, 4),
        lr,
    ]
    updates = np.arange(1, 130)
    for schedule in made:
        again = eval(repr(schedule), dict(vars(schedules)))
        for other in (again, pickle.loads(pickle.dumps(schedule))):
            assert other == schedule
            np.testing.assert_array_equal(other(updates), schedule(updates))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.pieces([]), "parts must be pairs"),
        (lambda: schedules.pieces([(10, schedules.constant(1.0))]), "until the last update.*None.*steps=…"),
        (lambda: schedules.pieces([schedules.constant(1.0)]), "parts must be pairs"),  # type: ignore[list-item]
        (lambda: schedules.pieces([(None, 1e-3)]), "a schedule must be a function .* got 0.001"),  # type: ignore[arg-type]
        (
            lambda: schedules.pieces([(9, schedules.constant(1.0))] * 2 + [(None, schedules.constant(1.0))]),
            "parts: until must be a whole number in .*10.* got 9",
        ),
        (lambda: schedules.pieces([(0, schedules.constant(1.0)), (None, schedules.constant(1.0))]), "got 0"),
        (lambda: schedules.inverse_sqrt(1.0, 0), "warmup must be a whole number"),
        (lambda: schedules.from_a_tenth(0.1), "schedule must be one of this module's schedules"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_a_schedule_is_refused_by_name(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
