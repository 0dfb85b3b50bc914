"""Running on the CPU. Shape legend: B batch, L sequence, N heads, H head width."""

import sys

import pytest
import torch
import torchtitan.distributed.fsdp as fsdp
import torchtitan.models.common.attention as attention
from torchtitan.models import deepseek_v3, llama3, qwen3
from torchtitan.models.common.attention import FlexAttention
from torchtitan.tools import utils

from let_plugin.runtime import host
from let_plugin.runtime.models import llama_spec
from tests.support import reference

MIB = 2**20
# Packed documents: 3 boundaries, at other places in each row; documents of one token too.
ROWS = ([5, 1, 11], [16, 1], [2, 3, 12])
POSITIONS_BL = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ROWS])


def test_every_copy_of_torchtitans_device_is_the_cpu():
    def patched():
        return utils.device_module, fsdp.disable_fsdp_gradient_division, attention._compiled_create_block_mask

    before = patched()
    host.set_up("cpu")  # again: nothing is patched twice
    assert patched() == before
    assert isinstance(utils.device_module, host.CpuDeviceModule)
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan."):
            assert vars(module).get("device_type", "cpu") == "cpu", name
            assert vars(module).get("device_module", utils.device_module) is utils.device_module, name


def test_peak_memory_rises_with_an_allocation_and_can_be_reset():
    device = host.CpuDeviceModule()
    assert device.get_device_properties().total_memory > device.memory_stats()["reserved_bytes.all.peak"] > 10 * MIB

    def peak():
        return device.memory_stats()["active_bytes.all.peak"]

    device.reset_peak_memory_stats()
    if not device.peak_is_resettable:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    before = peak()
    memory = torch.ones(200 * MIB // 4)
    assert peak() - before > 190 * MIB
    del memory
    assert peak() - before > 190 * MIB  # a peak, not the present
    device.empty_cache()
    device.reset_peak_memory_stats()
    assert peak() - before < 50 * MIB


# Attention


@pytest.mark.parametrize("module", [llama3, qwen3, deepseek_v3], ids=lambda module: module.__name__.split(".")[-1])
def test_flex_attention_is_replaced_everywhere_and_once(module):
    spec = module.model_registry("debugmodel")
    before = [(fqn, config) for fqn, config, _, _ in spec.traverse(FlexAttention.Config)]
    assert before, "this model would not test anything"
    before[0][1].block_size = 64  # not the default

    host.adapt_model_spec(spec)

    after = [(fqn, config) for fqn, config, _, _ in spec.traverse(FlexAttention.Config)]
    for (old_fqn, old), (fqn, new) in zip(before, after, strict=True):
        assert fqn == old_fqn and type(new)._owner.__name__ == "CpuAttention"
        assert (new.block_size, new.sharding_config) == (old.block_size, old.sharding_config)

    before = repr(spec)
    host.adapt_model_spec(spec)
    assert repr(spec) == before


def cpu_attention_and_mask():
    """The attention module that torchtitan builds here, and the mask that it makes for POSITIONS_BL."""
    shape = {"dim": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 24, "vocab_size": 31}
    spec = llama_spec("test", **shape)
    host.adapt_model_spec(spec)
    with torch.device("meta"):
        model = spec.model.build()
    return model.layers["0"].attention.inner_attention, model.get_attention_masks(positions=POSITIONS_BL)


def plain_attention(q_BLNH, k_BLNH, v_BLNH, mask_B1LL, scale):
    """softmax(q k^T * scale) v under the mask; every key/value head serves a group of query heads."""
    group = q_BLNH.shape[2] // k_BLNH.shape[2]
    k_BLNH, v_BLNH = k_BLNH.repeat_interleave(group, dim=2), v_BLNH.repeat_interleave(group, dim=2)
    scores_BNLL = torch.einsum("blnh,bmnh->bnlm", q_BLNH, k_BLNH) * scale
    return torch.einsum("bnlm,bmnh->blnh", scores_BNLL.masked_fill(~mask_B1LL, float("-inf")).softmax(-1), v_BLNH)


@pytest.mark.parametrize("masked", [True, False], ids=["packed", "causal"])
@pytest.mark.parametrize(("num_kv_heads", "scale"), [(4, None), (2, 0.7), (1, None)])
def test_attention_and_its_gradient_equal_a_plain_softmax(masked, num_kv_heads, scale):
    module, given_B1LL = cpu_attention_and_mask()
    mask_B1LL = reference.document_mask(POSITIONS_BL if masked else torch.arange(17).repeat(3, 1))
    assert not masked or torch.equal(given_B1LL, mask_B1LL)
    options = {"attention_masks": given_B1LL if masked else None, "scale": scale, "enable_gqa": num_kv_heads != 4}
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(3, 17, num_heads, 8, generator=generator) for num_heads in (4, num_kv_heads, num_kv_heads, 4)
    )

    def outputs_and_gradients(attend):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        out.backward(upstream)
        return [out.detach(), *(x.grad for x in inputs)]

    got = outputs_and_gradients(lambda *qkv: module(*qkv, **options))
    expected = outputs_and_gradients(lambda *qkv: plain_attention(*qkv, mask_B1LL, scale or 8**-0.5))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keyword", ["score_mod", "out_transform"])
def test_what_the_cpu_has_no_kernel_for_is_refused(keyword):
    module, mask_B1LL = cpu_attention_and_mask()
    q = torch.randn(3, 17, 4, 8)
    with pytest.raises(ValueError, match="needs an accelerator"):
        module(q, q, q, attention_masks=mask_B1LL, **{keyword: lambda *args: args[0]})
