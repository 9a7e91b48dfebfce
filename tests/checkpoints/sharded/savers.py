"""One small training on two processes, and the same state saved in every layout that shards.

    torchrun --nproc-per-node 2 savers.py FOLDER fsdp2 fsdp1

The layouts of OLMo, OLMo-core and torchtitan are written with the calls that those make, Accelerate's by itself.
`train` in one process gives what is true.
"""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

import weightdyn as wd

STEPS, WARMUP, TOTAL, PEAK, DECAY = 5, 3, 12, 1e-2, 0.1
WIDTH, VOCAB, BATCH = 6, 11, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, 3 * WIDTH + 1)
        self.down_proj = nn.Linear(3 * WIDTH + 1, WIDTH)

    def forward(self, x):
        return x + self.down_proj(torch.relu(self.up_proj(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def made(dtype=torch.float32):
    torch.manual_seed(0)
    model = Model().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # a bias that begins at 0 would have a norm of rounding
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def groups_of(model):
    """Decayed and not, each by name: an order that is neither the model's nor the alphabet's within both."""
    named = dict(model.named_parameters())
    decayed = sorted(name for name in named if name.endswith("weight") and "norm" not in name)
    others = sorted(set(named) - set(decayed))
    return [
        {"params": [named[name] for name in decayed], "param_names": decayed},
        {"params": [named[name] for name in others], "param_names": others, "weight_decay": 0.0},
    ]


def optimizer_of(model, **options):
    return torch.optim.AdamW(groups_of(model), lr=PEAK, weight_decay=DECAY, **options)


def scheduler_of(optimizer):
    """A rate that differs from one update to the next."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL)


def rate(step):
    """A rate of every update for those who set it before the update, as OLMo does."""
    return PEAK * min(step / WARMUP, 1.0 - 0.07 * step)


def train(model, optimizer, part=(0, 1), scheduler=None):
    i, n = part
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (BATCH, 7), generator=generator)[i * BATCH // n : (i + 1) * BATCH // n]
        logits = model(tokens[:, :-1])
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        if scheduler is None:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def progress(step=STEPS):
    """Of a trainer's state what OLMo and OLMo-core both have."""
    return {
        "epoch": 0,
        "global_step": step,
        "world_size": 2,
        "checkpoints": [Path("x/step2")],
        "rng": {"python": (3,)},
    }


# --- FSDP2 ------------------------------------------------------------------------------------------------


def fsdp2(folder, scheduled):
    """A training that is logged while it runs, saved in the layouts of DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    model = made()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    scheduler = scheduler_of(optimizer) if scheduled else None
    with wd.ForceLogger(optimizer, model, out=folder / "log"):
        train(model, optimizer, (rank, size), scheduler)
    weights, moments = get_state_dict(model, optimizer)
    flat = StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=True)
    _, flat_moments = get_state_dict(model, optimizer, options=flat)
    if scheduler is None:
        save_olmo_core(folder / f"step{STEPS}", model, flat_moments, rank)
        return
    kept = scheduler.state_dict()
    content = {"model": weights, "optimizer": moments, "scheduler": kept, "step": STEPS}
    torch_dcp.save(content, checkpoint_id=folder / "plain")
    torch_dcp.save({"app": {"model": weights, "optim": moments}, "sched": kept}, checkpoint_id=folder / "app")
    torch_dcp.save(
        {"model": weights, "optimizer": flat_moments, "scheduler": kept}, checkpoint_id=folder / "flat"
    )
    titan = {
        **get_model_state_dict(model),
        "optimizer": flat_moments,
        "lr_scheduler": {"last_epoch": scheduler.last_epoch},
        "train_state": {"step": torch.tensor(STEPS, dtype=torch.int32), "ntokens_seen": torch.tensor(5)},
    }
    torch_dcp.save(titan, checkpoint_id=folder / "titan" / f"step-{STEPS}")
    save_accelerate(folder / "accelerate", model, optimizer, kept, rank, size)


def save_olmo_core(folder, model, moments, rank):
    """The trainer's Checkpointer of OLMo-core."""
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    content = {"model": get_model_state_dict(model), "optim": moments}
    torch_dcp.save(content, checkpoint_id=folder / "model_and_optim", planner=planner)
    (folder / "train").mkdir(exist_ok=True)
    torch.save(progress(), folder / "train" / f"rank{rank}.pt")
    (folder / ".metadata.json").write_text(json.dumps({"version": "v2", "ephemeral": False}))
    optim = {"_CLASS_": "olmo_core.optim.adamw.AdamWConfig", "lr": PEAK}
    (folder / "config.json").write_text(json.dumps({"train_module": {"optim": optim}}))


def save_accelerate(folder, model, optimizer, schedule, rank, size):
    """What Accelerate saves of SHARDED_STATE_DICT, by its own functions."""
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

    PartialState(cpu=True)  # which its functions log through
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator = SimpleNamespace(process_index=rank, num_processes=size, is_fsdp2=True)
    save_fsdp_model(plugin, accelerator, model, str(folder))
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
    if rank == 0:
        torch.save(schedule, folder / "scheduler.bin")


# --- FSDP1 ------------------------------------------------------------------------------------------------


def fsdp1(folder):
    """The same in float64, where the order in which ranks add up does not show, as OLMo shards and saves it."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import StateDictType
    from torch.distributed.fsdp.api import (
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
    )
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    rank, size = dist.get_rank(), dist.get_world_size()
    model = FSDP(
        made(torch.float64),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    optimizer = optimizer_of(model)
    train(model, optimizer, (rank, size))
    with FSDP.state_dict_type(
        model,
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(offload_to_cpu=True),
        ShardedOptimStateDictConfig(offload_to_cpu=True),
    ):
        content = {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)}
    new, legacy = (folder / kind / f"step{STEPS}" for kind in ("new", "legacy"))
    for each in (new / "train", legacy):
        each.mkdir(parents=True, exist_ok=True)
    torch_dcp.save(content, storage_writer=FileSystemWriter(new / "model_and_optim"))
    torch.save(progress(), new / "train" / f"rank{rank}.pt")
    torch.save({**content, **progress()}, legacy / f"rank{rank}.pt")
    if rank == 0:
        for each in (new, legacy):
            (each / "config.yaml").write_text(YAML)


YAML = """run_name: tiny
model:
  d_model: 6
optimizer:
  name: adamw
  learning_rate: 0.01
  weight_decay: 0.1
scheduler:
  name: cosine_with_warmup
"""


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*FSDP.*|.*ShardedTensor.*|.*state_dict_type.*")
    dist.init_process_group("gloo")
    target = Path(sys.argv[1])
    for name in sys.argv[2:]:
        (target / name).mkdir(exist_ok=True)
        if name == "fsdp1":
            fsdp1(target / name)
        else:
            fsdp2(target / name, scheduled=name == "fsdp2")
        dist.barrier()
    dist.destroy_process_group()
