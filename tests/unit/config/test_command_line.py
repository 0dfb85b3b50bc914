"""What happens to the options of the command line, above all to the wrong ones."""

import pytest

from let_plugin.config import PairConfig, command_line
from let_plugin.config.errors import ConfigError
from let_plugin.config.overlay import Overlay


def apply(config, *cli):
    tables, problems = command_line.parse(cli, command_line.choices(config))
    overlay = Overlay(command_line.SOURCE)
    result = overlay.configuration(config, tables)
    return result, problems + overlay.problems


def value_at(config, key):
    for name in key.split("."):
        config = (
            config[name] if isinstance(config, dict) else config[int(name)] if name.isdigit() else getattr(config, name)
        )
    return config


OPTIMIZER = "optimizer.param_groups.0.optimizer_kwargs"


@pytest.mark.parametrize(
    ("cli", "key", "expected"),
    [
        (["--training.steps=3"], "training.steps", 3),
        (["--let.weight", ".5"], "let.weight", 0.5),
        (["--let.teacher.path=a=b"], "let.teacher.path", "a=b"),
        (["--let.teacher.path", "3"], "let.teacher.path", "3"),
        (["--let.enable"], "let.enable", True),
        (["--let.no-enable"], "let.enable", False),
        (["--lr-scheduler.decay-ratio", "None"], "lr_scheduler.decay_ratio", None),
        (["--compile.components", "model", "loss"], "compile.components", ["model", "loss"]),
        (["--compile.components", '["model", "loss"]'], "compile.components", ["model", "loss"]),
        ([f"--{OPTIMIZER}.betas", "0.8", "0.9"], f"{OPTIMIZER}.betas", (0.8, 0.9)),
        (["--training.steps", "3", "--training.steps", "4"], "training.steps", 4),
        # Free tables and arrays of tables.
        (["--let.loss-options.beta", "0.5"], "let.loss_options", {"beta": 0.5}),
        (["--let.pairs", '[{student = 0, teacher = "embedding", weight = 2}]'], "let.pairs",
         [PairConfig(student=0, teacher="embedding", weight=2.0)]),
        # A choice may come before or after other options.
        (["activation-checkpoint:none"], "activation_checkpoint", None),
        (["--let.enable", "activation-checkpoint:full"], "activation_checkpoint.preserve_rng_state", True),
        (["activation-checkpoint:full", "--activation-checkpoint.debug"], "activation_checkpoint.debug", True),
    ],
)  # fmt: skip
def test_good_options(config, cli, key, expected):
    result, problems = apply(config, *cli)
    assert not problems
    found = value_at(result, key)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("cli", "text"),
    [
        (["--training.steps", "five"], "training.steps = 'five': expected an integer"),
        (["--training.steps", "0"], "training.steps = 0: must be at least 1"),
        (["--training.steps", "3", "4"], "training.steps = [3, 4]: expected an integer"),
        (["--let.enabel"], "let.enabel: unknown; did you mean 'enable'?"),
        (["--let.enable", "maybe"], "let.enable = 'maybe': expected true or false"),
        (["--let.pairs.0.weight", "2"], "let.pairs.0: no such element"),
        (["--let.pairs=[]", "--let.pairs.0.weight", "2"], "let.pairs.0.weight: given as a whole and in part"),
        (["activation-checkpoint:ful"], "activation_checkpoint.type = 'ful': unknown type; did you mean 'full'?"),
        (["stray"], "stray: options are written --section.key VALUE"),
    ],
)  # fmt: skip
def test_wrong_option(config, cli, text):
    config.training.disable_cuda_graphs = False
    (problem,) = apply(config, *cli)[1]
    assert str(problem).startswith(f"command line: {text}")


def test_all_mistakes_at_once_and_the_good_options_applied(config):
    config.training.disable_cuda_graphs = False
    cli = ["--training.stepz", "3", "--let.weight", "x", "--training.seq_len", "32", "--let.pairs", "[{studnt = 3}]"]
    # Right only together with one that comes later:
    cli += ["--parallelism.pipeline_parallel_degree", "2", "--validator.steps=0", "--training.disable_cuda_graphs"]
    result, problems = apply(config, *cli)
    assert [problem.key for problem in problems] == [
        *("training.stepz", "let.weight", "let.pairs.0.studnt", "let.pairs.0.student", "validator.steps"),
    ]
    assert (result.training.seq_len, result.parallelism.pipeline_parallel_degree) == (32, 2)
    assert config.training.seq_len == 64


def test_help_of_all_and_of_a_section(config, capfd):
    def printed(section):
        with pytest.raises(SystemExit) as info:
            command_line.print_help(config, section, "let-train run.toml")
        assert not info.value.code
        return capfd.readouterr().out

    assert "--training.steps" in printed("")
    let = printed("let")
    assert "--let.weight" in let and "--let.teacher.path" in let and "--training" not in let
    assert "--let.teacher.path" in (teacher := printed("let.teacher")) and "--let.weight" not in teacher
    with pytest.raises(ConfigError, match="--help = 'lett': no such section; did you mean 'let'"):
        command_line.print_help(config, "lett", "")
