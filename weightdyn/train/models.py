"""The models of the reference trainer: shapes in the words of transformers' configurations, made from a seed.

They are real ones, of GPT-NeoX and LLaMA, made small by a vocabulary of bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weightdyn.core.checks import check_choice, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


VOCABULARY = 256
"""Bytes: every text has the same tokens, and none needs a download."""

CONTEXT = 2048
"""The longest sequence that the models accept."""

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "gpt_neox",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    },
    "tiny-llama": {
        "model_type": "llama",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
    },
    "pythia-14m": {
        "model_type": "gpt_neox",
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    },
    "pythia-70m": {
        "model_type": "gpt_neox",
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    },
    "llama-70m": {
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1376,
    },
}
"""Shapes by name, in the words of transformers' configurations. Pythia's blocks are those of the models after
which they are named, and llama-70m's are of the same size; but the vocabulary is bytes, so there are fewer
parameters than the names say: 0.9 million in tiny and tiny-llama, 1.3 in pythia-14m, 19 in the last two."""


def make_model(name: str, seed: int) -> PreTrainedModel:
    """A byte-level causal language model of transformers with fresh weights, in float32 on the CPU.

    Args:
        name: one of `MODELS`.
        seed: of the initial weights; torch's own random state stays as it is.

    Raises:
        TypeError, ValueError: if there is no such shape, or the seed is no whole number >= 0.
        ImportError: if transformers is not installed.
    """
    check_choice("name", name, MODELS)
    check_whole("seed", seed, 0, 2**63 - 1)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError('the models need transformers: pip install "weightdyn[hf]"') from error
    config = AutoConfig.for_model(
        **MODELS[name], vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, use_cache=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)
