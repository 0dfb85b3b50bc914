import itertools

import pytest
import torch
import torch.nn.functional as F

from let_plugin.alignment.losses import LOSSES, LossEntry, alignment_of, get_loss, negative_cosine, register_loss

SHAPES = [(1, 1, 1), (2, 3, 5), (1, 33, 33)]
CASES = [
    ("cosine", {}),
    ("mse", {}),
    ("mse", {"normalize": True}),
    ("smooth_l1", {}),
    ("smooth_l1", {"beta": 0.3}),
    ("logsum", {}),
    ("logsum", {"alpha": 1.5}),
    ("relational", {}),
    ("relational", {"stride": 1}),
    ("relational", {"stride": 3}),
]
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)]

all_losses = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
all_dtypes = pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)


@pytest.fixture(autouse=True)
def start_afresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


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
    if name == "smooth_l1":
        beta = options.get("beta", 1.0)
        parts = [d**2 / (2 * beta) if abs(d) < beta else abs(d) - beta / 2 for d in a_D - standard(t_D)]
        return sum(parts) / len(parts)
    assert name == "logsum"
    alpha = options.get("alpha", 4.0)
    return torch.log(sum(abs(d) ** alpha for d in standard(a_D) - standard(t_D)) + 1e-6)


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


def gradients(loss_BL, upstream_BL, *hidden):
    return torch.autograd.grad((loss_BL * upstream_BL).sum(), hidden, materialize_grads=True)


def assert_near(got, expected, tolerance):
    """Within `tolerance` of the largest element, or of 4 where large terms cancel out to zeros."""
    largest = expected.abs().max().item()
    scale = largest if largest > 1e-6 else 4.0
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * scale)


@all_dtypes
@all_shapes
@all_losses
def test_losses_and_gradients_equal_the_formula(name, options, shape, dtype, tolerance):
    *hidden, counts_BL = batch(shape, dtype)
    upstream_BL = torch.rand(shape[:2], dtype=torch.float64) * counts_BL
    hidden = [x_BLD.requires_grad_() for x_BLD in hidden]
    exact = [x_BLD.detach().double().requires_grad_() for x_BLD in hidden]

    loss_BL = get_loss(name).function(*hidden, **options)

    expected_BL = reference(name, options, *exact, counts_BL)
    assert loss_BL.shape == shape[:2] and loss_BL.dtype == dtype
    assert_near(loss_BL[counts_BL], expected_BL[counts_BL], tolerance)
    got = gradients(loss_BL, upstream_BL, *hidden)
    for a_BLD, b_BLD in zip(got, gradients(expected_BL, upstream_BL, *exact), strict=True):
        assert a_BLD.dtype == dtype
        assert_near(a_BLD[counts_BL], b_BLD[counts_BL], tolerance)

    align = alignment_of(get_loss(name), options)
    with torch.no_grad():  # as in the tap
        states = [x_BLD.detach() for x_BLD in hidden]
        alignment = align(*states, counts_BL, torch.tensor(0.37))
        again = align(*states, counts_BL.float(), torch.tensor(0.37))
    weighted = gradients(reference(name, options, *exact, counts_BL), 0.37, *exact)
    metric_sum = F.cosine_similarity(*exact, dim=-1)[counts_BL].sum().detach()
    assert alignment.gradient_BLD.dtype == alignment.target_gradient_BLD.dtype == dtype
    assert alignment.metric_sum.dtype == torch.float32 and alignment.metric_sum.shape == ()
    for a, b, c in zip(alignment, (*weighted, metric_sum), again, strict=True):
        assert_near(a, b, tolerance)
        assert torch.equal(a, c)


@all_losses
def test_tokens_that_do_not_count_have_no_gradient(name, options):
    *hidden, counts_BL = batch((2, 9, 8))
    got = alignment_of(get_loss(name), options)(*hidden, counts_BL, torch.tensor(1.0))
    assert not counts_BL.all()
    assert got.gradient_BLD[~counts_BL].eq(0).all() and got.target_gradient_BLD[~counts_BL].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@all_losses
def test_zeros_and_equal_states_give_finite_losses_and_gradients(name, options, dtype):
    zeros_BLD, other_BLD = torch.zeros(1, 9, 4, dtype=dtype), torch.randn(1, 9, 4).to(dtype)
    for pair in itertools.product((zeros_BLD, other_BLD), repeat=2):
        hidden = [x_BLD.clone().requires_grad_() for x_BLD in pair]
        loss_BL = get_loss(name).function(*hidden, **options)
        assert loss_BL.isfinite().all()
        assert all(g_BLD.isfinite().all() for g_BLD in gradients(loss_BL, torch.ones(1, 9), *hidden))


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


@all_losses
def test_a_small_step_against_the_gradient_lowers_the_loss(name, options):
    student_BLD, target_BLD, counts_BL = batch((2, 49, 16))
    entry = get_loss(name)
    gradient_BLD = alignment_of(entry, options)(student_BLD, target_BLD, counts_BL, torch.tensor(1.0)).gradient_BLD

    def total(student_BLD):
        return entry.function(student_BLD, target_BLD, **options)[counts_BL].sum()

    assert total(student_BLD - 0.01 * gradient_BLD) < total(student_BLD)


@all_losses
def test_compiled_equals_eager(name, options):
    align = alignment_of(get_loss(name), options)
    with torch.no_grad():
        *hidden, counts_BL = batch((2, 19, 16))
        eager = align(*hidden, counts_BL, torch.tensor(0.1))
        compiled = torch.compile(align, fullgraph=True, backend="aot_eager")(*hidden, counts_BL, torch.tensor(0.1))
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_two_options_of_one_loss_can_both_be_compiled():
    for alpha in (2.0, 3.0, 4.0):
        align = alignment_of(get_loss("logsum"), {"alpha": alpha})
        *arguments, counts_BL = batch((2, 5, 16))
        eager = align(*arguments, counts_BL, torch.tensor(0.1))
        compiled = torch.compile(align, fullgraph=True, backend="aot_eager")(*arguments, counts_BL, torch.tensor(0.1))
        torch.testing.assert_close(compiled.gradient_BLD, eager.gradient_BLD)


def test_the_closed_form_compiles_to_the_same():
    student_BLD, target_BLD, _ = batch((2, 5, 16))
    eager = negative_cosine(student_BLD, target_BLD, torch.tensor(0.1))
    compiled = torch.compile(negative_cosine, fullgraph=True)(student_BLD, target_BLD, torch.tensor(0.1))
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_closed_form_of_zero_vectors_and_zero_weight_is_zero():
    for result in negative_cosine(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor(0.0)):
        assert result.eq(0).all()


def test_the_normalised_mse_is_a_cosine_in_disguise():
    student_BLD, target_BLD = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    got_BL = get_loss("mse").function(student_BLD, target_BLD, normalize=True)
    torch.testing.assert_close(got_BL, 2 - 2 * F.cosine_similarity(student_BLD, target_BLD, dim=-1))


def test_the_relational_loss_sums_to_about_the_same_at_every_stride():
    student_BLD, target_BLD = torch.randn(4, 512, 8), torch.randn(4, 512, 8)
    function = get_loss("relational").function
    every, some = (function(student_BLD, target_BLD, stride=stride) for stride in (1, 4))
    assert some.sum().item() == pytest.approx(every.sum().item(), rel=0.1)
    assert some.view(4, -1, 4)[..., 1:].eq(0).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smooth_l1", {"beta": 0.0}),
        ("smooth_l1", {"beta": float("nan")}),
        ("smooth_l1", {"beta": float("inf")}),
        ("logsum", {"alpha": 0.5}),
        ("logsum", {"alpha": float("inf")}),
        ("relational", {"stride": 0}),
    ],
)
def test_a_bad_option_is_an_error_before_the_first_step(name, options):
    (option,) = options
    with pytest.raises(ValueError, match=rf"^{option} must be "):
        alignment_of(get_loss(name), options)


def test_the_registered_losses():
    assert list(LOSSES) == ["cosine", "logsum", "mse", "relational", "smooth_l1"]
    assert get_loss("cosine").closed_form is negative_cosine
    assert [name for name in LOSSES if get_loss(name).needs_whole_sequence] == ["relational"]
    with pytest.raises(LookupError, match=r"did you mean 'cosine'"):
        get_loss("cosin")


def scaled(student_BLD, target_BLD, *, scale: float = 2.0):
    return scale * (student_BLD * target_BLD).sum(dim=-1)


@pytest.fixture
def registered():
    """Names that a test registers, and that are taken back after it."""
    names = []
    yield names
    for name in names:
        LOSSES.unregister(name)


def test_an_entry_point_may_be_a_plain_function(registered):
    LOSSES.register("scaled", scaled)
    registered.append("scaled")
    entry = get_loss("scaled")
    assert entry == LossEntry(scaled, closed_form=None, needs_whole_sequence=False)
    student_BLD, target_BLD, counts_BL = batch((2, 3, 5))
    got = alignment_of(entry, {"scale": 3.0})(student_BLD, target_BLD, counts_BL, torch.tensor(0.5))
    torch.testing.assert_close(got.gradient_BLD, 1.5 * target_BLD)


def test_a_closed_form_is_that_of_the_loss_without_options(registered):
    def closed_form(student_BLD, target_BLD, coefficient):
        return negative_cosine(student_BLD, target_BLD, coefficient)._replace(gradient_BLD=torch.full((), 7.0))

    register_loss("scaled", scaled, closed_form=closed_form, needs_whole_sequence=True)
    registered.append("scaled")
    entry = get_loss("scaled")
    assert entry.needs_whole_sequence
    arguments = (*batch((2, 3, 5)), torch.tensor(0.5))
    assert alignment_of(entry, {})(*arguments).gradient_BLD == 7
    torch.testing.assert_close(alignment_of(entry, {"scale": 2.0})(*arguments).gradient_BLD, arguments[1])
