import math

import pytest
import torch
import torch.nn.functional as F

from let_plugin.baselines.distillation import distillation


def logits(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (3, 65)])
def test_value_and_gradient(shape, temperature):
    """Per token t^2 sum_v p (log p - log q); its gradient with respect to the student's logits is t (q - p)."""
    student_TV, teacher_TV = logits(*shape, seed=0).requires_grad_(), logits(*shape, seed=1)
    upstream_T = torch.arange(1.0, shape[0] + 1)
    losses_T = distillation(student_TV, teacher_TV, temperature=temperature)
    (losses_T * upstream_T).sum().backward()
    q, p = F.softmax(student_TV.detach() / temperature, -1), F.softmax(teacher_TV / temperature, -1)
    for t in range(shape[0]):
        pairs = zip(p[t].tolist(), q[t].tolist(), strict=True)
        expected = temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in pairs)
        assert losses_T[t].item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(student_TV.grad, temperature * (q - p) * upstream_T[:, None], rtol=1e-4, atol=1e-6)


def test_rows_of_one_vocabulary_alone_do_not_count():
    student_TV, teacher_TV = logits(4, 9, seed=0), logits(4, 12, seed=1)
    expected = distillation(student_TV, teacher_TV[:, :9])
    torch.testing.assert_close(distillation(student_TV, teacher_TV), expected)


def test_it_is_zero_only_where_both_agree():
    student_TV = logits(4, 9, seed=0)
    assert distillation(student_TV, student_TV + 3.0).abs().max() < 1e-5
    assert (distillation(student_TV, logits(4, 9, seed=1)) > 1e-3).all()
