"""What is known of optimizers, against what torch does with a parameter of its own."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import weightdyn as wd
from weightdyn.record.optimizers import (
    COUNT_STOPS,
    KNOWN,
    check_optimizer,
    count_stopped,
    coupled_decay,
    decoupled_decay,
    is_running,
    known,
    moments_of,
    rng_state,
    set_rng_state,
    skipped,
    source_of,
    step_frame,
    unwrap,
    update_counts,
    updates_made,
)


def made(name, parameters, **options):
    settings = {"lr": 0.125, "weight_decay": 0.5, **options}
    return getattr(torch.optim, name)(parameters, **settings)


OF_TORCH = [key.removeprefix("torch.") for key in KNOWN if key.startswith("torch.")]
CASES = [(name, {}) for name in OF_TORCH if name not in ("Rprop", "SGD", "ASGD", "Muon")]
# Rprop has no decay; of SGD and ASGD both kinds are the same here; Muon takes matrices.
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
    assert known(Mine([p])) == KNOWN["torch.AdamW"]
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


# --- where forces are read, and whether there was an update ---------------------------------------------------


def test_moments_are_read_where_adam_alone_makes_the_step():
    class Renamed(torch.optim.AdamW):
        """Adam's step, called something else."""

    class Extended(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class AdamW(torch.optim.Optimizer):
        """Somebody else's."""

    p = nn.Parameter(torch.ones(2, 2))
    sources = {
        "moments": [torch.optim.AdamW([p]), torch.optim.Adam([p], amsgrad=True), Renamed([p])],
        "displacement": [torch.optim.SGD([p]), torch.optim.NAdam([p]), Extended([p]), AdamW([p], {})],
    }
    for source, optimizers in sources.items():
        assert {source_of(each) for each in optimizers} == {source}


def test_moments_of_fewer_bits_than_the_weights_are_still_adams():
    p = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.ones(4)
    optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][key] = optimizer.state[p][key].bfloat16()
    assert source_of(optimizer) == "moments"
    assert moments_of(optimizer, p)["exp_avg"].dtype == torch.bfloat16


def test_an_update_is_skipped_where_no_count_has_grown():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p, q])
    none = update_counts(optimizer, [p, q])
    assert skipped(optimizer, [p, q], none) is False  # nothing is counted yet
    p.grad = torch.ones(2)
    optimizer.step()
    one = update_counts(optimizer, [p, q])
    assert one == [1, 0]
    assert skipped(optimizer, [p, q], none) is False
    assert skipped(optimizer, [p, q], one) is True
    optimizer.state[p]["step"].fill_(COUNT_STOPS)  # stands still at every update
    assert skipped(optimizer, [p], update_counts(optimizer, [p])) is False


def test_an_optimizer_that_counts_nothing_skips_nothing():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(2)
    optimizer.step()
    assert skipped(optimizer, [p], update_counts(optimizer, [p])) is False


class Around(torch.optim.AdamW):
    """It shrinks the weights before or after the step of its class, which torch hooks as well."""

    def __init__(self, parameters, when):
        super().__init__(parameters, lr=1e-2, weight_decay=0.0)
        self.when = when

    @torch.no_grad()
    def step(self, closure=None):
        for when in ("before", "", "after"):
            if not when:
                loss = super().step(closure)
            elif when == self.when:
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.9)
        return loss


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_all_that_a_step_does_around_that_of_its_class_is_one_update(when, closure):
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # from here on the step of the class has hooks
    model = nn.Linear(6, 6)

    def gradients():
        model.zero_grad()
        loss = (model(torch.ones(2, 6)) ** 2).mean()
        loss.backward()
        return loss

    optimizer = Around(model.parameters(), when)
    with wd.ForceLogger(optimizer, model, drift=False) as log:
        for t in (1, 2, 3):
            before = float(model.weight.detach().double().pow(2).sum())
            optimizer.step(gradients) if closure else (gradients(), optimizer.step())
            row = log.latest().set_index("tensor").loc["weight"]
            assert (log.step, len(log.run.forces())) == (t, 2 * t)
            assert row["norm_sq"] == pytest.approx(before, rel=1e-12)
            assert row["norm_sq_after"] == pytest.approx(
                float(model.weight.detach().double().pow(2).sum()), rel=1e-12
            )


def test_a_step_that_raised_is_not_taken_for_one_that_goes_on():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    def fail():
        raise ZeroDivisionError

    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    model = nn.Linear(3, 3)
    optimizer = Fails(model.parameters(), lr=0.1)
    with wd.ForceLogger(optimizer, model, drift=False) as log:
        for t in (1, 2, 3, 4):
            model.zero_grad()
            (model(torch.ones(2, 3)) ** 2).mean().backward()
            if t == 2:
                with pytest.raises(ZeroDivisionError):
                    optimizer.step(fail)
            optimizer.step()
            assert log.step == t


def test_a_call_is_running_until_it_returns():
    frames = []
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    assert step_frame() is None
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        register(lambda *_: frames.append((step_frame(), is_running(step_frame()))))
    optimizer.step()
    (before, running), (after, still) = frames
    assert before is after
    assert running
    assert still
    assert not is_running(before)
    assert not is_running(None)


# --- wrappers ------------------------------------------------------------------------------------------------


class Container(torch.optim.Optimizer):
    """An optimizer of several, as torchtitan's: its own groups hold all the parameters."""

    def __init__(self, optimizers):
        self.optimizers = optimizers
        super().__init__(
            [p for each in optimizers for g in each.param_groups for p in g["params"]], {"lr": 0.1}
        )

    def step(self, closure=None):
        for each in self.optimizers:
            each.step()


class Wrapper:
    """One around another, as fp16 wrappers are."""

    def __init__(self, inner, name="optimizer"):
        setattr(self, name, inner)

    def step(self):
        pass

    def zero_grad(self):
        pass


def some():
    model = nn.Linear(2, 2)
    return torch.optim.AdamW([model.weight]), torch.optim.SGD([model.bias], lr=0.1)


def test_wrappers_are_unwrapped_to_the_optimizers_that_make_the_steps():
    a, b = some()
    assert unwrap(a) == [a]
    assert unwrap((a, [b])) == [a, b]
    assert unwrap({"weight": a, "bias": b}.values()) == [a, b]
    assert unwrap(Container([a, b])) == [a, b]
    assert unwrap(Wrapper(a)) == [a]
    assert unwrap(Wrapper(a, "optim")) == [a]
    assert unwrap([Wrapper(Container([Container([a])])), b]) == [a, b]


def test_accelerates_and_lightnings_wrappers_are_unwrapped():
    a, b = some()
    accelerate = pytest.importorskip("accelerate")
    try:
        assert unwrap(accelerate.Accelerator(cpu=True).prepare(a)) == [a]
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
    lightning = pytest.importorskip("lightning.pytorch.core.optimizer")
    assert unwrap([lightning.LightningOptimizer(b), a]) == [b, a]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_zero_redundancy_optimizer_is_unwrapped(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
        assert unwrap(zero) == [zero.optim]
        with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer around a AdamW: .* optimizer.optim"):
            check_optimizer(zero)
    finally:
        dist.destroy_process_group()


def test_wrappers_whose_inner_one_steps_something_else_are_refused():
    free = pytest.importorskip("schedulefree")
    a, _ = some()
    for kind in (free.ScheduleFreeWrapper, free.ScheduleFreeWrapperReference):
        for take in (unwrap, check_optimizer):
            with pytest.raises(TypeError, match="steps z and not the weights"):
                take(kind(a))
    offload = pytest.importorskip("torchao.optim").CPUOffloadOptimizer
    for take in (unwrap, check_optimizer):
        with pytest.raises(TypeError, match=r"optim_dict.values"):
            take(object.__new__(offload))


def test_what_holds_no_optimizer_is_refused_by_type():
    a, b = some()
    scheduler = torch.optim.lr_scheduler.LambdaLR(a, lambda t: 1.0)
    for wrong in (None, "adam", nn.Linear(2, 2), scheduler, Wrapper(None), [a, "b"], {"a": a}):
        kind = type(wrong[1] if isinstance(wrong, list) else wrong).__name__
        with pytest.raises(TypeError, match=f"optimizer must be a torch.optim.Optimizer, .* got {kind}"):
            unwrap(wrong)
    with pytest.raises(ValueError, match="got none"):
        unwrap([])
    with pytest.raises(ValueError, match="a AdamW is there twice"):
        unwrap([a, b, Wrapper(a)])
    with pytest.raises(
        TypeError, match=r"Container around a AdamW and SGD: pass the inner one, optimizer.optimizers"
    ):
        check_optimizer(Container([a, b]))


def test_what_trains_otherwise_is_refused_with_what_to_do():
    a, _ = some()
    asked = {
        "attach behind the line that makes it": None,
        "the optimizer comes first, then the model": nn.Linear(2, 2),
        r"pass its values\(\)": {"a": a},
        r"pass its \.optimizer$": torch.optim.lr_scheduler.LambdaLR(a, lambda t: 1.0),
    }
    lightning = pytest.importorskip("lightning")
    asked["ForceCallback"] = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    for advice, wrong in asked.items():
        with pytest.raises(TypeError, match=f"got {type(wrong).__name__}: .*{advice}"):
            unwrap(wrong)


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
