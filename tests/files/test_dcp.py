"""Folders of torch.distributed.checkpoint, written by torch and by strangers."""

import io
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import get_state_dict

import weightdyn as wd
from weightdyn.files.dcp import Slice
from weightdyn.files.weightfiles import CheckpointError, checkpoint_files, dcp_entries, list_tensors, read_dcp

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def written(folder, pieces, objects=(), change=lambda metadata: None):
    """A folder as processes write it: `pieces` of a name are (process, offset, tensor); `change` the metadata."""
    folder.mkdir(exist_ok=True)
    files, listed, places = {}, {}, {}

    def add(process, index, value):
        name = f"__{process}_0.distcp"
        stream = files.setdefault(name, io.BytesIO())
        begin = stream.tell()
        alone = io.BytesIO()
        torch.save(value, alone)
        stream.write(alone.getvalue())
        places[index] = _StorageInfo(name, begin, len(alone.getvalue()))

    for name, parts in pieces.items():
        ends = [[o + n for o, n in zip(offset, part.shape, strict=True)] for _, offset, part in parts]
        shape = torch.Size(map(max, zip(*ends, strict=True)))
        chunks = [ChunkStorageMetadata(torch.Size(offset), part.shape) for _, offset, part in parts]
        listed[name] = TensorStorageMetadata(TensorProperties(dtype=parts[0][2].dtype), shape, chunks)
        for i, (process, offset, part) in enumerate(parts):
            add(process, MetadataIndex(name, offset, i), part.clone())
    for name, value in dict(objects).items():
        listed[name] = BytesStorageMetadata()
        add(0, MetadataIndex(name), value)
    for name, stream in files.items():
        (folder / name).write_bytes(stream.getvalue())
    ways = {name: tuple(name.split(".", 1)) for name in listed}
    metadata = Metadata(listed, ways, places)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def halves(tensor, axis=0):
    first, second = tensor.chunk(2, axis)
    offset = [0] * tensor.ndim
    offset[axis] = first.shape[axis]
    return [(0, [0] * tensor.ndim, first), (1, offset, second)]


def entries(folder):
    metadata = read_dcp(folder / ".metadata")
    return dcp_entries(folder / ".metadata", metadata, [*metadata.tensors, *metadata.objects])


W = torch.arange(40.0).reshape(8, 5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_in_pieces_reads_as_torch_reads_it(tmp_path, axis, dtype):
    whole = W.to(dtype)
    folder = written(tmp_path / "x", {"model.w": halves(whole, axis), "model.b": [(1, [0], whole[0])]})
    torchs = {"model": {"w": torch.empty_like(whole), "b": torch.empty_like(whole[0])}}
    torch_dcp.load(torchs, checkpoint_id=folder, no_dist=True)
    found = list_tensors(checkpoint_files(folder))
    assert list(found) == ["b", "w"]
    assert torch.equal(found["w"].read(), torchs["model"]["w"])
    assert torch.equal(found["b"].read(), torchs["model"]["b"])
    for start in range(8):
        for stop in range(start + 1, 9):
            assert torch.equal(found["w"].read(start, stop), whole[start:stop])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What torch writes of a model, its optimizer, a scheduler and numbers."""
    folder = tmp_path_factory.mktemp("dcp") / "saved"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    scheduler.step()
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict(), "step": 1}
    with pytest.warns(UserWarning, match="single process"):
        torch_dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder, content


def test_all_that_torch_saves_is_read_as_torch_itself_does(saved, tmp_path):
    folder, _ = saved
    dcp_to_torch_save(folder, tmp_path / "full.pt")
    torchs = torch.load(tmp_path / "full.pt", weights_only=False)
    metadata = read_dcp(folder / ".metadata")
    found = entries(folder)
    assert found.keys() == metadata.ways.keys()
    for name, value in found.items():
        expected = torchs
        for key in metadata.ways[name]:
            expected = expected[key]
        if name in metadata.tensors:
            shaped = value if value.shape else value._replace(shape=(1,), strides=(1,))
            assert torch.equal(shaped.read().reshape(expected.shape), expected), name
        elif name != "optimizer.param_groups.0.betas":
            assert value == expected, name
    assert found["scheduler._last_lr"] == [1e-3 * 0.9]


def test_the_weights_of_a_folder_are_what_lies_under_model(saved):
    folder, content = saved
    found = list_tensors(checkpoint_files(folder))
    assert set(found) == set(content["model"])
    fits = wd.fit_weights(folder, n_jobs=1, progress=False)
    assert set(fits["tensor"]) == {"0.weight", "1.weight"}


@pytest.mark.parametrize("inside", ["", "model_and_optim", "pytorch_model_fsdp_0"])
def test_a_series_of_folders_is_measured_as_safetensors_are(tmp_path, inside):
    folder = tmp_path / "step7" / inside
    folder.parent.mkdir(exist_ok=True)
    written(folder, {"model.w": halves(W), "optimizer.state.w.exp_avg": halves(W)})
    table = wd.Checkpoints(tmp_path).measure(weibull=False, cache=False, n_jobs=1, progress=False)
    assert table["tensor"].tolist() == ["w"]
    assert table["norm_sq"].tolist() == [float((W.double() ** 2).sum())]


def test_weights_without_a_key_of_their_own_are_those_beside_the_optimizer(tmp_path):
    """As torchtitan saves them."""

    def without_key(metadata):
        metadata.planner_data["layers.0.w"] = ("layers.0.w",)

    pieces = {
        "layers.0.w": halves(W),
        "optimizer.state.layers.0.w.exp_avg": halves(W),
        "train_state.x": halves(W),
    }
    found = list_tensors(checkpoint_files(written(tmp_path / "x", pieces, change=without_key)))
    assert list(found) == ["layers.0.w"]


def test_a_piece_without_weights_is_no_piece(tmp_path):
    """What fully_shard leaves to the last of three processes that share four rows."""
    folder = written(tmp_path / "x", {"model.w": [*halves(W), (2, [8, 0], W[8:])]})
    assert torch.equal(list_tensors(checkpoint_files(folder))["w"].read(), W)


def test_a_tensor_without_a_dimension_and_one_without_a_weight(tmp_path):
    folder = written(
        tmp_path / "x", {"optim.step": [(0, [], torch.tensor(3.0))], "model.e": [(0, [0], W[0, :0])]}
    )
    found = entries(folder)
    assert list(found) == ["optim.step"]
    assert found["optim.step"].shape == ()


def test_a_slice_of_a_file_reads_as_a_file_of_its_bytes():
    data = bytes(range(100))
    part = Slice(io.BytesIO(data), 20, 30)
    assert part.read() + part.read(1) == data[20:50]
    assert (part.seek(-4, os.SEEK_END), part.read(10)) == (26, data[46:50])
    assert (part.seek(3), part.read(2), part.seek(1, os.SEEK_CUR)) == (3, data[23:25], 6)
    with pytest.raises(ValueError, match="byte -1"):
        part.seek(-1)


def test_torch_s_safetensors_are_read_where_they_are_whole(tmp_path):
    for name, options in (("whole", {}), ("both", {"save_distributed": True, "enable_consolidation": True})):
        writer = torch_dcp.HuggingFaceStorageWriter(str(tmp_path / name), **options)
        torch_dcp.save({"layers.0.w": W}, storage_writer=writer, no_dist=True)
        assert torch.equal(list_tensors(checkpoint_files(tmp_path / name))["layers.0.w"].read(), W)
    writer = torch_dcp.HuggingFaceStorageWriter(str(tmp_path / "parts"), save_distributed=True)
    torch_dcp.save({"layers.0.w": W}, storage_writer=writer, no_dist=True)
    with pytest.raises(CheckpointError, match="enable_consolidation"):
        list_tensors(checkpoint_files(tmp_path / "parts"))


# --- strangers --------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def info(metadata, name="model.w", first=0):
    return next(
        value for key, value in metadata.storage_data.items() if key == MetadataIndex(name, [first, 0])
    )


def renamed(to):
    return lambda metadata: setattr(info(metadata), "relative_path", to)


def moved(**fields):
    return lambda metadata: [setattr(info(metadata), key, value) for key, value in fields.items()]


def chunks(metadata):
    return metadata.state_dict_metadata["model.w"].chunks


FAULTS = {
    "parent": (renamed("../evil.distcp"), "points outside its folder"),
    "absolute": (renamed("/etc/passwd"), "points outside its folder"),
    "subfolder": (renamed("sub/__0_0.distcp"), "points outside its folder"),
    "backslash": (renamed("..\\x"), "points outside its folder"),
    "null": (renamed("a\0b"), "points outside its folder"),
    "dot": (renamed("."), "points outside its folder"),
    "number": (renamed(3), "int where a str"),
    "missing file": (renamed("__9_0.distcp"), "lacks __9_0.distcp"),
    "beyond": (moved(offset=1 << 40), "ends within model.w"),
    "long": (moved(length=1 << 40), "ends within model.w|within something else"),
    "negative": (moved(offset=-1), "where sizes belong"),
    "absurd": (moved(offset=1 << 63), "where sizes belong"),
    "shifted": (moved(offset=1), "within something else"),
    "of something else": (moved(offset=0, relative_path="__1_0.distcp"), "within something else"),
    "cut": (moved(length=700), "zip's directory is not at its end"),
    "zstd": (moved(transform_descriptors=["zstd"]), "save without extensions"),
    "lacking": (lambda m: chunks(m).pop(), "says nothing else"),
    "gone": (lambda m: chunks(m).clear(), "says nothing else"),
    "overlapping": (lambda m: setattr(chunks(m)[1], "offsets", torch.Size([3, 0])), "does not say where"),
    "twice the shape": (
        lambda m: setattr(m.state_dict_metadata["model.w"], "size", torch.Size([16, 5])),
        "each of the weights once",
    ),
    "less than its pieces": (
        lambda m: setattr(m.state_dict_metadata["model.w"], "size", torch.Size([7, 5])),
        "has a piece of the shape",
    ),
    "huge": (
        lambda m: setattr(m.state_dict_metadata["model.w"], "size", torch.Size([1 << 40, 1 << 20])),
        "each of the weights once",
    ),
    "a dimension more": (lambda m: setattr(chunks(m)[0], "sizes", torch.Size([4, 5, 1])), "dimensions"),
    "other shape": (lambda m: setattr(chunks(m)[0], "sizes", torch.Size([4, 4])), "where .metadata has"),
    "other type": (
        lambda m: setattr(m.state_dict_metadata["model.w"].properties, "dtype", torch.bfloat16),
        "where .metadata has bfloat16",
    ),
    "no place": (lambda m: m.storage_data.pop(MetadataIndex("model.w", [0, 0])), "does not say where"),
    "no places": (lambda m: setattr(m, "storage_data", None), "NoneType where a dict"),
    "another class": (lambda m: m.state_dict_metadata.update({"model.w": m}), "Metadata where a TensorStorage"),
    "a way of dicts": (lambda m: m.planner_data.update({"model.w": ({},)}), "the keys that lead to model.w"),
    "two models": (lambda m: m.planner_data.update({"model.b": ("module", "b")}), "under model and module"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_of_strangers_is_refused_and_leads_nowhere(tmp_path, fault):
    change, said = FAULTS[fault]
    (tmp_path / "evil.distcp").write_bytes(b"PK")
    folder = written(tmp_path / "x", {"model.w": halves(W), "model.b": [(0, [0, 0], W)]}, change=change)
    with pytest.raises(CheckpointError, match=said) as error:
        list_tensors(checkpoint_files(folder))
    assert str(folder) in str(error.value)


def test_two_pieces_may_not_share_their_bytes(tmp_path):
    def shared(metadata):
        one, other = (info(metadata, "model.w", first) for first in (0, 4))
        other.relative_path, other.offset, other.length = one.relative_path, one.offset, one.length

    folder = written(tmp_path / "x", {"model.w": halves(W)}, change=shared)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp at 0, within something else"):
        list_tensors(checkpoint_files(folder))


@pytest.mark.parametrize("where", ["metadata", "planner", "object", "piece"])
def test_nothing_of_a_pickle_is_called(tmp_path, where):
    evil, owned = Evil(tmp_path / "owned"), tmp_path / "owned"

    def change(metadata):
        if where == "metadata":
            metadata.storage_meta = evil
        if where == "planner":
            metadata.planner_data = evil

    objects = {"scheduler.x": evil if where == "object" else 1}
    folder = written(tmp_path / "x", {"model.w": halves(W)}, objects, change)
    if where == "piece":
        for piece in (0, 1):
            stream = io.BytesIO()
            torch.save(evil, stream)
            metadata = pickle.loads((folder / ".metadata").read_bytes())
            for key, value in metadata.storage_data.items():
                if key.fqn == "model.w" and value.relative_path == f"__{piece}_0.distcp":
                    value.offset, value.length = 0, len(stream.getvalue())
            metadata.state_dict_metadata.pop("scheduler.x", None)
            metadata.storage_data.pop(MetadataIndex("scheduler.x"), None)
            (folder / ".metadata").write_bytes(pickle.dumps(metadata))
            (folder / f"__{piece}_0.distcp").write_bytes(stream.getvalue())
        with pytest.raises(CheckpointError, match="mkdir, which is not read"):
            list_tensors(checkpoint_files(folder))
    else:
        found = entries(folder)
        assert where != "object" or found["scheduler.x"].kind.name == "mkdir"
    assert not owned.exists()


def test_a_bit_that_changed_is_seen(tmp_path):
    folder = written(tmp_path / "x", {"model.w": halves(W)})
    file = folder / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[data.index(W[6].numpy().tobytes())] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp.*checksum"):
        list_tensors(checkpoint_files(folder))


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    folder = written(tmp_path / "x", {"model.w": halves(W)})
    (folder / "__1_0.distcp").unlink()
    os.mkfifo(folder / "__1_0.distcp")
    with pytest.raises(CheckpointError, match="is a pipe"):
        list_tensors(checkpoint_files(folder))


def test_a_folder_that_a_training_was_writing_says_what_lacks(tmp_path):
    folder = written(tmp_path / "x", {"model.w": halves(W)})
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        checkpoint_files(folder)
