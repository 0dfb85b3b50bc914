import pytest
import torch

from let_plugin.alignment.running_mean import GradientWeight


def steps_of(weight, ratios, share=0.3):
    """The lambdas of steps in which |g| is so many times the |h| at lambda = 1; 0: the step has no token."""
    values = []
    for ratio in ratios:
        weight.start_step(share)
        values.append(weight.value.item())
        own, added = ratio**2, weight.value.item() ** 2
        weight.finish_step(torch.tensor([0.1, own, added]) if ratio else torch.zeros(3))
    return values


def test_it_is_the_corrected_average_of_the_ratios_before():
    values = steps_of(GradientWeight(momentum=0.75, device=torch.device("cpu")), [2.0, 8.0, 0.0, 4.0, 1.0])
    means = [2.0, (0.75 * 2 + 8) / 1.75, (0.75 * 2 + 8) / 1.75, (0.75**2 * 2 + 0.75 * 8 + 4) / (0.75**2 + 1.75)]
    assert values == pytest.approx([0.3e-6, *(0.3 * mean for mean in means)])


def test_it_goes_on_from_its_state_to_the_bit():
    whole, first, second = (GradientWeight(momentum=0.9, device=torch.device("cpu")) for _ in range(3))
    expected = steps_of(whole, [3.0, 5.0, 0.5, 2.0])
    got = steps_of(first, [3.0, 5.0])
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert got + steps_of(second, [0.5, 2.0]) == expected


def test_no_share_is_no_weight():
    assert steps_of(GradientWeight(momentum=0.9, device=torch.device("cpu")), [1.0, 1.0], share=0.0) == [0.0, 0.0]
