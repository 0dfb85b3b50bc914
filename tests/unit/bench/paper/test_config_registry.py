"""The paper's configurations: checked as they are in train_configs/paper/, but for folders made here."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models

from let_plugin.bench.paper import config_registry
from let_plugin.config import load as toml_config
from let_plugin.config.errors import ConfigError
from let_plugin.preflight import checks as preflight
from let_plugin.runtime import data
from tests.support.jobs import ROOT

CONFIGS = {path.stem: path for path in sorted((ROOT / "train_configs/paper").glob("*.toml"))}
TABLE = (ROOT / "docs/paper_scale.md").read_text().split("<!-- table: begin -->")[1].split("<!-- table: end -->")[0]

# What each teacher's config.json on the hub says, and how many ids its tokenizer has.
TEACHERS = {
    "facebook/opt-125m": (
        50_265,
        {
            "model_type": "opt",
            "hidden_size": 768,
            "word_embed_proj_dim": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 50_272,
            "max_position_embeddings": 2048,
        },
    ),
    "EleutherAI/pythia-160m": (
        50_277,
        {
            "model_type": "gpt_neox",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 50_304,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
        },
    ),
    "HuggingFaceTB/SmolLM-135M": (
        49_152,
        {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49_152,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
    "meta-llama/Llama-3.2-1B": (
        128_256,
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "32")
    data.register()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Teacher's name on the hub -> a folder that passes for it where no weights are read."""
    made = {}
    for name, (num_ids, config) in TEACHERS.items():
        folder = tmp_path_factory.mktemp("teacher")
        vocabulary = {f"{name} {i}": i for i in range(num_ids)}
        Tokenizer(models.WordLevel(vocabulary, unk_token=f"{name} 0")).save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps(config))
        write_headers(folder)
        made[name] = str(folder)
    return made


def write_headers(folder):
    """A safetensors file with all the tensors that config.json asks for, in bf16; their bytes are a hole in it."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        trunk = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    header, size = {}, 0
    for name, tensor in trunk.state_dict().items():
        end = size + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


@pytest.fixture
def load(folders, tmp_path):
    """Loads a configuration by name, with options on top."""

    def load(name, *options):
        teacher = toml_config.load(CONFIGS[name], []).config.let.teacher.path
        own = ["--hf_assets_path", folders[teacher], "--let.teacher.path", folders[teacher]]
        return toml_config.load(CONFIGS[name], [*own, "--dump_folder", str(tmp_path), *options]).config

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


def test_every_function_has_its_file():
    bases = [toml_config.load(path, []).base for path in CONFIGS.values()]
    functions = [name for name in vars(config_registry) if name.startswith("llama_") and name != "llama_spec"]
    assert sorted(bases) == sorted(f"let_plugin.bench.paper.{name}" for name in functions)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_report_is_the_row_in_the_docs(name, load):
    config = load(name)
    report = preflight.run(config)
    print(report)
    assert table_row(name, report) in TABLE
    training = config.training
    tokens = training.steps * training.global_batch_size * training.seq_len
    assert abs(tokens / 20e9 - 1) < 1e-3
    warmup_tokens = config.lr_scheduler.warmup_steps * training.global_batch_size * training.seq_len
    assert abs(warmup_tokens / 375e6 - 1) < 1e-2  # GPT-3's
    (group,) = config.optimizer.param_groups
    assert group.optimizer_kwargs["betas"] == (0.9, 0.95)  # the file's lr leaves the rest as it is


@pytest.mark.parametrize("plan", ["data_parallel_replicate", "tensor_parallel", "pipeline_parallel"])
def test_other_plans_fit_32_ranks(plan, load):
    degree = "4" if plan == "data_parallel_replicate" else "2"
    preflight.run(load("3b_smollm_135m", f"--parallelism.{plan}_degree", degree))


def test_a_teacher_of_another_vocabulary_is_refused(load, folders):
    with pytest.raises(ConfigError, match="vocabulary is not the student's"):
        preflight.run(load("1_4b_smollm_135m", "--let.teacher.path", folders["EleutherAI/pythia-160m"]))


def test_without_a_network_the_report_says_what_is_missing(monkeypatch, load):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = load("1_4b_opt_125m", "--let.teacher.path", "facebook/opt-125m", "--hf_assets_path", "assets/hf/opt-125m")
    with pytest.raises(ConfigError) as info:
        preflight.run(config)
    problems = {problem.key: problem for problem in info.value.problems}
    assert sorted(problems) == ["hf_assets_path", "let.teacher.path"]
    assert "no local folder of that name either" in problems["let.teacher.path"].message


def test_a_local_copy_of_the_pile_is_looked_for(load, tmp_path):
    absent = str(tmp_path / "absent")
    options = ["--dataloader.dataset_path", absent, "--validator.dataloader.dataset_path", absent]
    with pytest.raises(ConfigError) as info:
        preflight.run(load("1_4b_opt_125m", *options))
    keys = sorted(problem.key for problem in info.value.problems)
    assert keys == ["dataloader.dataset_path", "validator.dataloader.dataset_path"]
