"""What the frameworks' tests share: a tiny model and its data, and forces from weights cloned across the step."""

import numpy as np
import torch

from weightdyn.core.tables import FORCES

TOKENS = torch.randint(0, 32, (64, 12), generator=torch.Generator().manual_seed(7))


def tiny_llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Truth:
    """AdamW in float64 beside the real one: the forces of each tensor and update from weights cloned before it."""

    def __init__(self):
        self.forces, self.moments = {}, {}

    def before(self, optimizer, model, step):
        """Clone the weights, follow the moments, and tell the forces of update `step`, which is about to be made."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            lr, decay, (beta1, beta2) = float(group["lr"]), float(group["weight_decay"]), group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = optimizer.state.get(p, {})  # a training that resumes has moments
                m, v, t = self.moments.get(
                    p, [state.get(key, torch.zeros(())).double() for key in ("exp_avg", "exp_avg_sq", "step")]
                )
                w, g, t = p.detach().double().clone(), p.grad.double(), float(t) + 1
                m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
                self.moments[p] = m, v, t
                u = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
                self.forces[step, names[p]] = (
                    -2 * lr * (1 - lr * decay) * (w * u).sum().item(),
                    lr**2 * (u * u).sum().item(),
                    -(2 * lr * decay - (lr * decay) ** 2) * (w * w).sum().item(),
                )


def assert_forces_are_true(table, truth, steps):
    """Every update of `steps` once for each tensor, and each force right to 1e-4 of its row's budget."""
    rows = table.set_index(["step", "tensor"])[[*FORCES]]
    tensors = {name for _, name in truth.forces}
    assert sorted(rows.index) == sorted((step, name) for step in steps for name in tensors)
    for key, row in rows.iterrows():
        expected = np.array(truth.forces[key])
        assert np.abs(row.to_numpy() - expected).max() <= 1e-4 * np.abs(expected).sum(), key
