import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from let_plugin.alignment.projectors import DIMENSION_MATCHES, LearnedLinear, interpolate


@pytest.mark.parametrize("width", [1, 5, 8, 13])
def test_interpolation_along_channels_equals_numpy(width):
    torch.manual_seed(0)
    teacher_BLE = torch.randn(2, 3, 8)
    # align_corners=False: the centre of output channel i lies at (i + 0.5) * E / D - 0.5 of the input.
    at = np.clip((np.arange(width) + 0.5) * 8 / width - 0.5, 0, 7)
    expected = np.apply_along_axis(lambda row: np.interp(at, np.arange(8), row), -1, teacher_BLE.numpy())
    got = interpolate(teacher_BLE, width)
    assert got.shape == (2, 3, width)
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-6)


def test_align_corners_keeps_the_first_and_the_last_channel():
    teacher_BLE = torch.randn(2, 3, 8)
    got = interpolate(teacher_BLE, 13, align_corners=True)
    torch.testing.assert_close(got[..., [0, -1]], teacher_BLE[..., [0, -1]])


def test_equal_widths_are_the_identity():
    teacher_BLE = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert interpolate(teacher_BLE, 8) is teacher_BLE


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_tokens_do_not_mix_and_values_stay_in_range(teacher_width, student_width, align_corners):
    teacher_BLE = torch.arange(3.0).view(1, 3, 1).expand(1, 3, teacher_width).contiguous()
    got = interpolate(teacher_BLE, student_width, align_corners=align_corners)
    torch.testing.assert_close(got, torch.arange(3.0).view(1, 3, 1).expand(1, 3, student_width))


@pytest.mark.parametrize(("teacher_width", "student_width"), [(8, 13), (13, 8), (6, 6)])
def test_the_learned_map_starts_as_the_interpolation(teacher_width, student_width):
    teacher_BLE = torch.randn(2, 3, teacher_width)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    module = LearnedLinear(teacher_width, student_width)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.shape for p in module.parameters()] == [(student_width, teacher_width)]
    torch.testing.assert_close(module(teacher_BLE), interpolate(teacher_BLE, student_width))


@pytest.mark.parametrize("name", ["interpolate", "linear"])
def test_the_registered_matches_are_modules_of_the_two_widths(name):
    match = DIMENSION_MATCHES.get(name, key="let.dimension_match")(8, 13, align_corners=False)
    assert match(torch.randn(2, 3, 8)).shape == (2, 3, 13)
    assert bool(list(match.parameters())) == (name == "linear")
