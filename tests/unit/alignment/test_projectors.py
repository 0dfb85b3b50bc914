import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.alignment.projectors import (
    DIMENSION_MATCHES,
    MLP,
    LearnedLinear,
    Orthogonal,
    TruncateOrPad,
    interpolate,
    register_dimension_match,
)

CASES = [
    ("interpolate", {}),
    ("interpolate", {"align_corners": True}),
    ("linear", {}),
    ("linear", {"init": "random"}),
    ("mlp", {"hidden_width": 7}),
    ("orthogonal", {}),
    ("procrustes", {}),
    ("truncate_or_pad", {}),
]
DTYPES = [(torch.float32, 3e-5), (torch.bfloat16, 5e-2)]

all_matches = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
all_dtypes = pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)


@pytest.fixture(autouse=True)
def start_afresh():
    torch._dynamo.reset()
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


def exponential(matrix):
    """By its power series."""
    result = term = torch.eye(len(matrix), dtype=matrix.dtype)
    for k in range(1, 80):
        term = term @ matrix / k
        result = result + term
    return result


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
    elif name in ("linear", "procrustes"):
        matrix_DE = weights["weight"]
    elif name == "orthogonal":
        matrix_DE = exponential(weights["weight"] - weights["weight"].T)[:, :in_width]
    elif name == "truncate_or_pad":
        matrix_DE = torch.eye(width, in_width, dtype=torch.float64)
    else:
        for layer in "024":
            if layer != "0":
                hidden_BLE = hidden_BLE / (1 + torch.exp(-hidden_BLE))  # SiLU
            hidden_BLE = torch.einsum("ble,de->bld", hidden_BLE, weights[f"{layer}.weight"]) + weights[f"{layer}.bias"]
        return hidden_BLE
    return torch.einsum("ble,de->bld", hidden_BLE, matrix_DE)


def assert_near(got, expected, tolerance):
    """Within `tolerance` of the largest element, or of 1 where the formula gives zeros."""
    largest = expected.abs().max().item()
    scale = largest if largest > 1e-6 else 1.0
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * scale)


@all_dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 8), (1, 9, 33, 33), (3, 4, 16, 7), (1, 2, 1, 5)], ids=str)
@all_matches
def test_values_and_gradients_equal_the_formula(name, options, shape, dtype, tolerance):
    batch, length, in_width, width = shape
    if name == "orthogonal":
        in_width, width = sorted((in_width, width))
    match = make(name, in_width, width, options)
    generator = torch.Generator().manual_seed(0)
    hidden_BLE = torch.randn(batch, length, in_width, generator=generator).to(dtype)
    gradient_BLD = torch.randn(batch, length, width, generator=generator).to(dtype)
    # Others than it starts with, and exact in either dtype.
    weights = {n: (w + 0.1 * torch.randn(w.shape, generator=generator)).to(dtype) for n, w in weights_of(match).items()}

    with torch.no_grad():  # as in the tap
        result_BLD, hidden_gradient_BLE, gradients = projection(match)(hidden_BLE, weights, gradient_BLD)

    exact_BLE = hidden_BLE.double().requires_grad_()
    exact = {n: w.double().requires_grad_() for n, w in weights.items()}
    expected_BLD = reference(name, exact_BLE, exact, width, options)
    assert result_BLD.shape == (batch, length, width) and result_BLD.dtype == dtype
    assert_near(result_BLD, expected_BLD.detach(), tolerance)
    expected_BLD.backward(gradient_BLD.double())
    assert_near(hidden_gradient_BLE, exact_BLE.grad, tolerance)
    for n, weight in exact.items():
        assert_near(gradients[n], weight.grad, tolerance)


@all_dtypes
@all_matches
def test_compiled_equals_eager(name, options, dtype, tolerance):
    match = make(name, 9, 13, options)
    arguments = (torch.randn(2, 3, 9).to(dtype), weights_of(match), torch.randn(2, 3, 13).to(dtype))
    with torch.no_grad():
        result_BLD, hidden_gradient_BLE, gradients = projection(match)(*arguments)
        compiled = torch.compile(projection(match), fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled[0], result_BLD, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(compiled[1], hidden_gradient_BLE, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(compiled[2], gradients, rtol=tolerance, atol=tolerance)


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
    assert bool(weights_of(match)) == (name in ("linear", "mlp", "orthogonal", "procrustes"))


@pytest.mark.parametrize(
    ("name", "options"), [("linear", {"init": "random"}), ("mlp", {}), ("orthogonal", {})], ids=str
)
def test_another_seed_gives_other_weights(name, options):
    one, other = (weights_of(make(name, 4, 4, {**options, "seed": seed})) for seed in (0, 1))
    assert not any(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("name", "widths", "options", "message"),
    [
        ("linear", (4, 4), {"init": "xavier"}, r"init must be 'interpolate' or 'random'"),
        ("linear", (4, 4), {"seed": -1}, r"seed must not be negative"),
        ("mlp", (4, 4), {"hidden_width": 0}, r"hidden_width must be at least 1"),
        (
            "orthogonal",
            (5, 4),
            {},
            r"in_width .* from 5 to 4 channels cannot keep inner products.*let\.projector\.side",
        ),
    ],
)
def test_bad_options(name, widths, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(name, *widths, options)


def test_interpolation_to_an_equal_width_is_the_identity():
    hidden_BLE = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert interpolate(hidden_BLE, 8) is hidden_BLE


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_interpolated_tokens_do_not_mix_and_values_stay_in_range(in_width, out_width, align_corners):
    hidden_BLE = torch.arange(3.0).view(1, 3, 1).expand(1, 3, in_width).contiguous()
    got = interpolate(hidden_BLE, out_width, align_corners=align_corners)
    torch.testing.assert_close(got, torch.arange(3.0).view(1, 3, 1).expand(1, 3, out_width))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("in_width", "out_width"), [(8, 13), (13, 8), (1, 5), (5, 1), (6, 6), (576, 2048)])
def test_the_compiled_interpolation_is_the_same(in_width, out_width, align_corners, dtype, tolerance):
    match = make("interpolate", in_width, out_width, {"align_corners": align_corners})

    def value_and_gradient(hidden_BLE, pulled_BLD):
        matched_BLD, backward = torch.func.vjp(match, hidden_BLE)
        return matched_BLD, *backward(pulled_BLD)

    hidden = torch.randn(2, 3, in_width).to(dtype), torch.randn(2, 3, out_width).to(dtype)
    compiled = torch.compile(value_and_gradient, fullgraph=True)
    for got, expected in zip(compiled(*hidden), value_and_gradient(*hidden), strict=True):
        assert got.dtype == dtype
        assert_near(got, expected.double(), tolerance)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("in_width", "out_width"), [(8, 13), (13, 8), (6, 6)])
def test_the_learned_map_starts_as_the_interpolation(in_width, out_width, align_corners):
    hidden_BLE = torch.randn(2, 3, in_width)
    match = LearnedLinear(in_width, out_width, align_corners=align_corners)
    assert [p.shape for p in match.parameters()] == [(out_width, in_width)]
    torch.testing.assert_close(match(hidden_BLE), interpolate(hidden_BLE, out_width, align_corners=align_corners))


def test_the_random_linear_map_keeps_the_size_of_the_channels():
    got = LearnedLinear(256, 512, init="random")(torch.randn(4, 64, 256))
    assert got.std().item() == pytest.approx(1, rel=0.05)


def test_the_mlp_is_that_of_repa_and_starts_as_torchs_layers_do():
    shapes = {name: tuple(weight.shape) for name, weight in weights_of(MLP(48, 32)).items()}
    layers = {"0": (2048, 48), "2": (2048, 2048), "4": (32, 2048)}
    biases = {f"{layer}.bias": shape[:1] for layer, shape in layers.items()}
    assert shapes == {**{f"{layer}.weight": shape for layer, shape in layers.items()}, **biases}
    for layer, (_, fan_in) in layers.items():
        weight = MLP(48, 32).get_parameter(f"{layer}.weight")
        assert weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.01)
        assert weight.std().item() == pytest.approx(torch.nn.Linear(fan_in, 512).weight.std().item(), rel=0.05)


@pytest.mark.parametrize(("in_width", "out_width"), [(5, 8), (8, 8), (1, 1), (48, 64)])
def test_the_orthogonal_map_preserves_inner_products_also_after_training(in_width, out_width):
    match = Orthogonal(in_width, out_width)
    optimizer = torch.optim.SGD(match.parameters(), lr=0.1)
    hidden_BLE, wanted_BLD = torch.randn(2, 17, in_width), torch.randn(2, 17, out_width)
    start = match.weight.detach().clone()
    losses = []
    for _ in range(5):
        result_BLD = match(hidden_BLE)
        torch.testing.assert_close(result_BLD @ result_BLD.mT, hidden_BLE @ hidden_BLE.mT, rtol=1e-4, atol=1e-4)
        losses.append((result_BLD - wanted_BLD).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    if out_width > 1:
        assert losses[-1] < losses[0] and not torch.equal(match.weight, start)


def test_the_orthogonal_map_starts_far_from_the_order_of_the_channels():
    matrix_DE = Orthogonal(256, 256)(torch.eye(256)[None])[0].T
    assert abs(matrix_DE.diagonal().mean().item()) < 0.1
    assert matrix_DE.abs().max() < 0.5


def test_truncating_keeps_the_first_channels_and_padding_adds_zeros():
    hidden_BLE = torch.randn(2, 3, 5)
    assert torch.equal(TruncateOrPad(5, 3)(hidden_BLE), hidden_BLE[..., :3])
    assert torch.equal(TruncateOrPad(5, 5)(hidden_BLE), hidden_BLE)
    padded_BLD = TruncateOrPad(5, 7)(hidden_BLE)
    assert torch.equal(padded_BLD[..., :5], hidden_BLE) and padded_BLD[..., 5:].eq(0).all()


def test_the_registered_matches_and_one_of_ones_own():
    assert list(DIMENSION_MATCHES) == ["interpolate", "linear", "mlp", "orthogonal", "procrustes", "truncate_or_pad"]
    register_dimension_match("own", TruncateOrPad)
    try:
        assert DIMENSION_MATCHES.get("own") is TruncateOrPad
    finally:
        DIMENSION_MATCHES.unregister("own")


@pytest.mark.parametrize(("in_width", "out_width"), [(5, 8), (8, 5), (6, 6)])
def test_procrustes_starts_as_the_interpolation_and_no_orthogonal_map_does_better(in_width, out_width):
    match = DIMENSION_MATCHES.get("procrustes")(in_width, out_width, refit_every=7)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(40, in_width, generator=generator)
    wanted = torch.randn(40, out_width, generator=generator)
    torch.testing.assert_close(match(given[None]), interpolate(given[None], out_width))
    assert match.refit_every == 7 and not any(p.requires_grad for p in match.parameters())

    weight = match.fit(wanted.T @ given)
    narrow, wide = sorted((in_width, out_width))
    gram = weight.T @ weight if out_width >= in_width else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(narrow), rtol=0, atol=1e-5)
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(wide, narrow, generator=generator)).Q
        other = other if out_width >= in_width else other.T
        assert (wanted * (given @ weight.T)).sum() >= (wanted * (given @ other.T)).sum()
        if out_width >= in_width:  # then also the nearest
            assert (wanted - given @ weight.T).square().sum() <= (wanted - given @ other.T).square().sum()


def test_procrustes_refuses_to_refit_never():
    with pytest.raises(ValueError, match=r"^refit_every must be"):
        DIMENSION_MATCHES.get("procrustes")(4, 4, refit_every=0)
