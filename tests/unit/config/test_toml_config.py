"""TOML + command line -> configuration, and back."""

import dataclasses
import gc
import os
import sys
from pathlib import Path

import pytest
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss, MSELoss
from torchtitan.distributed.activation_checkpoint import FullAC

from let_plugin.config import PairConfig, RuntimeConfig
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.config.load import dump, load, read, resolve

DEBUG_MODEL = 'base = "llama3.llama3_debugmodel"\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An own working directory and module path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def resolve_text(text, *cli, base=DEBUG_MODEL):
    Path("run.toml").write_text(base + text)
    return resolve(read(["run.toml", *cli]))


def load_text(text, *cli, base=DEBUG_MODEL):
    loaded = resolve_text(text, *cli, base=base)
    assert not loaded.problems
    return loaded


def config_of(text="", *cli, base=DEBUG_MODEL):
    return load_text(text, *cli, base=base).config


def problems_of(text, *cli, base=DEBUG_MODEL):
    """Dotted key -> line of the error message, without its source."""
    Path("run.toml").write_text(base + text)
    with pytest.raises(ConfigError) as info:
        load(Path("run.toml"), list(cli))
    assert all(problem.source == "run.toml" for problem in info.value.problems)
    return {problem.key: str(problem).removeprefix("run.toml: ") for problem in info.value.problems}


def value_at(config, key):
    for name in key.split("."):
        inside = config[int(name)] if name.isdigit() else config
        config = inside if name.isdigit() else inside[name] if isinstance(inside, dict) else getattr(inside, name)
    return config


def comparable(config):
    """Without what holds functions, which a base makes anew at each call."""
    config = dataclasses.replace(config, model_spec=None)
    if hasattr(config.dataloader, "sample_processor"):
        config.dataloader = dataclasses.replace(config.dataloader, sample_processor=len)
    return config


def assert_round_trip(loaded):
    again = load_text(dump(loaded), base="")
    assert comparable(again.config) == comparable(loaded.config)
    assert again.base == loaded.base
    assert again.config.model_spec.flavor == loaded.config.model_spec.flavor


OPTIMIZER = "optimizer.param_groups.0.optimizer_kwargs"
FIRST = '{pattern = "norm", optimizer_name = "Adam", optimizer_kwargs = {lr = 0.1, betas = [0.5, 0.6]}}'
TWO_GROUPS = f'optimizer.param_groups = [{FIRST}, {{pattern = ".*", optimizer_name = "AdamW"}}]\n'


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("", "training.steps", 10),
        ("[let]\nweight = 1\n", "let.weight", 1.0),
        ("[training]\nmax_norm = 2\n", "training.max_norm", 2),  # its type is float | int
        ('[override]\nimports = ["a", ["c.d", { size = 1 }]]\n', "override.imports", ["a", ("c.d", {"size": 1})]),
        ('[lr_scheduler]\ndecay_ratio = "none"\n', "lr_scheduler.decay_ratio", None),
        ('[compile]\nbackend = "none"\n', "compile.backend", "none"),  # a text where None is no choice
        # A table with integer keys overlays an element and keeps the rest; an array of tables replaces the list.
        (f"{OPTIMIZER}.lr = 1\n", OPTIMIZER, {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}),
        (TWO_GROUPS, OPTIMIZER, {"lr": 0.1, "betas": (0.5, 0.6)}),
        # A `type` key: another class starts from its own defaults, the same one is overlaid.
        ('[loss]\ntype = "CrossEntropyLoss"\n', "loss", CrossEntropyLoss.Config()),
        ('[loss]\ntype = "ChunkedLossWrapper"\nnum_chunks = 4\n', "loss",
         ChunkedLossWrapper.Config(num_chunks=4, loss_fn=CrossEntropyLoss.Config(global_vocab_size=2048))),
        ('[loss.loss_fn]\ntype = "MSELoss"\n', "loss.loss_fn", MSELoss.Config()),
        ('activation_checkpoint.type = "FullAC"\n', "activation_checkpoint", FullAC.Config()),
        (f'activation_checkpoint.type = "{FullAC.__module__}.FullAC.Config"', "activation_checkpoint", FullAC.Config()),
        ('activation_checkpoint.type = "none"\n', "activation_checkpoint", None),
        # [let] turns LET on.
        ("", "let.enable", False),
        ("[let]\nenable = false\nweight = 0.2\n", "let.enable", False),
        ('[let]\nteacher = "some/path"\n', "let.teacher.path", "some/path"),
        ('dump_folder = "~/out"\n', "dump_folder", os.path.expanduser("~/out")),
        ('[let]\nteacher = "~/teacher"\n', "let.teacher.path", os.path.expanduser("~/teacher")),
        # Options of the command line.
        (["--training.steps=3"], "training.steps", 3),
        (["--let.weight", ".5"], "let.weight", 0.5),
        (["--let.teacher.path=a=b"], "let.teacher.path", "a=b"),
        (["--let.teacher.path", "~/teacher"], "let.teacher.path", os.path.expanduser("~/teacher")),
        (["--let.enable", "--let.no-enable"], "let.enable", False),
        (["--lr-scheduler.decay-ratio", "None"], "lr_scheduler.decay_ratio", None),
        (["--compile.components", "model", "loss"], "compile.components", ["model", "loss"]),
        (["--compile.components", '["model", "loss"]'], "compile.components", ["model", "loss"]),
        ([f"--{OPTIMIZER}.betas", "0.8", "0.9"], f"{OPTIMIZER}.betas", (0.8, 0.9)),
        (["--training.steps", "3", "--training.steps", "4"], "training.steps", 4),
        (["--let.loss-options.beta", "0.5"], "let.loss_options", {"beta": 0.5}),
        (["--let.pairs", '[{student = 0, teacher = "embedding", weight = 2}]'], "let.pairs",
         [PairConfig(student=0, teacher="embedding", weight=2.0)]),
        (["activation-checkpoint:none"], "activation_checkpoint", None),
        (["--let.enable", "activation-checkpoint:full"], "activation_checkpoint.preserve_rng_state", True),
        (["activation-checkpoint:full", "--activation-checkpoint.debug"], "activation_checkpoint.debug", True),
    ],
)  # fmt: skip
def test_good_values(text, key, expected):
    found = value_at(config_of(text) if isinstance(text, str) else config_of("", *text), key)
    assert (found, type(found)) == (expected, type(expected))


def test_command_line_over_toml_over_base_and_the_next_load_starts_anew():
    text = f"{OPTIMIZER}.lr = 1.0\nruntime.device = 'cpu'\n[training]\nsteps = 20\nseq_len = 64\n"
    config = config_of(text, "--training.steps", "30", "--let.weight", "0.2")
    assert [read(["run.toml", *o]).runtime.device for o in ([], ["--runtime.device", "auto"])] == ["cpu", "auto"]
    assert (config.training.steps, config.training.seq_len, config.training.local_batch_size) == (30, 64, 8)
    assert not config.let.enable
    config = config_of()
    assert (config.optimizer.param_groups[0].optimizer_kwargs["lr"], config.training.steps) == (8e-4, 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('training.steps = "five"', "training.steps = 'five': expected an integer"),
        ('training.max_norm = "1"', "training.max_norm = '1': expected a number or an integer"),
        ('training.dtype = "bfloat61"', "training.dtype = 'bfloat61': not a valid choice; did you mean 'bfloat16'?"),
        ('compile.components = ["model", 3]', "compile.components = ['model', 3]: expected a string"),
        (f'{OPTIMIZER}.lr = "1e-3"', f"{OPTIMIZER}.lr = '1e-3': expected a number"),
        ("[trainign]\nsteps = 3", "trainign: unknown; did you mean 'training'?"),
        ("lr_scheduler.lr_min = 0.1",
         "lr_scheduler.lr_min = 0.1: a key of an older version; now: lr_scheduler.min_lr_factor"),
        ('let.target = "labels"', "let.target = 'labels': a key of an older version; now: let.signal"),
        ("training.stop_step = 3", "training.stop_step = 3: unknown; did you mean let.stop_step"),
        ('model_spec = "x"', "model_spec = 'x': only Python can set it"),
        ("[optimizer.param_groups.1]\n", "optimizer.param_groups.1: no such element; valid names: 0"),
        ('loss.type = "CrossEntropy"', "loss.type = 'CrossEntropy': unknown type; did you mean 'CrossEntropyLoss'?"),
        ('loss.type = "torchtitan.trainer.Trainer"', "loss.type = 'torchtitan.trainer.Trainer': neither it nor"),
        ('activation_checkpoint = { type = "none", debug = true }', "activation_checkpoint.debug = True: not together"),
        ('tokenizer.type = "MultiModalTokenizer"', "tokenizer.pad_token: missing; MultiModalTokenizer needs it"),
        ("validator.steps = 0", "validator.steps = 0: validation steps must be positive or -1"),
        ('compile = { backend = "x", enable_async_tensor_parallel = true }',
         "compile.enable_async_tensor_parallel = True: Async TP requires"),
        ('dataloader = { type = "InterleavedHuggingFaceTextDataLoader", sources = [] }',
         "dataloader: At least one source should be defined"),
        ("parallelism.pipeline_parallel_degree = 2", "parallelism: CUDA graphs"),
        ('runtime.device = "gpu"', "runtime.device = 'gpu': not a valid choice; did you mean 'cpu'?"),
    ],
)  # fmt: skip
def test_a_mistake_names_key_value_and_remedy(text, expected):
    key = expected.partition(" = " if " = " in expected.partition(":")[0] else ":")[0]
    problems = problems_of(f"{text}\n")
    assert problems.pop(key).startswith(expected)
    assert all(other.startswith((f"{key}.", "tokenizer.")) for other in problems)
    assert read(["run.toml"]).runtime == RuntimeConfig()


@pytest.mark.parametrize(
    ("cli", "text"),
    [
        (["--training.steps", "five"], "training.steps = 'five': expected an integer"),
        (["--training.steps", "3", "4"], "training.steps = [3, 4]: expected an integer"),
        (["--let.enable", "maybe"], "let.enable = 'maybe': expected true or false"),
        (["--let.pairs.0.weight", "2"], "let.pairs.0: no such element"),
        (["--let.pairs=[]", "--let.pairs.0.weight", "2"], "let.pairs.0.weight: given as a whole and in part"),
        (["activation-checkpoint:ful"], "activation_checkpoint.type = 'ful': unknown type; did you mean 'full'?"),
        (["stray"], "stray: options are written --section.key VALUE"),
    ],
)  # fmt: skip
def test_a_wrong_option(cli, text):
    (problem,) = resolve_text("", *cli).problems
    assert str(problem).startswith(f"command line: {text}")


def test_help_of_all_and_of_a_section(capfd):
    def printed(*section):
        with pytest.raises(SystemExit) as info:
            resolve_text("", "--help", *section)
        assert not info.value.code
        return capfd.readouterr().out

    assert "--training.steps" in printed() and "--training.steps" in printed("--training.steps", "3")
    let = printed("let")
    assert "--let.weight" in let and "--let.teacher.path" in let and "--training" not in let
    assert "--let.teacher.path" in (teacher := printed("let.teacher")) and "--let.weight" not in teacher
    with pytest.raises(ConfigError, match="--help = 'lett': no such section; did you mean 'let'"):
        resolve_text("", "--help", "lett")


def test_all_mistakes_at_once_and_the_good_values_next_to_them():
    text = """
    nonsense = 1
    dump_folder = "x"
    training = { stepz = 3, seq_len = "long", steps = 7 }
    loss = { type = "MSELoss", reduction = 3 }
    tokenizer.type = "MultiModalTokenizer"
    checkpoint = { interval = 0, keep_latest_k = 1, folder = "y" }
    [optimizer.param_groups.0.optimizer_kwargs]
    lr = "high"
    eps = 1e-5
    """
    cli = ["--training.local-batch-size", "many", "--metrics.log_freq", "3", "--let.pairs", "[{studnt = 3}]"]
    # Right only together with one that comes later:
    cli += ["--parallelism.pipeline_parallel_degree", "2", "--training.disable_cuda_graphs"]
    loaded = resolve_text(text, *cli)
    wrong = {"nonsense", "training.stepz", "training.seq_len", "loss.reduction", "training.local_batch_size"}
    wrong |= {"checkpoint.interval", f"{OPTIMIZER}.lr", "checkpoint.keep_latest_k"}
    wrong |= {"let.pairs.0.studnt", "let.pairs.0.student"}
    keys = {problem.key for problem in loaded.problems}
    assert wrong == {key for key in keys if not key.startswith("tokenizer.")} < keys
    config = loaded.config
    assert (config.dump_folder, config.training.steps, config.training.seq_len) == ("x", 7, 2048)
    assert (config.training.local_batch_size, config.metrics.log_freq, config.checkpoint.folder) == (8, 3, "y")
    assert config.parallelism.pipeline_parallel_degree == 2
    assert type(config.loss) is MSELoss.Config and config.tokenizer == config_of().tokenizer
    kwargs = config.optimizer.param_groups[0].optimizer_kwargs
    assert (kwargs["lr"], kwargs["eps"]) == (8e-4, 1e-5)


def test_unreadable_files(folder):
    (folder / "bad.toml").write_text("a = \n")
    (folder / "binary.toml").write_bytes(b"\xff\xfe")
    messages = {"missing.toml": "cannot be read", ".": "cannot be read", "bad.toml": "not valid TOML"}
    messages |= {"binary.toml": "not valid TOML", "--a.b": "the first argument is the TOML"}
    for name, message in messages.items():
        with pytest.raises(ConfigError, match=f"{name}.*: {message}"):
            read([name])


def test_what_has_no_effect_is_said_to_those_who_have_set_it(folder, caplog):
    for cli in ([], ["--checkpoint.folder", "x"], ["--checkpoint.initial-load-model-only"]):
        resolve_text("", *cli)
    assert caplog.messages == ["LET: checkpoint.initial_load_model_only has no effect without its initial_load_path"]


MODULE = """
from dataclasses import dataclass
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.models.llama3.config_registry import llama3_debugmodel as debugmodel

class MyLoss(CrossEntropyLoss):
    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        temperature: float = 1.0

def mine():
    config = debugmodel()
    config.training.steps = 77
    return config
"""


def test_own_configurations_and_classes(folder):
    for module in ("mine_a", "mine_b"):
        (folder / f"{module}.py").write_text(MODULE)
        base = f'base = "{module}.mine"\n'
        assert config_of(base=base).training.steps == 77
        gc.disable()  # dataclass(slots=True) leaves a second class behind until the garbage is collected
        try:
            loaded = load_text(f'[loss]\ntype = "{module}.MyLoss"\ntemperature = 2\n', base=base)
            assert (type(loaded.config.loss).__module__, loaded.config.loss.temperature) == (module, 2.0)
            assert_round_trip(loaded)
        finally:
            gc.enable()
    # The name of two classes says nothing.
    assert "or a full name" in problems_of('[loss]\ntype = "MyLoss"\n')["loss.type"]


# --- what a check of the whole finds

SOURCES = {
    "run.toml": ["training.steps", "training.seq_len", "training", "let.teacher.path"],
    "command line": ["dump_folder", "let.cuda_graphs", "let.stop_step", "parallelism", "activation_checkpoint.debug"],
    "base llama3.llama3_debugmodel": ["hf_assets_path"],
}


def found(loaded, *problems):
    """(source, key) of all that is wrong if a check complains about `problems`."""

    def check(config):
        raise ConfigError(problems)

    with pytest.raises(ConfigError) as info:
        loaded.apply(check)
    return [(problem.source, problem.key) for problem in info.value.problems]


def test_a_check_finds_the_source_of_each_value():
    cli = ["--dump_folder=x", "--let.no-cuda-graphs", "--let.stop_step", "1", "activation-checkpoint:full"]
    cli += ["--parallelism.data-parallel-shard-degree", "3"]
    loaded = load_text('[training]\nsteps = 3\n[let]\nteacher = "x"\nstop_step = 2\n', *cli)
    for source, keys in SOURCES.items():
        assert found(loaded, *(Problem(key, "bad") for key in keys)) == [(source, key) for key in keys]
    assert found(loaded, Problem("a", "bad", source="b.txt")) == [("b.txt", "a")]
    assert loaded.apply(lambda config: config.training.steps) == 3
    twice = found(resolve_text('training.steps = "many"'), Problem("training.steps", "bad"), Problem("x", "bad"))
    assert [key for _, key in twice] == ["training.steps", "x"]
    with pytest.raises(ConfigError, match="stepz"):
        resolve_text("[training]\nstepz = 3\n").apply(lambda config: None)


# The data loader of the second holds a function, which TOML cannot write.
BASES = ["llama3.llama3_8b", "llama3.sft_debugmodel", "qwen3.qwen3_debugmodel_moe_param_groups", "flux.flux_dev"]


@pytest.mark.parametrize("base", BASES)
def test_round_trip(base):
    base = f'base = "{base}"\n'
    assert_round_trip(load_text("", base=base))
    text = f'{OPTIMIZER} = {{ lr = 1e-5, extra = ["a", "b"], "a b.\\\\" = 2 }}\nlet.teacher = "é\\"\\n\\\\"\n'
    text += 'loss.type = "MSELoss"\nactivation_checkpoint.type = "none"\nlr_scheduler.decay_ratio = "none"\n'
    assert_round_trip(load_text(text, "--training.steps", "3", "--let.stop-step", "2", base=base))


def test_dump_refuses_what_toml_cannot_write():
    loaded = load_text("")
    loaded.config.optimizer.param_groups[0].optimizer_kwargs["fused"] = None
    with pytest.raises(ConfigError, match=r"optimizer\.param_groups.*cannot be written as TOML"):
        dump(loaded)


def test_a_stop_on_the_command_line_replaces_the_files():
    let = config_of("[let]\nstop_fraction = 0.5", "--let.stop-step", "3").let
    assert (let.stop_step, let.stop_fraction) == (3, None)
    let = config_of("[let]\nstop_step = 3\nstop_fraction = 0.5").let  # of one file: for preflight to refuse
    assert (let.stop_step, let.stop_fraction) == (3, 0.5)
