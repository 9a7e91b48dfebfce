"""The reader of weight files against torch.load and the tensors that were saved, and against files that lie."""

import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from weightdyn.checkpoints.series import Checkpoints
from weightdyn.files import weightfiles
from weightdyn.files.weightfiles import CheckpointError, config_beside, list_tensors, read_matrices
from weightdyn.weibull.diagnosis import diagnose
from weightdyn.weibull.weights import fit_weights

UP = "layers.0.mlp.up_proj.weight"


def legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def measure(folder):
    return Checkpoints({1: folder}).measure(weibull=False, cache=False)


READERS = {"fit": fit_weights, "diagnose": diagnose, "measure": measure}
WRITERS = {
    "model.safetensors": safetensors.torch.save_file,
    "pytorch_model.bin": torch.save,
    "legacy.pt": legacy,
}


@pytest.fixture(params=READERS)
def read(request):
    return READERS[request.param]


def weights(*shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{i}.mlp.up_proj.weight": torch.randn(shape, generator=generator)
        for i, shape in enumerate(shapes or [(40, 16), (8, 8), (5, 3, 2)])
    }


# What is read.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRITERS)
def test_every_range_of_rows_is_that_of_the_tensor_that_was_saved(tmp_path, name, dtype):
    saved = {key: tensor.to(dtype) for key, tensor in weights().items()}
    WRITERS[name](saved, tmp_path / name)
    listed = list_tensors([tmp_path / name])
    assert list(listed) == list(saved)
    for key, tensor in saved.items():
        stored = listed[key]
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), str(dtype).removeprefix("torch."))
        assert torch.equal(stored.read(), tensor)
        for start, stop in [(0, 1), (2, 5), (len(tensor) - 1, len(tensor)), (3, 3)]:
            assert torch.equal(stored.read(start, stop), tensor[start:stop])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "legacy.pt"])
def test_views_and_transposed_tensors_are_read_as_torch_load_reads_them(tmp_path, name):
    fused = torch.randn(12, 8)
    state = {
        "q.weight": fused[:4],
        "k.weight": fused[4:8],
        "v.weight": fused[8:, 2:6],
        "t.weight": torch.randn(6, 10).t(),
        "tied.weight": fused[:4],
        "parameter.weight": torch.nn.Parameter(torch.randn(3, 3)),
    }
    WRITERS[name](state, tmp_path / name)
    truth = torch.load(tmp_path / name, weights_only=True)
    listed = list_tensors([tmp_path / name])
    assert set(listed) == set(state) - {"tied.weight"}
    for key, stored in listed.items():
        assert torch.equal(stored.read(), truth[key])
        assert torch.equal(stored.read(1, 3), truth[key][1:3])


def test_models_of_any_layout_come_in_their_own_order_and_layers_by_number(tmp_path):
    names = [
        "layers.10.o_proj.weight",
        "layers.9.o_proj.weight",
        f"layers.{10**30}.o_proj.weight",
        "a.weight",
    ]
    state = {name: torch.randn(2, 2) for name in names}
    torch.save(state, tmp_path / "model.pt")
    assert [matrix.name for matrix in read_matrices(tmp_path / "model.pt")[0]] == names
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    by_number = ["a.weight", *sorted(names[:3], key=lambda name: int(name.split(".")[1]))]
    assert [matrix.name for matrix in read_matrices(tmp_path / "model.safetensors")[0]] == by_number
    assert list(list_tensors([tmp_path / "model.pt"])) == by_number


def test_twenty_thousand_tensors_of_one_file_are_measured_in_ten_seconds_and_listed_once(
    tmp_path, monkeypatch
):
    shared = np.random.default_rng(0).normal(size=(20_000, 4, 4)).astype("float32")
    state = {f"layers.{i}.mlp.up_proj.weight": torch.from_numpy(x) for i, x in enumerate(shared)}
    safetensors.torch.save_file(state, tmp_path / "step1.safetensors")
    parsed = []
    own = weightfiles._of_safetensors
    monkeypatch.setattr(weightfiles, "_of_safetensors", lambda *a: parsed.append(1) or own(*a))
    start = time.process_time()
    table = Checkpoints(tmp_path).measure(weibull=False, cache=False)
    assert time.process_time() - start < 10
    assert len(parsed) == 1
    truth = (shared.astype(float) ** 2).sum((1, 2))
    np.testing.assert_allclose(table["norm_sq"], truth, rtol=1e-12)


def test_no_file_stays_open(tmp_path):
    for name, write in WRITERS.items():
        write(weights(), tmp_path / name)
    before = len(os.listdir("/proc/self/fd"))
    for name in WRITERS:
        for stored in list_tensors([tmp_path / name]).values():
            stored.read()
    assert len(os.listdir("/proc/self/fd")) == before


# Indexes and configs.


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "{}/outside.safetensors", "a/b.safetensors", "..", "c:\\x", "a\0b"]
)
def test_an_index_leads_nobody_out_of_its_folder(tmp_path, read, target):
    safetensors.torch.save_file(weights(), tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": {UP: target.format(tmp_path)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json points outside its folder, to .* not followed"):
        read(folder)


BROKEN_JSON = {
    "web page": ("<!DOCTYPE html><html>Log in</html>", "is no JSON .a web page"),
    "cut": ('{"weight_map": {"a"', "is no JSON"),
    "nested": ("[" * 100_000, "is no JSON"),
    "a list": ("[1, 2]", "holds a list"),
    "a number": ("3", "holds a int"),
    "no text": (b"\xff\xfe\x00", "is no text"),
}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("fault", BROKEN_JSON)
def test_a_json_file_that_is_none_is_named_with_a_remedy(tmp_path, read, file, fault):
    content, message = BROKEN_JSON[fault]
    safetensors.torch.save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=rf"{file} {message}.*(again|pass config=)"):
        read(tmp_path)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}}])
def test_an_index_of_other_types_is_no_index(tmp_path, read, content):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"index\.json is no index of shards"):
        read(tmp_path)


def test_the_config_is_looked_for_beside_file_and_folder_and_in_the_run(tmp_path):
    place = tmp_path / "run" / "checkpoints" / "step-1.safetensors"
    place.parent.mkdir(parents=True)
    safetensors.torch.save_file(weights(), place)
    assert config_beside(place) is None
    (tmp_path / "run" / "run.json").write_text(json.dumps({"train": {"architecture": {"n_head": 2}}}))
    assert config_beside(place) == {"n_head": 2}
    (place.parent / "config.json").write_text(json.dumps({"n_head": 4}))
    assert config_beside(place) == {"n_head": 4}
    inside = tmp_path / "series" / "step5"
    inside.mkdir(parents=True)
    (inside.parent / "config.json").write_text(json.dumps({"n_head": 8}))
    assert config_beside(inside) == {"n_head": 8}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"train": [1]}))
    assert config_beside(tmp_path / "run") is None


# Files that are not what they are called.


@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json"]
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read, file):
    safetensors.torch.save_file(weights(), tmp_path / "whole.safetensors")
    os.mkfifo(tmp_path / file)
    with pytest.raises(CheckpointError, match=rf"{file} is a pipe"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.pt"])
def test_a_folder_named_like_weights_and_a_device_are_refused(tmp_path, read, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read(tmp_path)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=rf"{name} is a device"):
        read(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    with pytest.raises((CheckpointError, FileNotFoundError), match=name):
        read(tmp_path)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html></html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"", "cut short"),
        (b"\x80\x02", "cut short"),
    ],
)
def test_what_stands_in_the_place_of_weights_is_named(tmp_path, read, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read.*{message}.*again"):
        read(tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, name):
    WRITERS[name](weights((6, 4)), tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=name):
            list_tensors([tmp_path / name])


def header_of(tensors, change):
    data = safetensors.torch.save(tensors)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[UP].update(shape=[10**9, 10**9]), "has 2,560 bytes"),
        (lambda h: h[UP].update(shape=[-40, -16]), "has the shape"),
        (lambda h: h[UP].update(shape=[40.0, 16]), "has the shape"),
        (lambda h: h[UP].update(data_offsets=[4, 2564]), "lies at 4 to 2,564"),
        (lambda h: h[UP].update(data_offsets=[0, 2**70]), "has the shape"),
        (lambda h: h.update(copy=h[UP]), "what is before it ends at"),
        (lambda h: h.pop(UP), "and its header tells of"),
        (lambda h: h.update({UP: 3}), "no checkpoint"),
        (lambda h: h.update({"\ud800": h.pop(UP)}), "surrogates not allowed"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, change, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(header_of(weights((40, 16)), change))
    with pytest.raises(CheckpointError, match=rf"model.safetensors cannot be read.*{message}"):
        list_tensors([file])
    with pytest.raises(safetensors.SafetensorError):  # its own reader thinks the same
        safetensors.safe_open(file, "pt")


# What torch.save wrote.


@pytest.mark.parametrize("change", [lambda at, data: 1, lambda at, data: 0x80])
def test_a_bit_that_flipped_in_a_bin_is_found_by_its_checksum(tmp_path, read, change):
    file = tmp_path / "pytorch_model.bin"
    torch.save(weights(), file)
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        payload = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    at = data.index(weights()[UP].numpy().tobytes())
    for place in (at, at + 1000, at + payload.file_size - 1):
        bad = bytearray(data)
        bad[place] ^= change(place, data)
        file.write_bytes(bad)
        os.utime(file, ns=(place, place))
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*checksum of .*data/0 does not hold"):
            read(tmp_path)


def test_files_that_were_saved_without_checksums_are_read(tmp_path):
    options = getattr(torch.serialization, "set_crc32_options", None)
    if options is None:
        pytest.skip("this torch always writes checksums")
    options(False)
    try:
        torch.save(weights(), tmp_path / "pytorch_model.bin")
    finally:
        options(True)
    assert torch.equal(list_tensors([tmp_path / "pytorch_model.bin"])[UP].read(), weights()[UP])


def rezipped(path, change, kind=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    path.write_bytes(out.getvalue())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "legacy.pt"])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.ones(1).expand(10**6, 10**6)}, "repeats 4 bytes over the shape"),
        ({"w": torch.ones(8).as_strided((10**6, 8), (0, 1))}, "repeats 32 bytes"),
        (
            {f"w{i}": torch.ones(10**4).as_strided((90, 100), (i, 1)) for i in range(1, 90)},
            "lie in each other",
        ),
    ],
)
def test_tensors_larger_than_their_storage_are_refused_at_once(tmp_path, read, name, state, message):
    if len(state) > 1:
        own = torch.ones(10**4)
        state = {key: own.as_strided(value.shape, value.stride()) for key, value in state.items()}
    WRITERS[name](state, tmp_path / name)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"{name}.*{message}"):
        read(tmp_path)
    assert time.process_time() - start < 5


def test_storages_that_are_not_as_long_as_said_or_compressed_are_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    for change, kind, message in [
        (lambda name, data: data[:-4] if name.endswith("data/0") else data, zipfile.ZIP_STORED, "not 2,560"),
        (
            lambda name, data: data + data if name.endswith("data/0") else data,
            zipfile.ZIP_STORED,
            "not 2,560",
        ),
        (lambda name, data: data, zipfile.ZIP_DEFLATED, "is compressed"),
        (lambda name, data: b"big" if name.endswith("byteorder") else data, zipfile.ZIP_STORED, "big-endian"),
    ]:
        torch.save(weights((40, 16)), file)
        rezipped(file, change, kind)
        with pytest.raises(CheckpointError, match=message):
            list_tensors([file])


def test_zips_with_the_headers_of_large_files_are_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(weights(), file)
    out = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as record:
                record.write(old.read(name))
    file.write_bytes(out.getvalue())
    for name, stored in list_tensors([file]).items():
        assert torch.equal(stored.read(), weights()[name])


HEADERS = {
    "lists": b"[" + b"[]," * 5_000_000 + b"[]]",
    "dicts": b"{" + b",".join(b'"%06x":{}' % i for i in range(1_200_000)) + b"}",
    "large": b'{"' + b"a" * (1 << 26) + b'":0}',
    "few": b"[" + b"{}," * 300_000 + b"{}]",
}
PICKLES = {
    "sets": b"\x8f" * 10_000_000,
    "more": b"}" * 10_000_000,
    "huge": b"X\xff\xff\xff\x7f" + b"a" * (1 << 25),
}


def test_a_file_of_twenty_thousand_tensors_is_no_hostile_one(tmp_path):
    state = {
        f"model.layers.{i // 100}.mlp.experts.{i}.up_proj.weight": torch.ones(1, 1) for i in range(20_000)
    }
    torch.save(state, tmp_path / "a.pt")
    safetensors.torch.save_file(state, tmp_path / "b.safetensors")
    index = {"weight_map": {f"{name}{i}": "b.safetensors" for name in state for i in range(7)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list_tensors([tmp_path / "a.pt"]).keys() == list_tensors([tmp_path / "b.safetensors"]).keys()
    assert weightfiles.checkpoint_files(tmp_path) == [tmp_path / "b.safetensors"], "of 140,000 names"


def test_reading_hostile_files_takes_no_memory(tmp_path):
    torch.save({"w": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "a.bin")
    legacy({"w": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "b.pt")
    data = (tmp_path / "b.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(data.replace(b"K\x01", b"\x8a\x04\xff\xff\xff\x7f"))  # storages of 8 GB
    (tmp_path / "d.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    for name, header in HEADERS.items():
        (tmp_path / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for name, pickled in PICKLES.items():
        with zipfile.ZipFile(tmp_path / f"{name}.pt", "w") as file:
            file.writestr("archive/data.pkl", b"\x80\x02(" + pickled)
    with zipfile.ZipFile(tmp_path / "directory.pt", "w") as file:
        for i in range(200_000):
            file.writestr(zipfile.ZipInfo(f"a/{i}"), b"")
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from weightdyn import fit_weights\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for file in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try:\n"
        "        fit_weights(file)\n"
        "    except ValueError as error:\n"
        "        assert file.name in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(file)\n"
        "print((peak() - before) // 1024)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 200


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "write", [torch.save, legacy, lambda state, path: path.write_bytes(pickle.dumps(state))]
)
def test_no_code_of_a_pickle_runs(tmp_path, read, write):
    folder = tmp_path / "model"
    folder.mkdir()
    write({"w": _Evil(tmp_path / "owned"), "x": torch.ones(2, 2)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        read(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("tensor", [torch.ones(2, 2, device="meta"), torch.ones(2, 2).to_sparse()])
def test_tensors_without_dense_data_are_named(tensor):
    with pytest.raises(TypeError, match=r"source: w is (on the device meta|of layout torch.sparse_coo)"):
        read_matrices({"w": tensor})
