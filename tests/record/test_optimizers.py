"""What is known of optimizers, against what torch does with a parameter of its own."""

import math

import pytest
import torch
from torch import nn

from weightdyn.record.optimizers import (
    COUNT_STOPS,
    KNOWN,
    check_optimizer,
    count_stopped,
    coupled_decay,
    decoupled_decay,
    known,
    rng_state,
    set_rng_state,
    updates_made,
)


def made(name, parameters, **options):
    settings = {"lr": 0.125, "weight_decay": 0.5, **options}
    return getattr(torch.optim, name)(parameters, **settings)


CASES = [
    (name, {}) for name in KNOWN if name not in ("Rprop", "SGD", "ASGD")
]  # no decay; both are the same there
CASES += [(name, {"decoupled_weight_decay": True}) for name in ("Adam", "NAdam", "RAdam")]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_decay_that_is_known_is_the_one_that_acts(name, options):
    # Twins with one past and one gradient, of which one has a decay: decoupled, they part by ηλw.
    twins = []
    for decay in (0.0, 0.5):
        p = nn.Parameter(torch.tensor([16.0, -3.0, 2.0]))
        optimizer = made(name, [p], weight_decay=0.0, **options)
        for t in range(11):
            optimizer.param_groups[0]["weight_decay"] = decay if t == 10 else 0.0
            before = p.detach().clone()
            p.grad = torch.tensor([1.0, 2.0, -0.5]) * math.cos(t)
            optimizer.step()
        twins.append((before, p.detach().clone(), optimizer))
    (w, plain, _), (same, decayed, optimizer) = twins
    assert torch.equal(w, same)
    acts = torch.allclose(plain - decayed, 0.125 * 0.5 * w, rtol=1e-5)
    group = optimizer.param_groups[0]
    assert decoupled_decay(optimizer, group) == (0.5 if acts else 0.0)
    assert coupled_decay(optimizer, group) == (0.0 if acts else 0.5)


def test_a_group_that_says_how_it_decays_goes_before_the_class():
    p, q = nn.Parameter(torch.full((3,), 16.0)), nn.Parameter(torch.full((3,), 16.0))
    groups = [{"params": [p]}, {"params": [q], "decoupled_weight_decay": False}]
    optimizer = made("AdamW", groups)
    p.grad, q.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert [decoupled_decay(optimizer, group) for group in optimizer.param_groups] == [0.5, 0.0]
    assert float(p.detach()[0]) == 15.0
    assert float(q.detach()[0]) == pytest.approx(16 - 0.125)  # Adam's first step is η, whatever the gradient


def test_an_optimizer_of_the_same_name_elsewhere_is_another_one():
    class Mine(torch.optim.AdamW):
        pass

    class SGD(torch.optim.Optimizer):
        """Not torch's."""

    p = nn.Parameter(torch.ones(2))
    assert known(Mine([p])) == KNOWN["AdamW"]
    assert known(SGD([p], {})).decoupled
    assert not known(SGD([p], {})).adam


def test_updates_made_is_the_highest_count_and_a_stopped_one_is_a_lower_end():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p, q])
    assert updates_made(optimizer, default=7) == 7
    for count in (1, 2, 3):
        p.grad, q.grad = torch.ones(2), torch.ones(2) if count == 1 else None
        optimizer.step()
    assert updates_made(optimizer, default=7) == 3
    assert not count_stopped(optimizer)
    optimizer.state[p]["step"].fill_(COUNT_STOPS)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == COUNT_STOPS  # torch's own count stands still
    assert count_stopped(optimizer)
    assert (updates_made(optimizer), updates_made(optimizer, default=2**25)) == (COUNT_STOPS, 2**25)


def test_random_numbers_go_on_where_their_state_was_taken():
    device = torch.device("cpu")
    state = rng_state(device)
    first = torch.rand(5)
    torch.rand(3)
    set_rng_state(state, device)
    assert torch.equal(torch.rand(5), first)


@pytest.mark.parametrize("wrong", [None, "adam", nn.Linear(2, 2)])
def test_what_is_no_optimizer_is_refused_by_type(wrong):
    with pytest.raises(
        TypeError, match=f"optimizer must be a torch.optim.Optimizer, got {type(wrong).__name__}"
    ):
        check_optimizer(wrong)
