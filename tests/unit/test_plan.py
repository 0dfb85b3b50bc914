"""What a `[let]` table makes the run do. Shape legend: B batch, L sequence, D student width, E teacher width."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.config import CompileConfig

from let_plugin import plan
from let_plugin.alignment.schedules import linear
from let_plugin.config import LetConfig
from let_plugin.errors import ConfigError
from let_plugin.teacher.base import TeacherInfo
from let_plugin.trainer import with_let
from tests.support.config_registry import tiny

TEACHER = TeacherInfo(
    description="",
    hidden_size=32,
    num_layers=2,
    vocab_size=4096,
    max_seq_len=None,
    num_trunk_params=1,
    num_embedding_params=1,
)


def config_of(steps=10, **let):
    config = with_let(tiny())
    config.training.steps = steps
    config.let = LetConfig(enable=True, **let)
    return config


def problem_of(function, *args):
    with pytest.raises(ConfigError) as info:
        function(*args)
    (problem,) = info.value.problems
    return problem


@pytest.mark.parametrize(
    ("steps", "let", "expected"),
    [
        (10, {}, 5),
        (11, {}, 5),  # rounded down
        (10, {"stop_fraction": 0.0}, 0),
        (10, {"stop_fraction": 1.0}, 10),
        (10, {"stop_step": 7}, 7),
        (10, {"stop_step": 0, "stop_fraction": 1.0}, 0),  # 0 is a value, not "not given"
        (10, {"stop_step": 10}, 10),
        (10, {"stop_step": 3, "stop_fraction": 9.0}, 3),  # the fraction is not looked at
    ],
)
def test_stop_step(steps, let, expected):
    assert plan.stop_step(config_of(steps, **let)) == expected


@pytest.mark.parametrize("value", [-1, 11])
def test_a_stop_step_outside_of_the_run(value):
    problem = problem_of(plan.stop_step, config_of(stop_step=value))
    assert (problem.key, problem.value) == ("let.stop_step", value)
    assert "between 0 and training.steps = 10" in problem.message


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_stop_fraction_that_is_none(value):
    problem = problem_of(plan.stop_step, config_of(stop_fraction=value))
    assert (problem.key, problem.value) == ("let.stop_fraction", value) or math.isnan(problem.value)
    assert "between 0 and 1" in problem.message


def test_the_papers_schedule_is_the_default():
    assert plan.schedule(LetConfig()) is linear


@pytest.mark.parametrize(
    ("mapping", "block"),
    [("L2E", 0), ("L2M", 1), ("L2L", 3)],  # of the tiny student's 4 blocks
)
def test_layer_mapping(mapping, block):
    pair = plan.layer_pair(config_of(layer_mapping=mapping), TEACHER)
    assert (pair.student, pair.teacher) == (block, -1)


@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_chosen_block_overrides_the_mapping(block):
    pair = plan.layer_pair(config_of(student_block=block, layer_mapping="L2L"), TEACHER)
    assert (pair.student, pair.teacher) == (block, -1)


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_that_the_student_does_not_have(block):
    problem = problem_of(plan.layer_pair, config_of(student_block=block), TEACHER)
    assert (problem.key, problem.value) == ("let.student_block", block)
    assert "blocks 0 to 3" in problem.message


@pytest.mark.parametrize(
    ("field", "wrong", "right", "function"),
    [
        ("schedule", "linaer", "linear", lambda let: plan.schedule(let)),
        (
            "layer_mapping",
            "L2Early",
            "L2E",
            lambda let: plan.layer_pair(config_of(layer_mapping=let.layer_mapping), TEACHER),
        ),
        ("dimension_match", "interpolat", "interpolate", lambda let: plan.dimension_match(let)),
        ("loss", "cosin", "cosine", lambda let: plan.loss(let)),
    ],
)
def test_an_unknown_name_names_its_field_and_suggests(field, wrong, right, function):
    problem = problem_of(function, LetConfig(**{field: wrong}))
    assert (problem.key, problem.value) == (f"let.{field}", wrong)
    assert f"did you mean '{right}'?" in problem.message


def alignment(let, teacher_width, student_width, compile_config=None):
    return plan.alignment(let, plan.dimension_match(let)(teacher_width, student_width), compile_config)


def reference(student_BLD, teacher_BLE, coefficient, align_corners):
    """-coefficient * sum(cos) by autograd, in fp32, after resampling each token's channels one by one."""
    D, E = student_BLD.shape[-1], teacher_BLE.shape[-1]
    channel_D = torch.arange(D)
    place_D = channel_D * (E - 1) / (D - 1) if align_corners else ((channel_D + 0.5) * E / D - 0.5).clamp(0, E - 1)
    left_D = place_D.floor().long()
    right_D = (left_D + 1).clamp(max=E - 1)
    weight_D = place_D - left_D
    teacher_BLE = teacher_BLE.float()
    target_BLD = teacher_BLE[..., left_D] * (1 - weight_D) + teacher_BLE[..., right_D] * weight_D
    hidden_BLD = student_BLD.float().requires_grad_()
    cosine_sum = F.cosine_similarity(hidden_BLD, target_BLD, dim=-1).sum()
    (-coefficient * cosine_sum).backward()
    return hidden_BLD.grad, cosine_sum.detach()


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("teacher_width", "student_width"), [(32, 48), (48, 32), (7, 23), (24, 24)])
def test_alignment_equals_the_explicit_formula(teacher_width, student_width, align_corners, teacher_dtype):
    generator = torch.Generator().manual_seed(0)
    student_BLD = torch.randn(2, 5, student_width, generator=generator)
    teacher_BLE = torch.randn(2, 5, teacher_width, generator=generator).to(teacher_dtype)
    coefficient = torch.tensor(0.37)

    let = LetConfig(align_corners=align_corners)
    gradient_BLD, _, cosine_sum = alignment(let, teacher_width, student_width)(student_BLD, teacher_BLE, coefficient)

    expected_gradient, expected_sum = reference(student_BLD, teacher_BLE, coefficient, align_corners)
    assert gradient_BLD.dtype == cosine_sum.dtype == torch.float32
    torch.testing.assert_close(gradient_BLD, expected_gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cosine_sum, expected_sum, rtol=1e-5, atol=1e-5)


def test_a_bf16_student_is_aligned_in_fp32():
    generator = torch.Generator().manual_seed(0)
    student_BLD = torch.randn(2, 5, 12, generator=generator).bfloat16()
    teacher_BLE = torch.randn(2, 5, 8, generator=generator).bfloat16()
    gradient_BLD, _, _ = alignment(LetConfig(), 8, 12)(student_BLD, teacher_BLE, torch.tensor(1.0))
    expected_gradient, _ = reference(student_BLD, teacher_BLE, 1.0, align_corners=False)
    torch.testing.assert_close(gradient_BLD, expected_gradient, rtol=1e-4, atol=1e-6)

    low, _, cosine_sum = alignment(LetConfig(math_dtype="bfloat16"), 8, 12)(student_BLD, teacher_BLE, torch.tensor(1.0))
    assert low.dtype == torch.bfloat16 and cosine_sum.dtype == torch.float32
    torch.testing.assert_close(low.float(), expected_gradient, rtol=0, atol=3e-2)


def test_compiled_alignment_equals_eager():
    generator = torch.Generator().manual_seed(0)
    student_BLD, teacher_BLE = (torch.randn(2, 5, width, generator=generator) for width in (12, 8))
    args = (student_BLD, teacher_BLE, torch.tensor(0.37))
    compiled = alignment(LetConfig(), 8, 12, CompileConfig(enable=True, backend="aot_eager"))
    assert hasattr(compiled, "_torchdynamo_orig_callable")
    eager = alignment(LetConfig(), 8, 12, CompileConfig(enable=False))
    assert not hasattr(eager, "_torchdynamo_orig_callable")
    for got, expected in zip(compiled(*args), eager(*args), strict=True):
        torch.testing.assert_close(got, expected)


class Affine(nn.Module):
    """A projector with a bias: it makes something of a token that does not count, unless it is kept from it."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(12, 8, generator=generator))
        self.bias = nn.Parameter(torch.randn(12, generator=generator))

    def forward(self, teacher_BLE):
        return F.linear(teacher_BLE, self.weight, self.bias)


@pytest.mark.parametrize("compile_config", [None, CompileConfig(enable=True, backend="aot_eager")])
def test_learned_alignment_equals_autograd(compile_config):
    generator = torch.Generator().manual_seed(0)
    student_BLD, teacher_BLE = (torch.randn(2, 5, width, generator=generator) for width in (12, 8))
    teacher_BLE[0, :3] = 0  # tokens that do not count
    match = Affine()
    weights = {name: p.detach().clone().requires_grad_() for name, p in match.named_parameters()}
    student = student_BLD.clone().requires_grad_()
    target_BLD = F.linear(teacher_BLE, weights["weight"], weights["bias"])
    cosine_BL = F.cosine_similarity(student, target_BLD, dim=-1)[teacher_BLE.any(-1)]
    (-0.37 * cosine_BL.sum()).backward()

    align = plan.learned_alignment(LetConfig(), match, compile_config)
    with torch.no_grad():  # as in the tap
        own = {name: weight.detach() for name, weight in weights.items()}
        result, gradients = align(student_BLD, teacher_BLE, torch.tensor(0.37), own)

    torch.testing.assert_close(result.gradient_BLD, student.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.cosine_sum, cosine_BL.sum().detach())
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-5)
