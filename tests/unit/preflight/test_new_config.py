"""`let-train new`: what it writes passes the check, as far as the base's own files allow."""

from dataclasses import replace

import pytest
import tomli
from tokenizers import Tokenizer, models

from let_plugin import train
from let_plugin.bench.converge.methods import read_file
from let_plugin.config import TeacherConfig
from let_plugin.config.errors import ConfigError
from let_plugin.config.load import load_base, read, resolve
from let_plugin.demo import TEACHER
from let_plugin.preflight.checks import examine
from let_plugin.preflight.new_config import new_config
from tests.support import hf_models, jobs, tokenizer_kinds

pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
DEMO, DEBUG = "let_plugin.demo.student", "llama3.llama3_debugmodel"


@pytest.fixture
def new(tmp_path):
    """Function of base and teacher: the file's tables, its text, and the keys that --check complains about."""

    def new(base, teacher, **recipe):
        text = new_config(base, str(teacher), **recipe)
        (tmp_path / "new.toml").write_text(text)
        loaded = resolve(read([f"{tmp_path}/new.toml"]))
        problems = [*loaded.problems, *examine(loaded.config, 1).problems]
        return tomli.loads(text), text, [problem.key for problem in problems]

    return new


def test_a_debug_model_takes_the_tokenizer_of_a_small_teacher_and_its_length(new, tmp_path):
    """Of 61 words and 64 positions."""
    folder = hf_models.save(tmp_path / "teacher", hf_models.config_of("llama"))
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0")).save(f"{folder}/tokenizer.json")
    tables, text, wrong = new(DEBUG, folder)
    assert not wrong
    assert tables["hf_assets_path"] == tables["let"]["teacher"]["path"] == str(folder)
    assert tables["training"]["seq_len"] == 64 and "Not 2048: the teacher was built for" in text
    assert "# How many train steps to run\nsteps = 10\n" in text and "# dataset_path = " in text
    assert "# S_stop as a fraction of `training.steps`" in text


def test_every_kind_of_teacher(new, tmp_path):
    tables, _, wrong = new(DEMO, "demo_teacher")
    assert not wrong and tables["let"]["teacher"] == {"spec": "demo_teacher"}
    other = tmp_path / "other"
    jobs.make_hf_teacher(other)
    tokenizer_kinds.KINDS["Unigram"]().save(f"{other}/tokenizer.json")
    tables, text, wrong = new(DEMO, other)
    assert not wrong and tables["let"]["token_alignment"]["enable"]
    assert "Not False: its vocabulary is not the student's" in text
    # What is not on this machine, and a debug model's tokenizer, which torchtitan's own repository has.
    for base, teacher, expected in (
        (DEMO, "org/name", ["let.teacher.path"]),
        (DEBUG, "llama3:1B", ["hf_assets_path", "let.teacher.path"]),
        (DEBUG, TEACHER, ["hf_assets_path"]),
    ):
        _, text, wrong = new(base, teacher)
        assert wrong == expected and "# Still wrong: " in text


def test_the_recipe_is_what_the_evidence_suite_measured(new, tmp_path):
    _, _, wrong = new(DEMO, "demo_teacher", recipe=True)
    evidence = jobs.ROOT / "train_configs/evidence"
    measured = [f"{evidence}/student.toml", *read_file(evidence / "methods.toml")["recipe_linear"].options]
    runs = [[f"{tmp_path}/new.toml"], [*measured, "--let.weight", "10"]]
    written, suite = (resolve(read(argv)).config for argv in runs)
    assert replace(written.let, teacher=TeacherConfig()) == replace(suite.let, teacher=TeacherConfig()) and not wrong
    bases = load_base(DEMO), load_base("benchmarks.evidence.student")
    whole, rates = (
        [c.optimizer.param_groups[0].optimizer_kwargs["lr"] for c in own] for own in (bases, (written, suite))
    )
    assert rates == [whole[0] / 2, whole[1] / 2]
    tables, text, _ = new("qwen3.qwen3_debugmodel", "demo_teacher", recipe=True)
    assert tables["let"]["init"]["parts"] == "embeddings" and "# Not 'both': the student's embeddings and head" in text


def test_mistakes_and_a_file_that_is_there(tmp_path, capsys):
    for base, teacher, key in (
        ("flux.flux_debugmodel", "demo_teacher", "let.enable"),
        (DEMO, "/nowhere", "let.teacher.path"),
        (DEMO, "llama3:2B", "let.teacher.spec"),
        ("no_such.function", "demo_teacher", "base"),
    ):
        with pytest.raises(ConfigError, match=rf"^{key} = "):
            new_config(base, teacher)
    command = ["new", "--base", DEMO, "--teacher", "demo_teacher"]
    train.main(command)
    text = capsys.readouterr().out
    train.main([*command, "--out", f"{tmp_path}/a/new.toml"])
    assert (tmp_path / "a/new.toml").read_text() == text
    with pytest.raises(SystemExit, match="2"):
        train.main([*command, "--out", f"{tmp_path}/a/new.toml"])
    assert "--out" in capsys.readouterr().err
