"""Mutated files of every kind that the library reads: python tests/fuzz_files.py --count 1000 --seed 0

Each mutation is made in a fresh copy of a sound folder and read in a process of its own beside this one, under a
limit of time and memory and an audit of what is opened, written and run. Of a file that has changed the reader must
either return what the sound one gives, or raise an error that names a file of the folder. A different result is
right where the file is another sound one (`Mutation.sound`), and unavoidable where its format has no checksum.

To add a kind: a `Kind` in `KINDS`, with what makes a sound folder, which of its files are mutated, what reads it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fnmatch
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TIME_LIMIT = 20.0  # seconds for one file, on a busy machine; most take a hundredth of one
MEMORY_LIMIT = 200  # MB that reading one may take more than the largest sound one


class Kind(NamedTuple):
    """A kind of folder, how to make a sound one, and how to read it."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    targets: tuple[str, ...]
    checked: tuple[str, ...] = ()  # of the targets, those whose format carries checksums of all it holds


class Mutation(NamedTuple):
    """What was done to a file."""

    what: str
    sound: bool = False  # the file is a sound one, of other content


# --- kinds ------------------------------------------------------------------------------------------------

CONFIG = {"model_type": "gpt_neox", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
QKV = "gpt_neox.layers.0.attention.query_key_value.weight"


def tensors() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = {
        QKV: (48, 16),
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": (40, 16),
        "gpt_neox.layers.0.input_layernorm.weight": (16,),
    }
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))


def make_safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors(), folder / "model.safetensors")
    config(folder)


def make_olmo(folder: Path) -> None:
    """Unsharded, as safetensors whose names are pickles."""
    import base64

    import torch
    from safetensors.torch import save_file

    def named(way: tuple[str, ...], value: Any) -> tuple[str, Any]:
        pickled = not isinstance(value, torch.Tensor)
        name = base64.urlsafe_b64encode(pickle.dumps((way, pickled))).decode()
        return name, torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) if pickled else value

    weights = tensors()
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": [*weights]}
    state = [named(("param_groups",), [options])]
    for name, tensor in weights.items():
        state += [named(("state", name, key), (tensor * 0.1) ** 2) for key in ("exp_avg", "exp_avg_sq")]
        state.append(named(("state", name, "step"), torch.tensor(7.0)))
    save_file(dict(named((name,), tensor) for name, tensor in weights.items()), folder / "model.safetensors")
    save_file(dict(state), folder / "optim.safetensors")
    torch.save({"global_step": 7}, folder / "train.pt")
    (folder / "config.yaml").write_text("optimizer:\n  name: adamw\n")


def read_forces(folder: Path) -> Any:
    from weightdyn import forces_from_states

    return forces_from_states(folder, progress=False).to_csv()


def make_zip(folder: Path) -> None:
    import torch

    torch.save(tensors(), folder / "pytorch_model.bin")
    config(folder)


def make_legacy(folder: Path) -> None:
    import torch

    torch.save(tensors(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    config(folder)


def make_sharded(folder: Path) -> None:
    from safetensors.torch import save_file

    names = {}
    for i, (name, tensor) in enumerate(tensors().items()):
        file = f"model-{i}.safetensors"
        save_file({name: tensor}, folder / file)
        names[name] = file
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config(folder)


def make_dcp(folder: Path) -> None:
    import torch.distributed.checkpoint as torch_dcp

    moments = {name: {"exp_avg": tensor * 0.1} for name, tensor in tensors().items()}
    content = {"model": tensors(), "optimizer": {"state": moments}, "scheduler": {"_last_lr": [1e-3]}}
    torch_dcp.save(content, checkpoint_id=folder, no_dist=True)
    config(folder)


def read_dcp_folder(folder: Path) -> Any:
    from weightdyn.files.weightfiles import dcp_entries, read_dcp

    metadata = read_dcp(folder / ".metadata")
    found = dcp_entries(folder / ".metadata", metadata, [*metadata.tensors, *metadata.objects])
    values = {name: found[name] if name in metadata.objects else found[name].read() for name in found}
    return read_weights(folder), repr(sorted(values.items()))


def read_weights(folder: Path) -> Any:
    from weightdyn import Checkpoints, fit_weights

    table = Checkpoints({1: folder}).measure(weibull=False, cache=False, n_jobs=1)
    fits = fit_weights(folder, n_jobs=1)
    return table[["tensor", "numel", "norm_sq", "hash"]].to_csv(), fits[["tensor", "k", "lam"]].to_csv()


def make_trainer_state(folder: Path) -> None:
    history = [{"step": step, "learning_rate": 1e-3 / step, "loss": 2.0} for step in (10, 20, 30)]
    (folder / "trainer_state.json").write_text(json.dumps({"max_steps": 30, "log_history": history}))


def read_trainer_state(folder: Path) -> Any:
    from weightdyn import Recipe

    recipe = Recipe.from_trainer_state(folder / "trainer_state.json", weight_decay=0.1)
    return recipe.steps, recipe.lr_at(recipe.steps or 1)


def make_histogram(folder: Path) -> None:
    import torch

    from weightdyn.weibull.magnitudes import MagnitudeHistogram

    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    MagnitudeHistogram.from_tensor(x).save(folder / "histogram.npz")


def read_histogram(folder: Path) -> Any:
    from weightdyn import fit_weibull
    from weightdyn.weibull.magnitudes import MagnitudeHistogram

    return repr(fit_weibull(MagnitudeHistogram.load(folder / "histogram.npz")))


def trained(folder: Path, resume: str) -> Any:
    from weightdyn.train.trainer import TrainConfig, train

    options = TrainConfig(
        corpus=(str(Path(__file__).resolve()),), steps=4, batch_size=1, seq_len=16, warmup=2, save_every=4,
        weibull_every=2, eval_every=4, device="cpu",
    )  # fmt: skip
    return train(options, folder, resume=resume, progress=False)


def make_run(folder: Path) -> None:
    trained(folder, "auto")
    shutil.rmtree(folder / "checkpoints")
    (folder / "resume.pt").unlink()


def read_run(folder: Path) -> Any:
    from weightdyn import RunLog

    run = RunLog(folder)
    tables = run.forces(), run.weibull(), run.metrics()
    return [table.to_csv() for table in tables], sorted(run.info)


def make_resume(folder: Path) -> None:
    trained(folder, "auto")
    shutil.rmtree(folder / "checkpoints")


def read_resume(folder: Path) -> Any:
    return len(trained(folder, "must").forces())


def stepped() -> tuple[Any, Any, Any, Any]:
    """A model, its optimizer behind two updates, its schedule and its logger's snapshot of the last."""
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    matrices, rest = ([p for p in net.parameters() if (p.ndim > 1) == one] for one in (True, False))
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    return net, adamw, torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 9), lambda: net(torch.randn(4, 6))


def make_state(folder: Path) -> None:
    import torch

    net, adamw, schedule, output = stepped()
    for _ in range(2):
        adamw.zero_grad()
        output().square().sum().backward()
        adamw.step()
        schedule.step()
    states = {"model": net.state_dict(), "optimizer": adamw.state_dict(), "scheduler": schedule.state_dict()}
    torch.save(states, folder / "ckpt.pt")


def make_trainer(folder: Path) -> None:
    """As transformers' Trainer has it, without what needs transformers."""
    import torch

    make_state(folder)
    states = torch.load(folder / "ckpt.pt")
    (folder / "ckpt.pt").unlink()
    for key, name in (
        ("model", "pytorch_model.bin"),
        ("optimizer", "optimizer.pt"),
        ("scheduler", "scheduler.pt"),
    ):
        torch.save(states[key], folder / name)
    history = [{"step": 2, "learning_rate": 0.0096984631039295426}]
    content = {"global_step": 2, "max_steps": 9, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(content))


def make_snapshot(folder: Path) -> None:
    from weightdyn import ForceLogger

    net, adamw, _, output = stepped()
    with ForceLogger(adamw, net, out=folder / "run", snapshot_every=1):
        output().square().sum().backward()
        adamw.step()
    shutil.copy(folder / "run" / "snapshots" / "step-000001.safetensors", folder)
    shutil.rmtree(folder / "run")


def read_states(folder: Path) -> Any:
    from weightdyn import forces_from_states

    files = [path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors")]
    one = len(files) == 1 and not (folder / "trainer_state.json").exists()
    table = forces_from_states(files[0] if one else folder, progress=False)
    if table["alignment"].isna().any():  # which its note and a warning told
        raise ValueError(f"{folder}: {table['note'].max()}")
    return table.to_csv()


JSON = ("config.json",)
KINDS = {
    "safetensors": Kind(make_safetensors, read_weights, ("model.safetensors",)),
    "zip": Kind(make_zip, read_weights, ("pytorch_model.bin",), ("pytorch_model.bin",)),
    "legacy": Kind(make_legacy, read_weights, ("pytorch_model.bin",)),
    "sharded": Kind(make_sharded, read_weights, ("*.index.json", "*.safetensors")),
    "dcp": Kind(make_dcp, read_dcp_folder, (".metadata", "*.distcp"), ("*.distcp",)),
    "olmo": Kind(make_olmo, read_forces, ("*.safetensors", "train.pt"), ("train.pt",)),
    "config": Kind(make_safetensors, read_weights, JSON),
    "trainer_state": Kind(make_trainer_state, read_trainer_state, ("trainer_state.json",)),
    "histogram": Kind(make_histogram, read_histogram, ("histogram.npz",), ("histogram.npz",)),
    "run": Kind(make_run, read_run, ("run.json", "*.parquet"), ("*.parquet",)),
    "state": Kind(make_state, read_states, ("ckpt.pt",), ("ckpt.pt",)),
    "trainer": Kind(make_trainer, read_states, ("*.pt", "*.bin", "trainer_state.json"), ("*.pt", "*.bin")),
    "snapshot": Kind(make_snapshot, read_states, ("*.safetensors",)),
    "resume": Kind(make_resume, read_resume, ("resume.pt",)),
}


# --- mutations --------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it would make the folder that the audit looks for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 8])):
        at = rng.randrange(len(out))
        out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data))])]


def drop(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice([1, 8, 64]) :]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 8, 64])) + data[at:]


def double(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data + data[at:]


def blank(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice([4, 64, 512])
    part = data[at : at + length]
    return data[:at] + rng.choice([b"\0", b"\xff"]) * len(part) + data[at + length :]


def number(data: bytes, rng: random.Random) -> bytes:
    """A number of eight bytes that may be a length somewhere."""
    at = rng.choice([0, rng.randrange(len(data))])
    value = rng.choice([0, 1, 2**31 - 1, 2**32, 2**62, 2**63, 2**64 - 1])
    return data[:at] + struct.pack("<Q", value) + data[at + 8 :]


def noise(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 100, len(data)]))


def web_page(data: bytes, rng: random.Random) -> bytes:
    return b"<!DOCTYPE html>\n<html><body>Please log in</body></html>"


def lfs_pointer(data: bytes, rng: random.Random) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


BYTES = (
    flip_bits,
    flip_bits,
    flip_bits,
    cut,
    cut,
    drop,
    insert,
    double,
    blank,
    number,
    noise,
    web_page,
    lfs_pointer,
)


def strange(rng: random.Random) -> Any:
    deep: Any = []
    for _ in range(50):
        deep = [deep]
    return rng.choice(
        [None, True, -1, 0, 2**63, 10**40, 1e308, 0.5, "", "x", "../x", "/etc/passwd", "a\0b", [], {}, [None], deep,
         {"a": deep}, float("nan"), [-1, 2], [2**62, 2**62], "\ud800"]
    )  # fmt: skip


def change_json(value: Any, rng: random.Random) -> Any:
    """The same with something strange at one place."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        if rng.random() < 0.1:
            return {**value, str(strange(rng)): value[key]}
        return {**value, key: change_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], change_json(value[at], rng), *value[at + 1 :]]
    return strange(rng)


def deep_json(rng: random.Random) -> str:
    return rng.choice(
        ["[" * 100_000, '{"a":' * 100_000, '{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}"]
    )


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return deep_json(rng).encode()
    return json.dumps(change_json(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1:
        header = deep_json(rng).encode()
    else:
        header = json.dumps(change_json(json.loads(data[8 : 8 + length]), rng)).encode(
            "utf-8", "surrogatepass"
        )
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def rezipped(data: bytes, change: Callable[[str, bytes], bytes], compress: bool = False) -> bytes:
    """A zip with some of its records changed, and checksums that hold."""
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def mutate_torch(data: bytes, rng: random.Random, folder: Path) -> tuple[bytes, bool]:
    import torch

    legacy = not zipfile.is_zipfile(io.BytesIO(data))
    choice = rng.choice(["evil", "evil pickle", "giant", "other", "record", "record", "compressed", "nested"])
    stream = io.BytesIO()
    owned = folder.parent / "owned"
    if choice == "evil pickle":
        return pickle.dumps({"w": Evil(owned)}), False
    if choice == "record" and not legacy:
        name = rng.choice(["data.pkl", "data.pkl", "byteorder", "data/0"])
        return rezipped(
            data, lambda own, old: rng.choice(BYTES)(old, rng) if own.endswith(name) and old else old
        ), True
    if choice == "compressed" and not legacy:
        return rezipped(data, lambda own, old: old, compress=True), False
    if choice == "giant":
        value: Any = {"w.weight": torch.ones(1).expand(1_000_000, 1_000_000)}
    elif choice == "nested":
        value = []
        for _ in range(400):
            value = [value]
        value = {"w": value}
    elif choice == "evil":
        value = {"w": Evil(owned), "x": torch.ones(2, 2)}
    else:
        value = rng.choice([[1, 2], {}, 3, {"model": None}, {"w": torch.ones(3, 2)}, {"model": {"w": 1}}])
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue(), choice == "other"


def mutate_metadata(data: bytes, rng: random.Random, folder: Path) -> bytes:
    """Another field of the metadata of a folder of torch.distributed.checkpoint; or a call instead of one."""
    metadata = pickle.loads(data)
    places = list(metadata.storage_data.values())
    chunks = [
        chunk for entry in metadata.state_dict_metadata.values() for chunk in getattr(entry, "chunks", [])
    ]
    what: Any = rng.choice([metadata, rng.choice(places), rng.choice(places), rng.choice(chunks)])
    value = Evil(folder.parent / "owned") if rng.random() < 0.2 else strange(rng)
    setattr(what, rng.choice(list(vars(what))), value)
    return pickle.dumps(metadata)


def mutate_npz(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    import numpy as np

    choice = rng.choice(["bomb", "record", "arrays", "object"])
    if choice == "record":
        return rezipped(
            data, lambda own, old: rng.choice(BYTES)(old, rng) if rng.random() < 0.3 else old
        ), False
    with np.load(io.BytesIO(data)) as file:
        arrays = dict(file)
    key = rng.choice(list(arrays))
    if choice == "bomb":
        arrays[key] = np.zeros(1 << 27)  # a gigabyte, and a megabyte in the file
    elif choice == "object":
        arrays[key] = np.array([{"a": 1}, None], dtype=object)
    else:
        old = arrays[key]
        arrays[key] = rng.choice(
            [old[:1] if old.ndim else old, np.zeros(0), -np.ones(5), np.array("x"), np.full((2, 2), np.nan),
             np.arange(10**5), old.astype("U8"), old[::-1] if old.ndim else old]
        )  # fmt: skip
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue(), False


def mutate_parquet(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    choice = rng.choice(["foreign", "no metadata", "dropped", "retyped", "empty"])
    if choice == "foreign":
        table = pa.table({"a": [1, 2]})
    elif choice == "no metadata":
        table = table.replace_schema_metadata(None)
    elif choice == "dropped":
        table = table.drop_columns([rng.choice(table.column_names)])
    elif choice == "empty":
        table = table.slice(0, 0)
    else:
        at = rng.randrange(table.num_columns)
        table = table.set_column(at, table.column_names[at], pa.array(["x"] * table.num_rows))
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue(), True


def replace_file(path: Path, rng: random.Random) -> Mutation:
    """Something that is no regular file in its place."""
    data = path.read_bytes()
    path.unlink()
    kinds = ["pipe", "folder", "loop", "dangling", "gone", "device", "link"]
    kind = rng.choice(kinds)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":  # as the hub's cache has them
        path.with_name("blob").write_bytes(data)
        path.symlink_to("blob")
    return Mutation(kind, sound=kind in ("gone", "dangling"))


def mutate(folder: Path, kind: Kind, rng: random.Random) -> tuple[Path, Mutation]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(fnmatch.fnmatch(path.name, target) for target in kind.targets)
    ]
    path = rng.choice(files)
    if rng.random() < 0.06:
        return path, replace_file(path, rng)
    data, sound, what = path.read_bytes(), False, ""
    if rng.random() < 0.5:
        what = "structure"
        if path.suffix == ".json":
            new, sound = mutate_text(data, rng), True
        elif path.suffix == ".safetensors":
            new, sound = mutate_safetensors(data, rng), True
        elif path.suffix in (".bin", ".pt"):
            new, sound = mutate_torch(data, rng, folder)
        elif path.suffix == ".npz":
            new, sound = mutate_npz(data, rng)
        elif path.name == ".metadata":
            new, sound = mutate_metadata(data, rng, folder), True
        elif path.suffix == ".distcp":
            new = rng.choice(BYTES)(data, rng)
        else:
            new, sound = mutate_parquet(data, rng)
    else:
        change = rng.choice(BYTES)
        what, new = change.__name__, change(data, rng)
    path.write_bytes(new)
    return path, Mutation(what, sound)


# --- the process that reads -------------------------------------------------------------------------------

_audit: dict[str, Any] = {"active": False, "folder": "", "seen": []}
_RUNS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _audit["active"]:
        return
    if event in _RUNS:
        _audit["seen"].append(f"ran {event}")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "shutil.rmtree", "open"):
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | Path):
            return
        flags = arguments[2] if event == "open" and len(arguments) > 2 else 0
        mode = arguments[1] if event == "open" else "w"
        writes = event != "open" or any(letter in str(mode or "") for letter in "wax+")
        writes |= isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        full = os.path.abspath(path)
        if full.startswith(_audit["folder"]):
            return
        ours = full.startswith((sys.prefix, sys.base_prefix, "/proc/", "/sys/", "/usr/", "/lib", "/etc/ld"))
        ours |= any(place and full.startswith(os.path.abspath(place)) for place in sys.path)
        ours |= full in (os.path.abspath(__file__), os.path.devnull)
        if writes and full != os.path.devnull:
            _audit["seen"].append(f"{event} wrote {full}")
        elif not ours:
            _audit["seen"].append(f"opened {full}")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _inside(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _worker(pipe: Any, scratch: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.addaudithook(_hook)
    warnings.simplefilter("ignore")
    sound: dict[str, tuple[Path, Any]] = {}
    base = Path(scratch)
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        name, seed = job
        kind, rng = KINDS[name], random.Random(f"{name} {seed}")
        if name not in sound:
            folder = base / f"sound-{name}"
            folder.mkdir(exist_ok=True)
            kind.make(folder)
            sound[name] = folder, kind.read(folder)
        folder, truth = sound[name]
        own = base / f"{name}-{seed}" / "folder"
        shutil.copytree(folder, own)
        path, mutation = mutate(own, kind, rng)
        what = f"{path.relative_to(own)}: {mutation.what}"
        pipe.send(("started", what))
        before, peak = _inside(own), _peak()
        _audit.update(active=True, folder=str(own), seen=[])
        error, found = None, None
        try:
            with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                found = kind.read(own)
        except BaseException as raised:
            error = raised
        finally:
            _audit["active"] = False
        verdict, why = _judge(kind, own, path, mutation, truth, found, error)
        if seen := _audit["seen"]:
            verdict, why = "left its folder or ran code", "; ".join(seen[:3])
        if (own.parent / "owned").exists():
            verdict, why = "left its folder or ran code", "the pickle ran"
        if left := _inside(own) - before:
            verdict, why = "left something", ", ".join(sorted(left)[:3])
        if _peak() - peak > MEMORY_LIMIT:
            verdict, why = "memory", f"{_peak() - peak:.0f} MB"
        shutil.rmtree(own.parent, ignore_errors=True)
        pipe.send(("done", verdict, what, why))


def _judge(
    kind: Kind,
    folder: Path,
    path: Path,
    mutation: Mutation,
    truth: Any,
    found: Any,
    error: BaseException | None,
) -> tuple[str, str]:
    if error is None:
        if repr(found) == repr(truth):
            return "same", ""
        if mutation.sound:
            return "another", ""
        if any(fnmatch.fnmatch(path.name, target) for target in kind.checked):
            return "silently wrong", repr(found)[:200]
        return "unseen", ""  # no checksum tells
    text = str(error)
    what = f"{type(error).__name__}: {text[:300]}"
    if not isinstance(error, ValueError | FileNotFoundError):
        return "crash", what
    if not any(name in text for name in {path.name, str(folder)}):
        return "unnamed", what
    return "refused", ""


GOOD = ("same", "another", "unseen", "refused")


# --- the process that watches -----------------------------------------------------------------------------


class Result(NamedTuple):
    """What became of one mutation."""

    kind: str
    seed: int
    verdict: str
    what: str
    why: str


class _Reader:
    """A process that reads mutated files, killed and started anew where it hangs or dies."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.job: tuple[str, int] | None = None
        self.what = ""
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        place = tempfile.mkdtemp(dir=self.scratch)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_worker, args=(theirs, place), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.poll(120)
        self.pipe.recv()

    def give(self, job: tuple[str, int]) -> None:
        self.job, self.what, self.since = job, "", time.monotonic() + 60  # to make the sound folder first
        self.pipe.send(job)

    def result(self) -> Result | None:
        """What became of the job, if it is over."""
        assert self.job is not None
        verdict = why = ""
        try:
            while not verdict and self.pipe.poll(0):
                kind, *rest = self.pipe.recv()
                if kind == "started":
                    self.what, self.since = rest[0], time.monotonic()
                else:
                    verdict, self.what, why = rest
        except EOFError:
            self.process.join(5)
            verdict, why = "died", f"exit code {self.process.exitcode}"
        if not verdict and time.monotonic() - self.since > TIME_LIMIT:
            verdict, why = "hang", f"over {TIME_LIMIT:.0f} s"
        if not verdict:
            return None
        job, self.job = self.job, None
        if verdict in ("died", "hang", "memory"):
            self.stop(at_once=True)
            self.start()
        return Result(*job, verdict, self.what, why)

    def stop(self, *, at_once: bool = False) -> None:
        if not at_once:
            with contextlib.suppress(OSError):
                self.pipe.send(None)
            self.process.join(10)
        self.process.kill()
        self.process.join()


def fuzz(kinds: list[str], count: int, seed: int = 0, workers: int = 2) -> list[Result]:
    """Read `count` mutated folders, the kinds in turn."""
    jobs = collections.deque((kinds[i % len(kinds)], seed + i) for i in range(count))
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        readers = [_Reader(Path(scratch)) for _ in range(min(workers, count))]
        try:
            while jobs or any(reader.job for reader in readers):
                for reader in readers:
                    if reader.job is not None and (result := reader.result()):
                        results.append(result)
                    if reader.job is None and jobs:
                        reader.give(jobs.popleft())
                time.sleep(0.002)
        finally:
            for reader in readers:
                reader.stop()
    return results


def bad(results: list[Result]) -> list[str]:
    """A line for each result that must not be."""
    return [
        f"{r.verdict}: {r.kind} (--only {r.kind} --seed {r.seed} --count 1), {r.what}: {r.why}"
        for r in results
        if r.verdict not in GOOD
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="mutated folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", choices=list(KINDS), help="a kind, more than once if you like"
    )
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    start = time.monotonic()
    results = fuzz(options.only or list(KINDS), options.count, options.seed, options.workers)
    for kind in options.only or KINDS:
        verdicts = collections.Counter(r.verdict for r in results if r.kind == kind)
        print(f"{kind:14}", ", ".join(f"{number} {verdict}" for verdict, number in verdicts.most_common()))
    wrong = bad(results)
    print(*wrong, sep="\n")
    digest = hashlib.sha256(repr(sorted(results)).encode()).hexdigest()[:8]
    print(f"{len(results)} mutated folders, {len(wrong)} wrong, {time.monotonic() - start:.0f} s ({digest})")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
