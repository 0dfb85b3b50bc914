"""What is stored is what was given, to the encoding's own precision."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.teacher.stored.encodings import Int8, Moment, Plain, Projection, cosines, random_basis

WIDTH = 24


def random_states(seed, shape=(2, 5), scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, WIDTH, generator=generator) * scale).to(dtype)


def encodings():
    basis_EW = random_basis(WIDTH, 7, seed=0)
    return [Plain(WIDTH, torch.bfloat16), Plain(WIDTH, torch.float32), Int8(WIDTH), Projection(basis_EW)]


@pytest.mark.parametrize("encoding", encodings(), ids=lambda e: f"{type(e).__name__}-{e.bytes_per_token}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_are_as_declared_and_zeros_stay_zeros(encoding, dtype):
    states_BLE = random_states(0, dtype=dtype)
    states_BLE[0, 2] = 0
    columns = encoding.encode(states_BLE)
    assert {name: (c.dtype, c.shape) for name, c in columns.items()} == {
        name: (column.dtype, (2, 5, column.width)) for name, column in encoding.columns.items()
    }
    stored = sum(c.element_size() * c.shape[-1] for c in columns.values())
    assert stored == encoding.bytes_per_token
    decoded_BLE = encoding.decode(columns, dtype)
    assert decoded_BLE.dtype == dtype and decoded_BLE.shape == states_BLE.shape
    assert torch.equal(decoded_BLE.ne(0).any(-1), states_BLE.ne(0).any(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_of_the_stored_dtype_come_back_bit_for_bit(dtype):
    states_BLE = random_states(1, scale=1e3, dtype=dtype)
    encoding = Plain(WIDTH, dtype)
    assert torch.equal(encoding.decode(encoding.encode(states_BLE), dtype), states_BLE)


@given(seed=st.integers(0, 2**32), exponent=st.integers(-30, 30))
def test_int8_is_off_by_at_most_half_of_a_scale_of_each_tokens_own(seed, exponent):
    states_BLE = random_states(seed, scale=2.0**exponent)
    encoding = Int8(WIDTH)
    columns = encoding.encode(states_BLE)
    largest_BL1 = states_BLE.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(columns["scales"], largest_BL1 / 127)
    error_BLE = (encoding.decode(columns, torch.float32) - states_BLE).abs()
    assert (error_BLE <= 0.501 * columns["scales"]).all()


def test_int8_of_a_state_whose_scale_underflows_is_finite():
    encoding = Int8(WIDTH)
    decoded_BLE = encoding.decode(encoding.encode(torch.full((1, 1, WIDTH), 1e-45)), torch.float32)
    assert torch.isfinite(decoded_BLE).all()


@pytest.mark.parametrize("num_channels", [1, 7, WIDTH])
def test_bases_are_orthonormal_and_reproducible(num_channels):
    moment = Moment(WIDTH, torch.device("cpu"))
    moment.add(random_states(2, shape=(4, 50)))
    for make in (lambda: random_basis(WIDTH, num_channels, seed=3), lambda: moment.basis(num_channels)):
        basis_EW = make()
        torch.testing.assert_close(basis_EW.T @ basis_EW, torch.eye(num_channels))
        assert torch.equal(basis_EW, make())
    assert not torch.equal(random_basis(WIDTH, num_channels, seed=3), random_basis(WIDTH, num_channels, seed=4))


def test_all_channels_lose_nothing_but_bf16s_rounding():
    states_BLE = random_states(4)
    encoding = Projection(random_basis(WIDTH, WIDTH, seed=0))
    decoded_BLE = encoding.decode(encoding.encode(states_BLE), torch.float32)
    assert cosines(states_BLE, decoded_BLE).min() > 1 - 2**-15


def test_the_cosine_of_a_projection_is_the_share_of_the_length_that_it_keeps():
    states_BLE = random_states(5)
    basis_EW = random_basis(WIDTH, 9, seed=1)
    encoding = Projection(basis_EW)
    expected = (states_BLE @ basis_EW).norm(dim=-1) / states_BLE.norm(dim=-1)
    got = cosines(states_BLE, encoding.decode(encoding.encode(states_BLE), torch.float32))
    torch.testing.assert_close(got, expected.flatten(), atol=1e-4, rtol=0)


def test_pca_keeps_more_than_any_other_subspace_of_its_width_and_more_with_more_channels():
    # Few directions matter, and lengths differ by orders of magnitude: the long tokens must not decide alone.
    scales_E = torch.logspace(0, -3, WIDTH)
    states_BLE = random_states(6, shape=(8, 64)) * scales_E
    states_BLE = states_BLE * torch.logspace(-2, 2, 64)[:, None]
    moment = Moment(WIDTH, torch.device("cpu"))
    for half_BLE in states_BLE.chunk(2):
        moment.add(half_BLE)

    def kept(basis_EW):
        return (torch.nn.functional.normalize(states_BLE, dim=-1) @ basis_EW).square().sum(-1).mean().item()

    shares = [kept(moment.basis(num_channels)) for num_channels in (1, 4, 12, WIDTH)]
    assert shares == sorted(shares) and math.isclose(shares[-1], 1, abs_tol=1e-5)
    of_lengths = torch.linalg.eigh(torch.einsum("ble,blf->ef", states_BLE, states_BLE))[1][:, -4:]
    for other_EW in (random_basis(WIDTH, 4, seed=0), torch.eye(WIDTH)[:, :4], of_lengths):
        assert shares[1] >= kept(other_EW)


def test_tokens_without_a_state_have_no_cosine():
    states_BLE = random_states(7)
    states_BLE[1] = 0
    assert torch.allclose(cosines(states_BLE, states_BLE), torch.ones(5))
