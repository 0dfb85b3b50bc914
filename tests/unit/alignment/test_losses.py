import pytest
import torch
import torch.nn.functional as F

from let_plugin.alignment.losses import LOSSES, negative_cosine

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 17, 64), (1, 129, 33)]


def reference(student_BLD, target_BLD, coefficient):
    """The formula, by autograd: coefficient * sum(-cos)."""
    student_BLD = student_BLD.float().detach().requires_grad_()
    cosine_BL = F.cosine_similarity(student_BLD, target_BLD.float(), dim=-1, eps=1e-8)
    (coefficient * -cosine_BL.sum()).backward()
    return student_BLD.grad, cosine_BL.sum().detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_and_metric_equal_autograd(shape, dtype):
    torch.manual_seed(0)
    student_BLD, target_BLD = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    coefficient = torch.tensor(0.37)  # a non-unit upstream gradient

    gradient_BLD, cosine_sum = negative_cosine(student_BLD, target_BLD, coefficient)

    expected_gradient, expected_sum = reference(student_BLD, target_BLD, coefficient)
    assert gradient_BLD.dtype == cosine_sum.dtype == torch.float32
    torch.testing.assert_close(gradient_BLD, expected_gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cosine_sum, expected_sum, rtol=1e-5, atol=1e-5)


def test_a_zero_target_counts_nothing():
    student_BLD, target_BLD = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    target_BLD[0, 1:] = 0
    gradient_BLD, cosine_sum = negative_cosine(student_BLD, target_BLD, torch.tensor(1.0))
    assert gradient_BLD[0, 1:].eq(0).all()
    kept = torch.ones(2, 4, dtype=torch.bool)
    kept[0, 1:] = False
    expected = F.cosine_similarity(student_BLD[kept], target_BLD[kept], dim=-1).sum()
    torch.testing.assert_close(cosine_sum, expected)


def test_zero_vectors_and_zero_weight_give_finite_results():
    gradient_BLD, cosine_sum = negative_cosine(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor(0.0))
    assert gradient_BLD.eq(0).all() and cosine_sum.eq(0)


def test_a_small_step_against_the_gradient_raises_the_cosine():
    torch.manual_seed(0)
    student_BLD, target_BLD = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    gradient_BLD, before = negative_cosine(student_BLD, target_BLD, torch.tensor(1.0))
    _, after = negative_cosine(student_BLD - 0.1 * gradient_BLD, target_BLD, torch.tensor(1.0))
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
