"""What the tests of frameworks share: a tiny model and its data, forces from cloned weights, killed trainings."""

import os
import signal
import subprocess
import sys
from pathlib import Path

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
        """Clone the weights, follow the moments, and tell the forces of the update that is about to be made."""
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


def assert_every_update_is_there_once(table, tensors, updates):
    rows = zip(table["step"], table["tensor"], strict=True)
    assert sorted(rows) == sorted((step, name) for step in range(1, updates + 1) for name in tensors)


def assert_forces_are_true(table, truth):
    """Each force that the truth knows, to 1e-4 of its row's budget."""
    rows = table.set_index(["step", "tensor"])[[*FORCES]]
    for key, expected in truth.forces.items():
        wrong = np.abs(rows.loc[key].to_numpy() - np.array(expected)).max()
        assert wrong <= 1e-4 * np.abs(expected).sum(), key


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def run_to_the_kill(scenarios):
    """Call `train` of each (test module, arguments), in processes that end by SIGKILL."""
    code = f"""
import importlib, os, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
for module, arguments in {scenarios!r}:
    train = importlib.import_module(module).train
    child = os.fork()
    if child == 0:
        train(*arguments)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (module, arguments, status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def torchrun(module, folder):
    """Call `distributed(folder)` of a test module in two processes; the first leaves a file when all is well."""
    script = folder / "script.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        f"import {module}\n{module}.distributed({str(folder)!r})\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (folder / "done").exists()
