import pytest
import torch
import torch.nn.functional as F

from let_plugin.alignment.losses import LOSSES, negative_cosine

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 17, 64), (1, 129, 33)]


def reference(student_BLD, target_BLD, coefficient):
    """The formula, by autograd: coefficient * sum(-cos). Its gradients for both, and the sum of the cosines."""
    student_BLD, target_BLD = (hidden.float().detach().requires_grad_() for hidden in (student_BLD, target_BLD))
    cosine_BL = F.cosine_similarity(student_BLD, target_BLD, dim=-1, eps=1e-8)
    (coefficient * -cosine_BL.sum()).backward()
    return student_BLD.grad, target_BLD.grad, cosine_BL.sum().detach()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_and_metric_equal_autograd(shape, dtype, tolerance):
    torch.manual_seed(0)
    student_BLD, target_BLD = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    coefficient = torch.tensor(0.37)  # a non-unit upstream gradient

    got = negative_cosine(student_BLD, target_BLD, coefficient)

    expected = reference(student_BLD, target_BLD, coefficient)
    assert got.gradient_BLD.dtype == got.target_gradient_BLD.dtype == dtype
    assert got.cosine_sum.dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.float(), b, rtol=0, atol=tolerance * scale)


def test_a_zero_target_counts_nothing():
    student_BLD, target_BLD = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    target_BLD[0, 1:] = 0
    gradient_BLD, _, cosine_sum = negative_cosine(student_BLD, target_BLD, torch.tensor(1.0))
    assert gradient_BLD[0, 1:].eq(0).all()
    kept = torch.ones(2, 4, dtype=torch.bool)
    kept[0, 1:] = False
    expected = F.cosine_similarity(student_BLD[kept], target_BLD[kept], dim=-1).sum()
    torch.testing.assert_close(cosine_sum, expected)


def test_zero_vectors_and_zero_weight_give_finite_results():
    for result in negative_cosine(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor(0.0)):
        assert result.eq(0).all()


def test_a_small_step_against_the_gradient_raises_the_cosine():
    torch.manual_seed(0)
    student_BLD, target_BLD = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    gradient_BLD, _, before = negative_cosine(student_BLD, target_BLD, torch.tensor(1.0))
    _, _, after = negative_cosine(student_BLD - 0.1 * gradient_BLD, target_BLD, torch.tensor(1.0))
    assert after > before


def test_compiled_equals_eager():
    torch.manual_seed(0)
    student_BLD, target_BLD = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    eager = negative_cosine(student_BLD, target_BLD, torch.tensor(0.1))
    compiled = torch.compile(negative_cosine, fullgraph=True)(student_BLD, target_BLD, torch.tensor(0.1))
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_papers_loss_is_registered():
    assert LOSSES.get("cosine", key="let.loss") is negative_cosine
