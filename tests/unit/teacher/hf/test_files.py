"""Which files make up a checkpoint, and what is said of those that are wrong; teachers on the hub."""

import json
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="pip install let-plugin[hf]")

from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.teacher.hf.files import INDEX, SINGLE_FILE
from let_plugin.teacher.open import open_teacher


def source_of(path, **fields):
    return open_teacher(TeacherConfig(path=str(path), **fields))


def problem_of(path, **fields):
    with pytest.raises(ConfigError) as info:
        source_of(path, **fields)
    (problem,) = info.value.problems
    return f"{problem.key}: {problem.message}"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TEACHER, tmp_path / "teacher"))


def split(folder, subfolder):
    """Two shards in a subfolder, and the index."""
    weights = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    (folder / subfolder).mkdir(exist_ok=True)
    weight_map = {}
    for i in range(2):
        name = f"{subfolder}/model-{i}.safetensors"
        part = dict(list(weights.items())[i::2])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def logits(source):
    model = source.language_model(dtype=torch.float32, device=torch.device("cpu"), seq_len=8)
    with torch.no_grad():
        return model(torch.arange(8)[None], None)


@pytest.mark.parametrize("spec", ["", "transformers"])
def test_shards_in_subfolders_and_behind_links_are_read(folder, spec):
    expected = logits(source_of(TEACHER, spec=spec))
    split(folder, "shards")
    file = folder / "shards/model-0.safetensors"
    blob = folder.parent / "blob"  # as in the hub's cache
    file.rename(blob)
    file.symlink_to(blob)
    assert torch.equal(logits(source_of(folder, spec=spec)), expected)


def test_an_index_that_leaves_the_folder_is_refused(folder):
    (folder.parent / "other").mkdir()
    split(folder, "../other")
    assert "names files outside the folder: ../other/model-0" in problem_of(folder)


def test_a_stale_index_is_told_from_files_that_are_missing(folder):
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    source_of(folder)  # model.safetensors is complete
    (folder / SINGLE_FILE).rename(folder / "part.safetensors")
    message = problem_of(folder)
    assert "names files that are not there: gone.safetensors; fetch them. The folder has part.safetensors" in message


def test_an_adapter_is_named_with_the_way_to_merge_it(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "it is an adapter (PEFT)" in problem_of(folder) and "merge_and_unload()" in problem_of(folder)


def test_a_local_teacher_has_no_revision(folder):
    assert problem_of(folder, revision="main").startswith("let.teacher.revision: only a teacher on the hub has one")


# The hub: the real client against a small server


class Hub(SimpleHTTPRequestHandler):
    """Serves one repository, "org/name", out of `directory`, and notes what it was asked for."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []
    commit = "a" * 40

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def answer(self):
        path = urlsplit(self.path).path
        self.asked.append(path)
        files = sorted(str(f.relative_to(self.directory)) for f in Path(self.directory).rglob("*") if f.is_file())
        if path.startswith("/api/models/org/name/tree/"):
            sizes = {f: Path(self.directory, f).stat().st_size for f in files}
            tree = [{"type": "file", "path": f, "size": n, "oid": "b" * 40} for f, n in sizes.items()]
            return self.send(json.dumps(tree).encode())
        if path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": f, "size": Path(self.directory, f).stat().st_size} for f in files]
            return self.send(json.dumps({"id": "org/name", "sha": self.commit, "siblings": siblings}).encode())
        prefix = f"/org/name/resolve/{self.commit}/"
        if not path.startswith(prefix) or path.removeprefix(prefix) not in files:
            return self.send(b"{}", 404)
        content = Path(self.directory, path.removeprefix(prefix)).read_bytes()
        if wanted := self.headers.get("range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            return self.send(content[int(first) : int(last or len(content)) + 1], 206)
        return self.send(content)

    def send(self, content, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content):x}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The folder that the hub serves as "org/name"."""
    server = ThreadingHTTPServer(("localhost", 0), partial(Hub, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    set_hub(monkeypatch, f"http://localhost:{server.server_port}", tmp_path / "cache")
    yield folder
    server.shutdown()


def set_hub(monkeypatch, endpoint, cache):
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_teacher_is_checked_by_its_headers_and_fetched_when_it_is_loaded(hub, sharded, monkeypatch):
    expected = logits(source_of(TEACHER))
    if sharded:
        split(hub, "shards")
    shutil.copy(Path(TOKENIZER, "tokenizer.json"), hub)
    source = source_of("org/name", revision="main")
    assert f"hub org/name@{'a' * 8} ({2 if sharded else 1} file" in source.info.description
    assert len(source.vocabulary()) == 4096
    snapshots = Path(hub.parent, "cache/models--org--name/snapshots", "a" * 40)
    assert (snapshots / "config.json").is_file() and not list(snapshots.rglob("*.safetensors"))
    assert torch.equal(logits(source), expected)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(logits(source_of("org/name", revision="a" * 40)), expected)


def test_a_hub_teacher_that_lacks_a_tensor_is_refused_by_its_headers(hub):
    weights = load_file(hub / SINGLE_FILE)
    save_file({k: v for k, v in weights.items() if k != "model.norm.weight"}, hub / SINGLE_FILE)
    assert "lacks tensors that its configuration asks for: norm.weight" in problem_of("org/name")


def test_a_repository_of_pickles_or_an_adapter_is_refused_before_anything_is_fetched(hub):
    (hub / SINGLE_FILE).rename(hub / "pytorch_model.bin")
    message = problem_of("org/name")
    assert "only pickled weights there" in message and "let.teacher.revision" in message
    (hub / "adapter_config.json").write_text("{}")
    assert "it is an adapter (PEFT)" in problem_of("org/name")
    assert not [path for path in Hub.asked if "/resolve/" in path], Hub.asked


def test_without_a_network_one_error_within_ten_seconds(tmp_path, monkeypatch, caplog, capfd):
    set_hub(monkeypatch, "http://localhost:9", tmp_path)
    started = time.monotonic()
    assert "the hub cannot be reached or read (ConnectError), and it is not in the hub client's cache" in problem_of(
        "org/name"
    )
    assert time.monotonic() - started < 10
    assert not caplog.records and "etry" not in capfd.readouterr().err
