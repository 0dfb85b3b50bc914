"""The maths of a pair, against autograd.

Shape legend: B batch, L sequence, D student width, E teacher width.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from let_plugin.alignment.losses import alignment_of, get_loss
from let_plugin.alignment.pair import PairAlignment
from let_plugin.alignment.projectors import Interpolate, Procrustes


def pair(match, loss="cosine", **options):
    return PairAlignment(match, alignment_of(get_loss(loss), {}), **options)


def states(*widths):
    """Of 2 x 5 tokens; the first three do not count."""
    generator = torch.Generator().manual_seed(0)
    student_BLD, teacher_BLE = (torch.randn(2, 5, width, generator=generator) for width in widths)
    teacher_BLE[0, :3] = 0
    return student_BLD, teacher_BLE


class Affine(nn.Module):
    """A projector with a bias: it maps a token that does not count to something else, unless it is kept from it."""

    def __init__(self, in_width, out_width):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(out_width, in_width, generator=generator))
        self.bias = nn.Parameter(torch.randn(out_width, generator=generator))

    def forward(self, hidden_BLE):
        return F.linear(hidden_BLE, self.weight, self.bias)


@pytest.mark.parametrize("compile_options", [None, {"backend": "aot_eager"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss", ["cosine", "mse"])
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("kind", [Interpolate, Affine])
def test_a_pair_of_some_channels_and_its_weight_equals_autograd(kind, side, loss, compile_options):
    student_BLD, teacher_BLE = states(*((12, 20) if side == "teacher" else (8, 24)))
    channels = slice(4, 12) if side == "teacher" else slice(4, 16)
    match = kind(8, 12)
    weights = {name: p.detach().clone().requires_grad_() for name, p in match.named_parameters()}
    student, own_BLE = student_BLD.clone().requires_grad_(), teacher_BLE[..., channels]
    mapped = torch.func.functional_call(match, weights, (own_BLE if side == "teacher" else student,))
    both = (student, mapped) if side == "teacher" else (mapped, own_BLE)
    counts_BL, cosine_BL = own_BLE.any(-1), F.cosine_similarity(*both, dim=-1)
    loss_BL = -cosine_BL if loss == "cosine" else (both[0] - both[1]).square().mean(dim=-1)
    (0.2 * loss_BL[counts_BL].sum()).backward()

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        settings = {"side": side, "channels": channels, "weight": 0.5, "compile_options": compile_options}
        own = pair(match, loss, dtype=dtype, **settings)
        own.weights.update({name: weight.detach() for name, weight in weights.items()})
        own.weight_gradients.update({name: torch.zeros_like(weight) for name, weight in own.weights.items()})
        with torch.no_grad():  # as in the tap
            for _ in range(2):  # microbatches
                result = own(student_BLD, teacher_BLE, torch.tensor(0.4))
        assert result.gradient_BLD.dtype == dtype and result.metric_sum.dtype == torch.float32
        expected = [(result.gradient_BLD, student.grad), (result.metric_sum, cosine_BL[counts_BL].sum().detach())]
        expected += [(own.weight_gradients[name], 2 * weight.grad) for name, weight in weights.items()]
        for got, wanted in expected:
            scale = max(wanted.abs().max().item(), 1)
            torch.testing.assert_close(got.float(), wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_the_products_of_the_states_are_summed_while_they_are_asked_for(side):
    student_BLD, teacher_BLE = states(12, 20)
    own_BLE = teacher_BLE[..., 4:12]
    match = Procrustes(*((8, 12) if side == "teacher" else (12, 8)))
    own = pair(match, side=side, channels=slice(4, 12))
    with torch.no_grad():
        own(student_BLD, teacher_BLE, torch.tensor(1.0))
        own.products = products = torch.zeros(20, match.weight.shape[1])
        for _ in range(2):
            own(student_BLD, teacher_BLE, torch.tensor(1.0))
    student, teacher = (x[own_BLE.any(dim=-1)] for x in (student_BLD, own_BLE))  # of the tokens that count
    given, wanted = (teacher, student) if side == "teacher" else (student, teacher)
    torch.testing.assert_close(products, 2 * torch.cat([wanted, given], dim=1).T @ given)
