"""The paper's configurations: checked as they are in train_configs/paper/, but for folders made here."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models

from let_plugin.config import load as toml_config
from let_plugin.preflight import checks as preflight
from let_plugin.runtime import data
from tests.support.jobs import ROOT

CONFIGS = {path.stem: path for path in sorted((ROOT / "train_configs/paper").glob("*.toml"))}
TABLE = (ROOT / "docs/paper_scale.md").read_text().split("<!-- table: begin -->")[1].split("<!-- table: end -->")[0]

# How many ids each teacher's tokenizer has, and what its config.json on the hub says of its shape .
WIDE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048}
LLAMA = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 2048}
SMOLLM = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
LLAMA_3_2 = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
PYTHIA = {"model_type": "gpt_neox", "intermediate_size": 3072, "vocab_size": 50_304, "rotary_pct": 0.25}
TEACHERS = {
    "facebook/opt-125m": (50_265, WIDE | {"model_type": "opt", "ffn_dim": 3072, "vocab_size": 50_272}),
    "EleutherAI/pythia-160m": (50_277, WIDE | PYTHIA),
    "HuggingFaceTB/SmolLM-135M": (49_152, LLAMA | SMOLLM | {"num_key_value_heads": 3, "vocab_size": 49_152}),
    "meta-llama/Llama-3.2-1B": (128_256, LLAMA | LLAMA_3_2 | {"num_key_value_heads": 8, "vocab_size": 128_256}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Teacher's name on the hub -> a folder that passes for it where no weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}
    for name, (num_ids, config) in TEACHERS.items():
        folder = tmp_path_factory.mktemp("teacher")
        vocabulary = {f"{name} {i}": i for i in range(num_ids)}
        Tokenizer(models.WordLevel(vocabulary, unk_token=f"{name} 0")).save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps(config))
        # A safetensors file with all tensors that config.json asks for, in bf16; their bytes are a hole in it.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        header, size = {}, 0
        for key, tensor in model.state_dict().items():
            end = size + 2 * tensor.numel()
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [size, end]}
            size = end
        text = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
        made[name] = str(folder)
    return made


@pytest.fixture
def load(folders, tmp_path, monkeypatch):
    """Loads a configuration by name for 32 ranks, with options on top."""
    monkeypatch.setenv("WORLD_SIZE", "32")
    data.register()

    def load(name, *options):
        teacher = folders[toml_config.resolve(toml_config.read([str(CONFIGS[name])])).config.let.teacher.path]
        own = ["--hf_assets_path", teacher, "--let.teacher.path", teacher, "--dump_folder", str(tmp_path)]
        return toml_config.load(CONFIGS[name], [*own, *options]).config

    return load


def table_row(name, report):
    """A configuration's row in docs/paper_scale.md, out of its report."""
    lines = dict(re.findall(r"^  (\S+) +(.*)$", report, flags=re.M))
    cells = [
        f"`{name}`",
        re.search(r"([\d,]+) parameters$", lines["student"])[1],
        re.search(r"([\d,]+) parameters in its trunk", lines["teacher"])[1],
        re.search(r"output of student block (\d+)", lines["alignment"])[1],
        re.search(r"\+ ([\d.]+%)", lines["overhead"])[1],
        re.search(r"at ([\d.]+x)", lines["break-even"])[1],
        re.search(r"\+ ([\d.]+ MiB)", lines["memory"])[1],
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_report_is_the_row_in_the_docs(name, load):
    config = load(name)
    assert table_row(name, preflight.run(config)) in TABLE
    training = config.training
    tokens_per_step = training.global_batch_size * training.seq_len
    assert training.steps * tokens_per_step == pytest.approx(20e9, rel=1e-3)
    assert config.lr_scheduler.warmup_steps * tokens_per_step == pytest.approx(375e6, rel=1e-2)  # GPT-3's
    (group,) = config.optimizer.param_groups
    assert group.optimizer_kwargs["betas"] == (0.9, 0.95)  # the file's lr leaves the rest as it is
