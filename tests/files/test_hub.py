"""Checkpoints from a hub: a small server on 127.0.0.1 that fails as networks do, and the real client against it."""

import contextlib
import hashlib
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from weightdyn.checkpoints.clock import decay_clock
from weightdyn.checkpoints.series import Checkpoints
from weightdyn.checkpoints.states import forces_from_states
from weightdyn.cli import app
from weightdyn.files import hub as hub_module
from weightdyn.files.weightfiles import CheckpointError

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
import huggingface_hub
from huggingface_hub import constants, file_download

REPO = "someone/tiny"
CONFIG = {"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2}
QKV = "gpt_neox.layers.0.attention.query_key_value.weight"
UP = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
NORM = "gpt_neox.layers.0.input_layernorm.weight"
STEPS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 10_000, 1000)]


def weights(step):
    torch.manual_seed(step)
    return {QKV: torch.randn(96, 32), UP: torch.randn(128, 32) * 0.02, NORM: torch.ones(32)}


def saved(tensors):
    """The bytes that torch.save makes."""
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


def index(names):
    return json.dumps({"metadata": {}, "weight_map": names}).encode()


class Hub:
    """A hub with one repository, and `others`. `faults` lists what goes wrong with the next downloads of a path."""

    def __init__(self):
        self.revisions: dict[str, dict[str, bytes]] = {}
        self.others: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> its revisions
        self.tags: dict[str, str] = {}  # name -> the branch whose commit it has
        self.faults: dict[tuple[str, str], list[str]] = {}
        self.served: list[tuple[str, str, str | None]] = []  # revision, file, Range; of GET alone
        self.requests: list[str] = []
        self.sizes: dict[str, object] = {}  # what is announced instead of a file's size
        self.missing: set[str] = set()  # revisions whose files are not listed any more
        self.stall = threading.Event()
        self.stalled = threading.Event()
        self.watch = lambda: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_GET = do_HEAD = lambda self: hub.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self):
        self.stall.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def commit(self, revision):
        return hashlib.sha1(revision.encode()).hexdigest()

    def add(self, revision, files, config=True):
        self.revisions[revision] = {
            **files,
            **({"config.json": json.dumps(CONFIG).encode()} if config else {}),
        }

    def answer(self, request):
        path = request.path.partition("?")[0]
        self.requests.append(path)
        assert len(self.requests) < 2000, "a loop of requests without an end"
        repos = {REPO: self.revisions, **self.others}
        found = re.match(r"(?:/api/models)?/([^/]+/[^/]+)/", path)
        repo = found[1] if found and found[1] in repos else REPO
        revisions = repos[repo]
        if path == f"/api/models/{repo}/refs":
            names = dict.fromkeys(["main", *revisions])
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": self.commit(n)} for n in names]
            tags = [
                {"name": name, "ref": f"refs/tags/{name}", "targetCommit": self.commit(branch)}
                for name, branch in (self.tags if repo == REPO else {}).items()
            ]
            return self.send(
                request, json.dumps({"branches": branches, "tags": tags, "converts": []}).encode()
            )
        by_commit = {self.commit(name): name for name in revisions}
        if match := re.fullmatch(rf"/api/models/{repo}/tree/(\w+)", path):
            if by_commit[match[1]] in self.missing:
                return self.send(request, b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": self.sizes.get(name, len(data)),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                | ({} if name.endswith(".json") else {"lfs": lfs(data)})
                for name, data in revisions[by_commit[match[1]]].items()
            ]
            entries.append({"type": "directory", "path": "docs", "oid": "0" * 40})
            return self.send(request, json.dumps(entries).encode())
        if match := re.fullmatch(rf"/{repo}/resolve/(\w+)/(.+)", path):
            return self.resolve(request, by_commit[match[1]], match[2], revisions)
        return self.send(request, b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def resolve(self, request, revision, name, revisions):
        if "404" in self.faults.get((revision, name), []):
            return self.send(request, b"{}", 404, {"X-Error-Code": "EntryNotFound"})
        data = revisions[revision][name]
        digest = (hashlib.sha1 if name.endswith(".json") else hashlib.sha256)(data).hexdigest()
        headers = {"X-Repo-Commit": self.commit(revision), "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if request.command == "HEAD":
            return self.send(request, data, 200, headers)
        asked = request.headers.get("Range")
        self.served.append((revision, name, asked))
        self.watch()
        faults = self.faults.get((revision, name), [])
        fault = faults.pop(0) if faults else ""
        if fault == "stall":
            self.stalled.set()
            self.stall.wait(60)
        if fault == "trickle":
            request.send_response(200)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            with contextlib.suppress(OSError):
                for i in range(len(data)):
                    request.wfile.write(data[i : i + 1])
                    request.wfile.flush()
                    if self.stall.wait(0.05):
                        break
            request.close_connection = True
            return None
        if fault == "endless":
            request.send_response(200)
            request.end_headers()
            with contextlib.suppress(OSError):
                while not self.stall.is_set():
                    request.wfile.write(bytes(1 << 16))
            request.close_connection = True
            return None
        if fault == "503":
            return self.send(request, b"", 503)
        if fault == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        status = 200
        if asked:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        return self.send(request, data, status, headers, drop=fault == "drop")

    def send(self, request, data, status=200, headers=None, drop=False):
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data[: 2 * len(data) // 3] if drop else data)
        if drop:
            request.wfile.flush()
            request.close_connection = True


def lfs(data):
    return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_module, "_WAIT", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # or a small file has no middle to be cut in
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # as HF_ENDPOINT does: nothing leaves this machine
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # before 1.0 each has its own
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    yield server
    server.close()


def fill(hub, steps=STEPS):
    """Revisions in every form that published models have."""
    for i, step in enumerate(steps):
        tensors = weights(step)
        first = {QKV: tensors[QKV]}
        rest = {name: tensors[name] for name in (UP, NORM)}
        if i % 4 == 0:
            files = {"model.safetensors": safetensors.torch.save(tensors)}
        elif i % 4 == 1:
            files = {
                "model-00001-of-00002.safetensors": safetensors.torch.save(first),
                "model-00002-of-00002.safetensors": safetensors.torch.save(rest),
                "model.safetensors.index.json": index(
                    {
                        QKV: "model-00001-of-00002.safetensors",
                        UP: "model-00002-of-00002.safetensors",
                        NORM: "model-00002-of-00002.safetensors",
                    }
                ),
            }
        elif i % 4 == 2:
            files = {"pytorch_model.bin": saved(tensors)}
        else:
            files = {
                "pytorch_model-00001-of-00002.bin": saved(first),
                "pytorch_model-00002-of-00002.bin": saved(rest),
                "pytorch_model.bin.index.json": index(
                    {
                        QKV: "pytorch_model-00001-of-00002.bin",
                        UP: "pytorch_model-00002-of-00002.bin",
                        NORM: "pytorch_model-00002-of-00002.bin",
                    }
                ),
            }
        hub.add(f"step{step}", files)


def series(hub, **options):
    return Checkpoints(f"hf://{REPO}", endpoint=hub.url, **options)


def weight_files(folder):
    return {p for p in folder.rglob("*") if re.search(r"\.(safetensors|bin|incomplete)$", p.name)}


def check(table, steps):
    assert sorted(set(table["step"])) == list(steps)
    norms = table.set_index(["step", "tensor"])["norm_sq"]
    for step in steps:
        truth = weights(step)
        parts = truth[QKV].double().reshape(2, 3, 16, 32)
        for i, part in enumerate("qkv"):
            assert norms[step, f"{QKV}[{part}]"] == pytest.approx(float((parts[:, i] ** 2).sum()), rel=1e-12)
        assert norms[step, UP] == pytest.approx(float((truth[UP].double() ** 2).sum()), rel=1e-12)


def test_twenty_revisions_are_measured_with_at_most_one_checkpoint_on_the_disk_through_all_failures(
    hub, tmp_path
):
    fill(hub)
    hub.faults = {
        ("step0", "model.safetensors"): ["503", "503"],
        ("step1", "model-00002-of-00002.safetensors"): ["drop", "503"],
        ("step2", "pytorch_model.bin"): ["corrupt", "corrupt"],
        ("step8", "model.safetensors"): ["drop", "drop", "drop"],
        ("step512", "pytorch_model.bin"): ["503", "corrupt", "drop"],
    }
    cache = tmp_path / "cache"
    seen = []

    def watch():
        folders = {p.relative_to(cache / "download").parts[0] for p in weight_files(cache / "download")}
        seen.append(len(folders))

    hub.watch = watch
    table = series(hub).measure(cache=cache, progress=False)
    check(table, STEPS)
    assert len(STEPS) == 20
    assert max(seen) == 1
    assert not weight_files(tmp_path)
    assert all(not left for left in hub.faults.values())
    resumed = [entry for entry in hub.served if entry[2]]
    assert len(resumed) >= 4, "a dropped download goes on where it stopped"

    before = len(hub.served)
    again = series(hub).measure(cache=cache, progress=False)
    assert [entry for entry in hub.served[before:] if not entry[1].endswith(".json")] == []
    assert again.equals(table)


def test_a_killed_measurement_goes_on_without_reading_again_what_was_done(hub, tmp_path):
    fill(hub, STEPS[:8])
    hub.faults = {("step16", "pytorch_model.bin"): [], ("step8", "model.safetensors"): ["stall"]}
    cache = tmp_path / "cache"
    script = (
        "from weightdyn import Checkpoints\n"
        f"Checkpoints('hf://{REPO}', endpoint={hub.url!r}).measure(cache={str(cache)!r}, progress=False)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.stall.set()
    left = weight_files(cache / "download")
    done = [revision for revision, name, _ in hub.served if not name.endswith("json")]
    assert set(done) == {"step0", "step1", "step2", "step4", "step8"}
    assert left, "the kill came in the middle of a download"

    hub.served.clear()
    check(series(hub).measure(cache=cache, progress=False), STEPS[:8])
    read = {revision for revision, name, _ in hub.served if not name.endswith("json")}
    assert read == {"step8", "step16", "step32", "step64"}
    assert not weight_files(tmp_path / "cache")


def test_a_fault_that_stays_ends_in_an_error_after_a_bounded_number_of_requests(hub, tmp_path):
    fill(hub, [0, 1, 2])
    hub.faults = {("step2", "pytorch_model.bin"): ["corrupt"] * 100}
    with pytest.raises(CheckpointError, match=r"step2/pytorch_model.bin could not be fetched in 5 .*digest"):
        series(hub).measure(cache=tmp_path / "cache", progress=False)
    assert [entry[0] for entry in hub.served].count("step2") == hub_module.ATTEMPTS
    found = series(hub, errors="skip")
    with pytest.warns(UserWarning, match="left out.*step2"):
        table = found.measure(cache=tmp_path / "cache", progress=False)
    check(table, [0, 1])
    assert list(found.skipped) == [2]
    assert not weight_files(tmp_path / "cache")


@pytest.mark.parametrize("gone", ["tree", "weights", "config"])
def test_one_bad_revision_is_named_and_under_skip_left_out(hub, tmp_path, gone):
    fill(hub, [0, 4, 16])
    if gone == "tree":
        hub.missing.add("step0")
    else:
        name = "model.safetensors" if gone == "weights" else "config.json"
        hub.faults = {("step0", name): ["404"]}
    with pytest.raises(
        CheckpointError, match=r"tiny@step0.* answers 404 .*errors='skip' leaves the step out"
    ):
        series(hub).measure(cache=tmp_path / "cache")
    found = series(hub, errors="skip")
    with pytest.warns(UserWarning, match="left out: .*step0.*404"):
        table = found.measure(cache=tmp_path / "cache")
    check(table, [4, 16])
    assert list(found.skipped) == [0]
    assert found.config() == CONFIG
    assert sum("step0" in str(entry) or hub.commit("step0") in str(entry) for entry in hub.requests) < 12


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"<html>Log in</html>"}, r"step0/config.json is no JSON .a web page"),
        ({"model.safetensors": b"<html>Log in</html>"}, r"model.safetensors cannot be read.*web page"),
        ({"model.safetensors.index.json": b"<html>Log in</html>"}, r"index.json is no JSON .a web page"),
        ({"model.safetensors.index.json": b"[" * 100_000}, r"index.json is no JSON"),
        ({"config.json": b"[1]"}, r"step0/config.json holds a list"),
    ],
)
def test_a_login_page_in_the_place_of_a_file_of_the_hub_is_named(hub, tmp_path, files, message):
    hub.add(
        "step0",
        {"model.safetensors": safetensors.torch.save(weights(0)), "config.json": b"{}"} | files,
        False,
    )
    with pytest.raises(CheckpointError, match=message):
        series(hub).measure(cache=tmp_path / "cache")


def test_files_that_a_hub_lists_outside_the_folder_are_not_fetched(hub, tmp_path):
    hub.add("step0", {"../../evil.bin": saved(weights(0)), "/tmp/evil.pt": saved(weights(0))}, config=False)
    with pytest.raises(CheckpointError, match="holds no weights"):
        series(hub).measure(cache=tmp_path / "cache")
    assert not hub.served


def test_a_config_of_gigabytes_is_not_fetched(hub, tmp_path, monkeypatch):
    fill(hub, [0])
    monkeypatch.setattr(hub_module, "SMALL", 10)
    with pytest.raises(
        CheckpointError, match=r"step0/config.json has \d+ bytes, which no index or config has"
    ):
        series(hub).config()
    assert not hub.served


def test_a_file_that_fails_its_digest_leaves_nothing_in_the_shared_cache(hub, tmp_path):
    fill(hub, STEPS[:5])
    hub.faults = {("step8", "model.safetensors"): ["corrupt"] * 100}
    with pytest.raises(CheckpointError, match=r"step8/model.safetensors could not be fetched .*digest"):
        series(hub, keep=True).measure(cache=tmp_path / "cache")
    digests = {
        digest: path for path in (tmp_path / "hf").rglob("*") if path.is_file() for digest in [sha(path)]
    }
    assert sha(hub.revisions["step0"]["model.safetensors"]) in digests, "what is sound is kept"
    damaged = hub.revisions["step8"]["model.safetensors"]
    assert sha(damaged[:-1] + bytes([damaged[-1] ^ 1])) not in digests
    hub.faults = {}
    check(series(hub, keep=True).measure(cache=tmp_path / "cache"), STEPS[:5])


def sha(data):
    return hashlib.sha256(data if isinstance(data, bytes) else data.read_bytes()).hexdigest()


def test_a_server_that_trickles_ends_in_an_error_that_names_the_file(hub, tmp_path, monkeypatch):
    fill(hub, STEPS[:5])
    monkeypatch.setattr(hub_module, "TIME_LIMIT", 3.0)
    hub.faults = {("step8", "model.safetensors"): ["trickle"] * 10}
    start = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"step8/model.safetensors was not there after 3 seconds.*too slow"
    ):
        series(hub).measure(cache=tmp_path / "cache")
    assert time.monotonic() - start < 20
    assert [entry[0] for entry in hub.served].count("step8") == 1, "there is no time for another attempt"
    hub.faults = {}
    monkeypatch.setattr(hub_module, "TIME_LIMIT", 600.0)
    check(series(hub).measure(cache=tmp_path / "cache"), STEPS[:5])
    assert [entry[:2] for entry in hub.served].count(("step0", "model.safetensors")) == 1, "it was stored"


def test_a_server_that_sends_without_end_is_cut_off_at_the_announced_size(hub, tmp_path):
    if "tqdm_class" not in inspect.signature(huggingface_hub.hf_hub_download).parameters:
        pytest.skip("this client takes no bar that counts")
    fill(hub, STEPS[:5])
    hub.faults = {("step8", "model.safetensors"): ["endless"] * 10}
    with pytest.raises(CheckpointError, match=r"step8/model.safetensors .* sends more than the [\d,]+ bytes"):
        series(hub).measure(cache=tmp_path / "cache")
    assert [entry[0] for entry in hub.served].count("step8") == 1, "it is not asked again"
    hub.faults = {}
    check(series(hub).measure(cache=tmp_path / "cache"), STEPS[:5])


def test_a_step_beyond_what_tables_hold_is_refused_by_its_branch(hub):
    fill(hub, [0])
    hub.add(f"step{2**63}", {"model.safetensors": b""})
    with pytest.raises(CheckpointError, match=rf"tiny@step{2**63}: its step is beyond"):
        series(hub)
    with pytest.warns(UserWarning, match="its step is beyond"):
        assert series(hub, errors="skip").steps == [0]


def test_a_plan_of_the_hub_says_what_inner_products_would_download(hub, tmp_path):
    fill(hub, [0, 1, 2])
    cache = tmp_path / "cache"
    series(hub).measure("none", weibull=False, cache=cache)
    assert series(hub).plan("none", False, cache=cache)["measured"].all()
    plan = series(hub).plan("band", False, cache=cache).set_index("step")
    hub.served.clear()
    series(hub).measure("band", False, cache=cache)
    fetched = {revision for revision, name, _ in hub.served if not name.endswith("json")}
    assert fetched == {f"step{step}" for step in plan.index[~plan["measured"]]} == {"step0", "step1", "step2"}
    assert series(hub).plan("band", False, cache=cache)["measured"].all()


def test_a_repository_that_is_not_there_is_not_asked_for_again_and_again(hub):
    with pytest.raises(FileNotFoundError, match=r"no repository hf://someone/else"):
        Checkpoints("hf://someone/else", endpoint=hub.url)
    # The client has a request of its own besides, once a day.
    assert sum("someone/else" in path for path in hub.requests) == 1
    with pytest.raises(FileNotFoundError, match="no branch named like a checkpoint"):
        series(hub)
    for name in ("gpt2", "some one/else", "a/b/c", ""):
        with pytest.raises(ValueError, match="source must be hf://owner/name"):
            Checkpoints(f"hf://{name}", endpoint=hub.url)


def test_olmo_revisions_of_the_first_stage_are_found_by_their_steps(hub):
    data = {"model.safetensors": safetensors.torch.save(weights(1))}
    for name in (
        "stage1-step1000-tokens5B",
        "stage1-step150-tokens1B",
        "stage2-ingredient1-step1000-tokens5B",
    ):
        hub.add(name, data, config=False)
    with pytest.warns(UserWarning, match=r"taken is 'stage1' \(2 .*left out: 'stage2-ingredient1' \(1 "):
        found = series(hub)
    assert found.steps == [150, 1000]
    assert found.config() is None
    assert series(hub, stage="stage2-ingredient1").steps == [1000]
    hub.add("step7", data)
    with pytest.warns(UserWarning, match=r"left out: 'stage1' .*, 'stage2-ingredient1'"):
        assert series(hub).steps == [7]
    with pytest.raises(ValueError, match="the nearest to 140 is 150"):
        series(hub, steps=[140], stage="stage1")


def test_identical_content_under_two_revisions_is_reported(hub, tmp_path):
    data = {"model.safetensors": safetensors.torch.save(weights(1))}
    for step in (0, 1):
        hub.add(f"step{step}", data)
    hub.add("step2", {"model.safetensors": safetensors.torch.save(weights(2))})
    with pytest.warns(UserWarning, match="identical weights: 0 = 1$"):
        series(hub).measure(cache=tmp_path / "cache", progress=False)


def test_neighbours_on_the_hub_are_multiplied_with_two_checkpoints_on_the_disk(hub, tmp_path):
    fill(hub, STEPS[:6])
    cache, seen = tmp_path / "cache", []
    hub.watch = lambda: seen.append(
        len({p.relative_to(cache / "download").parts[0] for p in weight_files(cache / "download")})
    )
    table = series(hub).measure("band", weibull=False, cache=cache, progress=False)
    assert max(seen) == 2
    dots = table[table["tensor"] == UP].set_index("step")["dots"]
    for before, step in pairwise(STEPS[:6]):
        truth = float((weights(before)[UP].double() * weights(step)[UP].double()).sum())
        assert dots[step][-2] == pytest.approx(truth, rel=1e-12)
        assert len(dots[step]) == 2
    downloads = [entry for entry in hub.served if not entry[1].endswith("json")]
    assert len(downloads) == len(set(downloads)), "nothing is downloaded twice"
    with pytest.raises(ValueError, match=r"keep=True"):
        series(hub).measure("full", cache=cache)


def test_the_decay_clock_reads_a_hub_with_two_checkpoints_on_the_disk_and_over_a_foreign_one(hub, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 32, generator=generator)
    for step in range(0, 70, 10):
        given = torch.randn(60, 32) if step == 30 else weight.clone()
        hub.add(f"step{step}", {"model.safetensors": safetensors.torch.save({"embed_in.weight": given})})
        weight = weight * 0.999
        weight[:40] += 0.1 * torch.randn(40, 32, generator=generator)
    seen = []
    hub.watch = lambda: seen.append(len({p.parent.name for p in weight_files(tmp_path) if "step-" in str(p)}))
    table = decay_clock(series(hub), progress=False)
    assert table["rows"].tolist() == [20, 20, 0, 20, 20, 20]
    np.testing.assert_allclose(table["factor"].dropna(), [0.999, 0.999, 0.999**2, 0.999, 0.999], rtol=1e-6)
    downloads = [entry for entry in hub.served if not entry[1].endswith("json")]
    assert len(downloads) == len(set(downloads)) == 7, "nothing is downloaded twice"
    assert max(seen) == 2
    assert not weight_files(tmp_path)


def test_what_is_kept_is_downloaded_once_for_all_inner_products(hub, tmp_path):
    fill(hub, STEPS[:4])
    table = series(hub, keep=True).measure("full", weibull=False, cache=tmp_path / "cache", progress=False)
    dots = table[table["tensor"] == UP]["dots"].iloc[-1]
    truth = [float((weights(step)[UP].double() * weights(4)[UP].double()).sum()) for step in STEPS[:4]]
    np.testing.assert_allclose(dots, truth, rtol=1e-12)
    assert len(hub.served) == len(set(hub.served))
    assert weight_files(tmp_path / "hf")


def test_one_tensor_can_be_loaded_from_the_hub(hub, tmp_path):
    fill(hub, STEPS[:3])
    found = series(hub)
    assert found.tensors()[UP] == ((128, 32), "float32")
    assert torch.equal(found.load(2, UP), weights(2)[UP])


def test_an_index_on_the_hub_that_points_outside_is_refused(hub, tmp_path):
    hub.add("step0", {"model.safetensors.index.json": index({QKV: "../../secrets.safetensors"})})
    with pytest.raises(CheckpointError, match="points outside its folder"):
        series(hub).measure(cache=tmp_path / "cache", progress=False)


def test_a_dry_run_lists_revisions_and_sizes_and_downloads_no_weights(hub, tmp_path, monkeypatch):
    fill(hub, STEPS[:5])
    sizes = sum(
        len(data)
        for files in hub.revisions.values()
        for name, data in files.items()
        if not name.endswith(".json")
    )
    arguments = ["measure", f"hf://{REPO}", "--cache", str(tmp_path / "cache"), "--endpoint", hub.url]
    result = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert all(f"step{step}" in result.output for step in STEPS[:5])
    assert f"{sizes:,} bytes" in result.output
    assert not [entry for entry in hub.served if not entry[1].endswith(".json")]

    out = tmp_path / "table.parquet"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.exists()
    result = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert "to download: 0 of 5 checkpoints, 0 bytes" in result.output
    assert Path(out).stat().st_size > 0


def test_two_measurements_do_not_share_a_folder_of_downloads(hub, tmp_path):
    fill(hub, [0])
    folder = tmp_path / "cache"
    found = series(hub)
    (folder / "download").mkdir(parents=True)
    with (
        filelock.FileLock(folder / "download" / ".lock"),
        pytest.raises(FileExistsError, match="another process"),
    ):
        found.measure(cache=folder, progress=False)


def test_bars_are_shown_where_they_are_asked_for_alone(hub, tmp_path, capfd):
    huggingface_hub.utils.enable_progress_bars()  # a Trainer without bars switches them off for the process
    fill(hub, [0, 1])
    silent = set()
    hub.watch = lambda: silent.add(huggingface_hub.utils.are_progress_bars_disabled())
    series(hub).measure(cache=tmp_path / "cache")
    series(hub).measure(cache=tmp_path / "another", progress=False)
    assert capfd.readouterr() == ("", "")
    assert silent == {True}, "the client's bars too"
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    silent.clear()
    series(hub).measure(cache=tmp_path / "third", progress=True)
    assert "measure: 100%" in capfd.readouterr().err
    assert silent == {False}


# Other files than weights.

STATES = {
    "optim/rank0.pt": b"optimizer" * 2000,
    "train/rank0.pt": b"step 4",
    ".metadata": b"where each part lies",
    "__0_0.distcp": b"parts" * 3000,
    "global_step4/mp_rank_00_model_states.pt": b"deepspeed",
    "trainer_state.json": b'{"global_step": 4}',
}


def test_all_files_of_a_checkpoint_are_listed_and_those_asked_for_fetched_and_deleted(hub, tmp_path):
    for step in (0, 4):
        hub.add(f"step{step}", {"model.safetensors": safetensors.torch.save(weights(step)), **STATES})
    hub.faults = {("step4", "optim/rank0.pt"): ["503", "drop", "corrupt"]}
    found = series(hub)
    truth = hub.revisions["step4"]
    assert found.file_sizes(4) == {name: len(data) for name, data in truth.items()}
    assert not hub.served, "a listing downloads nothing"
    with found.files(4, ["optim/rank0.pt", ".metadata", "scheduler.pt"]) as paths:
        assert {name: path.read_bytes() for name, path in paths.items()} == {
            name: truth[name] for name in (".metadata", "optim/rank0.pt")
        }
        with found.files(4, lambda name: name.endswith((".pt", ".json"))) as more:
            assert len(more) == 5
            assert all(path.read_bytes() == truth[name] for name, path in more.items())
        assert all(path.is_file() for path in paths.values()), (
            "the inner with leaves what the outer one holds"
        )
        assert torch.equal(found.load(4, UP), weights(4)[UP])
        assert all(path.is_file() for path in (*paths.values(), *more.values()))
        folder = paths[".metadata"].parent
        assert paths["optim/rank0.pt"] == folder / "optim" / "rank0.pt"
    assert not folder.exists()
    assert all(not left for left in hub.faults.values())
    served = [name for _, name, asked in hub.served if asked is None and name != "optim/rank0.pt"]
    assert len(served) == len(set(served)), "nothing is downloaded twice"


def test_files_of_one_checkpoint_at_a_time_are_on_the_disk(hub, tmp_path):
    for step in range(4):
        hub.add(f"step{step}", {"model.safetensors": safetensors.torch.save(weights(step)), **STATES})
    seen = []
    found = series(hub)
    downloads = found._store.folder
    hub.watch = lambda: seen.append(len([path for path in downloads.glob("step-*") if any(path.iterdir())]))
    for step in found.steps:
        assert found.load((step + 1) % 4, UP).shape == (128, 32)
        with found.files(step, lambda name: True) as paths:
            assert len(paths) == 8
            assert sorted(downloads.glob("step-*")) == [downloads / f"step-{step}"]
        assert not list(downloads.glob("step-*"))
    assert max(seen) == 1


def test_files_that_are_kept_lie_in_the_cache_of_the_hub(hub, tmp_path):
    hub.add("step0", {"model.safetensors": b"", **STATES})
    with series(hub, keep=True).files(0, ["optim/rank0.pt"]) as paths:
        pass
    assert paths["optim/rank0.pt"].read_bytes() == STATES["optim/rank0.pt"]
    assert paths["optim/rank0.pt"].is_relative_to(tmp_path / "hf")


OUTSIDE = [
    *(
        "../evil",
        "optim/../../evil",
        "/etc/evil",
        "C:/evil",
        "C:evil",
        "a\\evil",
        "a\0evil",
        "a\nevil",
        "a//evil",
    ),
    *("./evil", "optim/", "", ".cache/huggingface/download/model.safetensors.metadata", ".CACHE/evil"),
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_the_checkpoint_is_neither_listed_nor_followed(hub, tmp_path, name):
    hub.add("step0", {name: b"evil", "good.pt": b"good"}, config=False)
    place = tmp_path / "local" / "step0"
    place.mkdir(parents=True)
    (tmp_path / "evil").write_text("evil")
    for found in (series(hub), Checkpoints(place.parent)):
        assert set(found.file_sizes(0)) <= {"good.pt"}
        with found.files(0, lambda name: True) as paths:
            assert set(paths) <= {"good.pt"}
        with (
            pytest.raises(CheckpointError, match=r"step0: .* is no name of a file inside a checkpoint"),
            found.files(0, [name]),
        ):
            pass
    assert {name for _, name, _ in hub.served} == {"good.pt"}


@pytest.mark.parametrize("size", [-1, 2**40 * 1000, 2**70, 1.5, None, "9"])
def test_a_size_that_no_file_has_ends_in_an_error(hub, size):
    hub.add("step0", {"huge.pt": b"x", "good.pt": b"good"}, config=False)
    hub.sizes["huge.pt"] = size
    found = series(hub)
    if isinstance(size, int) and size > 0:
        with (
            pytest.raises(CheckpointError, match=r"tiny@step0 has [\d,]+ bytes, and the disk of .* has"),
            found.files(0, ["huge.pt"]),
        ):
            pass
        assert not hub.served
        with (
            pytest.raises(CheckpointError, match=r"huge.pt could not be fetched .* 1 bytes of [\d]+"),
            series(hub, keep=True).files(0, ["huge.pt"]),
        ):
            pass
    else:
        assert found.file_sizes(0) == {"good.pt": 4}


def test_weights_that_no_disk_holds_are_not_begun(hub, tmp_path):
    fill(hub, [0, 4])
    hub.sizes["model.safetensors"] = 2**55
    with pytest.raises(CheckpointError, match=r"tiny@step0 has [\d,]+ bytes, and the disk of .* has"):
        series(hub).measure(cache=tmp_path / "cache", progress=False)
    assert not [name for _, name, _ in hub.served if name == "model.safetensors"]


def test_a_listing_without_end_is_refused(hub, monkeypatch):
    monkeypatch.setattr(hub_module, "ENTRIES", 10)
    hub.add("step0", {f"{i}.pt": b"" for i in range(11)})
    with pytest.raises(CheckpointError, match="step0 lists more than 10 files"):
        series(hub).file_sizes(0)


def test_a_file_that_stays_damaged_is_named_and_nothing_is_left(hub, tmp_path):
    hub.add("step0", STATES)
    hub.faults = {("step0", "optim/rank0.pt"): ["corrupt"] * 100}
    found = series(hub)
    with (
        pytest.raises(CheckpointError, match=r"step0/optim/rank0.pt could not be fetched in 5 .*digest"),
        found.files(0, lambda name: True),
    ):
        pass
    assert not list(found._store.folder.glob("step-*"))


# Which checkpoints.


def one(step):
    return {"model.safetensors": safetensors.torch.save(weights(step))}


def test_stages_whose_steps_go_on_are_one_series_where_the_user_says_so(hub, tmp_path):
    for stage, step in ((1, 40), (1, 80), (2, 120), (3, 160)):
        hub.add(f"stage{stage}-step-{step}", one(step))
    hub.add("lc-4k-to-32k-step-40", one(7))
    hub.add("it-SFT", one(8))
    with pytest.warns(UserWarning, match=r"stage=\['stage1', 'stage2', 'stage3'\] those whose steps go on"):
        assert series(hub).steps == [40, 80]
    found = series(hub, stage=["stage1", "stage2", "stage3"])
    check(found.measure(cache=tmp_path / "cache", progress=False), [40, 80, 120, 160])
    with pytest.raises(
        ValueError, match=r"the steps of 'lc-4k-to-32k' .* do not go on from those of 'stage3'"
    ):
        series(hub, stage=["stage3", "lc-4k-to-32k"])
    for stage, count in (("stage2", 1), ("stage1,stage2", 3)):
        options = ["--stage", stage, "--endpoint", hub.url, "--dry-run", "--cache", str(tmp_path / "cache")]
        result = CliRunner().invoke(app, ["measure", f"hf://{REPO}", *options])
        assert f"of {count} checkpoints" in result.output


def test_a_mapping_takes_any_revisions_of_several_repositories_and_files_beside_them(hub, tmp_path):
    hub.add("ckpt_001", one(2))
    hub.others = {"tiny/step-240k-503b": {"main": one(4)}, "tiny/step-480k-1T": {"v1": one(8)}}
    local = tmp_path / "local.safetensors"
    safetensors.torch.save_file(weights(1), local)
    hub.revisions["ckpt_001"]["config.json"] = json.dumps(CONFIG).encode()
    found = Checkpoints(
        {
            1: local,
            2: f"hf://{REPO}@ckpt_001",
            4: "hf://tiny/step-240k-503b",
            8: f"hf://tiny/step-480k-1T@{hub.commit('v1')}",
        },
        endpoint=hub.url,
    )
    assert found.config() == CONFIG, "the file has none beside it"
    cache, seen = tmp_path / "cache", []
    hub.watch = lambda: seen.append(
        len({p.relative_to(cache / "download").parts[0] for p in weight_files(cache / "download")})
    )
    table = found.measure("band", cache=cache, progress=False)
    check(table, [1, 2, 4, 8])
    assert max(seen) == 2
    dots = table[table["tensor"] == UP].set_index("step")["dots"]
    for before, step in pairwise([1, 2, 4, 8]):
        truth = float((weights(before)[UP].double() * weights(step)[UP].double()).sum())
        assert dots[step][-2] == pytest.approx(truth, rel=1e-12)
    downloads = [entry for entry in hub.served if not entry[1].endswith("json")]
    assert len(downloads) == 3
    found.measure("band", cache=cache, progress=False)
    assert len([entry for entry in hub.served if not entry[1].endswith("json")]) == 3
    assert not weight_files(cache)
    places = found.plan(cache=cache)["place"].tolist()
    assert places == [str(local), f"hf://{REPO}@ckpt_001", "hf://tiny/step-240k-503b@main",
                      f"hf://tiny/step-480k-1T@{hub.commit('v1')}"]  # fmt: skip
    for step in (1, 4):
        with found.files(step, lambda name: name.endswith(".safetensors")) as paths:
            (path,) = paths.values()
            assert path.is_file()
        assert path.is_file() is (step == 1)
    assert sum(path.endswith("/refs") for path in hub.requests) == 3, "one request for each repository"


def test_a_series_of_the_hub_that_matches_nothing_says_what_it_saw(hub):
    for i in range(9):
        hub.add(f"v{i}", {})
    with pytest.raises(
        FileNotFoundError,
        match=r"no branch named like a checkpoint .* it has main, v0, v1, v2, v3 … \(10 in all\)",
    ):
        series(hub)


def test_a_tag_of_the_same_commit_is_the_same_checkpoint(hub):
    fill(hub, [0, 1])
    hub.tags = {"step1": "step1", "step-000001": "step1"}
    assert series(hub).steps == [0, 1]
    hub.tags = {"step-000001": "step0"}
    with pytest.raises(CheckpointError, match=r"step 1 is there twice, as step1 and step-000001"):
        series(hub)
    with pytest.warns(UserWarning, match="left out: .* twice"):
        assert series(hub, errors="skip").steps == [0, 1]


@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [
        (
            f"hf://{REPO}@step9",
            FileNotFoundError,
            r"someone/tiny has no branch or tag 'step9'; it has main, step0",
        ),
        (f"hf://{REPO}@", ValueError, "names no revision after @"),
        ("hf://tiny", ValueError, "source must be hf://owner/name, got hf://tiny"),
        ("hf://someone/else@main", FileNotFoundError, "there is no repository hf://someone/else"),
        ("hf://a b/c", ValueError, "source must be hf://owner/name, got hf://a b/c"),
        ("", ValueError, "source: the place of step 0 must be a path or hf://owner/name@revision"),
        (3, ValueError, "source: the place of step 0 must be a path or hf://owner/name@revision"),
    ],
)
def test_a_place_of_a_mapping_that_is_none_is_named(hub, place, kind, message):
    fill(hub, [0])
    with pytest.raises(kind, match=message):
        Checkpoints({0: place}, endpoint=hub.url)


def test_one_revision_is_no_series_but_a_place(hub):
    fill(hub, [0])
    with pytest.raises(ValueError, match=r"one revision is \{step: 'hf://someone/tiny@step0'\}"):
        Checkpoints(f"hf://{REPO}@step0", endpoint=hub.url)
    with pytest.raises(ValueError, match="stage: a mapping says itself"):
        Checkpoints({0: f"hf://{REPO}@step0"}, endpoint=hub.url, stage="a")


def trained_states(hub, steps):
    """A training whose checkpoints with their states are branches, and the injection of each update."""
    from weightdyn.record.logger import ForceLogger

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    adamw = torch.optim.AdamW(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 10)
    with ForceLogger(adamw, net) as logger:
        for step in range(1, max(steps) + 1):
            adamw.zero_grad()
            net(torch.randn(4, 6)).square().sum().backward()
            adamw.step()
            schedule.step()
            if step in steps:
                files = {"pytorch_model.bin": net, "optimizer.bin": adamw, "scheduler.bin": schedule}
                data = {name: saved(each.state_dict()) for name, each in files.items()}
                hub.add(f"step{step}", {**data, "random_states_0.pkl": b"x" * 100})
    return logger.run.forces()


def test_forces_from_states_on_the_hub_fetch_each_checkpoint_once_and_go_on_where_they_stopped(hub, tmp_path):
    log, cache, seen = trained_states(hub, [2, 4, 6]), tmp_path / "cache", []
    hub.watch = lambda: seen.append(len([*(cache / "download").glob("step-*")]))
    hub.faults["step6", "optimizer.bin"] = ["404"] * 50
    with pytest.raises((CheckpointError, FileNotFoundError)):
        forces_from_states(series(hub), cache=cache, progress=False)
    assert max(seen) == 1
    first, hub.faults = len(hub.served), {}
    table = forces_from_states(series(hub), cache=cache, progress=False)
    assert {revision for revision, name, _ in hub.served[first:] if name != "config.json"} == {"step6"}
    assert any(name.startswith("random_states") for _, name, _ in hub.served)  # they count the processes
    rows = log[log["step"].isin([2, 4, 6])].reset_index(drop=True)
    for force in ("alignment", "injection", "decay"):
        np.testing.assert_allclose(table[force], rows[force], rtol=1e-6)
    assert not weight_files(cache)
    last = len(hub.served)
    again = forces_from_states(series(hub), cache=cache, progress=False)
    pd.testing.assert_frame_equal(again, table)
    assert all(name == "config.json" for _, name, _ in hub.served[last:])
    assert len(forces_from_states(series(hub), views=False, cache=False, progress=False)) == len(table)
