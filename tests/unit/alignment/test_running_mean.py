import torch

from let_plugin.alignment.running_mean import RunningMean

CPU = torch.device("cpu")


def steps(num, generator=None):
    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        states_BLE = torch.randn(2, 5, 3, generator=generator) + 4
        yield states_BLE, torch.rand(2, 5, generator=generator) < 0.7


def run(mean, batches, channels=(0, 1, 2)):
    for states_BLE, counts_BL in batches:
        mean.add(states_BLE, counts_BL, torch.tensor(channels))
        mean.finish_step()
    return mean


def test_it_is_the_corrected_average_of_the_steps_means():
    mean = run(RunningMean(3, momentum=0.75, device=CPU), steps(4))
    weights = torch.tensor([0.25 * 0.75**i for i in (3, 2, 1, 0)])
    means = torch.stack([states[counts].mean(dim=0) for states, counts in steps(4)])
    torch.testing.assert_close(mean.mean_C, (weights[:, None] * means).sum(0) / weights.sum())


def test_nothing_before_the_first_step_ends_and_that_steps_mean_after_it():
    mean = RunningMean(3, momentum=0.99, device=CPU)
    ((states_BLE, counts_BL),) = steps(1)
    address = mean.mean_C.data_ptr()
    mean.add(states_BLE, counts_BL, torch.arange(3))
    assert not mean.mean_C.any()
    mean.finish_step()
    torch.testing.assert_close(mean.mean_C, states_BLE[counts_BL].mean(dim=0))
    assert mean.mean_C.data_ptr() == address


def test_microbatches_and_ranks_add_up():
    whole, parts = RunningMean(3, momentum=0.5, device=CPU), RunningMean(3, momentum=0.5, device=CPU)
    ((states_BLE, counts_BL),) = steps(1)
    run(whole, [(states_BLE, counts_BL)])
    for row in range(2):
        parts.add(states_BLE[row : row + 1], counts_BL[row : row + 1], torch.arange(3))
    parts.finish_step()
    torch.testing.assert_close(parts.mean_C, whole.mean_C)


def test_channels_lie_where_they_are_said_to():
    mean = run(RunningMean(5, momentum=0.5, device=CPU), steps(2), channels=(4, 0, 2))
    straight = run(RunningMean(3, momentum=0.5, device=CPU), steps(2))
    torch.testing.assert_close(mean.mean_C[[4, 0, 2]], straight.mean_C)
    assert not mean.mean_C[[1, 3]].any()


def test_restored_it_goes_on_bit_for_bit():
    batches = list(steps(5))
    whole = run(RunningMean(3, momentum=0.9, device=CPU), batches)
    before = run(RunningMean(3, momentum=0.9, device=CPU), batches[:2])
    after = RunningMean(3, momentum=0.9, device=CPU)
    after.load_state_dict({name: value.clone() for name, value in before.state_dict().items()})
    run(after, batches[2:])
    assert all(torch.equal(a, b) for a, b in zip(after.state_dict().values(), whole.state_dict().values(), strict=True))
