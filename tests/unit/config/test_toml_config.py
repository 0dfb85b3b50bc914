"""TOML + command line -> configuration, and back."""

import dataclasses
import gc
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss, MSELoss
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.trainer import Trainer

from let_plugin.config import RuntimeConfig, plan
from let_plugin.config import load as toml_config
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.config.load import Loaded, dump, load, read, resolve
from let_plugin.tokens.tiktoken import TikTokenTokenizer
from tests.support.jobs import ROOT

DEBUG_MODEL = 'base = "llama3.llama3_debugmodel"\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An own working directory and module path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def load_text(text, *cli, base=DEBUG_MODEL):
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(base + text)
        file.flush()
        return load(Path(file.name), list(cli))


def resolve_text(text, *cli, base=DEBUG_MODEL):
    Path("run.toml").write_text(base + text)
    return resolve(read(["run.toml", *cli]))


def config_of(text="", *cli, base=DEBUG_MODEL):
    return load_text(text, *cli, base=base).config


def problems_of(text, *cli, base=DEBUG_MODEL):
    """Dotted key -> message."""
    with pytest.raises(ConfigError) as info:
        load_text(text, *cli, base=base)
    assert all(problem.source.endswith(".toml") for problem in info.value.problems)
    return {problem.key: problem.message for problem in info.value.problems}


def comparable(loaded):
    """Without what holds functions, which a base makes anew at each call, so that they never compare equal."""
    config = dataclasses.replace(loaded.config, model_spec=None)
    if hasattr(config.dataloader, "sample_processor"):
        config.dataloader = dataclasses.replace(config.dataloader, sample_processor=len)
    return config


def assert_round_trip(loaded):
    text = dump(loaded)
    again = load_text(text, base="")
    assert comparable(again) == comparable(loaded)
    assert again.base == loaded.base
    assert again.config.model_spec.flavor == loaded.config.model_spec.flavor
    assert dump(again) == text


# --- precedence and values


def test_base_alone_is_the_base():
    config = config_of()
    assert isinstance(config, Trainer.Config)
    assert (config.training.steps, config.training.seq_len) == (10, 2048)
    assert config.model_spec.flavor == "debugmodel"
    assert not config.let.enable


def test_command_line_over_toml_over_base():
    config = config_of("[training]\nsteps = 20\nseq_len = 64\n", "--training.steps", "30")
    assert (config.training.steps, config.training.seq_len, config.training.local_batch_size) == (30, 64, 8)


def test_values_keep_their_types():
    config = config_of(
        'dump_folder = "x"\n[let]\nweight = 1\n[training]\nmax_norm = 2\n'
        '[compile]\ncomponents = ["model"]\n[parallelism]\nmodule_fqns_per_model_part = [["a"], ["b", "c"]]\n'
        '[override]\nimports = ["a.b", ["c.d", { size = 1 }]]\n'
    )
    assert config.dump_folder == "x"
    assert type(config.let.weight) is float
    assert type(config.training.max_norm) is int  # its type is float | int
    assert config.compile.components == ["model"]
    assert config.parallelism.module_fqns_per_model_part == [["a"], ["b", "c"]]
    assert config.override.imports == ["a.b", ("c.d", {"size": 1})]


@pytest.mark.parametrize("none", ["none", "None"])
def test_none_for_optional_fields_only(none):
    assert config_of().lr_scheduler.decay_ratio == 0.8
    assert config_of(f'[lr_scheduler]\ndecay_ratio = "{none}"\n').lr_scheduler.decay_ratio is None
    assert config_of(f'[compile]\nbackend = "{none}"\n').compile.backend == none
    assert problems_of(f'[training]\nsteps = "{none}"\n') == {"training.steps": "expected an integer"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.steps", '"five"', "expected an integer"),
        ("training.steps", "true", "expected an integer"),
        ("training.steps", "5.0", "expected an integer"),
        ("training.gc_debug", "1", "expected true or false"),
        ("training.max_norm", '"1"', "expected a number or an integer"),
        ("let.weight", "true", "expected a number"),
        ("let.stop_step", "1.5", "expected an integer"),
        ("dump_folder", "3", "expected a string"),
        ("training.dtype", '"bfloat61"', "not a valid choice; did you mean 'bfloat16'? valid names: bfloat16, float32"),
        ("compile.components", '"model"', "expected an array"),
        ("training", "3", "expected a table"),
        ("let", "true", "expected a table"),
        ("optimizer.param_groups.0.optimizer_kwargs.lr", '"1e-3"', "expected a number"),
    ],
)
def test_wrong_type(key, value, message):
    assert problems_of(f"{key} = {value}\n") == {key: message}


def test_wrong_element_of_an_array():
    assert problems_of('[compile]\ncomponents = ["model", 3]\n') == {
        "compile.components": "element 1: expected a string"
    }


# --- lists and dicts


def test_table_with_integer_keys_overlays_an_element_and_keeps_the_rest():
    (group,) = config_of("[optimizer.param_groups.0.optimizer_kwargs]\nlr = 1\n").optimizer.param_groups
    assert group.pattern == ".*"
    assert group.optimizer_kwargs == {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    assert type(group.optimizer_kwargs["lr"]) is float


def test_overlays_do_not_reach_the_next_load():
    config_of("[optimizer.param_groups.0.optimizer_kwargs]\nlr = 1.0\n[training]\nsteps = 1\n")
    config = config_of()
    assert (config.optimizer.param_groups[0].optimizer_kwargs["lr"], config.training.steps) == (8e-4, 10)


def test_array_of_tables_replaces_the_list():
    text = """
    [[optimizer.param_groups]]
    pattern = "norm"
    optimizer_name = "Adam"
    optimizer_kwargs = { lr = 0.1, betas = [0.5, 0.6] }
    [[optimizer.param_groups]]
    pattern = ".*"
    optimizer_name = "AdamW"
    """
    first, second = config_of(text).optimizer.param_groups
    assert (first.pattern, first.optimizer_kwargs) == ("norm", {"lr": 0.1, "betas": (0.5, 0.6)})
    assert (second.optimizer_name, second.optimizer_kwargs) == ("AdamW", {})


def test_mistakes_in_lists():
    problems = problems_of('[[optimizer.param_groups]]\npattern = ".*"\nlr = 1.0\n')
    assert problems["optimizer.param_groups.0.optimizer_name"].startswith("missing")
    assert "optimizer_kwargs.lr" in problems["optimizer.param_groups.0.lr"]
    assert "valid names: 0" in problems_of('[optimizer.param_groups.1]\npattern = "x"\n')["optimizer.param_groups.1"]


# --- polymorphic fields


def test_type_by_class_name_starts_from_the_new_class_defaults():
    assert config_of().loss.loss_fn.global_vocab_size == 2048
    config = config_of('[loss]\ntype = "CrossEntropyLoss"\n')
    assert config.loss == CrossEntropyLoss.Config()


def test_type_of_the_current_class_overlays():
    config = config_of('[loss]\ntype = "ChunkedLossWrapper"\nnum_chunks = 4\n')
    assert config.loss == ChunkedLossWrapper.Config(
        num_chunks=4, loss_fn=CrossEntropyLoss.Config(global_vocab_size=2048)
    )


def test_type_in_a_nested_table():
    assert config_of('[loss.loss_fn]\ntype = "MSELoss"\n').loss.loss_fn == MSELoss.Config()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("selective", SelectiveAC.Config()),
        ("full", FullAC.Config()),
        ("FullAC", FullAC.Config()),
        ("torchtitan.distributed.activation_checkpoint.FullAC", FullAC.Config()),
        ("torchtitan.distributed.activation_checkpoint.FullAC.Config", FullAC.Config()),
        ("memory-budget", MemoryBudgetAC.Config()),
        ("none", None),
    ],
)
def test_activation_checkpoint_types(name, expected):
    text = f'[activation_checkpoint]\ntype = "{name}"\n[compile]\nenable = true\n'
    assert config_of(text).activation_checkpoint == expected


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ('[loss]\ntype = "CrossEntropy"', "loss.type", "did you mean 'CrossEntropyLoss'"),
        ('[loss]\ntype = "torchtitan.components.loss.Loss"', "loss.type", "cannot be imported"),
        ('[loss]\ntype = "no_such_package.Loss"', "loss.type", "No module named 'no_such_package'"),
        (
            '[loss]\ntype = "torchtitan.trainer.Trainer"',
            "loss.type",
            "subclass of torchtitan.components.loss.BaseLoss.Config",
        ),
        ("[loss]\ntype = 3", "loss.type", "expected a string"),
        ('[activation_checkpoint]\ntype = "none"\ndebug = true', "activation_checkpoint.debug", "not together"),
        ("[activation_checkpoint]\nmemory_budget = 0.1", "activation_checkpoint.memory_budget", "'memory-budget'"),
        ('[tokenizer]\ntype = "MultiModalTokenizer"', "tokenizer.pad_token", "missing; MultiModalTokenizer needs it"),
        ('[dataloader]\ntype = "ChatDataLoader"\ndataset_path = "x"', "dataloader", "needs sample_processor"),
    ],
)
def test_wrong_type_key(text, key, message):
    assert re.search(message, problems_of(text)[key])


def test_users_own_class(folder):
    (folder / "my_losses_a.py").write_text("""
from dataclasses import dataclass
from torchtitan.components.loss import CrossEntropyLoss

class MyLoss(CrossEntropyLoss):
    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        temperature: float = 1.0
""")
    loaded = load_text('[loss]\ntype = "my_losses_a.MyLoss"\ntemperature = 2\n')
    assert type(loaded.config.loss).__module__ == "my_losses_a"
    assert loaded.config.loss.temperature == 2.0
    assert_round_trip(loaded)


def test_class_without_an_owner_is_known_by_its_own_name(folder):
    """dataclass(slots=True) leaves a second class of that name behind until the garbage is collected."""
    (folder / "my_losses_b.py").write_text("""
from dataclasses import dataclass
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.models.llama3.config_registry import llama3_debugmodel as debugmodel

@dataclass(kw_only=True, slots=True)
class WarmLoss(CrossEntropyLoss.Config):
    temperature: float = 1.0

def mine():
    return debugmodel()
""")
    base = 'base = "my_losses_b.mine"\n'
    gc.disable()
    try:
        loaded = load_text('[loss]\ntype = "WarmLoss"\ntemperature = 2\n', base=base)
    finally:
        gc.enable()
    assert type(loaded.config.loss) is sys.modules["my_losses_b"].WarmLoss
    assert_round_trip(loaded)


def test_two_classes_of_one_name_need_the_full_name(folder):
    for module in ("my_losses_c", "my_losses_d"):
        (folder / f"{module}.py").write_text("""
from dataclasses import dataclass
from torchtitan.components.loss import CrossEntropyLoss

class TwinLoss(CrossEntropyLoss):
    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        pass
""")
        loaded = load_text(f'[loss]\ntype = "{module}.TwinLoss"\n')
        assert type(loaded.config.loss).__module__ == module
    message = problems_of('[loss]\ntype = "TwinLoss"\n')["loss.type"]
    assert "my_losses_c.TwinLoss" in message
    assert "my_losses_d.TwinLoss" in message


# --- unknown and old keys


def test_unknown_key_suggests_a_sibling():
    assert problems_of("[training]\nstep = 3\n")["training.step"].startswith("unknown; did you mean 'steps'?")
    assert "did you mean 'training'" in problems_of("[trainign]\nsteps = 3\n")["trainign"]


def test_unknown_key_that_exists_elsewhere():
    assert "training.steps" in problems_of("steps = 3\n")["steps"]
    assert "let.stop_step" in problems_of("[training]\nstop_step = 3\n")["training.stop_step"]


def test_fields_that_only_python_sets():
    assert "`base` chooses the model" in problems_of('model_spec = "x"\n')["model_spec"]
    problems = problems_of('[profiler]\ntrace_post_processor = "x"\n')
    assert "only Python" in problems["profiler.trace_post_processor"]
    assert "unknown" in problems_of("[loss]\n_owner = 3\n")["loss._owner"]


def test_all_problems_at_once():
    problems = problems_of('[training]\nsteps = "x"\nsequence_len = 3\n[optimizer]\nlr = 1e-3\n[loss]\ntype = "No"\n')
    assert set(problems) == {"training.steps", "training.sequence_len", "optimizer.lr", "loss.type"}


OLD_FILE = """
[job]
dump_folder = "x"
[training]
dataset = "c4"
steps = 3
[metrics]
enable_color_printing = true
"""


@pytest.mark.parametrize("base", ["", 'base = "llama3.no_such"\n', DEBUG_MODEL])
def test_old_file_is_explained_at_once(base):
    problems = problems_of(OLD_FILE, base=base)
    expected = {"job", "metrics.enable_color_printing"}
    assert set(problems) == expected | ({"training.dataset"} if base == DEBUG_MODEL else {"base"})
    assert "dataloader.dataset" in problems.get("training.dataset", "dataloader.dataset")
    assert "metrics.disable_color_printing" in problems["metrics.enable_color_printing"]


def test_the_own_tables_are_checked_without_a_base():
    problems = problems_of('[let]\nwieght = 1\nteacher = 3\n[runtime]\ndevice = "gpu"\n', base="")
    assert set(problems) == {"base", "let.wieght", "let.teacher", "runtime.device"}


# --- checks of the configuration classes


def test_post_init_names_the_key():
    assert problems_of("[validator]\nsteps = 0\n") == {"validator.steps": "validation steps must be positive or -1"}
    problems = problems_of("[compile]\nbackend = 'eager'\nenable_async_tensor_parallel = true\n")
    assert list(problems) == ["compile.enable_async_tensor_parallel"]
    assert "Async TP requires" in problems["compile.enable_async_tensor_parallel"]


def test_all_that_post_init_refuses_at_once():
    loaded = resolve_text("[checkpoint]\ninterval = 0\nkeep_latest_k = 1\nfoldr = 'x'\nfolder = 'y'\n")
    assert [problem.key for problem in loaded.problems] == [
        "checkpoint.foldr",
        "checkpoint.interval",
        "checkpoint.keep_latest_k",
    ]
    assert loaded.problems[1].value == 0
    assert loaded.config.checkpoint.folder == "y"


def test_post_init_that_complains_about_a_value_that_is_wrong_already():
    problems = problems_of('[compile]\nenable = "yes"\nenable_async_tensor_parallel = true\n')
    assert list(problems) == ["compile.enable"]


def test_post_init_of_a_new_class():
    text = '[dataloader]\ntype = "InterleavedHuggingFaceTextDataLoader"\nsources = []\n'
    assert problems_of(text) == {"dataloader": "At least one source should be defined."}


def test_post_init_of_the_whole():
    problems = problems_of("[parallelism]\npipeline_parallel_degree = 2\n")
    assert list(problems) == ["parallelism"]
    assert "CUDA graphs" in problems["parallelism"]
    text = "[parallelism]\npipeline_parallel_degree = 2\n[training]\ndisable_cuda_graphs = true\n"
    assert config_of(text).parallelism.pipeline_parallel_degree == 2


# --- [let] and [runtime]


def test_let_table_turns_let_on():
    assert config_of("[let]\n").let.enable
    assert config_of("[let.teacher]\npath = 'x'\n").let.enable
    assert not config_of("[let]\nenable = false\nweight = 0.2\n").let.enable
    assert not config_of("", "--let.weight", "0.2").let.enable


def test_teacher_shorthand():
    let = config_of('[let]\nteacher = "some/path"\n').let
    assert (let.teacher.path, let.enable) == ("some/path", True)


def test_read(folder):
    path = folder / "a.toml"
    path.write_text('base = "x.y"\n[runtime]\ndevice = "cpu"\n')
    assert read([str(path)]).runtime == RuntimeConfig(device="cpu")
    assert read([str(path), "--runtime.device", "auto"]).runtime.device == "auto"
    assert read([str(path), "--runtime.device=auto", "--training.steps=3"]).runtime.device == "auto"
    path.write_text("")
    assert read([str(path)]).runtime == RuntimeConfig()


@pytest.mark.parametrize(
    ("text", "cli", "message"),
    [
        ('[runtime]\ndevice = "gpu"\n', [], "valid names: auto, cpu"),
        ("runtime = 3\n", [], "expected a table"),
        ("[runtime]\ndevise = 'cpu'\n", [], "did you mean 'device'"),
        ("", ["--runtime.device", "tpu"], "command line: runtime.device = 'tpu'"),
        ("", ["--runtime.device"], "valid names: auto, cpu"),
    ],
)
def test_runtime_errors_wait_for_the_others(folder, text, cli, message):
    (folder / "a.toml").write_text(DEBUG_MODEL + text)
    assert read(["a.toml", *cli]).runtime == RuntimeConfig()
    with pytest.raises(ConfigError, match=message):
        load(Path("a.toml"), cli)


def test_read_needs_the_file_first():
    with pytest.raises(ConfigError, match="the first argument is the TOML file"):
        read(["--training.steps", "3"])


def test_read_imports_neither_torch_nor_torchtitan(folder):
    (folder / "a.toml").write_text("[runtime]\ndevice = 'cpu'\n")
    code = (
        "import sys; from let_plugin.config.load import read; "
        "print(read(['a.toml']).runtime.device, {'torch', 'torchtitan'} & set(sys.modules))"
    )
    root = str(Path(toml_config.__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert run.stdout.strip() == "cpu set()", run.stderr


# --- files


def test_unreadable_files(folder):
    (folder / "bad.toml").write_text("a = \n")
    (folder / "binary.toml").write_bytes(b"\xff\xfe")
    for name, message in [
        ("missing.toml", "no such file"),
        (".", "a folder"),
        ("bad.toml", "not valid TOML.*line 1"),
        ("binary.toml", "not a text file in UTF-8"),
        ("bad.toml/x", "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load(Path(name), [])


# --- shipped files


@pytest.mark.parametrize("path", sorted((ROOT / "train_configs").rglob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_run_can_be_shortened(path):
    config = load(path, ["--training.steps", "10"]).config
    assert not config.let.enable or 0 < plan.stop_step(config, 1) <= 10


def test_the_home_folder_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = 'dump_folder = "~/out"\n[let]\nteacher = "~/teacher"\n[tokenizer]\ntype = "TikTokenTokenizer"\n'
    text += 'eos_token = "~"\n'
    config = config_of(text, "--hf_assets_path=~/tokenizer", "--dataloader.dataset_path", "~/data")
    assert (config.dump_folder, config.let.teacher.path) == ("/home/me/out", "/home/me/teacher")
    assert (config.hf_assets_path, config.dataloader.dataset_path) == ("/home/me/tokenizer", "/home/me/data")
    assert config.tokenizer.eos_token == "~"


# --- base


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("3", "expected .module.function"),
        ('"llama3_debugmodel"', "expected .module.function"),
        ('"llama.llama3_debugmodel"', "did you mean 'llama3'"),
        ('"llama3.llama3_debug"', "no function 'llama3_debug'.*did you mean 'llama3_debugmodel'"),
        ('"no_such.module.f"', "no module 'no_such.module'"),
        ('"deepseek_v3.enable_fused_swiglu"', "takes no arguments"),
    ],
)
def test_wrong_base(base, message):
    problems = problems_of("", base=f"base = {base}\n")
    assert re.search(message, problems["base"])


def test_own_module_in_the_working_directory(folder):
    (folder / "my_configs_a.py").write_text("""
from torchtitan.models.llama3.config_registry import llama3_debugmodel

def mine():
    config = llama3_debugmodel()
    config.training.steps = 77
    return config

def fails():
    return helper({})

def helper(sizes):
    return sizes["width"]

def wrong():
    return 3
""")
    assert config_of(base='base = "my_configs_a.mine"\n').training.steps == 77
    first, *frames = problems_of("", base='base = "my_configs_a.fails"\n')["base"].splitlines()
    assert first == "my_configs_a.fails failed: KeyError: 'width'"
    file = folder / "my_configs_a.py"
    assert frames == [
        f"    {file}:10, in fails: return helper({{}})",
        f'    {file}:13, in helper: return sizes["width"]',
    ]
    assert "returns a int" in problems_of("", base='base = "my_configs_a.wrong"\n')["base"]
    assert problems_of("", base='base = "my_configs_a.nine"\n')["base"].endswith("valid names: fails, mine, wrong")


def test_own_module_that_fails_to_import_says_why(folder):
    (folder / "my_configs_b.py").write_text("import no_such_dependency\n")
    package = folder / "my_package_b"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "config_registry.py").write_text("from torchtitan.trainer import NoSuchName\n")
    assert "No module named 'no_such_dependency'" in problems_of("", base='base = "my_configs_b.f"\n')["base"]
    assert "cannot import name 'NoSuchName'" in problems_of("", base='base = "my_package_b.f"\n')["base"]


# --- command line


def test_command_line_keeps_everything_else():
    text = """
    [training]
    max_norm = 2
    [activation_checkpoint]
    type = "full"
    [loss]
    type = "CrossEntropyLoss"
    [override]
    imports = ["a.b", ["c.d", { size = 1 }]]
    [optimizer.param_groups.0.optimizer_kwargs]
    lr = 1
    """
    without, with_option = load_text(text), load_text(text, "--training.seq-len", "2048")
    assert comparable(without) == comparable(with_option)


# --- the good values of a bad file, and what else is wrong with them


def test_a_tiktoken_tokenizer_with_special_tokens():
    text = """
    [tokenizer]
    type = "TikTokenTokenizer"
    pattern = "cl100k_base"
    eos_token = "<|end of text|>"
    [tokenizer.special_tokens]
    "<|end of text|>" = 100
    """
    loaded = resolve_text(text, "--tokenizer.rank-file", "a.tiktoken")
    assert not loaded.problems
    expected = TikTokenTokenizer.Config(
        pattern="cl100k_base", special_tokens={"<|end of text|>": 100}, eos_token="<|end of text|>"
    )
    assert config_of(text).tokenizer == expected
    assert loaded.config.tokenizer.rank_file == "a.tiktoken"
    assert loaded.config.tokenizer.special_tokens == {"<|end of text|>": 100}
    Path("again.toml").write_text(dump(loaded))
    assert load(Path("again.toml"), []).config.tokenizer == loaded.config.tokenizer
    problems = problems_of(text.replace("= 100", '= "100"'))
    assert "expected an integer" in problems["tokenizer.special_tokens.<|end of text|>"]


def test_good_values_are_applied_next_to_bad_ones():
    text = """
    nonsense = 1
    dump_folder = "x"
    [training]
    stepz = 3
    seq_len = "long"
    steps = 7
    [loss]
    type = "MSELoss"
    reduction = 3
    [tokenizer]
    type = "MultiModalTokenizer"
    [compile]
    components = ["model", 3]
    [optimizer.param_groups.0.optimizer_kwargs]
    lr = "high"
    eps = 1e-5
    [[override.imports]]
    """
    loaded = resolve_text(text, "--training.local-batch-size", "many", "--metrics.log_freq", "3")
    base, config = config_of(), loaded.config
    assert (config.dump_folder, config.training.steps, config.training.seq_len) == ("x", 7, 2048)
    assert (config.training.local_batch_size, config.metrics.log_freq) == (8, 3)
    assert type(config.loss) is MSELoss.Config
    assert (config.tokenizer, config.compile, config.override) == (base.tokenizer, base.compile, base.override)
    kwargs = config.optimizer.param_groups[0].optimizer_kwargs
    assert (kwargs["lr"], kwargs["eps"]) == (8e-4, 1e-5)


def found(text, *cli, check):
    """source, key of the problems of `resolve` and of a check, which is the list of its own problems."""

    def fail(config):
        raise ConfigError(check)

    with pytest.raises(ConfigError) as info:
        resolve_text(text, *cli).apply(fail)
    return [(problem.source, problem.key) for problem in info.value.problems]


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("training.steps", "run.toml"),
        ("training.seq_len", "run.toml"),  # in a table that the file has
        ("training", "run.toml"),
        ("let.teacher.path", "run.toml"),
        ("dump_folder", "command line"),
        ("metrics.log_freq", "command line"),
        ("let.cuda_graphs", "command line"),
        ("let.stop_step", "command line"),
        ("parallelism", "command line"),
        ("activation_checkpoint.debug", "command line"),
        ("hf_assets_path", "base llama3.llama3_debugmodel"),
        ("profiler.enable_profiling", "base llama3.llama3_debugmodel"),
    ],
)
def test_source_of_a_value(key, source):
    text = '[training]\nsteps = 3\n[let]\nteacher = "x"\nstop_step = 2\n'
    cli = ["--dump_folder=x", "--metrics.log-freq", "4", "--let.no-cuda-graphs", "--let.stop_step", "1"]
    cli += ["--parallelism.data-parallel-shard-degree", "3", "activation-checkpoint:full"]
    assert found(text, *cli, check=[Problem(key, "bad")]) == [(source, key)]


def test_a_source_that_is_known_stays():
    assert found("", check=[Problem("a", "bad", source="b.txt")]) == [("b.txt", "a")]


def test_a_check_without_complaints():
    assert resolve_text("").apply(lambda config: config.training.steps) == 10
    with pytest.raises(ConfigError, match="stepz"):
        resolve_text("[training]\nstepz = 3\n").apply(lambda config: None)


@pytest.mark.parametrize(
    ("text", "cli", "problem", "follows"),
    [
        # the value itself is wrong, or its table
        ('dump_folder = 3\n[let]\nweight = "x"\n', [], Problem("let.weight", "bad"), True),
        ("let = 3\n", [], Problem("let.teacher.path", "no teacher is given"), True),
        ("", ["--let.teacher.dtype", "x"], Problem("let.teacher.dtype", "bad"), True),
        # it was perhaps meant
        ('[let]\nteacher.pth = "x"\n', [], Problem("let.teacher.path", "no teacher is given"), True),
        ('[let]\ntecher.path = "x"\n', [], Problem("let.teacher.path", "no teacher is given"), True),
        ('[let]\nteacher.path = "y"\nteacher.pth = "x"\n', [], Problem("let.teacher.path", "no such"), False),
        ("[let]\n", ["--let.teacher.pth", "x"], Problem("let.teacher.path", "no teacher is given"), True),
        ('[model]\ntokenizer_path = "x"\n', [], Problem("hf_assets_path", "no such folder"), True),
        ('[trainign]\nsteps = "x"\n', [], Problem("training.steps", "bad"), True),
        ('[trainign]\nsteps = "x"\n', [], Problem("hf_assets_path", "no such folder"), True),
        # it does not fit what stands in for a wrong value
        (
            '[let]\nstop_step = 99\n[training]\nsteps = "many"\n',
            [],
            Problem("let.stop_step", "at most training.steps = 10"),
            True,
        ),
        ("[parallelism]\ntensor_parallel_degree = 'x'\n", [], Problem("parallelism", "tensor_parallel_degree"), True),
        # the neighbour of a mistake
        ("[training]\nstepz = 3\nsteps = 9\n", [], Problem("training.steps", "too many"), False),
        ("[training]\nstepz = 3\n", ["--training.steps=9"], Problem("training.steps", "too many"), False),
        ("[validator]\nsteps = 0\nfreq = 9\n", [], Problem("validator.freq", "bad"), False),
    ],
)
def test_mere_consequences_are_not_said(text, cli, problem, follows):
    already = [problem.key for problem in resolve_text(text, *cli).problems]
    assert already
    keys = [key for _, key in found(text, *cli, check=[problem])]
    assert keys == already + ([] if follows else [problem.key])


# --- dump


@pytest.mark.parametrize(
    "base",
    [
        "llama3.llama3_debugmodel",
        "llama3.llama3_8b",
        "llama3.sft_debugmodel",  # its data loader holds a function, which TOML cannot write
        "qwen3.qwen3_debugmodel_moe_param_groups",
        "deepseek_v3.deepseek_v3_debugmodel",
        "flux.flux_debugmodel",
    ],
)
def test_round_trip(base):
    base = f'base = "{base}"\n'
    assert_round_trip(load_text("", base=base))
    text = """
    [let]
    teacher = "t"
    [loss]
    type = "MSELoss"
    [activation_checkpoint]
    type = "none"
    [lr_scheduler]
    decay_ratio = "none"
    [optimizer.param_groups.0.optimizer_kwargs]
    lr = 1e-5
    extra = ["a", "b"]
    """
    assert_round_trip(load_text(text, "--training.steps", "3", "--let.stop-step", "2", base=base))


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
overlays = st.fixed_dictionaries(
    {},
    optional={
        "dump_folder": names,
        "training": st.fixed_dictionaries({"steps": st.integers(1, 10**9)}, optional={"max_norm": st.floats(0, 10)}),
        "activation_checkpoint": st.fixed_dictionaries({"type": st.sampled_from(["selective", "full", "none"])}),
        "compile": st.fixed_dictionaries({"components": st.lists(names, max_size=3)}),
        "loss": st.fixed_dictionaries({"type": st.sampled_from(["MSELoss", "CrossEntropyLoss", "ChunkedLossWrapper"])}),
        "lr_scheduler": st.fixed_dictionaries({"decay_ratio": st.one_of(st.just("none"), st.floats(0, 1))}),
        "optimizer": st.fixed_dictionaries(
            {
                "param_groups": st.lists(
                    st.fixed_dictionaries(
                        {"pattern": names, "optimizer_name": names},
                        optional={
                            "optimizer_kwargs": st.dictionaries(
                                names,
                                st.one_of(st.integers(-5, 5), st.booleans(), names, st.lists(st.floats(0, 1))),
                                max_size=3,
                            )
                        },
                    ),
                    max_size=3,
                )
            }
        ),
        "let": st.fixed_dictionaries({}, optional={"enable": st.booleans(), "weight": st.floats(0, 3)}),
    },
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overlays)
def test_round_trip_of_any_overlay(tables):
    assert_round_trip(load_text(tomli_w.dumps(tables)))


def test_dump_is_a_fixed_point_where_the_base_has_an_int_for_a_float():
    assert_round_trip(load_text("", base='base = "flux.flux_dev"\n'))


def test_dump_refuses_what_toml_cannot_write():
    loaded = load_text("")
    kwargs = {**loaded.config.optimizer.param_groups[0].optimizer_kwargs, "fused": None}
    group = dataclasses.replace(loaded.config.optimizer.param_groups[0], optimizer_kwargs=kwargs)
    optimizer = dataclasses.replace(loaded.config.optimizer, param_groups=[group])
    config = dataclasses.replace(loaded.config, optimizer=optimizer)
    with pytest.raises(ConfigError, match=r"optimizer\.param_groups.*cannot be written as TOML"):
        dump(Loaded(config, loaded.base, loaded.source))
