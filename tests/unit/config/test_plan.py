"""What a `[let]` table makes the run do. Shape legend: B batch, L sequence, D student width, E teacher width."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.config import CompileConfig

from let_plugin.alignment.layer_mapping import LayerPair
from let_plugin.alignment.schedules import linear
from let_plugin.config import LetConfig, PairConfig, ProjectorConfig, plan
from let_plugin.config.errors import ConfigError
from let_plugin.trainer import with_let
from tests.support.config_registry import tiny


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
        (10, {"stop_step": 0}, 0),  # 0 is a value, not "not given"
        (10, {"stop_step": 10}, 10),
        (10, {"stop_tokens": 0}, 0),
        (10, {"stop_tokens": 257}, 2),  # of 4 x 64 tokens; rounded up
        (10, {"stop_tokens": 2560}, 10),
        (10, {"schedule": "hard_stop"}, 5),
        (10, {"schedule": "constant"}, 10),
        (10, {"schedule": "constant", "stop_step": 3}, 3),
    ],
)
def test_stop_step(steps, let, expected):
    assert plan.stop_step(config_of(steps, **let), 1) == expected


@pytest.mark.parametrize("value", [-1, 11])
def test_a_stop_step_outside_of_the_run(value):
    problem = problem_of(plan.stop_step, config_of(stop_step=value), 1)
    assert (problem.key, problem.value) == ("let.stop_step", value)
    assert "between 0 and training.steps = 10" in problem.message


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_stop_fraction_that_is_none(value):
    problem = problem_of(plan.stop_step, config_of(stop_fraction=value), 1)
    assert (problem.key, problem.value) == ("let.stop_fraction", value) or math.isnan(problem.value)
    assert "between 0 and 1" in problem.message


def test_tokens_of_a_step_are_those_of_all_ranks():
    assert plan.tokens_per_step(config_of(), 1) == 4 * 64
    assert plan.tokens_per_step(config_of(), 8) == 8 * 4 * 64
    config = config_of()
    config.training.global_batch_size = 32
    assert plan.tokens_per_step(config, 2) == 32 * 64
    config.let.stop_tokens = 32 * 64 * 3
    assert plan.stop_step(config, 2) == 3


@pytest.mark.parametrize("value", [-1, 2561])
def test_a_stop_in_tokens_outside_of_the_run(value):
    problem = problem_of(plan.stop_step, config_of(stop_tokens=value), 1)
    assert (problem.key, problem.value) == ("let.stop_tokens", value)
    assert "2560" in problem.message


def test_one_stop_only():
    with pytest.raises(ConfigError) as info:
        plan.stop_step(config_of(stop_step=3, stop_fraction=0.5), 1)
    assert [problem.key for problem in info.value.problems] == ["let.stop_step", "let.stop_fraction"]


@pytest.mark.parametrize("value", [-1, 4])
def test_a_warm_up_that_is_longer_than_the_alignment(value):
    problem = problem_of(plan.stop_step, config_of(stop_step=3, warmup_steps=value), 1)
    assert (problem.key, problem.value) == ("let.warmup_steps", value)


def test_the_papers_schedule_is_the_default():
    schedule = plan.schedule(LetConfig())
    assert [schedule(step, stop_step=7) for step in range(9)] == [linear(step, stop_step=7) for step in range(9)]


def test_options_and_warm_up_of_a_schedule():
    schedule = plan.schedule(LetConfig(schedule="exponential", schedule_options={"final": 0.25}, warmup_steps=1))
    assert [schedule(step, stop_step=3) for step in range(4)] == pytest.approx([0.5, 1, 0.5, 0])


@pytest.mark.parametrize(
    ("mapping", "block"),
    [("L2E", 0), ("L2M", 1), ("L2L", 3)],  # of the tiny student's 4 blocks
)
def test_layer_mapping(mapping, block):
    assert plan.layer_pairs(config_of(layer_mapping=mapping), 2) == [LayerPair(block, 1)]


def test_pairs_by_hand_count_from_the_end_too():
    pairs = [PairConfig(student=-1), PairConfig(student=0, teacher=0, weight=0.5)]
    pairs.append(PairConfig(student=-4, teacher="embedding"))
    got = plan.layer_pairs(config_of(pairs=pairs), 2)
    assert got == [LayerPair(3, 1), LayerPair(0, 0, 0.5), LayerPair(0, "embedding")]
    assert plan.teacher_layers([*got, got[0]]) == [1, 0, "embedding"]


@pytest.mark.parametrize(
    ("pairs", "keys"),
    [
        ([PairConfig(student=4)], ["let.pairs.0.student"]),
        ([PairConfig(student=0, teacher=2), PairConfig(student=-5)], ["let.pairs.0.teacher", "let.pairs.1.student"]),
        ([PairConfig(student=0, weight=-1.0)], ["let.pairs.0.weight"]),
        ([PairConfig(student=0, weight=math.nan)], ["let.pairs.0.weight"]),
        ([PairConfig(student=0), PairConfig(student=-4, teacher=1)], ["let.pairs.1"]),  # the same pair
    ],
)
def test_pairs_that_there_are_not(pairs, keys):
    with pytest.raises(ConfigError) as info:
        plan.layer_pairs(config_of(pairs=pairs), 2)
    assert [problem.key for problem in info.value.problems] == keys


def test_a_chosen_block_is_one_pair_and_not_beside_pairs():
    problem = problem_of(plan.layer_pairs, config_of(student_block=1, layer_mapping="uniform"), 2)
    assert problem.key == "let.student_block" and "let.pairs" in problem.message
    problem = problem_of(plan.layer_pairs, config_of(student_block=1, pairs=[PairConfig(student=0)]), 2)
    assert problem.key == "let.student_block"


def test_a_bad_option_of_a_mapping():
    config = config_of(layer_mapping_options={"early": 0.0})
    assert problem_of(plan.layer_pairs, config, 2).key == "let.layer_mapping_options.early"
    config = config_of(layer_mapping_options={"erly": 0.5})
    problem = problem_of(plan.layer_pairs, config, 2)
    assert problem.key == "let.layer_mapping_options.erly" and "'early'" in problem.message


@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_chosen_block_overrides_the_mapping(block):
    pairs = plan.layer_pairs(config_of(student_block=block, layer_mapping="L2L"), 2)
    assert pairs == [LayerPair(block, 1)]


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_that_the_student_does_not_have(block):
    problem = problem_of(plan.layer_pairs, config_of(student_block=block), 2)
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
            lambda let: plan.layer_pairs(config_of(layer_mapping=let.layer_mapping), 2),
        ),
        ("dimension_match", "interpolat", "interpolate", lambda let: plan.dimension_match(let)),
        ("loss", "cosin", "cosine", lambda let: plan.loss(let)),
    ],
)
def test_an_unknown_name_names_its_field_and_suggests(field, wrong, right, function):
    problem = problem_of(function, LetConfig(**{field: wrong}))
    assert (problem.key, problem.value) == (f"let.{field}", wrong)
    assert f"did you mean '{right}'?" in problem.message


def alignment(let, teacher_width, student_width, compile_config=None, **pair):
    """The maths of a pair without anything to learn."""
    align = plan.alignment(let, plan.dimension_match(let)(teacher_width, student_width), compile_config, **pair)
    return lambda *args: align(*args, {})[0]


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
    metric_sum = F.cosine_similarity(hidden_BLD, target_BLD, dim=-1).sum()
    (-coefficient * metric_sum).backward()
    return hidden_BLD.grad, metric_sum.detach()


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("teacher_width", "student_width"), [(32, 48), (48, 32), (7, 23), (24, 24)])
def test_alignment_equals_the_explicit_formula(teacher_width, student_width, align_corners, teacher_dtype):
    generator = torch.Generator().manual_seed(0)
    student_BLD = torch.randn(2, 5, student_width, generator=generator)
    teacher_BLE = torch.randn(2, 5, teacher_width, generator=generator).to(teacher_dtype)
    coefficient = torch.tensor(0.37)

    let = LetConfig(dimension_match_options={"align_corners": align_corners})
    gradient_BLD, _, metric_sum = alignment(let, teacher_width, student_width)(student_BLD, teacher_BLE, coefficient)

    expected_gradient, expected_sum = reference(student_BLD, teacher_BLE, coefficient, align_corners)
    assert gradient_BLD.dtype == metric_sum.dtype == torch.float32
    torch.testing.assert_close(gradient_BLD, expected_gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metric_sum, expected_sum, rtol=1e-5, atol=1e-5)


def test_a_bf16_student_is_aligned_in_fp32():
    generator = torch.Generator().manual_seed(0)
    student_BLD = torch.randn(2, 5, 12, generator=generator).bfloat16()
    teacher_BLE = torch.randn(2, 5, 8, generator=generator).bfloat16()
    gradient_BLD, _, _ = alignment(LetConfig(), 8, 12)(student_BLD, teacher_BLE, torch.tensor(1.0))
    expected_gradient, _ = reference(student_BLD, teacher_BLE, 1.0, align_corners=False)
    torch.testing.assert_close(gradient_BLD, expected_gradient, rtol=1e-4, atol=1e-6)

    low, _, metric_sum = alignment(LetConfig(math_dtype="bfloat16"), 8, 12)(student_BLD, teacher_BLE, torch.tensor(1.0))
    assert low.dtype == torch.bfloat16 and metric_sum.dtype == torch.float32
    torch.testing.assert_close(low.float(), expected_gradient, rtol=0, atol=3e-2)


def test_compiled_alignment_equals_eager():
    generator = torch.Generator().manual_seed(0)
    student_BLD, teacher_BLE = (torch.randn(2, 5, width, generator=generator) for width in (12, 8))
    args = (student_BLD, teacher_BLE, torch.tensor(0.37))
    config = CompileConfig(enable=True, backend="aot_eager")
    match = plan.dimension_match(LetConfig())(8, 12)
    assert hasattr(plan.alignment(LetConfig(), match, config), "_torchdynamo_orig_callable")
    assert not hasattr(plan.alignment(LetConfig(), match, CompileConfig(enable=False)), "_torchdynamo_orig_callable")
    compiled, eager = (alignment(LetConfig(), 8, 12, c) for c in (config, None))
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

    align = plan.alignment(LetConfig(), match, compile_config)
    with torch.no_grad():  # as in the tap
        own = {name: weight.detach() for name, weight in weights.items()}
        result, gradients = align(student_BLD, teacher_BLE, torch.tensor(0.37), own)

    torch.testing.assert_close(result.gradient_BLD, student.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.metric_sum, cosine_BL.sum().detach())
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-5)


def test_a_pair_has_its_channels_and_its_weight():
    generator = torch.Generator().manual_seed(0)
    student_BLD, teacher_BLE = (torch.randn(2, 5, width, generator=generator) for width in (12, 20))
    own = alignment(LetConfig(), 8, 12, channels=slice(4, 12), weight=0.5)
    got = own(student_BLD, teacher_BLE, torch.tensor(0.4))
    expected = alignment(LetConfig(), 8, 12)(student_BLD, teacher_BLE[..., 4:12], torch.tensor(0.2))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
@pytest.mark.parametrize("compile_config", [None, CompileConfig(enable=True, backend="aot_eager")])
def test_a_match_on_the_students_side_equals_autograd(loss, compile_config):
    generator = torch.Generator().manual_seed(0)
    student_BLD, teacher_BLE = (torch.randn(2, 5, width, generator=generator) for width in (8, 12))
    teacher_BLE[0, :3] = 0
    match = Affine()
    weights = {name: p.detach().clone().requires_grad_() for name, p in match.named_parameters()}
    student = student_BLD.clone().requires_grad_()
    projected_BLE = F.linear(student, weights["weight"], weights["bias"])
    if loss == "cosine":
        loss_BL = -F.cosine_similarity(projected_BLE, teacher_BLE, dim=-1)
    else:
        loss_BL = (projected_BLE - teacher_BLE).square().mean(dim=-1)
    (0.37 * loss_BL[teacher_BLE.any(-1)].sum()).backward()

    let = LetConfig(loss=loss, projector=ProjectorConfig(side="student"))
    align = plan.alignment(let, match, compile_config)
    with torch.no_grad():  # as in the tap
        own = {name: weight.detach() for name, weight in weights.items()}
        result, gradients = align(student_BLD, teacher_BLE, torch.tensor(0.37), own)

    torch.testing.assert_close(result.gradient_BLD, student.grad, rtol=1e-4, atol=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-5)


def test_a_bad_option_of_a_loss_a_match_and_a_schedule():
    assert problem_of(plan.loss, LetConfig(loss_options={"bta": 1})).key == "let.loss_options.bta"
    let = LetConfig(loss="smooth_l1", loss_options={"beta": 0.0})
    assert problem_of(plan.loss, let).key == "let.loss_options.beta"
    let = LetConfig(schedule="exponential", schedule_options={"final": 2})
    assert problem_of(plan.schedule, let).key == "let.schedule_options.final"
    let = LetConfig(dimension_match_options={"align_corners": 1})
    assert problem_of(plan.dimension_match, let).key == "let.dimension_match_options.align_corners"


def test_an_orthogonal_map_where_it_cannot_be():
    let = LetConfig(dimension_match="orthogonal")
    assert plan.dimension_match(let)(8, 12)(torch.ones(1, 1, 8)).shape == (1, 1, 12)
    problem = problem_of(plan.dimension_match(let), 12, 8)
    assert problem.key.startswith("let.dimension_match_options") and "let.projector.side" in problem.message
    let.projector.side = "student"
    assert plan.dimension_match(let)(12, 8)(torch.ones(1, 1, 8)).shape == (1, 1, 12)


def test_auxiliary_blocks_are_those_of_the_pairs_each_once():
    assert plan.auxiliary_pairs(config_of()) == [LayerPair(0, 3)]
    pairs = [PairConfig(student=2, weight=0.5), PairConfig(student=2, teacher=0), PairConfig(student=0)]
    assert [(p.student, p.weight) for p in plan.auxiliary_pairs(config_of(pairs=pairs))] == [(2, 0.5), (0, 1.0)]


def test_auxiliary_blocks_have_no_teacher_whose_layers_could_be_wrong():
    pairs = [PairConfig(student=-1, teacher=11), PairConfig(student=1, teacher="embedding")]
    assert [pair.student for pair in plan.auxiliary_pairs(config_of(pairs=pairs))] == [3, 1]
    with pytest.raises(ConfigError, match=r"let\.pairs\.0\.student = 4: the student has blocks 0 to 3"):
        plan.auxiliary_pairs(config_of(pairs=[PairConfig(student=4, teacher=11)]))
