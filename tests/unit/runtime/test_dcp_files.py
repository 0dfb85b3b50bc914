"""Torch's checkpoints are read as torch reads them, and run no code."""

import contextlib
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.metadata import Metadata

from let_plugin.bench import export_hf
from let_plugin.bench.converge import stacking
from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.preflight import checks as preflight
from let_plugin.preflight import teacher_cli as cli
from let_plugin.runtime import checkpoint, dcp_files
from let_plugin.teacher.titan.source import TitanTeacherSource


class Creates:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return open, (str(self._path), "w")


@pytest.fixture
def evidence(tmp_path):
    """The path of a file that is not there, and must not be there after the test."""
    path = tmp_path / "evidence"
    yield path
    assert not path.exists()


REFUSED = r"\.metadata is not one that torch has written, or is damaged"


@pytest.mark.parametrize("within", [False, True])
def test_every_reader_refuses_what_torch_itself_would_run(within, tiny_teacher, evidence, config, capsys, tmp_path):
    malicious = str(shutil.copytree(tiny_teacher[0], tmp_path / "malicious"))
    opened = TitanTeacherSource(TeacherConfig(spec="tiny_teacher", path=malicious))  # before the file was exchanged
    content = Creates(evidence)
    if within:
        described = dcp.FileSystemReader(malicious).read_metadata()
        described.planner_data, content = {"x": content}, described
    (tmp_path / "malicious" / ".metadata").write_bytes(pickle.dumps(content))
    with contextlib.suppress(AttributeError):  # afterwards
        dcp.FileSystemReader(malicious).read_metadata()
    evidence.unlink()  # torch has run it

    with pytest.raises(ValueError, match=REFUSED):
        dcp_files.open_checkpoint(malicious).read_metadata()

    config.let.teacher.path = malicious
    config.checkpoint.enable = True
    config.checkpoint.initial_load_path = malicious
    config.checkpoint.initial_load_model_only = False
    teacher, resumed = r"let\.teacher\.path", r"checkpoint\.initial_load_path"
    for key, reads in (
        (teacher, lambda: TitanTeacherSource(config.let.teacher)),
        (teacher, lambda: opened.language_model(dtype=torch.float32, device=torch.device("cpu"), seq_len=8)),
        (teacher, lambda: preflight.run(config)),
        (resumed, lambda: checkpoint.find(config)),
        ("let", lambda: checkpoint.read("own", None, malicious)),
        ("", lambda: stacking.grow(config, 2, malicious, tmp_path / "out")),
        ("", lambda: export_hf.export(config, malicious, tmp_path / "out")),
    ):
        with pytest.raises(ConfigError, match=rf"{key}.*{REFUSED}: it asks for (_io|io)\.open"):
            reads()

    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", malicious, "--spec", "tiny_teacher", "--device", "cpu"])
    assert "it asks for" in capsys.readouterr().err


NAMED = ["os.system", "torch.load", "torch.hub.load", "builtins.eval", "torch.Tensor"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *(("c{}\n{}\n.".format(*name.rsplit(".", 1)).encode(), f"it asks for {name}") for name in NAMED),
        *((content, "") for content in (b"", b"x", pickle.dumps(3), pickle.dumps(Metadata(3)))),
    ],
)
def test_what_is_no_metadata_is_refused(tmp_path, content, reason):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=f"{REFUSED}: .*{reason}"):
        dcp_files.open_checkpoint(str(tmp_path)).read_metadata()


@pytest.mark.parametrize("wanted", [torch.zeros(2), 0.0])
def test_values_run_no_code(tmp_path, evidence, wanted):
    """What is no tensor is pickled in torch's files; a file may say so of what should be a tensor."""
    dcp.save({"optimizer": {"lr": Creates(evidence)}}, checkpoint_id=str(tmp_path), no_dist=True)
    state = {"optimizer": {"lr": wanted}}
    with pytest.raises(ValueError, match="not a tensor there" if torch.is_tensor(wanted) else "Weights only"):
        dcp_files.load(state, dcp_files.open_checkpoint(str(tmp_path)))


# What torch has written


@pytest.mark.parametrize("where", ["local", "memory://dcp_files"])
def test_a_training_checkpoint_is_read_as_torch_reads_it(tmp_path, where):
    """Weights of several data types, an optimizer's state with all its settings, and values that are no tensors."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.99))
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = {
        "model": {**model.state_dict(), "half": torch.ones(2, dtype=torch.bfloat16), "step": torch.tensor(3)},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"last_epoch": 3, "_last_lr": [0.5]},
        "train_state": {"step": 3, "name": "x", "bytes": b"x", "nothing": None},
        "channels": torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last),
    }
    path = str(tmp_path / "step-3") if where == "local" else where
    dcp.save(saved, checkpoint_id=path, no_dist=True)
    reader = dcp_files.open_checkpoint(path)
    plain = dcp.FileSystemReader(path) if where == "local" else FsspecReader(path)
    expected, got = vars(plain.read_metadata()), vars(reader.read_metadata())
    for name in ("state_dict_metadata", "storage_data", "planner_data"):
        assert got[name] == expected[name]
    state = torch.utils._pytree.tree_map(lambda x: torch.zeros_like(x) if torch.is_tensor(x) else type(x)(), saved)
    dcp_files.load(state, reader)
    flat, flat_saved = (torch.utils._pytree.tree_leaves_with_path(tree) for tree in (state, saved))
    for (path, value), (same_path, expected_value) in zip(flat, flat_saved, strict=True):
        assert path == same_path
        assert torch.equal(value, expected_value) if torch.is_tensor(value) else value == expected_value


def test_a_tensor_of_which_a_part_is_in_no_file(tmp_path):
    """`test_titan_weights.py` has files that are missing or truncated."""
    dcp.save({"a": torch.ones(1000)}, checkpoint_id=str(tmp_path), no_dist=True)
    described = dcp_files.open_checkpoint(str(tmp_path)).read_metadata()
    described.state_dict_metadata["a"].size = torch.Size([1001])
    assert dcp_files.incomplete(described, ["a"], tmp_path) == {"a": "its parts are not all there"}
