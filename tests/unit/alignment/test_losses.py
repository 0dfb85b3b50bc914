import itertools

import pytest
import torch
import torch.nn.functional as F

from let_plugin.alignment.losses import LossEntry, alignment_of, get_loss, negative_cosine

CASES = [
    ("cosine", {}),
    ("mse", {}),
    ("mse", {"normalize": True}),
    ("smooth_l1", {"beta": 0.3}),
    ("relational", {}),
    ("relational", {"stride": 3}),
]
GRID = [
    ((1, 1, 1), torch.float32, 1e-5, False),
    ((2, 17, 5), torch.float32, 1e-5, True),
    ((2, 17, 5), torch.bfloat16, 5e-2, False),
]
all_losses = pytest.mark.parametrize(("name", "options"), CASES, ids=str)


def unit(x_D):
    return x_D / (x_D @ x_D).sqrt()


def standard(x_D):
    centred_D = x_D - x_D.sum() / len(x_D)
    return centred_D / (centred_D @ centred_D / len(x_D) + 1e-5).sqrt()


def reference_of_token(name, a_D, t_D, options):
    if name == "cosine":
        return -(unit(a_D) @ unit(t_D))
    if name == "mse":
        if options.get("normalize"):
            a_D, t_D = (x_D / (x_D @ x_D / len(x_D)).sqrt() for x_D in (a_D, t_D))
        return (a_D - t_D) @ (a_D - t_D) / len(a_D)
    assert name == "smooth_l1"
    beta = options.get("beta", 1.0)
    parts = [d**2 / (2 * beta) if abs(d) < beta else abs(d) - beta / 2 for d in a_D - standard(t_D)]
    return sum(parts) / len(parts)


def reference_of_relation(i, a_LD, t_LD, counts_L, options):
    """One token of `relational`, from the cosines with it and those before it."""
    stride = options.get("stride", 8)
    if i % stride:
        return a_LD.new_zeros(())
    before = [j for j in range(0, i + 1, stride) if counts_L[j]]
    pairs = [(unit(a_LD[i]) @ unit(a_LD[j]).detach() - unit(t_LD[i]) @ unit(t_LD[j])) ** 2 for j in before]
    return stride * sum(pairs) / len(pairs)


def reference(name, options, student_BLD, target_BLD, counts_BL):
    """Each token's loss by the formula, token by token in fp64; zero where it does not count."""
    loss_BL = torch.zeros(counts_BL.shape, dtype=torch.float64)
    for b, i in counts_BL.nonzero().tolist():
        if name == "relational":
            loss_BL[b, i] = reference_of_relation(i, student_BLD[b], target_BLD[b], counts_BL[b], options)
        else:
            loss_BL[b, i] = reference_of_token(name, student_BLD[b, i], target_BLD[b, i], options)
    return loss_BL


def batch(shape, dtype=torch.float32, seed=0):
    """(student, target, which tokens count): about a quarter does not, and has a target of zeros."""
    generator = torch.Generator().manual_seed(seed)
    student_BLD, target_BLD = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    counts_BL = torch.rand(shape[:2], generator=generator) > 0.25
    counts_BL[0, 0] = True
    return student_BLD, target_BLD * counts_BL[..., None], counts_BL


def assert_near(got, expected, tolerance):
    """Within `tolerance` of the largest element, or of 4 where large terms cancel out to zeros."""
    largest = expected.abs().max().item()
    scale = largest if largest > 1e-6 else 4.0
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("shape", "dtype", "tolerance", "compiles"), GRID, ids=str)
@all_losses
def test_losses_and_gradients_equal_the_formula_also_compiled(name, options, shape, dtype, tolerance, compiles):
    *hidden, counts_BL = batch(shape, dtype)
    upstream_BL = torch.arange(1.0, counts_BL.numel() + 1, dtype=torch.float64).view_as(counts_BL) * counts_BL
    hidden = [x_BLD.requires_grad_() for x_BLD in hidden]
    exact = [x_BLD.detach().double().requires_grad_() for x_BLD in hidden]

    loss_BL = get_loss(name).function(*hidden, **options)

    expected_BL = reference(name, options, *exact, counts_BL)
    assert loss_BL.shape == shape[:2] and loss_BL.dtype == dtype
    assert_near(loss_BL[counts_BL], expected_BL[counts_BL], tolerance)
    got = torch.autograd.grad((loss_BL * upstream_BL).sum(), hidden)
    expected = torch.autograd.grad((expected_BL * upstream_BL).sum(), exact, retain_graph=True)
    for a_BLD, b_BLD in zip(got, expected, strict=True):
        assert a_BLD.dtype == dtype
        assert_near(a_BLD[counts_BL], b_BLD[counts_BL], tolerance)

    weighted = torch.autograd.grad(0.37 * expected_BL.sum(), exact)
    metric_sum = F.cosine_similarity(*exact, dim=-1)[counts_BL].sum().item()
    align = alignment_of(get_loss(name), options)
    other = torch.compile(align, fullgraph=True, backend="aot_eager") if compiles else align
    for function, counts in ((align, counts_BL), (other, counts_BL.float())):
        with torch.no_grad():  # as in the tap
            alignment = function(*(x_BLD.detach() for x_BLD in hidden), counts, torch.tensor(0.37))
        assert [x.dtype for x in alignment] == [dtype, dtype, torch.float32] and alignment.metric_sum.shape == ()
        for a, b in zip(alignment, weighted, strict=False):
            assert_near(a, b, tolerance)
        assert alignment.metric_sum.item() == pytest.approx(metric_sum, abs=tolerance * counts_BL.sum().sqrt().item())
        assert not any(g_BLD[~counts_BL].any() for g_BLD in alignment[:2])  # exactly 0 where a token does not count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@all_losses
def test_zeros_and_equal_states_give_finite_losses_and_gradients(name, options, dtype):
    zeros_BLD, other_BLD = torch.zeros(1, 9, 4, dtype=dtype), torch.randn(1, 9, 4).to(dtype)
    align = alignment_of(get_loss(name), options)
    for pair in itertools.product((zeros_BLD, other_BLD), repeat=2):
        assert get_loss(name).function(*pair, **options).isfinite().all()
        assert all(x.isfinite().all() for x in align(*pair, torch.ones(1, 9), torch.tensor(1.0)))


@all_losses
def test_no_gradient_depends_on_a_later_token_or_another_row(name, options):
    *hidden, counts_BL = batch((3, 17, 8))
    align = alignment_of(get_loss(name), options)
    before_BLD = align(*hidden, counts_BL, torch.tensor(0.3)).gradient_BLD
    student_BLD, target_BLD, _ = batch((3, 17, 8), seed=1)
    for at in range(17):
        changed = [torch.cat([x[:, :at], y[:, at:]], 1) for x, y in zip(hidden, (student_BLD, target_BLD), strict=True)]
        after_BLD = align(*changed, counts_BL, torch.tensor(0.3)).gradient_BLD
        torch.testing.assert_close(after_BLD[:, :at], before_BLD[:, :at], rtol=1e-5, atol=1e-7)
    for b in range(3):
        alone_BLD = align(*(x[b : b + 1] for x in hidden), counts_BL[b : b + 1], torch.tensor(0.3)).gradient_BLD
        torch.testing.assert_close(alone_BLD, before_BLD[b : b + 1], rtol=1e-5, atol=1e-7)


def scaled(student_BLD, target_BLD, *, scale: float = 2.0):
    return scale * (student_BLD * target_BLD).sum(dim=-1)


def test_a_closed_form_is_that_of_a_loss_without_options():
    def closed_form(student_BLD, target_BLD, coefficient):
        return negative_cosine(student_BLD, target_BLD, coefficient)._replace(gradient_BLD=torch.full((), 7.0))

    arguments, own = (*batch((2, 3, 5)), torch.tensor(0.5)), LossEntry(scaled, closed_form)
    assert alignment_of(own, {})(*arguments).gradient_BLD == 7
    torch.testing.assert_close(alignment_of(own, {"scale": 3.0})(*arguments).gradient_BLD, 1.5 * arguments[1])
