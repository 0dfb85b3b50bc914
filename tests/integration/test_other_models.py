"""LET in lower precision, and in other decoders of torchtitan; under FSDP2."""

import pytest

from tests.support import jobs

pytestmark = pytest.mark.slow

FSDP2 = jobs.LAYOUTS["FSDP2"]
# Large enough that the alignment makes up most of the gradient.
WEIGHT = ["--let.weight", "50", "--training.max_norm", "1e9", "--training.steps", "1", "--let.stop-step", "1"]
BFLOAT16 = ["--training.mixed_precision_param", "bfloat16"]
# Name -> (base, options); torchtitan's default reduces gradients in fp32.
PRECISIONS = {
    "fp32": ("tiny", []),
    "fp32, no alignment": ("tiny", ["--let.weight", 0]),
    "bf16": ("tiny", BFLOAT16),
    "bf16, teacher in fp32": ("tiny", [*BFLOAT16, "--let.teacher.dtype", "float32"]),
    "bf16, maths in bf16": ("tiny", [*BFLOAT16, "--let.math-dtype", "bfloat16"]),
    "bf16, learned projector": ("tiny", [*BFLOAT16, "--let.dimension-match", "linear"]),
    "float8": ("tiny_float8", []),
}
DECODERS = ("tiny_qwen3", "tiny_mixture_of_experts")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("models")

    def config(base):
        path = folder / f"{base}.toml"
        text = jobs.TINY.format(folder=folder / base, teacher=tiny_teacher[0])
        path.write_text(text.replace("tests.support.tiny", f"tests.support.{base}"))
        return path

    start = jobs.seed_checkpoint(folder / "seed", config("tiny"))
    cases = {name: (config(base), [*start, *WEIGHT, *FSDP2, *args]) for name, (base, args) in PRECISIONS.items()}
    steps = ["--training.steps", "3", "--let.stop-step", "2"]
    cases |= {base: (config(base), [*FSDP2, *steps]) for base in DECODERS}
    return jobs.train_many(folder, cases, processes=2)


def test_leaving_the_alignment_out_would_be_seen(runs):
    gradients = [runs[name]["gradients"] for name in ("fp32, no alignment", "fp32")]
    assert jobs.relative_difference(*gradients) > 0.5


@pytest.mark.parametrize("name", [name for name in PRECISIONS if not name.startswith("fp32")])
def test_the_gradient_is_that_of_fp32_up_to_rounding(runs, name):
    expected = runs["fp32"]["gradients"]
    student = {key: gradient for key, gradient in runs[name]["gradients"].items() if key in expected}
    difference = jobs.relative_difference(student, expected)
    assert 1e-5 < difference < 3e-2, f"{difference:.1e}"


@pytest.mark.parametrize("base", DECODERS)
def test_another_decoder_trains_with_let(runs, base):
    logged = runs[base]["logged"]
    assert [line["let/active"] for line in logged] == [1.0, 1.0, 0.0]
    assert all(-1 <= line["let/cosine"] <= 1 and line["let/cosine"] != 0 for line in logged[:2])
