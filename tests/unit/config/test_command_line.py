"""What happens to the options of the command line, above all to the wrong ones."""

import pytest

from let_plugin.config import PairConfig, command_line
from let_plugin.config.errors import Problem


def apply(config, *cli):
    return command_line.apply(config, list(cli), "let-train")


def problem_of(config, *cli):
    (problem,) = apply(config, *cli)[1]
    assert problem.source == "command line"
    return problem


def test_no_options(config):
    assert apply(config) == (config, [])


def test_good_options(config):
    result, problems = apply(config, "--training.steps", "3", "--let.no-enable", "--let.teacher.path=a=b")
    assert not problems
    assert (result.training.steps, result.let.enable, result.let.teacher.path) == (3, False, "a=b")
    assert config.let.enable


@pytest.mark.parametrize(
    ("cli", "key", "value", "message"),
    [
        (["--training.steps", "five"], "training.steps", "five", "expected an integer"),
        (["--training.steps=5.5"], "training.steps", 5.5, "expected an integer"),
        (["--training.step", "5"], "training.step", 5, "unknown; did you mean 'steps'?"),
        (["--training.local-batch-sise", "5"], "training.local_batch_sise", 5, "did you mean 'local_batch_size'?"),
        (["--training.dtype", "bfloat61"], "training.dtype", "bfloat61", "did you mean 'bfloat16'?"),
        (["--training.dataset", "c4"], "training.dataset", "c4", "torchtitan 0.3 calls it dataloader.dataset"),
        (["--let.enable", "maybe"], "let.enable", "maybe", "expected true or false"),
        (["--validator.steps", "0"], "validator.steps", 0, "validation steps must be positive or -1"),
        (["--parallelism.pipeline-parallel-degree", "2"], "parallelism.pipeline_parallel_degree", 2, "CUDA graphs"),
    ],
)
def test_wrong_option(config, cli, key, value, message):
    config.training.disable_cuda_graphs = False
    problem = problem_of(config, *cli)
    assert (problem.key, problem.value) == (key, value)
    assert message in problem.message


def test_new_keys_of_free_tables_and_arrays_of_tables_are_written_as_in_toml(config):
    options = ["--let.loss-options.beta", "0.5", "--let.schedule-options.final=0.1", "--training.steps", "3"]
    pairs = ["--let.pairs", '[{student = 3}, {student = 0, teacher = "embedding", weight = 2}]']
    result, problems = apply(config, *options, *pairs)
    assert not problems
    assert result.let.loss_options == {"beta": 0.5} and result.let.schedule_options == {"final": 0.1}
    assert result.let.pairs == [PairConfig(student=3), PairConfig(student=0, teacher="embedding", weight=2.0)]
    assert result.training.steps == 3
    assert not config.let.pairs and not config.let.loss_options
    for text, value in (("1.5", 1.5), ("2", 2.0)):
        assert apply(result, "--let.loss-options.beta", text)[0].let.loss_options == {"beta": value}
    assert apply(result, "--let.pairs", "[]")[0].let.pairs == []


@pytest.mark.parametrize("option", [["--let.loss-options.beta", "2"], ["--let.pairs=[{student = 3}]"]])
def test_a_choice_may_follow_them(config, option):
    result, problems = apply(config, *option, "activation-checkpoint:full")
    assert not problems
    assert type(result.activation_checkpoint).__qualname__.startswith("FullAC")
    assert result.let.loss_options == {"beta": 2} or result.let.pairs == [PairConfig(student=3)]


def test_mistakes_in_them(config):
    problems = apply(config, "--let.pairs", "[{studnt = 3}]", "--let.loss-options", "beta", "--training.steps", "x")[1]
    assert [problem.key for problem in problems] == [
        *("let.pairs.0.studnt", "let.pairs.0.student", "let.loss_options", "training.steps"),
    ]
    assert {problem.source for problem in problems} == {"command line"}


@pytest.mark.parametrize(
    ("cli", "text"),
    [
        (["--training.steps"], "command line: training.steps: expected an integer"),
        (["--dump_folder"], "command line: dump_folder: Missing value"),
        (["--let.enabel"], "command line: let.enabel: unknown; did you mean 'enable'?"),
    ],
)
def test_option_without_a_value(config, cli, text):
    assert str(problem_of(config, *cli)).startswith(text)


def test_all_mistakes_at_once_and_the_good_options_applied(config, capfd):
    config.training.disable_cuda_graphs = False
    cli = ["--training.stepz", "3", "--let.weight", "x", "--training.seq_len", "32"]
    # Right only together with one that comes later:
    cli += ["--parallelism.pipeline_parallel_degree", "2", "--validator.steps=0", "--training.disable_cuda_graphs"]
    result, problems = apply(config, *cli)
    assert [problem.key for problem in problems] == ["training.stepz", "let.weight", "validator.steps"]
    assert (result.training.seq_len, result.parallelism.pipeline_parallel_degree) == (32, 2)
    assert capfd.readouterr() == ("", "")


def test_help_is_printed_nonetheless(config, capfd):
    with pytest.raises(SystemExit) as info:
        apply(config, "--help")
    assert not info.value.code
    assert "--training.steps" in capfd.readouterr().out


def test_the_message_in_a_box():
    box = "log\n+- Error ----+\n| \x1b[31mOne thing\x1b[0m   |\n| or another |\n| ---------- |\n| see --help |\n+---+\n"
    assert command_line._first_paragraph(box) == "One thing or another"
    assert command_line._first_paragraph(box.replace("|", "│").replace("-", "─")) == "One thing or another"


@pytest.mark.parametrize(
    ("cli", "keys"),
    [
        (["--a.b_c", "1"], {"a.b_c"}),
        (["--a.b-c=--d"], {"a.b_c"}),
        (["--a.no-b"], {"a.no_b", "a.b"}),
        (["--a.0.b", "-1"], {"a.0.b"}),
        (["activation-checkpoint:full"], {"activation_checkpoint"}),
    ],
)
def test_keys(cli, keys):
    assert command_line.keys(cli) == keys


def test_an_option_that_tyro_alone_refuses_keeps_its_message(config):
    assert problem_of(config, "stray") == Problem(
        "stray", "Unrecognized options: stray; options are written --section.key VALUE", source="command line"
    )
