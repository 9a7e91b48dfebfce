"""One small training, on one process or in any of the ways in which several share it.

    torchrun --nproc-per-node 2 stacks.py FOLDER fsdp tp …

logs each way named into FOLDER/<way>. All of it is in float64, where the order in which ranks add up does not show.
"""

import itertools
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import weightdyn as wd
from weightdyn.record import shards

HEADS, HIDDEN, VOCAB, BATCH, LENGTH = 4, 16, 17, 12, 6
CONFIG = {"model_type": "gpt_neox", "num_attention_heads": HEADS, "hidden_size": HIDDEN}
STEPS = 5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.dense = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        fused = self.query_key_value(x)  # of tensor parallelism: some of the heads
        q, k, v = fused.unflatten(-1, (-1, 3, HIDDEN // HEADS)).permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.dense_4h_to_h = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.attention = Attention()
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN)
        self.mlp = MLP()
        self.gain = nn.Parameter(torch.ones(1, HIDDEN))  # of whose one row most ranks hold nothing

    def forward(self, x):
        return (
            self.gain * x
            + self.attention(self.input_layernorm(x))
            + self.mlp(self.post_attention_layernorm(x))
        )


class Model(nn.Module):
    """A GPT-NeoX in what its tensors are called and how q, k and v lie in them."""

    def __init__(self):
        super().__init__()
        self.embed_in = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.final_layer_norm = nn.LayerNorm(HIDDEN)
        self.embed_out = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.embed_in(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed_out(self.final_layer_norm(x))


def made():
    torch.manual_seed(0)
    model = Model().double()
    with torch.no_grad():
        for parameter in model.parameters():  # a bias that begins at 0 would have a norm of rounding
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def optimizer_of(model, kind=torch.optim.AdamW, **options):
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    others = [(name, p) for name, p in model.named_parameters() if p.ndim < 2]
    groups = [
        {"params": [p for _, p in matrices], "weight_decay": 0.1},
        {"params": [p for _, p in others], "weight_decay": 0.0},
    ]
    return kind(groups, lr=1e-2, **options)


def batches(first=0, steps=STEPS):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        yield step, torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)


def train(model, optimizer, part=(0, 1), first=0, steps=STEPS, after=lambda step: None):
    """Some updates; of each batch this process has part i of n."""
    i, n = part
    for step, tokens in batches(first, steps):
        tokens = tokens[i * BATCH // n : (i + 1) * BATCH // n]
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        after(step)


# --- the ways in which several processes train it ---------------------------------------------------------------


def sharded(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for layer in model.layers:
        plan = {
            "attention.query_key_value": ColwiseParallel(),
            "attention.dense": RowwiseParallel(),
            "mlp.dense_h_to_4h": ColwiseParallel(),
            "mlp.dense_4h_to_h": RowwiseParallel(),
        }
        parallelize_module(layer, mesh, plan)
    return model


def way(name):
    """A model and its optimizer, the module to call, and which part of a batch this process has."""
    size, rank = dist.get_world_size(), dist.get_rank()
    model = made()
    called, part = model, (rank, size)
    if name == "fsdp":
        sharded(model, init_device_mesh("cpu", (size,)))
    elif name == "hsdp":
        sharded(model, init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("copies", "shards")))
    elif name == "tp":
        tensor_parallel(model, init_device_mesh("cpu", (size,)))
        part = (0, 1)
    elif name == "fsdp_tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        sharded(tensor_parallel(model, mesh["tp"]), mesh["dp"])
        part = (mesh.get_coordinate()[0], size // 2)
    elif name in ("ddp", "zero"):
        called = nn.parallel.DistributedDataParallel(model)
    if name == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        groups = optimizer_of(model).param_groups
        groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, lr=1e-2)
    else:
        optimizer = optimizer_of(model)
    return model, optimizer, called, part


OPTIONS = {"weibull_every": 2, "snapshot_every": 4, "audit_every": 2}


def logged(folder, name):
    """Train in one of the ways, logged on every rank."""
    model, optimizer, called, part = way(name)
    out = folder / f"{name}-{dist.get_world_size()}"
    with wd.ForceLogger(optimizer, model, config=CONFIG, out=out, **OPTIONS) as log:
        train(called, optimizer, part)
    assert log.latest()["step"].tolist() == [STEPS] * len(log.latest())
    assert log.latest()["norm_sq"].notna().all()
    dist.barrier()
    assert log.run.forces()["step"].max() == STEPS


def resumed(folder, first, stop):
    """Go on from the checkpoint of any number of processes, and leave one."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    if dist.is_initialized():
        model, optimizer, called, part = way("fsdp")
    else:
        model = called = made()
        optimizer, part = optimizer_of(model), (0, 1)
    with wd.ForceLogger(optimizer, model, config=CONFIG, out=folder / "resumed"):
        if first:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments}
            dcp.load(state, checkpoint_id=folder / f"checkpoint-{first}")
            set_state_dict(
                model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        train(called, optimizer, part, first, stop - first)
        if dist.is_initialized():
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"checkpoint-{stop}")


# --- fakes of stacks that hand their shards over ------------------------------------------------------------------


class Flat:
    """A replica whose weights and moments lie in flat pieces, each on one rank, as Megatron and ZeRO have them."""

    def __init__(self, cuts):
        self.model = made()
        self.parameters = dict(self.model.named_parameters())
        rank = dist.get_rank()
        self.ranges = {name: cut[rank] for name, cut in cuts(self.parameters).items()}
        self.mains = {
            name: nn.Parameter(p.detach().flatten()[slice(*self.ranges[name])].clone())
            for name, p in self.parameters.items()
        }
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.mains[name]], "weight_decay": 0.1 if p.ndim > 1 else 0.0}
                for name, p in self.parameters.items()
            ],
            lr=1e-2,
        )

    def step(self, groups):
        """A step of each of these parts of the optimizer, after which every rank has the new weights."""
        for name, p in self.parameters.items():
            dist.all_reduce(p.grad)
            self.mains[name].grad = p.grad.flatten()[slice(*self.ranges[name])] / dist.get_world_size()
        everything = self.optimizer.param_groups
        for some in groups(everything):  # one sub-group at a time: the optimizer's hooks fire for each
            self.optimizer.param_groups = some
            self.optimizer.step()
        self.optimizer.param_groups = everything
        for name, p in self.parameters.items():
            whole = torch.zeros(p.numel(), dtype=p.dtype)
            whole[slice(*self.ranges[name])] = self.mains[name].detach()
            dist.all_reduce(whole)
            p.data.copy_(whole.view(p.shape))
            p.grad = None

    def shards(self, step):
        for group, (name, main) in zip(self.optimizer.param_groups, self.mains.items(), strict=True):
            if main.numel():
                state = self.optimizer.state[main]
                yield wd.Shard(
                    name, main, state["exp_avg"], state["exp_avg_sq"], step=step, lr=group["lr"],
                    weight_decay=group["weight_decay"], betas=group["betas"], eps=group["eps"],
                    start=self.ranges[name][0], grad=main.grad,
                )  # fmt: skip


def buffer_cuts(parameters):
    """Megatron's: one buffer of all parameters, of which each rank has an equal part, wherever that cuts them."""
    total, size = sum(p.numel() for p in parameters.values()), dist.get_world_size()
    edges = [total * i // size for i in range(size + 1)]
    found, first = {}, 0
    for name, p in parameters.items():
        ends = [min(max(edge - first, 0), p.numel()) for edge in edges]
        found[name] = list(itertools.pairwise(ends))
        first += p.numel()
    return found


def parameter_cuts(parameters):
    """ZeRO-3's: of each parameter every rank has an equal part; the last is padded."""
    size = dist.get_world_size()
    found = {}
    for name, p in parameters.items():
        part = -(-p.numel() // size)
        found[name] = [(min(i * part, p.numel()), min((i + 1) * part, p.numel())) for i in range(size)]
    return found


def handed_over(folder, name):
    """The training of a stack whose tensors say nothing of how they are cut."""
    flat = Flat(buffer_cuts if name == "megatron" else parameter_cuts)
    half = len(flat.parameters) // 2
    groups = (lambda all_: [all_]) if name == "megatron" else (lambda all_: [all_[:half], all_[half:]])
    shapes = {key: tuple(p.shape) for key, p in flat.parameters.items()}
    options = {"dtype": torch.float64, **OPTIONS}
    del options["audit_every"]
    part = dist.get_rank(), dist.get_world_size()
    with wd.ShardLogger(shapes, group=dist.group.WORLD, config=CONFIG, out=folder / name, **options) as log:
        for step, tokens in batches():
            tokens = tokens[part[0] * BATCH // part[1] : (part[0] + 1) * BATCH // part[1]]
            loss = F.cross_entropy(flat.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            for group in flat.optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            flat.step(groups)
            log.update(flat.shards(step + 1))
        assert log.step == STEPS


# --- what is refused ---------------------------------------------------------------------------------------------


def refused(kind, message, work, here=True):
    """On those ranks where `here` is true the work ends by this error, on the others it is done."""
    told = None
    try:
        work()
    except kind as error:
        told = str(error)
    if not here:
        assert told is None, told
    else:
        assert told is not None, f"no {kind.__name__} that says {message}"
        assert re.search(message, told), told
    dist.barrier()


def attached_wrongly(folder):
    """A logger that not all ranks have, or not the same; and what cannot be logged at all."""
    rank, shards.PATIENCE = dist.get_rank(), 1.0

    def one_step(name, on=(0, 1), **options):
        model, optimizer, called, part = way(name)

        def work():
            if rank not in on:
                train(called, optimizer, part, steps=1)
                return
            log = wd.ForceLogger(optimizer, model, config=CONFIG, **options)
            try:
                train(called, optimizer, part, steps=1)
            finally:
                log.close()

        return work

    everywhere = r"none on the ranks \[1\].*attach it on all ranks"
    refused(RuntimeError, everywhere, one_step("fsdp", on=[0]), here=rank == 0)
    different = r"rank . has every=[23] where this one has [23]"
    refused(RuntimeError, different, one_step("fsdp", every=2 + rank))

    schedule = r"rank . has every=.* where this one has"
    refused(RuntimeError, schedule, one_step("fsdp", every=lambda step: step % 2 == rank))

    work = one_step("ddp", on=[1], out=folder / "on_rank_1")
    refused(RuntimeError, r"rank 0 writes\. It may be attached on that rank alone", work, here=rank == 1)
    one_step("ddp", on=[0], out=folder / "on_rank_0")()
    dist.barrier()

    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        model = FullyShardedDataParallel(made(), device_id=torch.device("cpu"), use_orig_params=original)
        optimizer = torch.optim.AdamW(model.parameters())
        refused(TypeError, "FSDP1.*fully_shard", lambda o=optimizer, m=model: wd.ForceLogger(o, m))

    from torch.distributed.tensor import DTensor, Partial

    partial = nn.Parameter(DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (2,)), [Partial()]))
    refused(TypeError, "partial sum", lambda: wd.ForceLogger(torch.optim.AdamW([partial])))


def main(folder, names):
    warnings.filterwarnings("error", message="ForceLogger")
    dist.init_process_group("gloo")
    for name in names:
        if name == "attached_wrongly":
            attached_wrongly(folder)
        elif name in ("megatron", "zero3"):
            handed_over(folder, name)
        elif name.startswith("resumed"):
            resumed(folder, *map(int, name.split("-")[1:]))
        else:
            logged(folder, name)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
