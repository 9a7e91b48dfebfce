"""Sharded trainings against float64 loops over their gathered tensors: the combinations that the tests leave out.

    python benchmarks/check_stacks.py            each case in as many processes (gloo, CPU) as it names
    python benchmarks/check_stacks.py bf16 lion  some of them

For each update of each case every tensor is gathered (`full_tensor`) before and after the step, and the forces of
each row are computed from that by their definition. Printed are the largest relative errors of the log: those of
alignment and drift in units of |alignment| + injection. Fits (k, lam) are held against those of gathered tensors.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import weightdyn as wd
from weightdyn.core.naming import describe

VOCAB, LENGTH, BATCH, STEPS = 300, 8, 12, 4


def llama(kv_heads=2, hidden=48, vocab=VOCAB):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=kv_heads,
        )
    )  # fmt: skip


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
        )
    )


def blocks(model):
    return model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers


def sharded(model, mesh=None, **options):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def offloaded(model):
    from torch.distributed.fsdp import CPUOffloadPolicy

    return sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def mixed(model):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return sharded(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def columns(model):
    from torch.distributed.tensor import Shard

    return sharded(model, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else Shard(0))


def replicated(model):
    size = dist.get_world_size()
    return sharded(model, init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("copies", "shards")))


def tensor_parallel(model):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    size = dist.get_world_size()
    if size < 8:
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        outer = mesh["dp"]
    else:  # the four ranks that hold the tensors once have no group yet
        mesh = init_device_mesh("cpu", (size // 4, 2, 2), mesh_dim_names=("copies", "dp", "tp"))
        outer = mesh["copies", "dp"]
    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    for block in blocks(model):
        parallelize_module(block, mesh["tp"], plan)
    return sharded(model, outer)


def adamw(model, **options):
    return [torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, **options)]


def two(model):
    return [
        torch.optim.AdamW([p for p in model.parameters() if p.ndim > 1], lr=3e-3, weight_decay=0.1),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-3, weight_decay=0.0),
    ]


def lion(model):
    from lion_pytorch import Lion

    return [Lion(model.parameters(), lr=1e-3, weight_decay=0.1)]


def sgd(model):
    return [torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9, nesterov=True)]


PLAIN = {"processes": 2, "model": neox, "shard": sharded, "optimizers": adamw, "options": {}, "clip": False}
CASES = {
    "three processes": {"processes": 3},
    "cpu offload": {"shard": offloaded},
    "mixed precision": {"shard": mixed},
    "dimension 1": {"shard": columns},
    "heads": {"options": {"views": "head"}},
    "heads, three processes": {"options": {"views": "head"}, "processes": 3},
    "clipped": {"clip": True},
    "drift before": {"options": {"drift": "before"}},
    "grouped queries": {"model": llama},
    "one key head, three processes": {"model": lambda: llama(1), "processes": 3},
    "heads of grouped queries": {"model": llama, "options": {"views": "head"}},
    "replicas": {"shard": replicated, "processes": 4},
    "tensor parallel and sharded": {"model": llama, "shard": tensor_parallel, "processes": 4},
    "replicas of both": {"model": llama, "shard": tensor_parallel, "processes": 8},
    "amsgrad": {"optimizers": lambda model: adamw(model, amsgrad=True)},
    "for loop": {"optimizers": lambda model: adamw(model, foreach=False)},
    "fused": {"optimizers": lambda model: adamw(model, fused=True)},
    "sgd": {"optimizers": sgd},
    "lion": {"optimizers": lion},
    "displacement": {"options": {"source": "displacement"}},
    "two optimizers": {"optimizers": two},
    "bf16": {"model": lambda: neox().bfloat16()},
    "counted fits": {"model": lambda: llama(hidden=384, vocab=1500)},
}


def whole(tensor):
    """A tensor as it was before it was cut, in float64; its own copy."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().double().clone()


def expected(model, optimizers, before, gradients, step, views, source):
    """The forces of each row, by their definition."""
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            eta, decay = group["lr"], group["weight_decay"]
            for p in group["params"]:
                w, now = before[p], whole(p)
                u, fresh = ((1 - eta * decay) * w - now) / eta, None
                if isinstance(optimizer, torch.optim.AdamW):
                    state = optimizer.state[p]
                    beta1, beta2 = group["betas"]
                    second = whole(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
                    root = (second / (1 - beta2**step)).sqrt() + group["eps"]
                    u = u if source == "displacement" else whole(state["exp_avg"]) / (1 - beta1**step) / root
                    fresh = gradients[p] / root
                described = describe(names[p], tuple(p.shape), model.config, views=views)
                for row in described.rows(tuple(p.shape)):
                    a, b, c = row.of(w), row.of(u), row.of(now)
                    yield row.label, {
                        "norm_sq": a.square().sum(),
                        "norm_sq_after": c.square().sum(),
                        "alignment": -2 * eta * (1 - eta * decay) * (a * b).sum(),
                        "injection": eta**2 * b.square().sum(),
                        "decay": -(2 * eta * decay - (eta * decay) ** 2) * a.square().sum(),
                        "u_max": b.abs().max(),
                    } | ({} if fresh is None else {
                        "drift": -2 * eta * (1 - eta * decay)
                        * (a * row.of(fresh)).sum()
                    })  # fmt: skip


def check(case):
    case = {**PLAIN, **case}
    torch.manual_seed(0)
    model = case["model"]()
    with torch.no_grad():
        for p in model.parameters():  # a bias that begins at 0 would have a norm of rounding
            p += 0.02 * torch.randn_like(p)
    model = case["shard"](model)
    optimizers = case["optimizers"](model)
    views, source = case["options"].get("views", True), case["options"].get("source")
    part, size = (0, 1) if case["shard"] is tensor_parallel else (dist.get_rank(), dist.get_world_size())
    errors, compared, missing = {}, 0, 0
    with wd.ForceLogger(optimizers, model, weibull_every=2, audit_every=2, **case["options"]) as log:
        for step in range(1, STEPS + 1):
            tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
            tokens = tokens[part * BATCH // size : (part + 1) * BATCH // size]
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
            if case["clip"]:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            before = {p: whole(p) for p in model.parameters()}
            gradients = {p: whole(p.grad) for p in model.parameters()}
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if len(optimizers) > 1:
                log._finish()  # it would at the next step
            got = log.latest().set_index("tensor")
            for label, wanted in expected(model, optimizers, before, gradients, step, views, source):
                row, compared = got.loc[label], compared + 1
                scale = float(wanted["alignment"].abs() + wanted["injection"])
                for name, value in wanted.items():
                    if name == "drift" and row[name] != row[name]:
                        missing += 1
                        continue
                    size_of = max(abs(float(value)), scale if name in ("alignment", "drift") else 0, 1e-300)
                    errors[name] = max(errors.get(name, 0.0), abs(float(row[name]) - float(value)) / size_of)
        fits = log.run.weibull()
        fits = fits[fits["step"] == STEPS].set_index("tensor")
        for p_name, p in model.named_parameters():
            full = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
            for row in describe(p_name, tuple(p.shape), model.config, views=views).rows(tuple(p.shape)):
                if p.ndim > 1:
                    fit = wd.fit_weibull(row.of(full))
                    for name in ("k", "lam"):
                        error = abs(fits.loc[row.label, name] / getattr(fit, name) - 1)
                        errors[name] = max(errors.get(name, 0.0), float(error))
    text = "  ".join(f"{name} {value:.1e}" for name, value in errors.items())
    return f"{compared} rows, {missing} without drift: {text}"


def inside(names):
    dist.init_process_group("gloo")
    for name in names:
        text = check(CASES[name])
        if dist.get_rank() == 0:
            print(f"{name:<34}{text}", flush=True)
        dist.barrier()
    dist.destroy_process_group()


def main(names):
    for processes in (2, 3, 4, 8):
        chosen = [name for name in names if CASES[name].get("processes", 2) == processes]
        if chosen:
            print(f"-- {processes} processes", flush=True)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command += [str(processes), str(Path(__file__)), "--inside", *chosen]
            with tempfile.TemporaryFile("w+") as told:
                if subprocess.run(command, stderr=told).returncode:
                    told.seek(0)
                    sys.exit(told.read()[-5000:])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2:])
    else:
        main(sys.argv[1:] or list(CASES))
