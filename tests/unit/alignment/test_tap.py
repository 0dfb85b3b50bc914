import pytest
import torch
import torch.nn.functional as F
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


def reference_gradients(batch, pairs, coefficient):
    """Gradients of sum(y^2) - coefficient * sum over pairs (block, target) of sum(cos), and these sums, by autograd."""
    model, hidden = Student(), {}
    x = batch[0]
    for name, layer in model.layers.items():
        hidden[name] = x = layer(x)
    cosines = torch.stack([F.cosine_similarity(hidden[block], target, dim=-1).sum() for block, target in pairs])
    (x.square().sum() - coefficient * cosines.sum()).backward()
    return gradients(model), cosines.detach()


def tapped(model=None, pairs=None):
    model = model or Student()
    tap = AlignmentTap(model, {"1": [negative_cosine]} if pairs is None else pairs, device=CPU)
    tap.coefficient.fill_(0.3)
    return model, tap


def forward(model, batch):
    return model(batch[0], **{TARGET_KWARG: batch[1]})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)


@pytest.mark.parametrize("wrap", ["plain", "checkpointed", "compiled"])
def test_the_injected_gradient_is_that_of_the_sum_over_blocks_and_pairs(batch, wrap):
    def towards_other(student_BLD, target_BLE, coefficient):
        return negative_cosine(student_BLD, target_BLE.roll(1, dims=-1), coefficient)

    model = Student()
    if wrap == "checkpointed":
        model.layers["0"] = checkpoint_wrapper(model.layers["0"])
    elif wrap == "compiled":
        for layer in model.layers.values():
            layer.compile(backend="aot_eager", fullgraph=True)
    _, tap = tapped(model, {"0": [negative_cosine, towards_other], "2": [negative_cosine]})
    forward(model, batch).square().sum().backward()
    pairs = [("0", batch[1]), ("0", batch[1].roll(1, dims=-1)), ("2", batch[1])]
    expected, cosines = reference_gradients(batch, pairs, 0.3)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tap.metric_sums, cosines)
    assert tap.num_calls == {"0": 1, "2": 1}
    assert tap._target is None  # the last block has freed it


def test_the_tap_is_inert_without_a_target_and_without_gradient(batch):
    model, tap = tapped()
    with torch.no_grad():
        forward(model, batch)
    assert tap.num_calls == {"1": 0} and tap.metric_sums == 0
    model(batch[0]).square().sum().backward()
    assert tap.num_calls == {"1": 0} and tap.metric_sums == 0
    plain = Student()
    plain(batch[0]).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=0, atol=0)
    other, _ = tapped(pairs={})  # another part of a pipeline rank drops the target
    torch.testing.assert_close(forward(other, batch), plain(batch[0]))


def test_the_gradient_is_added_once_though_the_backward_of_the_block_runs_twice(batch):
    """As under a zero-bubble pipeline: for the inputs, and later for the weights."""
    model, tap = tapped(pairs={"2": [negative_cosine]})
    out = forward(model, batch)
    weight = model.layers["2"].linear.weight
    first, again = (torch.autograd.grad(out, weight, torch.ones_like(out), retain_graph=True)[0] for _ in range(2))
    plain = Student()
    plain(batch[0]).sum().backward()
    assert tap.num_calls == {"2": 1}
    torch.testing.assert_close(again, plain.layers["2"].linear.weight.grad)
    assert not torch.allclose(first, again)


def test_the_metric_sums_over_microbatches_and_is_a_buffer_that_a_pipelines_trial_run_can_put_back(batch):
    model, tap = tapped()
    backup = [(buffer, buffer.clone()) for buffer in model.buffers()]
    forward(model, batch)
    assert tap.num_calls == {"1": 0}  # no backward has taken the gradient along
    once = tap.metric_sums.clone()
    assert once != 0
    forward(model, batch)
    torch.testing.assert_close(tap.metric_sums, 2 * once)
    for buffer, value in backup:
        buffer.copy_(value)
    assert tap.metric_sums == 0
    forward(model, batch)
    tap.reset()
    assert tap.metric_sums == 0


def test_remove_leaves_no_trace(batch):
    model, tap = tapped()
    assert list(model.state_dict()) == list(Student().state_dict())
    tap.remove()
    assert not model._forward_pre_hooks and not model.layers["1"]._forward_hooks and not list(model.buffers())
    with pytest.raises(TypeError, match=TARGET_KWARG):
        forward(model, batch)


def test_the_gradient_is_added_in_the_dtype_of_the_hidden_state(batch):
    model, _ = tapped(Student().bfloat16())
    forward(model, (batch[0].bfloat16(), batch[1])).square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_the_two_gradients_are_compared_when_asked_for(batch):
    model, tap = tapped()
    forward(model, batch).square().sum().backward()
    assert not tap.gradient_sums.any()
    tap.measured = "1"
    for _ in range(2):  # microbatches
        forward(model, batch).square().sum().backward()

    plain = Student()
    hidden = plain.layers["1"](plain.layers["0"](batch[0]))
    losses = plain.layers["2"](hidden).square().sum(), -0.3 * F.cosine_similarity(hidden, batch[1], dim=-1).sum()
    own, added = (torch.autograd.grad(loss, hidden, retain_graph=True)[0].flatten() for loss in losses)
    torch.testing.assert_close(tap.gradient_sums, 2 * torch.stack([own @ added, own @ own, added @ added]))
    tap.reset()
    assert not tap.gradient_sums.any()
