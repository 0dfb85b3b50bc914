"""What LET must not do in a training step: make the host wait, compile again, leave work behind, or do nothing."""

import json

import pytest

from tests.support import jobs
from tests.support.config_registry import VOCAB_SIZE

STEPS = ["--training.steps", "6", "--let.stop-step", "4"]


def counts(tmp_path, what, config, *args, processes=1):
    out = tmp_path / f"{what}{len(list(tmp_path.iterdir()))}.json"
    jobs.run("tests.support.hot_path", out, what, config, *STEPS, *args, processes=processes)
    return json.loads(out.read_text())


@pytest.fixture
def hf_teacher(tmp_path):
    """Options for a teacher that `transformers` builds, of the student's vocabulary."""
    transformers = pytest.importorskip("transformers", reason="pip install let-plugin[hf]")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=VOCAB_SIZE, **shape))
    model.save_pretrained(tmp_path / "hf")
    return ["--let.teacher.spec", "", "--let.teacher.path", tmp_path / "hf"]


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "match"), [("titan", "interpolate"), ("titan", "linear"), ("hf", "interpolate")])
def test_no_step_makes_the_host_wait_for_let(tmp_path, tiny_config, hf_teacher, match, teacher):
    """Steps 1 and 6 are logged, and step 1 builds the teacher; in the others LET reads nothing from the device."""
    args = ["--metrics.log_freq", "6", "--let.dimension-match", match, *(hf_teacher if teacher == "hf" else [])]
    plain = counts(tmp_path, "reads", tiny_config, *args, "--let.no-enable")
    let = counts(tmp_path, "reads", tiny_config, *args)
    assert plain[1:5] == let[1:5]
    assert let[0] > plain[0]  # the counter counts: LET's metrics of a logged step


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "match"), [("titan", "interpolate"), ("titan", "linear"), ("hf", "interpolate")])
def test_steps_after_the_stop_are_those_of_a_run_without_let(tmp_path, tiny_config, hf_teacher, match, teacher):
    """Not a single operation more or less: what a step costs is the baseline's."""
    args = ["--let.dimension-match", match, *(hf_teacher if teacher == "hf" else [])]
    plain = counts(tmp_path, "operations", tiny_config, *args, "--let.no-enable")
    let = counts(tmp_path, "operations", tiny_config, *args)
    assert len(let) == 6 and let[4:] == plain[4:]
    assert all(len(step) > 100 + len(base) for step, base in zip(let[:4], plain[:4], strict=True))


@pytest.mark.slow
def test_nothing_is_compiled_again_at_the_stop(tmp_path, tiny_config):
    args = ["--compile.enable", "--compile.backend", "aot_eager"]
    plain = counts(tmp_path, "graphs", tiny_config, *args, "--let.no-enable")
    let = counts(tmp_path, "graphs", tiny_config, *args)
    assert plain[0] > 0 and len(set(plain)) == 1
    # All graphs are made in the first step, the alignment's maths and the teacher's among them; the stop makes none.
    assert let[0] > plain[0] and len(set(let)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_teacher_of_the_student_s_family_leaves_it_compiled_for_its_own_shapes(tmp_path, tiny_config, processes):
    args = ["--compile.enable", "--compile.backend", "aot_eager"]
    assert counts(tmp_path, "symbols", tiny_config, *args, processes=processes) == [0] * 6
    assert counts(tmp_path, "graphs", tiny_config, *args, processes=processes)[0] > 0


def test_a_hook_that_is_lost_is_an_error_in_the_first_step(tmp_path, tiny_config):
    result = jobs.run("tests.support.lost_hook", tiny_config, check=False)
    assert result.returncode == 1
    assert "the tap was not reached" in result.stderr
    assert len(jobs.metrics(tmp_path / "out")) == 1
