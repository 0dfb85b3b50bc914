"""Licences and data types, as the files state them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from let_plugin.config.errors import ConfigError
from let_plugin.preflight.weight_files import read_weight_files


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    return tmp_path


def test_size_and_data_types(folder):
    files = read_weight_files(str(folder))
    assert files.format == "safetensors"
    assert files.num_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert files.dtypes == {"F32": 2, "BF16": 1}


@pytest.mark.parametrize(
    ("readme", "config", "licence"),
    [
        (None, None, "not stated"),
        ("# A model\nlicense: mit\n", None, "not stated"),
        ("---\nlicense: apache-2.0\n---\n# A model\n", {"license": "mit"}, "apache-2.0 (README.md)"),
        ("---\nlicense: other\nlicense_name: mine\n---\n", None, "mine (README.md)"),
        ("---\nlicense: [\n---\n", {"license": "mit"}, "mit (config.json)"),
        ("---\ntags: []\n---\n", {"model_type": "llama"}, "not stated"),
    ],
)
def test_licence(folder, readme, config, licence):
    if readme is not None:
        (folder / "README.md").write_text(readme)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    assert read_weight_files(str(folder)).licence == licence


def test_a_licence_file(folder):
    (folder / "LICENSE.txt").touch()
    assert read_weight_files(str(folder)).licence == "see LICENSE.txt there"


def test_damaged_files(folder):
    (folder / "model-2.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(ConfigError, match=r"let\.teacher\.path.*cannot be read"):
        read_weight_files(str(folder))
