"""What LET must not do in a training step: make the host wait, compile again, leave work behind, or do nothing."""

import pytest

from tests.support import jobs

pytestmark = pytest.mark.slow

# Steps 1 and 6 are logged, step 1 builds the teacher, and step 5 is the first without.
STEPS = ["--training.steps", "6", "--let.stop-step", "4", "--metrics.log_freq", "6"]
COMPILE = ["--compile.enable", "--compile.backend", "aot_eager"]
OFF = ["--let.no-enable"]
KINDS = ("torchtitan", "torchtitan, linear", "transformers")


def steps_of(folder, tiny_teacher, cases, processes, count):
    """Name -> what each step did."""
    config = jobs.tiny(folder, tiny_teacher[0])
    cases = {name: (config, [*STEPS, *args]) for name, args in cases.items()}
    results = jobs.train_many(folder, cases, processes, count=count)
    return {name: result["steps"] for name, result in results.items()}


@pytest.fixture(scope="module")
def eager(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("eager")
    options = [
        [],
        ["--let.dimension-match", "linear", "--let.weight-by", "gradient"],
        jobs.make_hf_teacher(folder / "hf"),
    ]
    return steps_of(folder, tiny_teacher, {"off": OFF, **dict(zip(KINDS, options, strict=True))}, 1, "eager")


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_makes_the_host_wait_for_let(eager, kind):
    let, off = ([step["reads"] for step in eager[name]] for name in (kind, "off"))
    assert let[1:5] == off[1:5]
    assert let[0] > off[0]  # the counter counts: LET's metrics of a logged step


@pytest.mark.parametrize("kind", KINDS)
def test_steps_after_the_stop_are_those_of_a_run_without_let(eager, kind):
    """Not a single operation more or less: what a step costs is the baseline's."""
    let, off = ([step["operations"] for step in eager[name]] for name in (kind, "off"))
    assert len(let) == 6 and let[4:] == off[4:]
    assert all(len(step) > 100 + len(base) for step, base in zip(let[:4], off[:4], strict=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_all_is_compiled_in_the_first_step_for_its_own_shapes(tmp_path, tiny_teacher, processes):
    """The alignment's maths and a teacher of the student's family as well; the stop compiles nothing again."""
    runs = steps_of(tmp_path, tiny_teacher, {"off": [*COMPILE, *OFF], "let": COMPILE}, processes, "compiled")
    first = {}
    for name, steps in runs.items():
        assert [step["symbols"] for step in steps] == [0] * 6
        first[name], *others = [step["graphs"] for step in steps]
        assert others == [0] * 5
    assert first["let"] > first["off"] > 0
