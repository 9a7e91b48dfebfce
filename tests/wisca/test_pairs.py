"""Pairs, on the attention code of transformers itself: what a label gets wrong, the logits show."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from wisca_models import FAMILIES, logits, make, same, weights

from weightdyn import wisca
from weightdyn.wisca import Part, ScalingPair, pairs

KINDS = ("qk", "vo", "up_down", "norm")
GRANULARITIES = ("tensor", "head", "channel")


def error(model, kinds=KINDS, granularity="channel", **options):
    """Largest change of a logit, in units of the largest logit, and the α."""
    before = logits(model)
    table = wisca.rescale_(model, pairs=kinds, granularity=granularity, errors="skip", **options)
    return float((logits(model) - before).abs().max() / before.abs().max()), table["alpha"]


# --- outputs stay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_of_every_family_leaves_the_outputs_as_they_are(family, attention):
    for granularity in GRANULARITIES:
        single, alpha = error(make(family, attention), KINDS, granularity)
        assert single <= 1e-5
        assert alpha.max() > 1.5
        double, _ = error(make(family, attention, torch.float64), KINDS, granularity)
        assert double <= 1e-12


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_powers_of_two_leave_the_outputs_as_they_are_to_the_last_bit(family, attention):
    for dtype in (torch.float32, torch.bfloat16):
        for granularity in GRANULARITIES:
            changed, alpha = error(make(family, attention, dtype), KINDS, granularity, power_of_two=True)
            assert changed == 0.0
            assert alpha.max() >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_pair_alone_leaves_the_outputs_and_changes_the_weights(family):
    for kind in KINDS:
        model = make(family)
        found = [pair for pair in wisca.find_pairs(model) if pair.kind == kind]
        if all(pair.refused for pair in found):
            continue
        before = weights(model)
        assert error(model, (kind,))[0] <= 1e-5
        touched = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
        assert touched == {part.name for pair in found if not pair.refused for part in (*pair.a, *pair.b)}


def test_every_block_has_each_pair_once():
    for family in FAMILIES:
        found = wisca.find_pairs(make(family))
        assert len({(pair.kind, pair.module) for pair in found}) == len(found)
        for layer in (0, 1):
            kinds = [pair.kind for pair in found if pair.layer == layer]
            assert [kinds.count(kind) for kind in ("qk", "vo", "up_down")] == [1, 1, 1]


# --- wrong ways are caught ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qk", "vo", "up_down", "norm"])
def test_a_bias_that_is_left_unscaled_would_show(kind, monkeypatch):
    family = {"qk": "qwen2", "vo": "gpt_neox", "up_down": "opt", "norm": "gpt2"}[kind]
    assert error(make(family), (kind,))[0] <= 1e-5
    monkeypatch.setattr(pairs._Block, "_bias", lambda self, path, channels: ())
    assert error(make(family), (kind,))[0] > 1e-3


@pytest.mark.parametrize("kind", ["qk", "vo"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_groups_that_are_tiled_instead_of_interleaved_would_show(family, kind, monkeypatch):
    assert error(make(family), (kind,), "head")[0] <= 1e-5
    monkeypatch.setattr(
        pairs, "_groups", lambda heads, kv_heads: torch.arange(kv_heads).repeat(heads // kv_heads)
    )
    assert error(make(family), (kind,), "head")[0] > 1e-3


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral", "qwen2", "qwen3", "olmo2"])
def test_rows_that_rope_turns_together_and_are_scaled_apart_would_show(family, monkeypatch):
    assert error(make(family), ("qk",))[0] <= 1e-5
    monkeypatch.setattr(pairs, "_rotary_channels", lambda head_dim, rotary: torch.arange(head_dim))
    assert error(make(family), ("qk",))[0] > 1e-3


def test_rows_paired_as_if_rope_turned_the_whole_head_would_show(monkeypatch):
    monkeypatch.setattr(pairs._Block, "_rotary", lambda self: self.head_dim)
    assert error(make("gpt_neox"), ("qk",))[0] > 1e-3


def test_a_gate_that_is_scaled_in_place_of_up_would_show(monkeypatch):
    swapped = pairs._FAMILIES["llama"]._replace(up="mlp.gate_proj")
    monkeypatch.setitem(pairs._FAMILIES, "llama", swapped)
    assert error(make("llama"), ("up_down",), "tensor")[0] > 1e-3


def test_a_bias_of_o_that_is_scaled_with_its_columns_would_show(monkeypatch):
    columns = pairs._Block._columns

    def wrong(self, part, channels):
        return (
            *columns(self, part, channels),
            *self._bias(self._of(part), torch.zeros(48, dtype=torch.long)),
        )

    monkeypatch.setattr(pairs._Block, "_columns", wrong)
    assert error(make("opt"), ("vo",), "tensor")[0] > 1e-3


def test_gelu_taken_for_homogeneous_would_show(monkeypatch):
    monkeypatch.setattr(pairs, "_HOMOGENEOUS", ("gelu",))
    assert error(make("gpt_neox"), ("up_down",))[0] > 1e-3


# --- what is a pair and what is not -------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "heads"), [("qwen3", 1), ("olmo2", 2)])
def test_with_qk_norm_the_pair_is_the_gains_of_the_norms(family, heads):
    model = make(family)
    pair = next(pair for pair in wisca.find_pairs(model) if pair.kind == "qk")
    assert [part.name for part in (*pair.a, *pair.b)] == [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.k_norm.weight",
    ]
    assert pair.head_count == heads  # Qwen3 has one gain for all heads
    # That is why: the projections' scale is divided out, and scaling them alone leaves no trace of itself.
    before = logits(model)
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight").mul_(3)
        model.get_parameter("model.layers.0.self_attn.q_proj.bias").mul_(3)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


def refusals(model):
    return {(pair.kind, pair.layer): pair.refused for pair in wisca.find_pairs(model) if pair.refused}


def test_gelu_has_no_up_down_and_relu_has():
    assert "'gelu' is not positively homogeneous" in refusals(make("gpt_neox"))["up_down", 0]
    assert "'gelu_new'" in refusals(make("gpt2"))["up_down", 1]
    assert "'gelu'" in refusals(make("opt", activation_function="gelu"))["up_down", 0]
    relu = make("gpt_neox", hidden_act="relu")
    assert ("up_down", 0) not in refusals(relu)
    assert error(relu, ("up_down",))[0] <= 1e-5


def test_norms_behind_the_attention_are_refused():
    assert "residual stream" in refusals(make("olmo2"))["norm", 0]
    post = make("opt", do_layer_norm_before=False)
    assert "residual stream" in refusals(post)["norm", 0]
    assert error(post)[0] <= 1e-5
    bare = make("opt", layer_norm_elementwise_affine=False)
    assert refusals(bare)["norm", 0] == "it has no gain"


def test_a_head_that_is_the_embedding_is_refused_and_one_of_its_own_is_not():
    assert (
        "lm_head.weight is tied to model.embed_tokens.weight"
        in refusals(make("llama", tie_word_embeddings=True))[("norm", None)]
    )
    assert ("norm", None) not in refusals(make("llama"))


def test_a_projection_between_the_last_norm_and_a_tied_head_is_its_linear():
    model = make("opt", word_embed_proj_dim=24, do_layer_norm_before=True)
    last = wisca.find_pairs(model)[-1]
    assert [part.name for part in last.b] == ["model.decoder.project_out.weight"]
    assert error(model)[0] <= 1e-5


def test_a_model_without_its_head_has_the_pairs_of_its_blocks():
    model = make("llama")
    bare = wisca.find_pairs(model.model)
    assert {pair.layer for pair in bare} == {0, 1}
    assert [f"model.{pair.module}" for pair in bare] == [
        pair.module for pair in wisca.find_pairs(model) if pair.layer is not None
    ]


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_wrappers_are_looked_through():
    model = make("llama")
    expected = [repr(pair) for pair in wisca.find_pairs(model)]
    assert [repr(pair) for pair in wisca.find_pairs(Wrapper(model))] == expected
    assert [repr(pair) for pair in wisca.find_pairs(torch.compile(model))] == expected


def test_memory_in_common_is_found_and_neighbours_in_one_buffer_are_not():
    model = nn.Module()
    buffer = torch.randn(6, 4)
    model.first, model.second = nn.Parameter(buffer[:3]), nn.Parameter(buffer[3:])
    assert pairs.shared_parameters(model) == {}
    model.turned = nn.Parameter(buffer[3:].T)
    assert pairs.shared_parameters(model) == {"second": "turned", "turned": "second"}
    model.again = model.first
    assert pairs.shared_parameters(model)["again"] == "first"


# --- models that are not known ------------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped attention with names of its own: 4 heads of 3, 2 key-value heads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wq, self.wk, self.wv = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.mix = nn.Linear(12, 12)

    def forward(self, x):
        q = self.wq(x).view(-1, 2, 2, 3)  # place, group, head of the group
        k, v = (linear(x).view(-1, 2, 3) for linear in (self.wk, self.wv))
        scores = torch.einsum("ighd,jgd->ghij", q, k).softmax(-1)
        return self.mix(torch.einsum("ghij,jgd->ighd", scores, v).reshape(-1, 12))


def test_the_pairs_of_an_unknown_model_are_a_few_lines_of_user_code():
    model = Attention()
    with pytest.raises(
        ValueError, match=r"(?s)Attention, which has no config; .*describe its pairs yourself"
    ):
        wisca.find_pairs(model)
    narrow = torch.arange(6)
    wide = narrow.view(2, 1, 3).expand(2, 2, 3).reshape(-1)
    own = [
        ScalingPair("qk", "attention", heads=narrow // 3,
                    a=[Part("wq.weight", 0, wide), Part("wq.bias", 0, wide, measured=False)],
                    b=[Part("wk.weight", 0, narrow), Part("wk.bias", 0, narrow, measured=False)]),
        ScalingPair("vo", "attention", heads=narrow // 3,
                    a=[Part("mix.weight", 1, wide)],
                    b=[Part("wv.weight", 0, narrow), Part("wv.bias", 0, narrow, measured=False)]),
    ]  # fmt: skip
    x = torch.randn(5, 12)

    def forward(model, x):
        return model(x.to(model.mix.weight.dtype)), None

    for granularity in GRANULARITIES:
        proof = wisca.check_equivalence(model, x, pairs=own, forward=forward, granularity=granularity)
        assert proof.loc[proof["dtype"] == "float64", "relative"].max() < 1e-12
    own[1] = ScalingPair("vo", "attention", a=own[1].a, b=own[1].b[:1])  # without the bias
    proof = wisca.check_equivalence(model, x, pairs=own, forward=forward)
    assert proof["relative"].max() > 1e-3


def test_an_unknown_family_is_told_which_are_known():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(
        ValueError, match=r"(?s)type 'bloom'; pairs are known for gpt2, gpt_neox, llama.*rescale_"
    ):
        wisca.find_pairs(model)


def test_the_advice_in_the_error_runs_as_it_stands():
    model = nn.Module()
    model.blocks = nn.ModuleList()
    for _ in range(2):
        block = nn.Module()
        block.v, block.o = nn.Linear(8, 8), nn.Linear(8, 8)
        model.blocks.append(block)
    with pytest.raises(ValueError, match="describe its pairs") as caught:
        wisca.find_pairs(model)
    code = str(caught.value).split("heads:\n\n")[1].split("\n\nand let")[0]
    lines = "\n".join(line.removeprefix("    ") for line in code.splitlines())
    scope = {"torch": torch, "wisca": wisca, "model": model, "hidden_size": 8, "head_dim": 4, "layers": 2}
    before = weights(model)
    exec(lines, scope)
    assert len(scope["pairs"]) == 2
    assert not same(before, weights(model))


def test_a_config_whose_heads_do_not_add_up_is_refused():
    model = make("gpt_neox")
    model.config.num_attention_heads = 5
    with pytest.raises(ValueError, match="heads do not account for the rows"):
        wisca.find_pairs(model)


def test_no_model_at_all_is_a_type_error():
    with pytest.raises(TypeError, match="Module, got str"):
        wisca.find_pairs("gpt2")


def test_finding_pairs_needs_neither_transformers_nor_peft():
    code = "import sys, weightdyn.wisca; assert not {'transformers', 'peft'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
