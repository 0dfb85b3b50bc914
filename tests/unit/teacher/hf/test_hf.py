"""HFTeacher against transformers itself, one document at a time, in many families.

Shape legend: B batch, L sequence, E teacher width.
"""

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from let_plugin.alignment.layer_mapping import EMBEDDING
from let_plugin.config.errors import ConfigError
from let_plugin.teacher.hf import attention
from tests.support import hf_models
from tests.support.hf_models import FAMILIES, VOCAB_SIZE, build, packed_batch, reference_of, source_of


class NoHostSync(TorchDispatchMode):
    """Fails where a tensor's value is read on the host: there an accelerator would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor is read on the host"
        return func(*args, **(kwargs or {}))


def states_by_layer(reference, tokens_BL):
    """What transformers returns for the embedding and each block, without the final norm; and, as "final", with it."""
    last_block = next(module for module in reference.modules() if isinstance(module, torch.nn.ModuleList))[-1]
    raw = []
    handle = last_block.register_forward_hook(
        lambda module, args, output: raw.append(output[0] if isinstance(output, tuple) else output)
    )
    embedding, *blocks, final = reference(input_ids=tokens_BL, output_hidden_states=True).hidden_states
    handle.remove()
    return {EMBEDDING: embedding, **dict(enumerate(blocks)), len(blocks): raw[0], "final": final}


def num_hooks(teacher):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_of_any_layers_are_those_of_transformers_of_each_document_alone(folders, family):
    tokens_BL, positions_BL = packed_batch()
    source, reference = source_of(folders[family]), reference_of(folders[family])
    for layers, final_norm, num_blocks, hooks in (
        ([1, EMBEDDING, 0], True, 2, 3),
        ([2], False, 3, 1),
        ([2, 0], True, 3, 1),
    ):

        def expected(tokens, layers=layers, final_norm=final_norm):
            by_layer = states_by_layer(reference, tokens)
            return torch.cat([by_layer["final" if layer == 2 and final_norm else layer] for layer in layers], -1)

        teacher = build(source, layers=layers, final_norm=final_norm)
        with NoHostSync():
            packed_BLE, whole_BLE = teacher(tokens_BL, positions_BL), teacher(tokens_BL, None)
        torch.testing.assert_close(whole_BLE, expected(tokens_BL), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed_BLE, hf_models.alone(expected, tokens_BL), rtol=1e-4, atol=1e-5)
        assert whole_BLE.shape[-1] == sum(source.info.width(layer, final_norm) for layer in layers)
        assert num_hooks(teacher) == hooks
        num_params = sum(parameter.numel() for parameter in teacher.parameters())
        assert num_params == source.info.num_params_to(layers)
        assert num_params == source.info.num_trunk_params - sum(source.info.block_params[num_blocks:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_in_bfloat16_is_that_of_from_pretrained_frozen_and_headless(folders, family):
    expected = transformers.AutoModel.from_pretrained(folders[family], dtype=torch.bfloat16)
    rng_state = torch.get_rng_state()
    teacher = build(source_of(folders[family]), torch.bfloat16)
    assert torch.equal(rng_state, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32
    for named in ("named_parameters", "named_buffers"):  # some of them in fp32
        tensors = dict(getattr(teacher.trunk, named)())
        assert tensors.keys() == dict(getattr(expected, named)()).keys()
        for name, tensor in getattr(expected, named)():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training or "head" in name for name, module in teacher.named_modules())
    assert teacher(*packed_batch()).dtype == torch.bfloat16 and num_hooks(teacher) == 0


def test_a_leak_between_documents_is_found_in_the_layers_that_are_asked_for(folders, monkeypatch):
    monkeypatch.setattr(attention.DocumentMask, "get", lambda *_: None)
    source = source_of(folders["llama"])
    build(source, layers=[EMBEDDING])
    for layers in ([EMBEDDING, 0], None):
        with pytest.raises(ConfigError, match=r"let\.teacher\.path.*depend on the document before it"):
            build(source, layers=layers)


def test_a_window_that_the_family_does_not_hand_on_is_refused(tmp_path):
    window = {"use_sliding_window": True, "sliding_window": hf_models.WINDOW, "max_window_layers": 1}
    hf_models.save(tmp_path, transformers.Qwen2MoeConfig(**hf_models.GROUPED, num_experts=2, **window))
    with pytest.raises(ConfigError, match=r"let\.teacher\.path.*sliding window"):
        build(source_of(tmp_path))


@pytest.mark.skipif(not hasattr(transformers, "DoryConfig"), reason="a newer transformers has it")
def test_blocks_that_run_in_loops_are_not_cut_apart(tmp_path):
    """Dory runs its blocks 1 and 2 twice, then block 3: without block 2, block 1 would see something else."""
    fields = {**hf_models.GROUPED, "num_hidden_layers": 4, "head_dim": 8}
    config = transformers.DoryConfig(**fields, n_input_layers=1, n_output_layers=1, n_recurrent_loops=2)
    hf_models.save(tmp_path, config)
    tokens_BL, _ = packed_batch()
    with torch.no_grad():
        expected_BLE = reference_of(tmp_path)(input_ids=tokens_BL).last_hidden_state
        torch.testing.assert_close(build(source_of(tmp_path))(tokens_BL, None), expected_BLE, rtol=0, atol=1e-3)
    with pytest.raises(ConfigError, match=r"let\.pairs = \[1\].*do not run once each, in order"):
        build(source_of(tmp_path), layers=[1])


def test_positions_may_be_embeddings_as_well(folders):
    info = source_of(folders["gpt2"]).info
    assert (info.vocab_size, info.max_seq_len, info.num_embedding_params) == (VOCAB_SIZE, 64, (VOCAB_SIZE + 64) * 32)
