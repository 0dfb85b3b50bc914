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

from let_plugin.demo import TEACHER, TOKENIZER
from let_plugin.teacher.hf.files import INDEX, SINGLE_FILE
from tests.support.hf_models import config_with, language_model, opened
from tests.support.problems import problem_of


def message_of(path):
    return problem_of(opened, path).message


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


@torch.no_grad()
def logits(source):
    return language_model(source)(torch.arange(8)[None], None)


@pytest.mark.parametrize("spec", ["", "transformers"])
def test_shards_in_subfolders_and_behind_links_are_read(folder, spec):
    expected = logits(opened(TEACHER, spec=spec))
    split(folder, "shards")
    file = folder / "shards/model-0.safetensors"
    blob = folder.parent / "blob"  # as in the hub's cache
    file.rename(blob)
    file.symlink_to(blob)
    assert torch.equal(logits(opened(folder, spec=spec)), expected)


def test_an_index_that_is_wrong(folder):
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    opened(folder)  # model.safetensors is complete
    (folder / SINGLE_FILE).rename(folder / "part.safetensors")
    assert "names files that are not there: gone.safetensors; fetch them" in message_of(folder)
    (folder / "part.safetensors").rename(folder / SINGLE_FILE)
    (folder.parent / "other").mkdir()
    split(folder, "../other")
    assert "names files outside the folder: ../other/model-0" in message_of(folder)


# The hub: the real client against a small server


class Hub(SimpleHTTPRequestHandler):
    """Serves one repository, "org/name", out of `directory`, and notes what it was asked for."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []
    commit = "a" * 40

    def do_GET(self):
        path = urlsplit(self.path).path
        self.asked.append(path)
        files = [str(f.relative_to(self.directory)) for f in Path(self.directory).rglob("*") if f.is_file()]
        name = path.removeprefix(f"/org/name/resolve/{self.commit}/")
        if path.startswith("/api/models/org/name/tree/"):
            sizes = {file: Path(self.directory, file).stat().st_size for file in files}
            tree = [{"type": "file", "path": file, "size": size, "oid": "b" * 40} for file, size in sizes.items()]
            self.send(json.dumps(tree).encode())
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": file} for file in files]
            self.send(json.dumps({"id": "org/name", "sha": self.commit, "siblings": siblings}).encode())
        elif name in files:
            self.send(Path(self.directory, name).read_bytes())
        else:
            self.send(b"{}", 404)

    do_HEAD = do_GET

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
    constants = {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
    for name, value in {**constants, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)


def test_a_hub_teacher_is_fetched_once_and_read_from_the_cache_without_a_network(hub, monkeypatch):
    expected = logits(opened(TEACHER))
    split(hub, "shards")
    shutil.copy(Path(TOKENIZER, "tokenizer.json"), hub)
    source = opened("org/name")
    assert "hub org/name (commit aaaaaaaa)" in source.info.description and len(source.vocabulary()) == 4096
    assert torch.equal(logits(source), expected)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = opened("org/name")
    assert "hub org/name (in the cache)" in source.info.description
    assert torch.equal(logits(source), expected)


def test_what_cannot_be_a_teacher_is_refused_before_its_weights_are_fetched(hub):
    config_with(quantization_config={"quant_method": "gptq"})(hub)
    assert "its weights are quantized" in message_of("org/name")
    (hub / SINGLE_FILE).rename(hub / "pytorch_model.bin")
    message = message_of("org/name")
    assert "only pickled weights there" in message and "let.teacher.revision" in message
    (hub / "adapter_config.json").write_text("{}")
    assert "it is an adapter (PEFT)" in message_of("org/name") and "merge_and_unload()" in message_of(hub)
    assert problem_of(opened, hub, revision="main").key == "let.teacher.revision"
    assert not [path for path in Hub.asked if path.endswith((".bin", ".safetensors"))], Hub.asked


def test_without_a_network_or_a_repository_one_error_within_ten_seconds(hub, tmp_path, monkeypatch, caplog, capfd):
    assert "there is no such folder, and the hub refuses it: Client error '404" in message_of("org/other")
    set_hub(monkeypatch, "http://localhost:9", tmp_path)
    started = time.monotonic()
    assert "there is no such folder, and it is not in the hub client's cache" in message_of("org/name")
    assert time.monotonic() - started < 10
    assert [record.message.split(":")[0] for record in caplog.records] == ["LET"] and "ConnectError" in caplog.text
    assert "etry" not in capfd.readouterr().err
