"""What is the same has the same fingerprint, wherever it lies; what is not has another."""

import shutil

import pytest

from let_plugin.config import TeacherConfig
from let_plugin.demo import TEACHER
from let_plugin.teacher.stored import fingerprints
from tests.support.fields import set_all


def test_a_teacher_is_its_files_not_their_place(tmp_path, tiny_teacher):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_teacher[0], copy)
    before = fingerprints.teacher(TeacherConfig(path=str(tiny_teacher[0]), spec="tiny_teacher"))
    assert fingerprints.teacher(TeacherConfig(path=str(copy), spec="tiny_teacher")) == before
    (copy / "notes.txt").write_text("not the teacher's")
    assert fingerprints.teacher(TeacherConfig(path=str(copy))) == before
    (shard,) = copy.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert fingerprints.teacher(TeacherConfig(path=str(copy))) != before
    (copy / "below").mkdir()
    (copy / "below/model.safetensors").write_bytes(content)
    before = fingerprints.teacher(TeacherConfig(path=str(copy)))
    (copy / "below/model.safetensors").write_bytes(content[:-1])
    assert fingerprints.teacher(TeacherConfig(path=str(copy))) != before


def test_large_files_are_sampled_at_both_ends(tmp_path):
    path = tmp_path / "model.gguf"
    zeros = bytes(2**21)  # twice the samples
    seen = set()
    for content in (zeros, b"x" + zeros[1:], zeros[1:] + b"x", zeros + b"\0"):
        path.write_bytes(content)
        seen.add(fingerprints.teacher(TeacherConfig(path=str(path))))
    assert len(seen) == 4


def test_a_registered_spec_brings_its_weights_and_what_is_elsewhere_goes_by_its_name():
    import let_plugin.demo.config_registry  # noqa: F401

    assert fingerprints.teacher(TeacherConfig(spec="demo_teacher")) == fingerprints.teacher(TeacherConfig(path=TEACHER))
    assert fingerprints.teacher(TeacherConfig(path="org/no-such-model")) == "org/no-such-model@unknown"
    assert fingerprints.teacher(TeacherConfig(spec="transformers")) == ""


@pytest.mark.parametrize("files", ["corpus.jsonl", "corpus/*.jsonl"])
def test_the_loader_is_what_decides_the_rows(config, tmp_path, files):
    def loader(folder, text="{}"):
        (folder / files).parent.mkdir(parents=True, exist_ok=True)
        (folder / files.replace("*", "a")).write_text(text)
        set_all(config, dataloader__dataset="text_files", dataloader__dataset_path=str(folder / files))
        return fingerprints.loader(config)

    before = loader(tmp_path / "one")
    assert loader(tmp_path / "two") == before
    assert loader(tmp_path / "two", text="{} ") != before
    loader(tmp_path / "one")
    config.dataloader.num_workers = 3
    assert fingerprints.loader(config) == before
    config.dataloader.infinite = False
    assert fingerprints.loader(config) != before
