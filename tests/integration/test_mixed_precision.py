"""LET under reduced precision: the same gradient, up to the rounding of the student's own."""

import pytest

from tests.support import jobs

# Large enough that the alignment makes up most of the gradient.
WEIGHT = 50
BFLOAT16 = {"training.mixed_precision_param": "bfloat16"}
CASES = {
    "fp32": {},
    "fp32, no alignment": {"let.weight": 0},
    "bf16": BFLOAT16,
    "bf16, teacher in fp32": BFLOAT16 | {"let.teacher.dtype": "float32"},
    "bf16, target in fp32": BFLOAT16 | {"let.target-dtype": "float32"},
    "bf16, maths in bf16": BFLOAT16 | {"let.math-dtype": "bfloat16"},
    "bf16, learned projector": BFLOAT16 | {"let.dimension-match": "linear"},
    "float8": {"base": "tests.support.tiny_float8"},
}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory, tiny_teacher):
    """Of the first step, under FSDP2 on two processes; torchtitan's default reduces in fp32."""
    folder = tmp_path_factory.mktemp("precision")
    seed = folder / "seed.toml"
    seed.write_text(jobs.TINY.format(folder=folder / "seed", teacher=tiny_teacher[0]))
    args = jobs.seed_checkpoint(folder / "seed", seed)
    args += ["--parallelism.data_parallel_shard_degree", "2", "--training.local_batch_size", "2"]
    args += ["--training.max_norm", "1e9", "--training.steps", "1", "--let.stop-step", "1"]
    cases = {}
    for i, (name, options) in enumerate(CASES.items()):
        options = {"let.weight": WEIGHT, **options}
        config = folder / f"{i}.toml"
        text = jobs.TINY.format(folder=folder / str(i), teacher=tiny_teacher[0])
        config.write_text(text.replace("tests.support.tiny", options.pop("base", "tests.support.tiny")))
        cases[name] = (config, [*args, *(arg for option, value in options.items() for arg in (f"--{option}", value))])
    results = jobs.train_many(folder, cases, processes=2)
    for name, result in results.items():
        assert "error" not in result, f"{name}: {result['error']}"
    return {name: result["gradients"] for name, result in results.items()}


@pytest.mark.slow
def test_leaving_the_alignment_out_would_be_seen(gradients):
    assert jobs.relative_difference(gradients["fp32, no alignment"], gradients["fp32"]) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("fp32")])
def test_the_gradient_is_that_of_fp32_up_to_rounding(gradients, name):
    student = {key: gradient for key, gradient in gradients[name].items() if key in gradients["fp32"]}
    difference = jobs.relative_difference(student, gradients["fp32"])
    assert 1e-5 < difference < 3e-2, f"{difference:.1e}"
