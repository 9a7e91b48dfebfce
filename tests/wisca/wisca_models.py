"""Small random models of every family that WISCA knows: no weight, bias or gain of them is at a special value."""

import torch

V = 61
_LLAMA = {
    "vocab_size": V, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_NEOX = {
    "vocab_size": V, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 32, "rotary_pct": 0.25, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_GPT2 = {
    "vocab_size": V, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
_OPT = {
    "vocab_size": V, "hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "word_embed_proj_dim": 48, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_CONFIGS = {
    "gpt_neox": ("GPTNeoX", _NEOX),
    "llama": ("Llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**_LLAMA, "head_dim": 10}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 10, "attention_bias": True}),
    "olmo2": ("Olmo2", {**_LLAMA, "attention_bias": True}),
    "gpt2": ("GPT2", _GPT2),
    "opt": ("OPT", _OPT),
}
FAMILIES = tuple(_CONFIGS)


def make(family, attention="sdpa", dtype=torch.float32, **config):
    import transformers

    name, defaults = _CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**defaults, **config}, attn_implementation=attention)
    causal = f"{name}LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"
    model = getattr(transformers, causal)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(0.15 * noise * torch.randn(len(noise), 1).div(2).exp())  # rows differ in size
            else:
                parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
    return model.to(dtype)


def tokens(seed=0, batch=2, length=12):
    return torch.randint(1, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())
