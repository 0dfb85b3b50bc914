import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from let_plugin.alignment.losses import negative_cosine
from let_plugin.alignment.tap import TARGET_KWARG, AlignmentTap

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).tanh()


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(3)})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


def gradients(model):
    named = model.named_parameters()
    return {name.replace("_checkpoint_wrapped_module.", ""): p.grad.clone() for name, p in named}


def reference_gradients(x, target, coefficient):
    """LM loss + coefficient * sum(-cos) at block 1, by autograd alone."""
    model = Student()
    h = model.layers["1"](model.layers["0"](x))
    loss = model.layers["2"](h).square().sum()
    loss = loss - coefficient * nn.functional.cosine_similarity(h, target, dim=-1).sum()
    loss.backward()
    return gradients(model)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)


@pytest.mark.parametrize("wrap", ["plain", "checkpointed", "compiled"])
def test_the_injected_gradient_is_that_of_the_summed_loss(batch, wrap):
    x, target = batch
    model = Student()
    if wrap == "checkpointed":
        model.layers["1"] = checkpoint_wrapper(model.layers["1"])
    elif wrap == "compiled":
        for layer in model.layers.values():
            layer.compile(backend="aot_eager", fullgraph=True)
    tap = AlignmentTap(model, {"1": [negative_cosine]}, CPU)
    tap.coefficient.fill_(0.3)

    model(x, **{TARGET_KWARG: target}).square().sum().backward()

    assert tap.num_calls == {"1": 1}
    got = gradients(model)
    for name, expected in reference_gradients(x, target, 0.3).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_the_tap_is_inert_without_a_target_and_without_gradient(batch):
    x, target = batch
    model = Student()
    tap = AlignmentTap(model, {"1": [negative_cosine]}, CPU)
    tap.coefficient.fill_(0.3)
    model(x).sum().backward()
    with torch.no_grad():
        model(x, **{TARGET_KWARG: target})
    model.zero_grad()
    assert tap.num_calls == {"1": 0} and tap.metric_sums == 0
    model(x).square().sum().backward()
    with_tap = gradients(model)
    plain = Student()
    plain(x).square().sum().backward()
    for name, expected in gradients(plain).items():
        assert torch.equal(with_tap[name], expected), name


def test_a_target_is_used_once(batch):
    x, target = batch
    model = Student()
    tap = AlignmentTap(model, {"1": [negative_cosine]}, CPU)
    model(x, **{TARGET_KWARG: target}).sum().backward()
    model(x).sum().backward()
    assert tap.num_calls == {"1": 1}


def test_the_gradient_is_added_once_though_the_backward_of_the_block_runs_twice(batch):
    """As under a zero-bubble pipeline: for the inputs, and later for the weights."""
    x, target = batch
    model = Student()
    tap = AlignmentTap(model, {"2": [negative_cosine]}, CPU)
    tap.coefficient.fill_(0.3)
    out = model(x, **{TARGET_KWARG: target})
    weight = model.layers["2"].linear.weight
    first, again = (torch.autograd.grad(out, weight, torch.ones_like(out), retain_graph=True)[0] for _ in range(2))
    plain = Student()
    plain(x).sum().backward()
    assert tap.num_calls == {"2": 1}
    torch.testing.assert_close(again, plain.layers["2"].linear.weight.grad)
    assert not torch.allclose(first, again)


def test_a_tap_whose_gradient_no_backward_takes_along_counts_nothing(batch):
    x, target = batch
    model = Student()
    tap = AlignmentTap(model, {"1": [negative_cosine]}, CPU)
    model(x, **{TARGET_KWARG: target})
    assert tap.num_calls == {"1": 0}


def test_the_other_parts_of_a_pipeline_rank_drop_the_target(batch):
    x, target = batch
    other = Student()
    tap = AlignmentTap(other, {}, CPU)
    torch.testing.assert_close(other(x, **{TARGET_KWARG: target}), Student()(x))
    tap.remove()
    assert not other._forward_pre_hooks


def test_the_metric_is_a_buffer_that_a_pipelines_trial_run_can_put_back(batch):
    x, target = batch
    model = Student()
    tap = AlignmentTap(model, {"1": [negative_cosine]}, CPU)
    backup = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model(x, **{TARGET_KWARG: target})
    assert tap.metric_sums != 0
    for buffer, value in backup:
        buffer.copy_(value)
    assert tap.metric_sums == 0
    assert not any("let" in name for name in model.state_dict())


def test_the_metric_sums_over_microbatches_until_reset(batch):
    x, target = batch
    model = Student()
    tap = AlignmentTap(model, {"1": [negative_cosine]}, CPU)
    model(x, **{TARGET_KWARG: target})
    once = tap.metric_sums.clone()
    model(x, **{TARGET_KWARG: target})
    torch.testing.assert_close(tap.metric_sums, 2 * once)
    tap.reset()
    assert tap.metric_sums == 0


def test_remove_leaves_no_trace(batch):
    x, target = batch
    model = Student()
    keys = list(model.state_dict())
    tap = AlignmentTap(model, {"1": [negative_cosine]}, CPU)
    assert list(model.state_dict()) == keys
    tap.remove()
    assert not model._forward_pre_hooks and not model.layers["1"]._forward_hooks and not list(model.buffers())
    with pytest.raises(TypeError, match=TARGET_KWARG):
        model(x, **{TARGET_KWARG: target})


def test_the_gradient_is_added_in_the_dtype_of_the_hidden_state(batch):
    x, target = batch
    model = Student().bfloat16()
    tap = AlignmentTap(model, {"1": [negative_cosine]}, CPU)
    tap.coefficient.fill_(0.3)
    model(x.bfloat16(), **{TARGET_KWARG: target}).square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_several_blocks_and_several_pairs_of_one_block_add_up(batch):
    x, target = batch
    other = target.roll(1, dims=-1)

    def towards_other(student_BLD, target_BLE, coefficient):
        return negative_cosine(student_BLD, target_BLE.roll(1, dims=-1), 2 * coefficient)

    model = Student()
    tap = AlignmentTap(model, {"0": [negative_cosine, towards_other], "2": [negative_cosine]}, CPU)
    tap.coefficient.fill_(0.3)
    model(x, **{TARGET_KWARG: target}).square().sum().backward()

    plain = Student()
    first = plain.layers["0"](x)
    last = plain.layers["2"](plain.layers["1"](first))
    cosines = [nn.functional.cosine_similarity(*two, dim=-1).sum() for two in ((first, target), (first, other))]
    cosines.append(nn.functional.cosine_similarity(last, target, dim=-1).sum())
    (last.square().sum() - 0.3 * (cosines[0] + 2 * cosines[1] + cosines[2])).backward()
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(tap.metric_sums, torch.stack(cosines).detach())
    assert tap.num_calls == {"0": 1, "2": 1}
    assert tap._target_BLE is None  # the last block has freed it


def test_the_two_gradients_are_compared_when_asked_for(batch):
    x, target = batch
    model = Student()
    tap = AlignmentTap(model, {"1": [negative_cosine]}, CPU)
    tap.coefficient.fill_(0.3)
    model(x, **{TARGET_KWARG: target}).square().sum().backward()
    assert not tap.gradient_sums.any()
    tap.measured_block = "1"
    for _ in range(2):  # microbatches
        model(x, **{TARGET_KWARG: target}).square().sum().backward()

    plain = Student()
    hidden = plain.layers["1"](plain.layers["0"](x))
    own = torch.autograd.grad(plain.layers["2"](hidden).square().sum(), hidden, retain_graph=True)[0].flatten()
    added = (
        -0.3 * torch.autograd.grad(nn.functional.cosine_similarity(hidden, target, dim=-1).sum(), hidden)[0].flatten()
    )
    expected = 2 * torch.stack([own @ added, own @ own, added @ added])
    torch.testing.assert_close(tap.gradient_sums, expected)
    tap.reset()
    assert not tap.gradient_sums.any()
