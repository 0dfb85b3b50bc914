import pytest
import torch
import torch.nn.functional as F

from let_plugin.alignment.projectors import DIMENSION_MATCHES, MLP, LearnedLinear, interpolate
from tests.unit.alignment.test_losses import assert_near

CASES = [
    ("interpolate", {}),
    ("interpolate", {"align_corners": True}),
    ("least_squares", {}),
    ("linear", {}),
    ("linear", {"init": "random"}),
    ("mlp", {"hidden_width": 7}),
    ("orthogonal", {}),
    ("procrustes", {}),
    ("random", {"seed": 2}),
    ("truncate_or_pad", {}),
]
GRID = [
    ((1, 2, 1, 1), torch.float32, 3e-5, False),
    ((2, 3, 5, 8), torch.float32, 3e-5, True),
    ((3, 4, 16, 7), torch.float32, 3e-5, True),
    ((2, 3, 5, 8), torch.bfloat16, 5e-2, False),
]
all_matches = pytest.mark.parametrize(("name", "options"), CASES, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)  # not 0, which the matches themselves start from


def make(name, in_width, out_width, options):
    return DIMENSION_MATCHES.get(name)(in_width, out_width, **options)


def weights_of(match):
    return {name: parameter.detach() for name, parameter in match.named_parameters()}


def projection(match):
    """As in `let_plugin.config.plan`: from states, weights and upstream gradient to the result and its gradients."""

    def project(hidden_BLE, weights, gradient_BLD):
        def call(hidden_BLE, weights):
            weights = {name: weight.to(hidden_BLE.dtype) for name, weight in weights.items()}
            return torch.func.functional_call(match, weights, (hidden_BLE,))

        result_BLD, backward = torch.func.vjp(call, hidden_BLE, weights)
        return result_BLD, *backward(gradient_BLD)

    return project


def reference(name, hidden_BLE, weights, width, options):
    """The formula, written out."""
    in_width = hidden_BLE.shape[-1]
    if name == "interpolate":
        channel_D = torch.arange(width, dtype=torch.float64)
        if options.get("align_corners"):
            place_D = channel_D * (in_width - 1) / max(width - 1, 1)
        else:
            # The centre of output channel i lies at (i + 0.5) * E / D - 0.5 of the input.
            place_D = ((channel_D + 0.5) * in_width / width - 0.5).clamp(0, in_width - 1)
        matrix_DE = (1 - (place_D[:, None] - torch.arange(in_width)).abs()).clamp_min(0)
    elif name in ("least_squares", "linear", "procrustes"):
        matrix_DE = weights["weight"]
    elif name == "orthogonal":
        matrix_DE = torch.matrix_exp(weights["weight"] - weights["weight"].T)[:, :in_width]
    elif name == "random":
        matrix_DE = make(name, in_width, width, options).weight.double()
        short = matrix_DE if in_width > width else matrix_DE.T
        torch.testing.assert_close(short @ short.T, torch.eye(len(short), dtype=torch.float64), rtol=0, atol=1e-5)
    elif name == "truncate_or_pad":
        matrix_DE = torch.eye(width, in_width, dtype=torch.float64)
    else:
        for layer in "024":
            hidden_BLE = F.linear(hidden_BLE, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
            hidden_BLE = F.silu(hidden_BLE) if layer != "4" else hidden_BLE
        return hidden_BLE
    return torch.einsum("ble,de->bld", hidden_BLE, matrix_DE)


@pytest.mark.parametrize(("shape", "dtype", "tolerance", "compiles"), GRID, ids=str)
@all_matches
def test_values_and_gradients_equal_the_formula_also_compiled(name, options, shape, dtype, tolerance, compiles):
    batch, length, in_width, width = shape
    if name == "orthogonal":
        in_width, width = sorted((in_width, width))
    match = make(name, in_width, width, options)
    generator = torch.Generator().manual_seed(0)
    hidden_BLE = torch.randn(batch, length, in_width, generator=generator).to(dtype)
    gradient_BLD = torch.randn(batch, length, width, generator=generator).to(dtype)
    # Others than it starts with, and exact in either dtype.
    weights = {n: (w + 0.1 * torch.randn(w.shape, generator=generator)).to(dtype) for n, w in weights_of(match).items()}

    exact_BLE = hidden_BLE.double().requires_grad_()
    exact = {n: w.double().requires_grad_() for n, w in weights.items()}
    expected_BLD = reference(name, exact_BLE, exact, width, options)
    expected_BLD.backward(gradient_BLD.double())
    functions = [projection(match)]
    if compiles:
        functions.append(torch.compile(projection(match), fullgraph=True, backend="aot_eager"))
    for project in functions:
        with torch.no_grad():  # as in the tap
            result_BLD, hidden_gradient_BLE, gradients = project(hidden_BLE, weights, gradient_BLD)
        assert result_BLD.shape == (batch, length, width) and result_BLD.dtype == dtype
        assert_near(result_BLD, expected_BLD.detach(), tolerance)
        assert_near(hidden_gradient_BLE, exact_BLE.grad, tolerance)
        for n, weight in exact.items():
            assert_near(gradients[n], weight.grad, tolerance)


@all_matches
def test_making_one_takes_no_random_numbers_and_gives_the_same_again(name, options):
    state = torch.get_rng_state()
    match = make(name, 8, 13, options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    with torch.device("meta"):  # wherever the run makes its models
        again = make(name, 8, 13, options)
    torch.testing.assert_close(weights_of(again), weights_of(match), rtol=0, atol=0)
    assert all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights_of(again).values())
    for one, other in zip(match.buffers(), again.buffers(), strict=True):
        assert one.device.type == "cpu" and torch.equal(one, other)
    if name in ("mlp", "orthogonal") or "init" in options:
        other = weights_of(make(name, 8, 13, {**options, "seed": 1}))
        assert not any(torch.equal(weight, other[key]) for key, weight in weights_of(match).items())


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("in_width", "out_width"), [(8, 13), (13, 8)])
def test_the_learned_map_starts_as_the_interpolation_or_keeps_the_channels_size(in_width, out_width, align_corners):
    hidden_BLE = torch.randn(2, 3, in_width)
    match = LearnedLinear(in_width, out_width, align_corners=align_corners)
    torch.testing.assert_close(match(hidden_BLE), interpolate(hidden_BLE, out_width, align_corners=align_corners))
    random = LearnedLinear(256, 32 * out_width, init="random")
    assert random(torch.randn(4, 64, 256)).std().item() == pytest.approx(1, rel=0.05)


def test_the_mlp_is_that_of_repa_and_starts_as_torchs_layers_do():
    weights = weights_of(MLP(48, 32))
    for layer, shape in {"0": (2048, 48), "2": (2048, 2048), "4": (32, 2048)}.items():
        weight, bias = weights.pop(f"{layer}.weight"), weights.pop(f"{layer}.bias")
        assert weight.shape == shape and bias.shape == shape[:1]
        assert weight.abs().max().item() == pytest.approx(shape[1] ** -0.5, rel=0.01)
        assert weight.std().item() == pytest.approx(torch.nn.Linear(shape[1], 512).weight.std().item(), rel=0.05)
    assert not weights


@pytest.mark.parametrize(("in_width", "out_width"), [(5, 8), (8, 5)])
def test_procrustes_starts_as_the_interpolation_and_no_orthogonal_map_does_better(in_width, out_width):
    match = DIMENSION_MATCHES.get("procrustes")(in_width, out_width, refit_every=7)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(40, in_width, generator=generator)
    wanted = torch.randn(40, out_width, generator=generator)
    torch.testing.assert_close(match(given[None]), interpolate(given[None], out_width))
    assert [step for step in range(15) if match.is_fitted_in(step)] == [0, 7, 14]

    match.fit(wanted.T @ given)
    weight = match.weight
    assert not weight.requires_grad
    gram = weight.T @ weight if out_width >= in_width else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(in_width, out_width)), rtol=0, atol=1e-5)
    best = torch.linalg.svdvals(wanted.T @ given).sum()  # of any orthogonal map
    torch.testing.assert_close((wanted * (given @ weight.T)).sum(), best)


def test_least_squares_is_ridge_regression_on_all_tokens_so_far():
    match = DIMENSION_MATCHES.get("least_squares")(5, 8, fit_steps=3, ridge=0.01)
    start = match.weight.clone()
    match.fit(torch.zeros(13, 5))  # a step without a token that counts
    assert torch.equal(match.weight, start)
    assert [step for step in range(9) if match.is_fitted_in(step)] == [0, 1, 2]
    given, wanted = torch.randn(2, 20, 5), torch.randn(2, 20, 8)
    for x, y in zip(given, wanted, strict=True):
        match.fit(torch.cat([y, x], dim=1).T @ x)
    # Ridge regression is least squares with further rows of sqrt(ridge m) I, whose wanted states are zero.
    x, y = given.flatten(0, 1).double(), wanted.flatten(0, 1).double()
    rows = (0.01 * x.square().sum(dim=0).mean()).sqrt() * torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, rows]), torch.cat([y, torch.zeros(5, 8, dtype=torch.float64)])).solution
    torch.testing.assert_close(match.weight.double(), expected.T, rtol=0, atol=1e-5)
    again = DIMENSION_MATCHES.get("least_squares")(5, 8)
    again.load_state_dict(match.state_dict())
    assert torch.equal(again.weight, match.weight) and torch.equal(again.sums, match.sums)
