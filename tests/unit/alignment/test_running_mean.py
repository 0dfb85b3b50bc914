import pytest
import torch

from let_plugin.alignment.running_mean import GradientWeight, RunningMean

CPU = torch.device("cpu")


def steps(num):
    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        states_BLE = torch.randn(2, 5, 3, generator=generator) + 4
        yield states_BLE, torch.rand(2, 5, generator=generator) < 0.7


def run(mean, batches):
    for states_BLE, counts_BL in batches:
        mean.add(states_BLE, counts_BL, torch.arange(3))
        mean.finish_step()
    return mean


def test_it_is_the_corrected_average_of_the_steps_means():
    mean = run(RunningMean(3, momentum=0.75, device=CPU), steps(4))
    weights = torch.tensor([0.25 * 0.75**i for i in (3, 2, 1, 0)])
    means = torch.stack([states[counts].mean(dim=0) for states, counts in steps(4)])
    torch.testing.assert_close(mean.mean_C, (weights[:, None] * means).sum(0) / weights.sum())


def test_microbatches_add_up_where_their_channels_lie_when_the_step_ends():
    mean = RunningMean(5, momentum=0.99, device=CPU)
    address = mean.mean_C.data_ptr()
    ((states_BLE, counts_BL),) = steps(1)
    for row in range(2):
        mean.add(states_BLE[row : row + 1], counts_BL[row : row + 1], torch.tensor([4, 0, 2]))
        assert not mean.mean_C.any()
    mean.finish_step()
    torch.testing.assert_close(mean.mean_C[[4, 0, 2]], states_BLE[counts_BL].mean(dim=0))
    assert mean.mean_C[[1, 3]].eq(0).all()  # no token had them
    assert mean.mean_C.data_ptr() == address


def test_restored_it_goes_on_bit_for_bit():
    batches = list(steps(5))
    whole = run(RunningMean(3, momentum=0.9, device=CPU), batches)
    before = run(RunningMean(3, momentum=0.9, device=CPU), batches[:2])
    after = RunningMean(3, momentum=0.9, device=CPU)
    after.load_state_dict({name: value.clone() for name, value in before.state_dict().items()})
    run(after, batches[2:])
    assert all(torch.equal(a, b) for a, b in zip(after.state_dict().values(), whole.state_dict().values(), strict=True))


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
    values = steps_of(GradientWeight(momentum=0.75, device=CPU), [2.0, 8.0, 0.0, 4.0, 1.0])
    means = [2.0, (0.75 * 2 + 8) / 1.75, (0.75 * 2 + 8) / 1.75, (0.75**2 * 2 + 0.75 * 8 + 4) / (0.75**2 + 1.75)]
    assert values == pytest.approx([0.3e-6, *(0.3 * mean for mean in means)])
    assert steps_of(GradientWeight(momentum=0.9, device=CPU), [1.0, 1.0], share=0.0) == [0.0, 0.0]


def test_it_goes_on_from_its_state_to_the_bit():
    whole, first, second = (GradientWeight(momentum=0.9, device=CPU) for _ in range(3))
    expected = steps_of(whole, [3.0, 5.0, 0.5, 2.0])
    got = steps_of(first, [3.0, 5.0])
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert got + steps_of(second, [0.5, 2.0]) == expected
