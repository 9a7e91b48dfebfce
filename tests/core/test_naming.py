"""Names and views, against tables written by hand and against the attention code of transformers itself."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightdyn.core.naming import COMPONENTS, TensorName, View, describe, role_of, split_label

transformers = pytest.importorskip("transformers")
new_names = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="written for the parameters of transformers 5"
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}

# What every parameter is, by hand: component, name; {i} stands for the block.
LLAMA = """
embed   model.embed_tokens.weight
q       model.layers.{i}.self_attn.q_proj.weight
k       model.layers.{i}.self_attn.k_proj.weight
v       model.layers.{i}.self_attn.v_proj.weight
o       model.layers.{i}.self_attn.o_proj.weight
gate    model.layers.{i}.mlp.gate_proj.weight
up      model.layers.{i}.mlp.up_proj.weight
down    model.layers.{i}.mlp.down_proj.weight
norm    model.layers.{i}.post_attention_layernorm.weight
norm    model.norm.weight
"""
PRE_NORM = "norm model.layers.{i}.input_layernorm.weight\n"
HEAD = "unembed lm_head.weight\n"
QK_NORM = "norm model.layers.{i}.self_attn.q_norm.weight\nnorm model.layers.{i}.self_attn.k_norm.weight\n"
SANDWICH = "norm model.layers.{i}.post_feedforward_layernorm.weight\n"
GEMMA_2 = LLAMA + PRE_NORM + SANDWICH + "norm model.layers.{i}.pre_feedforward_layernorm.weight\n"

EXPECTED = {
    "GPTNeoX": """
        embed   gpt_neox.embed_in.weight
        norm    gpt_neox.layers.{i}.input_layernorm.weight
        bias    gpt_neox.layers.{i}.input_layernorm.bias
        norm    gpt_neox.layers.{i}.post_attention_layernorm.weight
        bias    gpt_neox.layers.{i}.post_attention_layernorm.bias
        qkv     gpt_neox.layers.{i}.attention.query_key_value.weight
        bias    gpt_neox.layers.{i}.attention.query_key_value.bias
        o       gpt_neox.layers.{i}.attention.dense.weight
        bias    gpt_neox.layers.{i}.attention.dense.bias
        up      gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight
        bias    gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias
        down    gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight
        bias    gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias
        norm    gpt_neox.final_layer_norm.weight
        bias    gpt_neox.final_layer_norm.bias
        unembed lm_head.weight
    """,
    "Llama": LLAMA + PRE_NORM + HEAD,
    "Mistral": LLAMA + PRE_NORM + HEAD,
    "Qwen2": LLAMA
    + PRE_NORM
    + HEAD
    + """
        bias    model.layers.{i}.self_attn.q_proj.bias
        bias    model.layers.{i}.self_attn.k_proj.bias
        bias    model.layers.{i}.self_attn.v_proj.bias
    """,
    "Qwen3": LLAMA + PRE_NORM + QK_NORM + HEAD,
    "Olmo2": LLAMA + QK_NORM + SANDWICH + HEAD,
    "GPT2": """
        embed   transformer.wte.weight
        embed   transformer.wpe.weight
        norm    transformer.h.{i}.ln_1.weight
        bias    transformer.h.{i}.ln_1.bias
        qkv     transformer.h.{i}.attn.c_attn.weight
        bias    transformer.h.{i}.attn.c_attn.bias
        o       transformer.h.{i}.attn.c_proj.weight
        bias    transformer.h.{i}.attn.c_proj.bias
        norm    transformer.h.{i}.ln_2.weight
        bias    transformer.h.{i}.ln_2.bias
        up      transformer.h.{i}.mlp.c_fc.weight
        bias    transformer.h.{i}.mlp.c_fc.bias
        down    transformer.h.{i}.mlp.c_proj.weight
        bias    transformer.h.{i}.mlp.c_proj.bias
        norm    transformer.ln_f.weight
        bias    transformer.ln_f.bias
    """,
    "OPT": """
        embed   model.decoder.embed_tokens.weight
        embed   model.decoder.embed_positions.weight
        other   model.decoder.project_in.weight
        other   model.decoder.project_out.weight
        q       model.decoder.layers.{i}.self_attn.q_proj.weight
        bias    model.decoder.layers.{i}.self_attn.q_proj.bias
        k       model.decoder.layers.{i}.self_attn.k_proj.weight
        bias    model.decoder.layers.{i}.self_attn.k_proj.bias
        v       model.decoder.layers.{i}.self_attn.v_proj.weight
        bias    model.decoder.layers.{i}.self_attn.v_proj.bias
        o       model.decoder.layers.{i}.self_attn.out_proj.weight
        bias    model.decoder.layers.{i}.self_attn.out_proj.bias
        norm    model.decoder.layers.{i}.self_attn_layer_norm.weight
        bias    model.decoder.layers.{i}.self_attn_layer_norm.bias
        up      model.decoder.layers.{i}.fc1.weight
        bias    model.decoder.layers.{i}.fc1.bias
        down    model.decoder.layers.{i}.fc2.weight
        bias    model.decoder.layers.{i}.fc2.bias
        norm    model.decoder.layers.{i}.final_layer_norm.weight
        bias    model.decoder.layers.{i}.final_layer_norm.bias
        norm    model.decoder.final_layer_norm.weight
        bias    model.decoder.final_layer_norm.bias
    """,
    "Gemma": LLAMA + PRE_NORM,
    "Gemma2": GEMMA_2,
    "Gemma3Text": GEMMA_2 + QK_NORM,
    "Phi3": """
        embed   model.embed_tokens.weight
        qkv     model.layers.{i}.self_attn.qkv_proj.weight
        o       model.layers.{i}.self_attn.o_proj.weight
        up      model.layers.{i}.mlp.gate_up_proj.weight
        down    model.layers.{i}.mlp.down_proj.weight
        norm    model.layers.{i}.input_layernorm.weight
        norm    model.layers.{i}.post_attention_layernorm.weight
        norm    model.norm.weight
        unembed lm_head.weight
    """,
    "Mixtral": """
        embed   model.embed_tokens.weight
        q       model.layers.{i}.self_attn.q_proj.weight
        k       model.layers.{i}.self_attn.k_proj.weight
        v       model.layers.{i}.self_attn.v_proj.weight
        o       model.layers.{i}.self_attn.o_proj.weight
        other   model.layers.{i}.mlp.gate.weight
        up      model.layers.{i}.mlp.experts.gate_up_proj
        down    model.layers.{i}.mlp.experts.down_proj
        norm    model.layers.{i}.input_layernorm.weight
        norm    model.layers.{i}.post_attention_layernorm.weight
        norm    model.norm.weight
        unembed lm_head.weight
    """,
}
SPECIAL = {
    "GPTNeoX": SIZES,
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16,
             "bos_token_id": 1, "eos_token_id": 2},
    "OPT": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 16},
    "Gemma": {**GROUPED, "head_dim": 16},
    "Gemma2": {**GROUPED, "head_dim": 16},
    "Gemma3Text": {**GROUPED, "head_dim": 16},
    "Qwen3": {**GROUPED, "head_dim": 16},
    "Mixtral": {**GROUPED, "num_local_experts": 3},
}  # fmt: skip


def config_of(family, **changes):
    return getattr(transformers, f"{family}Config")(**{**SPECIAL.get(family, GROUPED), **changes})


def parameters(config, head="CausalLM"):
    with torch.device("meta"):
        model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=new_names if each in ("GPTNeoX", "Mixtral") else ()) for each in EXPECTED],
)
def test_every_parameter_of_a_family_gets_its_layer_and_component(family):
    expected = {}
    for line in EXPECTED[family].split("\n"):
        if line.strip():
            component, name = line.split()
            blocks = (0, 1) if "{i}" in name else (None,)
            expected |= {name.format(i=i): (i, component) for i in blocks}
    config = config_of(family)
    shapes = parameters(config)
    got = {name: describe(name, shape, config) for name, shape in shapes.items()}
    assert {name: (tensor.layer, tensor.component) for name, tensor in got.items()} == expected
    fused = {"query_key_value", "c_attn", "qkv_proj", "gate_up_proj"}
    for name, tensor in got.items():
        parts = {"qkv": ("q", "k", "v"), "up": ("gate", "up")}.get(tensor.component, ())
        parts = parts if fused & set(name.split(".")) and tensor.component != "bias" else ()
        assert tuple(view.name for view in tensor.views) == parts
        assert tensor.name == name


@pytest.mark.parametrize("family", EXPECTED)
def test_a_config_file_says_the_same_as_the_config(family):
    config = config_of(family)
    for name, shape in parameters(config).items():
        for views in (False, True, "head"):
            assert describe(name, shape, config, views=views) == describe(
                name, shape, config.to_dict(), views=views
            )


@pytest.mark.parametrize(("family", "key_heads"), [("Llama", 2), ("Gemma", 2), ("Qwen3", 2), ("OPT", 4)])
def test_unfused_matrices_have_their_own_number_of_heads(family, key_heads):
    config = config_of(family)
    counts = {}
    for name, shape in parameters(config).items():
        tensor = describe(name, shape, config, views="head")
        assert describe(name, shape, config).views == ()
        if tensor.layer == 1 and tensor.views:
            counts[tensor.component] = [view.name for view in tensor.views]
    assert counts == {
        "q": [f"q.{head}" for head in range(4)],
        "k": [f"k.{head}" for head in range(key_heads)],
        "v": [f"v.{head}" for head in range(key_heads)],
    }


def integers(*shape):
    """Whole numbers in float64: products and sums are exact in any order, so outputs compare bit for bit."""
    return torch.randint(-8, 9, shape, dtype=torch.float64)


def with_integers(module):
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(integers(*parameter.shape) * (not name.endswith("bias")))
    return module


@pytest.fixture(scope="module")
def attended():
    """Register an attention function that keeps the q, k and v it is called with."""
    seen = {}

    def keep(module, query, key, value, *args, **kwargs):
        seen.update(q=query, k=key, v=value)
        return query.transpose(1, 2), None

    transformers.AttentionInterface.register("weightdyn_keep", keep)
    return seen


ATTENTION = {
    "gpt_neox": ("GPTNeoX", "GPTNeoXAttention", ("query_key_value",)),
    "gpt2": ("GPT2", "GPT2Attention", ("c_attn",)),
    "phi3": ("Phi3", "Phi3Attention", ("qkv_proj",)),
    "llama": ("Llama", "LlamaAttention", ("q_proj", "k_proj", "v_proj")),
    "gemma": ("Gemma", "GemmaAttention", ("q_proj", "k_proj", "v_proj")),
}


@pytest.mark.parametrize("views", [True, "head"], ids=["whole", "heads"])
@pytest.mark.parametrize("module", ATTENTION)
def test_views_give_the_q_k_and_v_that_transformers_attention_computes(attended, module, views):
    family, cls, names = ATTENTION[module]
    config = config_of(family)
    config._attn_implementation = "weightdyn_keep"
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    attention = with_integers(getattr(code, cls)(config, layer_idx=0))
    x = integers(1, 5, 32)
    dim = getattr(config, "head_dim", None) or 8
    still = {"position_embeddings": (torch.ones(1, 5, dim).double(), torch.zeros(1, 5, dim).double())}
    if module == "gpt_neox":
        still = {"position_embeddings": tuple(part[..., :2] for part in still["position_embeddings"])}
    attention(x, attention_mask=None, **({} if module == "gpt2" else still))

    checked = []
    for name in names:
        weight = attention.get_parameter(f"{name}.weight").detach()
        tensor = describe(f"h.0.attn.{name}.weight", weight.shape, config, views=views)
        whole = (View(tensor.component, tensor.component, 0, ((0, len(weight)),)),)
        for view in tensor.views or whole:
            part, _, head = view.name.partition(".")
            assert (part, role_of(part)) == (view.component, view.role)
            ours = x @ (view.of(weight).T if view.axis == 0 else view.of(weight))
            ours = ours.view(1, 5, -1, dim).transpose(1, 2)
            theirs = attended[part] if not head else attended[part][:, [int(head)]]
            assert torch.equal(ours, theirs)
            checked.append(view.name)
    heads = {part: attended[part].shape[1] for part in "qkv"}
    assert checked == (
        [f"{part}.{head}" for part in "qkv" for head in range(heads[part])] if views == "head" else [*"qkv"]
    )


def test_views_follow_falcons_groups_of_query_heads_with_one_key_and_value_each():
    from transformers.models.falcon.modeling_falcon import FalconAttention

    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True
    )
    attention = with_integers(FalconAttention(config, layer_idx=0))
    weight = attention.query_key_value.weight.detach()
    x = integers(1, 5, 32)
    theirs = dict(zip("qkv", attention._split_heads(x @ weight.T), strict=True))
    for view in describe("h.0.self_attention.query_key_value.weight", weight.shape, config).views:
        ours = (x @ view.of(weight).T).view(1, 5, -1, 8)
        assert torch.equal(ours.repeat_interleave(4 // ours.shape[2], 2), theirs[view.name])


def falcon(**changes):
    from transformers.models.falcon.modeling_falcon import FalconAttention

    config = transformers.FalconConfig(**SIZES, **changes)
    module = FalconAttention(config, layer_idx=0)
    still = {"position_embeddings": (torch.ones(1, 5, 8).double(), torch.zeros(1, 5, 8).double())}
    given = {"alibi": None, "attention_mask": torch.zeros(1, 1, 5, 5).double()}
    return config, module, "query_key_value", "dense", lambda x: module(x, **given, **still)


def mpt():
    from transformers.models.mpt.modeling_mpt import MptAttention

    config = transformers.MptConfig(d_model=32, n_heads=4)
    module = MptAttention(config, layer_idx=0)
    return config, module, "Wqkv", "out_proj", lambda x: module(x, torch.zeros(4, 5, 5).double())


def dbrx():
    from transformers.models.dbrx.modeling_dbrx import DbrxAttention

    config = transformers.DbrxConfig(
        d_model=32, n_heads=4, attn_config={"kv_n_heads": 2, "clip_qkv": 1e6, "rope_theta": 1e4}
    )
    config._attn_implementation = "eager"
    module = DbrxAttention(config, layer_idx=0)
    still = {"position_embeddings": (torch.ones(1, 5, 8).double(), torch.zeros(1, 5, 8).double())}
    return config, module, "Wqkv", "out_proj", lambda x: module(x, attention_mask=None, **still)


def modernbert():
    from transformers.models.modernbert.modeling_modernbert import ModernBertAttention

    config = transformers.ModernBertConfig(hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    config._attn_implementation = "eager"
    module = ModernBertAttention(config, layer_idx=0).eval()
    still = {"position_embeddings": (torch.ones(1, 5, 8).double(), torch.zeros(1, 5, 8).double())}
    return config, module, "Wqkv", "Wo", lambda x: module(x, attention_mask=None, **still)


def codegen():
    from transformers.models.codegen.modeling_codegen import CodeGenAttention

    config = transformers.CodeGenConfig(n_embd=64, n_head=8, rotary_dim=4, n_positions=8)
    module = CodeGenAttention(config, layer_idx=0)
    places = torch.arange(5)[None]
    return config, module, "qkv_proj", "out_proj", lambda x: module(x, position_ids=places)


def bigcode(multi_query):
    from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention

    config = transformers.GPTBigCodeConfig(n_embd=32, n_head=4, multi_query=multi_query)
    config._attn_implementation = "eager"
    module = GPTBigCodeAttention(config, layer_idx=0).eval()
    return config, module, "c_attn", "c_proj", module


def deepseek(version, projection, q_lora_rank=12):
    code = importlib.import_module(f"transformers.models.deepseek_v{version}.modeling_deepseek_v{version}")
    config = getattr(transformers, f"DeepseekV{version}Config")(
        **SIZES, num_key_value_heads=4, q_lora_rank=q_lora_rank, kv_lora_rank=10, qk_rope_head_dim=4,
        qk_nope_head_dim=6, v_head_dim=8, head_dim=4,
    )  # fmt: skip
    config._attn_implementation = "eager"
    module = getattr(code, f"DeepseekV{version}Attention")(config, layer_idx=0)
    if version == 2:
        still = torch.ones(1, 5, 2, dtype=torch.complex128)
    else:
        still = (torch.ones(1, 5, 4).double(), torch.zeros(1, 5, 4).double())
    return (
        config,
        module,
        projection,
        "o_proj",
        lambda x: module(x, position_embeddings=still, attention_mask=None),
    )


def blip():
    from transformers.models.blip.modeling_blip import BlipAttention

    config = transformers.BlipVisionConfig(hidden_size=32, num_attention_heads=4)
    config._attn_implementation = "eager"
    module = BlipAttention(config).eval()
    return config, module, "qkv", "projection", lambda x: module(x, output_attentions=True)


def multihead():
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    config = {"num_heads": 4}
    return config, module, "in_proj_weight", "out_proj", lambda x: module(x, x, x, average_attn_weights=False)


LAYOUTS = {
    "Falcon, one key": lambda: falcon(multi_query=True),
    "Falcon, heads of their own": lambda: falcon(multi_query=False),
    "Falcon, groups": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
    "MPT": mpt,
    "DBRX": dbrx,
    "ModernBERT": modernbert,
    "CodeGen": codegen,
    "GPT-BigCode, one key": lambda: bigcode(multi_query=True),
    "GPT-BigCode, heads of their own": lambda: bigcode(multi_query=False),
    "DeepSeek-V2's q": lambda: deepseek(2, "q_b_proj"),
    "DeepSeek-V2's k and v": lambda: deepseek(2, "kv_b_proj"),
    "DeepSeek-V2 Lite's q": lambda: deepseek(2, "q_proj", None),
    "DeepSeek-V3's q": lambda: deepseek(3, "q_b_proj"),
    "DeepSeek-V3's k and v": lambda: deepseek(3, "kv_b_proj"),
    "BLIP's ViT": blip,
    "nn.MultiheadAttention": multihead,
}


@new_names
@pytest.mark.parametrize("plain", [False, True], ids=["config", "dict"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_a_changed_row_of_q_k_or_v_shows_in_its_own_head_alone(family, plain):
    """A row is changed for one token: q moves that token's weights, k all tokens' weights, v one output channel."""
    torch.manual_seed(0)
    config, module, name, out, forward = LAYOUTS[family]()
    config = config.to_dict() if plain and not isinstance(config, dict) else config
    module.double()
    for parameter_name, parameter in module.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.eye_(module.get_submodule(out).weight)  # the output is what the heads gave, side by side
    x, token = torch.randn(1, 5, module.get_submodule(out).weight.shape[1]).double(), 2

    read = [x]  # what the fused matrix reads
    if name != "in_proj_weight":
        module.get_submodule(name).register_forward_pre_hook(lambda _, given: read.append(given[0]))
    key = name if name == "in_proj_weight" else f"{name}.weight"
    weight = module.get_parameter(key)
    with torch.no_grad():
        before, weights = forward(x)
        # The only token whose product with this is not 0.
        poke = torch.linalg.pinv(read[-1].reshape(5, -1))[:, token]

        tensor = describe(f"layers.0.self_attn.{key}", weight.shape, config, views="head")
        counts = {part: sum(view.component == part for view in tensor.views) for part in "qkv"}
        heads = weights.shape[1]
        assert (tensor.component, counts["q"] + counts["k"] > 0) == ("qkv" if counts["k"] else "q", True)
        assert sum(view.numel(weight.shape) for view in tensor.views) == weight.numel()
        for view in tensor.views:
            part, _, number = view.name.partition(".")
            group = heads // counts[part]
            mine = list(range(int(number) * group, (int(number) + 1) * group))
            ((start, stop),) = view.ranges
            for place, row in enumerate(range(start, stop)):
                weight[row] += 3 * poke
                after, moved = forward(x)
                weight[row] -= 3 * poke
                changed = ((moved - weights).abs() > 1e-9).any(dim=(0, 3))  # head, token that asks
                channels = ((after - before).abs() > 1e-9).any(dim=(0, 1)).view(heads, -1)
                expected = torch.zeros_like(changed)
                if part == "q":
                    expected[mine, token] = True
                elif part == "k":
                    expected[mine] = True
                assert torch.equal(changed, expected), (view.name, row)
                reached = torch.zeros_like(channels)
                reached[mine, slice(None) if part != "v" else place] = True
                assert torch.equal(channels, reached), (view.name, row)
        whole = describe(f"layers.0.self_attn.{key}", weight.shape, config).views
        for view in whole:
            own = [each.ranges[0] for each in tensor.views if each.component == view.name]
            assert {i for span in own for i in range(*span)} == {
                i for span in view.ranges for i in range(*span)
            }


def test_thirds_need_no_heads_and_take_them_where_they_account_for_the_columns():
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(32, 4)
    for name, parameter in layer.named_parameters():
        if name.endswith("in_proj_weight"):
            for config in (None, {"num_heads": 4, "hidden_size": 48}, {"num_heads": 5}):
                for views in (True, "head"):
                    thirds = describe(f"layers.0.{name}", parameter.shape, config, views=views).views
                    assert [(view.name, view.ranges) for view in thirds] == [
                        ("q", ((0, 32),)),
                        ("k", ((32, 64),)),
                        ("v", ((64, 96),)),
                    ]
            # Grouped heads are of another attention of the model: thirds have none.
            for config in ({"num_heads": 4}, {"num_heads": 4, "num_key_value_heads": 2}):
                heads = describe(f"layers.0.{name}", parameter.shape, config, views="head").views
                assert [view.name for view in heads] == [
                    f"{part}.{head}" for part in "qkv" for head in range(4)
                ]
    # A projection for each where keys and values have widths of their own.
    unlike = torch.nn.MultiheadAttention(32, 4, kdim=16, vdim=24)
    found = {name: describe(f"attn.{name}", each.shape).component for name, each in unlike.named_parameters()}
    assert found == {
        "q_proj_weight": "q",
        "k_proj_weight": "k",
        "v_proj_weight": "v",
        "in_proj_bias": "bias",
        "out_proj.weight": "o",
        "out_proj.bias": "bias",
    }


@new_names
@pytest.mark.parametrize("family", ["Mamba", "Mamba2", "Rwkv"])
def test_what_mixes_without_attention_has_no_q_k_or_v(family):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    sizes |= {"num_heads": 8, "head_dim": 8, "n_groups": 1} if family == "Mamba2" else {}
    config = getattr(transformers, f"{family}Config")(**sizes)
    found = {}
    for name, shape in parameters(config).items():
        tensor = describe(name, shape, config, views="head")
        assert tensor.views == ()
        if tensor.layer == 0:
            found.setdefault(tensor.component, set()).add(name.partition(".0.")[2])
    norms = {"bias", "norm"}
    if family == "Rwkv":
        assert {name: found[name] for name in sorted(set(found) - norms)} == {
            "down": {"feed_forward.value.weight"},
            "o": {"attention.output.weight"},
            "other": {
                *(f"attention.{part}.weight" for part in ("key", "value", "receptance")),
                "attention.time_decay",
                "attention.time_first",
                *(f"attention.time_mix_{part}" for part in ("key", "value", "receptance")),
                "feed_forward.receptance.weight",
                "feed_forward.time_mix_key",
                "feed_forward.time_mix_receptance",
            },
            "up": {"feed_forward.key.weight"},
        }
    else:
        other = {"mixer.A_log", "mixer.D", "mixer.conv1d.weight", "mixer.in_proj.weight"}
        other |= {"mixer.x_proj.weight", "mixer.dt_proj.weight"} if family == "Mamba" else set()
        assert {name: found[name] for name in sorted(set(found) - norms)} == {
            "o": {"mixer.out_proj.weight"},
            "other": other,
        }


@new_names
def test_views_give_the_gate_and_up_of_transformers_phi3_mixtral_and_llama4():
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    seen = []

    class Keep(torch.nn.Module):
        def forward(self, gate):
            seen.append(gate)
            return torch.ones_like(gate)  # so that the output is down(up)

    x = integers(3, 32)
    config = config_of("Phi3")
    mlp = with_integers(Phi3MLP(config))
    mlp.activation_fn = Keep()
    weight = mlp.gate_up_proj.weight.detach()
    gate, up = describe("layers.0.mlp.gate_up_proj.weight", weight.shape).views
    assert torch.equal(mlp(x), (x @ up.of(weight).T) @ mlp.down_proj.weight.T)
    assert torch.equal(seen.pop(), x @ gate.of(weight).T)

    # With an inner size of 16 the fused axis is as long as the hidden state: shape alone cannot tell.
    for inner in (48, 16):
        config = config_of("Mixtral", intermediate_size=inner)
        config._experts_implementation = "eager"
        experts = with_integers(MixtralExperts(config))
        experts.act_fn = Keep()
        weight = experts.gate_up_proj.detach()
        gate, up = describe("layers.0.mlp.experts.gate_up_proj", weight.shape, config).views
        out = experts(x, torch.tensor([[0], [1], [2]]), torch.ones(3, 1).double())
        assert torch.equal(out[:, None], x[:, None] @ up.of(weight).mT @ experts.down_proj.mT)
        assert torch.equal(torch.stack(seen), x[:, None] @ gate.of(weight).mT)
        seen.clear()

    config = transformers.Llama4TextConfig(**GROUPED, num_local_experts=3)
    experts = with_integers(Llama4TextExperts(config))
    experts.act_fn = Keep()
    weight = experts.gate_up_proj.detach()
    gate, up = describe("layers.0.feed_forward.experts.gate_up_proj", weight.shape, config).views
    assert torch.equal(experts(x)[:, None], x[:, None] @ up.of(weight) @ experts.down_proj)
    assert torch.equal(seen.pop(), x[:, None] @ gate.of(weight))


@given(
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 4),
    dim=st.integers(1, 6),
    hidden=st.integers(1, 40),
    name=st.sampled_from(["query_key_value", "qkv_proj", "c_attn", "q_proj", "k_proj", "v_proj"]),
    views=st.sampled_from([True, "head"]),
)
def test_views_cover_every_index_once(kv_heads, group, dim, hidden, name, views):
    heads = kv_heads * group
    count = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}.get(name, heads + 2 * kv_heads)
    shape = (hidden, count * dim) if name == "c_attn" else (count * dim, hidden)
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    found = describe(f"h.0.attn.{name}.weight", shape, config, views=views).views
    if name in ("q_proj", "k_proj", "v_proj") and views is True:
        assert found == ()
        return
    assert len(found) == (count if views == "head" else 3)
    index = torch.arange(shape[0] * shape[1]).view(shape)
    parts = [view.of(index) for view in found]
    assert torch.equal(torch.cat([part.flatten() for part in parts]).sort().values, index.flatten())
    assert [view.numel(shape) for view in found] == [part.numel() for part in parts]
    for view in found:
        assert list(view.ranges) == sorted(view.ranges)
        assert all(start < stop for start, stop in view.ranges)


def test_a_view_of_one_range_is_no_copy():
    weight = torch.zeros(24, 8)
    config = {"num_attention_heads": 2, "hidden_size": 8}
    q, k, v = describe("h.0.attn.qkv_proj.weight", weight.shape, config).views
    k.of(weight).fill_(1)
    assert weight.sum() == k.numel(weight.shape) == 64
    assert q.of(weight).data_ptr() == weight.data_ptr()
    assert v.of(weight).untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        ("layers.0.attention.query_key_value.weight", (96, 32), None),
        ("layers.0.attention.query_key_value.weight", (96, 32), {"hidden_size": 32}),
        ("layers.0.attention.query_key_value.weight", (90, 32), SIZES),
        ("layers.0.self_attn.qkv_proj.weight", (96, 32), None),
        ("layers.0.self_attn.qkv_proj.weight", (96, 32), GROUPED),
        ("h.0.attn.c_attn.weight", (32, 96), None),
        ("h.0.crossattention.c_attn.weight", (32, 64), SIZES),
        ("layers.0.attn.Wqkv.weight", (96, 32), GROUPED),
        ("layers.0.attn.wqkv.weight", (96, 32), SIZES),  # InternLM2's is interleaved, others' are blocks
        ("layers.0.self_attn.in_proj_weight", (64, 32), SIZES),
        ("blocks.0.attn.qkv.weight", (192, 32), SIZES),
        ("stages.0.blocks.0.attn_block.attn.qkv.weight", (96, 32), SIZES),  # timm's MaxViT: heads outermost
        ("h.0.attn.qkv_proj.weight", (96, 32), SIZES | {"model_type": "minimax"}),
        ("h.0.attn.qkv_proj.weight", (72, 24), SIZES | {"model_type": "codegen", "num_attention_heads": 3}),
        ("h.0.attn.c_attn.weight", (48, 32), SIZES | {"model_type": "gpt_bigcode"}),
        ("layers.0.self_attn.kv_b_proj.weight", (96, 32), None),
        ("layers.0.self_attn.kv_b_proj.weight", (96, 32), SIZES),
    ],
)
def test_a_fused_matrix_that_the_heads_do_not_account_for_is_left_whole(name, shape, config):
    tensor = describe(name, shape, config, views="head")
    assert (tensor.component, tensor.role, tensor.views) == ("qkv", "other", ())


@pytest.mark.parametrize(
    "config", [None, {"hidden_size": 7}, {"hidden_size": 32, "model_type": "gpt_oss"}], ids=str
)
def test_stacked_experts_of_unknown_layout_are_left_whole(config):
    tensor = describe("layers.0.mlp.experts.gate_up_proj", (3, 96, 32), config)
    assert (tensor.component, tensor.role, tensor.views) == ("up", "transmission", ())


def test_a_gated_query_projection_is_not_cut_into_heads():
    # Qwen3-Next has twice the rows in q_proj: a gate lies behind each head's query.
    assert describe("layers.0.self_attn.q_proj.weight", (64, 32), SIZES, views="head").views == ()


@pytest.mark.parametrize(
    ("component", "layer", "name"),
    [
        ("gate", 3, "model.layers.3.block_sparse_moe.experts.7.w1.weight"),
        ("down", 3, "model.layers.3.block_sparse_moe.experts.7.w2.weight"),
        ("up", 3, "model.layers.3.block_sparse_moe.experts.7.w3.weight"),
        ("other", 3, "model.layers.3.block_sparse_moe.gate.weight"),
        ("other", 3, "model.layers.3.mlp.shared_expert_gate.weight"),
        ("other", 3, "model.layers.3.mlp.router.weight"),
        ("down", 3, "model.layers.3.mlp.experts.7.down_proj.weight"),
        ("unembed", None, "embed_out.weight"),
        ("bias", None, "lm_head.bias"),
        ("other", None, "score.weight"),
        ("q", 11, "bert.encoder.layer.11.attention.self.query.weight"),
        ("o", 11, "bert.encoder.layer.11.attention.output.dense.weight"),
        ("up", 11, "bert.encoder.layer.11.intermediate.dense.weight"),
        ("down", 11, "bert.encoder.layer.11.output.dense.weight"),
        ("embed", None, "bert.embeddings.position_embeddings.weight"),
        ("o", 0, "encoder.block.0.layer.1.EncDecAttention.o.weight"),
        ("down", 0, "encoder.block.0.layer.2.DenseReluDense.wo.weight"),
        ("other", 0, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("o", 2, "layers.2.attention.wo.weight"),
        ("other", 2, "backbone.layers.2.mixer.in_proj.weight"),
        ("o", 2, "backbone.layers.2.mixer.out_proj.weight"),
        ("other", 2, "model.layers.2.mamba.x_proj.weight"),
        ("o", 2, "model.layers.2.mamba.out_proj.weight"),
        ("other", 2, "blocks.2.att.key.weight"),  # RWKV's own names
        ("o", 2, "blocks.2.att.output.weight"),
        ("up", 2, "blocks.2.ffn.key.weight"),
        ("k", 2, "blocks.2.attn.key.weight"),  # minGPT
        ("k", 2, "blocks.2.attention.key.weight"),
        ("q", 2, "model.layers.2.self_attn.q_b_proj.weight"),
        ("other", 2, "model.layers.2.self_attn.q_a_proj.weight"),
        ("other", 2, "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"),
        ("norm", 2, "model.layers.2.self_attn.kv_a_layernorm.weight"),
        ("bias", 2, "encoder.layers.2.self_attn.in_proj_bias"),
        ("bias", 2, "layers.2.mlp.experts.gate_up_proj_bias"),
        ("embed", None, "transformer.wte.weight"),  # OLMo's own names
        ("qkv", 2, "transformer.blocks.2.att_proj.weight"),
        ("o", 2, "transformer.blocks.2.attn_out.weight"),
        ("up", 2, "transformer.blocks.2.ff_proj.weight"),
        ("down", 2, "transformer.blocks.2.ff_out.weight"),
        ("norm", 2, "transformer.blocks.2.q_norm.weight"),
        ("norm", None, "transformer.ln_f.weight"),
        ("unembed", None, "transformer.ff_out.weight"),
        ("embed", None, "embeddings.weight"),  # OLMo-core's
        ("q", 2, "blocks.2.attention.w_q.weight"),
        ("k", 2, "blocks.2.attention.w_k.weight"),
        ("v", 2, "blocks.2.attention.w_v.weight"),
        ("o", 2, "blocks.2.attention.w_out.weight"),
        ("gate", 2, "blocks.2.feed_forward.w1.weight"),
        ("down", 2, "blocks.2.feed_forward.w2.weight"),
        ("up", 2, "blocks.2.feed_forward.w3.weight"),
        ("unembed", None, "lm_head.w_out.weight"),
        ("norm", None, "lm_head.norm.weight"),
        ("unembed", None, "output.weight"),  # torchtitan's
        ("other", None, ""),
    ],
)
def test_names_of_other_checkpoints_and_heads(component, layer, name):
    tensor = describe(name, (4, 4))
    assert (tensor.component, tensor.layer, tensor.views) == (component, layer, ())


def test_olmo_s_fused_attention_is_q_then_k_then_v_with_heads_of_its_own_number():
    config = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2}
    tensor = describe("transformer.blocks.2.att_proj.weight", (64, 32), config)
    assert [(view.name, view.ranges) for view in tensor.views] == [
        ("q", ((0, 32),)),
        ("k", ((32, 48),)),
        ("v", ((48, 64),)),
    ]


def test_a_vector_named_weight_is_a_norm_and_a_matrix_is_not():
    assert describe("net.2.weight", (32,)) == TensorName("net.2.weight", 2, "norm", stack="net")
    assert describe("net.2.weight", (32, 32)).component == "other"
    assert describe("layers.0.self_attn.sinks", (4,)).component == "other"


def test_a_flattened_matrix_keeps_its_component_and_has_no_views():
    tensor = describe("layers.0.attention.query_key_value.weight", (3072,), SIZES, views="head")
    assert (tensor.component, tensor.views) == ("qkv", ())


def test_tied_embeddings_count_once_and_as_embed():
    config = config_of("GPT2")
    assert config.tie_word_embeddings
    components = [describe(name, shape).component for name, shape in parameters(config).items()]
    assert components.count("unembed") == 0
    assert components.count("embed") == 2


def test_score_heads_are_other():
    shapes = parameters(config_of("Llama", num_labels=3), "SequenceClassification")
    assert describe("score.weight", shapes["score.weight"]).component == "other"


def test_each_part_of_a_composite_model_has_its_own_heads():
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 3,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.Gemma3Config(text_config=config_of("Gemma3Text"), vision_config=vision)
    shapes = parameters(config, "ImageTextToText")
    heads = {}
    for name, shape in shapes.items():
        tensor = describe(name, shape, config, views="head")
        if tensor.component in ("q", "k"):
            heads.setdefault(("vision" in name, tensor.component), set()).add(len(tensor.views))
    assert heads == {(False, "q"): {4}, (False, "k"): {2}, (True, "q"): {3}, (True, "k"): {3}}


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.gpt_neox.layers.5.attention.query_key_value.weight",
        "_orig_mod.module.gpt_neox.layers.5.attention.query_key_value.weight",
        "_fsdp_wrapped_module.gpt_neox.layers.5._fsdp_wrapped_module.attention.query_key_value.weight",
        "gpt_neox.layers.5._checkpoint_wrapped_module.attention._orig_mod.query_key_value.weight",
        "base_model.model.gpt_neox.layers.5.attention.query_key_value.base_layer.weight",
    ],
)
def test_wrappers_are_looked_through(wrapped):
    plain = describe("gpt_neox.layers.5.attention.query_key_value.weight", (96, 32), SIZES)
    seen = describe(wrapped, (96, 32), SIZES, rules={r"^gpt_neox\.nothing": "other"})
    assert seen == TensorName(wrapped, plain.layer, plain.component, plain.views, plain.stack)
    assert describe(wrapped, (96, 32), rules={r"^gpt_neox\.layers\.5\.attention": "o"}).component == "o"


@new_names
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_models_are_named_as_what_they_adapt():
    peft = pytest.importorskip("peft")
    config = config_of("GPTNeoX")
    model = transformers.GPTNeoXForCausalLM(config)
    lora = peft.LoraConfig(
        r=2, target_modules=["query_key_value", "dense_h_to_4h"], modules_to_save=["lm_head"]
    )
    model = peft.get_peft_model(model, lora)
    got = {}
    for name, parameter in model.named_parameters():
        tensor = describe(name, parameter.shape, config)
        got[name] = (tensor.layer, tensor.component, len(tensor.views))
    block = "base_model.model.gpt_neox.layers.1."
    assert got[block + "attention.query_key_value.base_layer.weight"] == (1, "qkv", 3)
    assert got[block + "attention.query_key_value.base_layer.bias"] == (1, "bias", 0)
    assert got[block + "attention.query_key_value.lora_A.default.weight"] == (1, "qkv", 0)
    assert got[block + "attention.query_key_value.lora_B.default.weight"] == (1, "qkv", 3)
    assert got[block + "mlp.dense_h_to_4h.lora_A.default.weight"] == (1, "up", 0)
    assert got["base_model.model.lm_head.modules_to_save.default.weight"] == (None, "unembed", 0)
    assert got["base_model.model.lm_head.original_module.weight"] == (None, "unembed", 0)
    assert {component for _, component, _ in got.values()} <= set(COMPONENTS) - {"other"}


def test_the_users_rules_go_first_and_may_set_the_layer():
    rules = {r"^stage_(?P<layer>\d+)_mix$": "o", r"\.W_Q$": "q", r"q_proj": "other", r"q_proj.weight": "v"}
    assert describe("stage_12_mix", (8, 8), rules=rules) == TensorName("stage_12_mix", 12, "o")
    tensor = describe("blocks.4.W_Q", (32, 32), SIZES, views="head", rules=rules)
    assert (tensor.layer, tensor.role, len(tensor.views)) == (4, "selection", 4)
    assert describe("blocks.4.q_proj.weight", (32, 32), rules=rules).component == "other"
    assert describe("blocks.4.k_proj.weight", (32, 32), rules=rules).component == "k"
    # A rule that agrees with the table keeps the views, one that does not drops them.
    name, shape = "layers.0.attention.query_key_value.weight", (96, 32)
    assert len(describe(name, shape, SIZES, rules={"query_key_value": "qkv"}).views) == 3
    assert describe(name, shape, SIZES, rules={"query_key_value": "other"}).views == ()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"q_proj": "query"}, r"rules\['q_proj'\] must be one of .*'qkv'.*, got 'query'"),
        ({"(": "q"}, r"rules: '\(' .* is not a regular expression"),
        ({r"layers\.(?P<layer>\w)": "q"}, "'layer' of .* must match a number such as '12', got 'x'"),
    ],
)
def test_a_rule_that_cannot_be_used_says_why(rules, message):
    with pytest.raises(ValueError, match=message):
        describe("layers.x.q_proj", (4, 4), rules=rules)


WORDS = ["q_proj", "query_key_value", "c_attn", "gate_up_proj", "experts", "attn", "norm", "weight", "bias",
         "lora_A", "base_model", "model", "module", "vision", "w1", "ln_f", "in_proj_weight", "qkv",
         "qkv_proj", "kv_b_proj", "q_b_proj", "0", "9" * 5000, "٣", "", "\n"]  # fmt: skip
NUMBERS = st.one_of(st.none(), st.integers(-3, 64), st.just(10**12), st.floats(), st.text(max_size=2))
KEYS = ["num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "n_head", "text_config",
        "vision_config", "model_type", "multi_query", "qk_nope_head_dim", "v_head_dim"]  # fmt: skip


@settings(deadline=None)
@given(
    name=st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4))).map(".".join)),
    shape=st.lists(st.integers(0, 64), max_size=4),
    config=st.one_of(
        st.none(),
        st.dictionaries(st.sampled_from(KEYS), st.one_of(NUMBERS, st.lists(NUMBERS, max_size=2))),
    ),
    views=st.sampled_from([True, "head"]),
)
def test_describe_never_fails(name, shape, config, views):
    tensor = describe(name, shape, config, views=views)
    assert tensor.name == name
    assert tensor.component in COMPONENTS
    assert tensor.role in ("selection", "transmission", "value", "other")
    assert tensor.layer is None or tensor.layer >= 0
    if tensor.views:
        assert sum(view.numel(shape) for view in tensor.views) == torch.Size(shape).numel()


@pytest.mark.parametrize("part", ["0", "att", "a.", "0.", "layers.", "module.", "a" * 30 + "."])
def test_a_name_of_a_million_characters_is_answered_without_searching_it(part):
    # Patterns take time that grows with the square of a name: this one would take hours.
    name = part * (10**6 // len(part))
    assert describe(name, (4, 4)) == TensorName(name, None, "other")


def test_roles_are_the_four_of_the_papers():
    roles = {component: role_of(component) for component in COMPONENTS}
    assert {name for name, role in roles.items() if role == "selection"} == {"q", "k"}
    assert {name for name, role in roles.items() if role == "transmission"} == {"o", "gate", "up", "down"}
    assert {name for name, role in roles.items() if role == "value"} == {"v"}
    assert roles["qkv"] == roles["embed"] == roles["norm"] == "other"
    with pytest.raises(ValueError, match="component must be one of"):
        role_of("query")


def test_the_module_does_not_import_transformers():
    code = "import sys, weightdyn.core.naming; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("name", "stack", "layer"),
    [
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder", 0),  # T5
        ("decoder.block.0.layer.2.DenseReluDense.wi.weight", "decoder", 0),
        ("model.encoder.layers.3.fc1.weight", "model.encoder", 3),  # Whisper
        ("model.decoder.layers.3.fc1.weight", "model.decoder", 3),
        ("layer1.0.conv1.weight", "layer1", 0),  # torchvision's ResNet
        ("layer2.0.conv1.weight", "layer2", 0),
        ("resnet.encoder.stages.0.layers.1.layer.0.convolution.weight", "resnet.encoder.stages.0", 1),
        ("resnet.encoder.stages.1.layers.1.layer.0.convolution.weight", "resnet.encoder.stages.1", 1),
        ("swin.encoder.layers.2.blocks.5.intermediate.dense.weight", "swin.encoder.layers.2", 5),
        ("model.layers.3.mlp.experts.5.w1.weight", "model", 3),  # experts keep their layer
        ("layers.4.mlp.up_proj.weight", "", 4),
        ("lm_head.weight", "", None),
    ],
)
def test_a_layer_is_unique_with_its_stack(name, stack, layer):
    found = describe(name, (8, 8))
    assert (found.stack, found.layer) == (stack, layer)


def test_the_stacks_of_models_of_transformers_keep_their_layers_apart():
    from transformers import ResNetConfig, ResNetModel, T5Config, T5Model, WhisperConfig, WhisperModel

    small = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 16, "num_mel_bins": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    models = [
        T5Model(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)),
        WhisperModel(WhisperConfig(**small, **heads, **tokens)),
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[2, 2], layer_type="basic")),
    ]
    for model in models:
        blocks = {}  # the module of a block, from the model itself: an entry of the lists that hold several
        for path, module in model.named_modules():
            if type(module).__name__ in (
                "T5Block",
                "WhisperEncoderLayer",
                "WhisperDecoderLayer",
                "ResNetBasicLayer",
            ):
                blocks[path] = {name for name, _ in module.named_parameters(prefix=path)}
        assert len(blocks) == 4
        seen = {}
        for path, names in blocks.items():
            places = {(found.stack, found.layer) for found in (describe(name, (8, 8)) for name in names)}
            assert len(places) == 1, path
            seen[places.pop()] = path
        assert len(seen) == len(blocks)


def test_a_rule_may_set_the_stack():
    found = describe(
        "tower_text_block_3_mix", (8, 8), rules={r"tower_(?P<stack>[a-z]+)_block_(?P<layer>\d+)_mix": "o"}
    )
    assert (found.stack, found.layer, found.component) == ("text", 3, "o")


@given(
    st.text(max_size=12),
    st.sampled_from([None, "q", "k", "v", "gate", "up", "q.0", "k.12"]),
)
def test_a_label_is_made_and_parsed_by_the_same_grammar(name, view):
    parts = () if view is None else (View(view, view.partition(".")[0], 0, ((0, 1),)),)
    (row,) = TensorName(name, None, "other", parts).rows((1,))
    if view is not None or split_label(name) == (name, None):
        assert split_label(row.label) == (name, view)
