"""The maths of a pair, against explicit formulas.

Shape legend: B batch, L sequence, D student width, E teacher width.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from let_plugin.alignment.losses import alignment_of, get_loss
from let_plugin.alignment.pair import PairAlignment
from let_plugin.alignment.projectors import Interpolate, Procrustes

COMPILED = {"backend": "aot_eager"}


def pair(match, loss="cosine", **options):
    return PairAlignment(match, alignment_of(get_loss(loss), {}), **options)


def states(*widths, dtype=torch.float32):
    """Of 2 x 5 tokens; the first three do not count."""
    generator = torch.Generator().manual_seed(0)
    student_BLD, teacher_BLE = (torch.randn(2, 5, width, generator=generator).to(dtype) for width in widths)
    teacher_BLE[0, :3] = 0
    return student_BLD, teacher_BLE


def reference(student_BLD, teacher_BLE, coefficient):
    """-coefficient * sum(cos) by autograd, in fp32."""
    target_BLD = F.interpolate(teacher_BLE.float(), student_BLD.shape[-1], mode="linear")
    hidden_BLD = student_BLD.float().requires_grad_()
    metric_sum = F.cosine_similarity(hidden_BLD, target_BLD, dim=-1).sum()
    (-coefficient * metric_sum).backward()
    return hidden_BLD.grad, metric_sum.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("teacher_width", "student_width"), [(48, 32), (24, 24)])
def test_it_equals_the_explicit_formula(teacher_width, student_width, dtype):
    student_BLD, teacher_BLE = states(student_width, teacher_width, dtype=dtype)
    coefficient = torch.tensor(0.37)
    match = Interpolate(teacher_width, student_width)

    gradient_BLD, _, metric_sum = pair(match)(student_BLD, teacher_BLE, coefficient)

    expected_gradient, expected_sum = reference(student_BLD, teacher_BLE, coefficient)
    assert gradient_BLD.dtype == metric_sum.dtype == torch.float32
    torch.testing.assert_close(gradient_BLD, expected_gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metric_sum, expected_sum, rtol=1e-5, atol=1e-5)

    low, _, metric_sum = pair(match, dtype=torch.bfloat16)(student_BLD, teacher_BLE, coefficient)
    assert low.dtype == torch.bfloat16 and metric_sum.dtype == torch.float32
    torch.testing.assert_close(low.float(), expected_gradient, rtol=0, atol=3e-2)


@pytest.mark.parametrize("compile_options", [None, COMPILED], ids=["eager", "compiled"])
def test_a_pair_has_its_channels_and_its_weight(compile_options):
    student_BLD, teacher_BLE = states(12, 20)
    own = pair(Interpolate(8, 12), channels=slice(4, 12), weight=0.5, compile_options=compile_options)
    got = own(student_BLD, teacher_BLE, torch.tensor(0.4))
    expected = pair(Interpolate(8, 12))(student_BLD, teacher_BLE[..., 4:12], torch.tensor(0.2))
    torch.testing.assert_close(got, expected)


class Affine(nn.Module):
    """A projector with a bias: it maps a token that does not count to something else, unless it is kept from it."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(12, 8, generator=generator))
        self.bias = nn.Parameter(torch.randn(12, generator=generator))

    def forward(self, hidden_BLE):
        return F.linear(hidden_BLE, self.weight, self.bias)


@pytest.mark.parametrize("compile_options", [None, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss", ["cosine", "mse"])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_match_that_is_trained_equals_autograd(side, loss, compile_options):
    student_BLD, teacher_BLE = states(*((12, 8) if side == "teacher" else (8, 12)))
    match = Affine()
    weights = {name: p.detach().clone().requires_grad_() for name, p in match.named_parameters()}
    student = student_BLD.clone().requires_grad_()
    mapped = F.linear(teacher_BLE if side == "teacher" else student, weights["weight"], weights["bias"])
    both = (student, mapped) if side == "teacher" else (mapped, teacher_BLE)
    loss_BL = -F.cosine_similarity(*both, dim=-1) if loss == "cosine" else (both[0] - both[1]).square().mean(dim=-1)
    (0.37 * loss_BL[teacher_BLE.any(-1)].sum()).backward()

    own = pair(match, loss, side=side, compile_options=compile_options)
    own.weights.update({name: weight.detach() for name, weight in weights.items()})
    own.weight_gradients.update({name: torch.zeros_like(weight) for name, weight in own.weights.items()})
    with torch.no_grad():  # as in the tap
        for _ in range(2):  # microbatches
            result = own(student_BLD, teacher_BLE, torch.tensor(0.37))

    torch.testing.assert_close(result.gradient_BLD, student.grad, rtol=1e-4, atol=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(own.weight_gradients[name], 2 * weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_the_products_of_the_states_are_summed_while_they_are_asked_for(side):
    student_BLD, teacher_BLE = states(12, 20)
    own_BLE = teacher_BLE[..., 4:12]
    match = Procrustes(*((8, 12) if side == "teacher" else (12, 8)))
    own = pair(match, side=side, channels=slice(4, 12))
    with torch.no_grad():
        own(student_BLD, teacher_BLE, torch.tensor(1.0))
        own.products = products = torch.zeros_like(match.weight)
        for _ in range(2):
            own(student_BLD, teacher_BLE, torch.tensor(1.0))
    expected = torch.einsum("bld,ble->de", student_BLD, own_BLE)
    torch.testing.assert_close(products, 2 * (expected if side == "teacher" else expected.T))
