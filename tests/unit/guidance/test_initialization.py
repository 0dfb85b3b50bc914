"""A student that starts in its teacher's basis, on a real trainer of one process."""

import pytest
import torch

from let_plugin.config import InitConfig, plan
from let_plugin.guidance.initialization import initialize, token_pieces
from let_plugin.teacher.open import open_teacher
from tests.support import config_registry as tiny
from tests.support import jobs, reference, tokenizer_kinds


@pytest.fixture
def teacher(config, tmp_path):
    """The weights of the configuration's teacher, which has a head."""
    config.let.teacher.path = str(tmp_path / "teacher")
    config.let.init = InitConfig(parts="both", upper_blocks="zero")
    return jobs.make_teacher(tmp_path / "teacher", with_head=True)


@pytest.mark.parametrize("name", ["random", "truncate_or_pad"])
@torch.no_grad()
def test_with_the_teachers_trunk_for_a_block_the_logits_are_the_teachers(config, teacher, name, batch, request):
    config.let.dimension_match = name
    (model,) = request.getfixturevalue("trainer").model_parts  # of the configuration as it is by now
    tokens_BL, positions_BL = batch[0]["input"], batch[0]["positions"]
    hidden, states_BLE = reference.llama(teacher, tokens_BL, positions_BL, **tiny.TEACHER)
    states_BLD = hidden[-1] @ plan.basis(config, tiny.TEACHER_DIM).into_DE.T
    model.layers["0"].register_forward_hook(lambda *_: states_BLD)  # in place of what the block returns
    model._skip_lm_head = False  # the loss does without it
    logits_BLV = model(tokens_BL, positions_BL)
    torch.testing.assert_close(logits_BLV, states_BLE @ teacher["lm_head.weight"].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_padded_rows_of_the_student_stay_and_those_of_the_teacher_are_left_out(config, padded, request, padded_teacher):
    if padded == "student":
        config.model_spec = tiny.tiny_padded().model_spec
    else:
        config.let.teacher.spec = padded_teacher
    config.let.teacher.path = f"{config.dump_folder}/teacher"
    weights = jobs.make_teacher(config.let.teacher.path, with_head=True, spec=config.let.teacher.spec)
    trainer = request.getfixturevalue("trainer")
    embeddings = trainer.model_parts[0].tok_embeddings.weight
    before_VD = embeddings.full_tensor().clone()
    config.let.init = InitConfig(parts="both")
    initialize(trainer)
    after_VD, map_DE = embeddings.full_tensor(), plan.basis(config, tiny.TEACHER_DIM).into_DE
    new_VD = weights["tok_embeddings.weight"][:4096] @ map_DE.T
    torch.testing.assert_close(after_VD[:4096], new_VD * (before_VD[:4096].norm() / new_VD.norm()))
    assert torch.equal(after_VD[4096:], before_VD[4096:])


def test_a_token_takes_the_mean_of_its_pieces_and_one_without_any_stays_as_it_is(config, teacher, trainer):
    """Of another tokenizer, and a vocabulary that is padded."""
    own = tokenizer_kinds.KINDS["Unigram"]()
    before = {name: p.full_tensor().clone() for name, p in trainer.model_parts[0].named_parameters()}
    trainer.tokenizer, config.let.token_alignment.enable, config.let.init.embedding_scale = own, True, 1.0
    initialize(trainer)
    pieces = token_pieces(config, own, open_teacher(config.let.teacher))
    assert len(pieces) == tiny.VOCAB_SIZE and not any(pieces[own.get_vocab_size() :])
    unknown_V = torch.tensor([not piece for piece in pieces])
    several = next(i for i, piece in enumerate(pieces) if len(piece) > 1)
    basis = plan.basis(config, tiny.TEACHER_DIM)
    for name, gain, map_DE in (
        ("tok_embeddings.weight", torch.ones(tiny.TEACHER_DIM), basis.into_DE),
        ("lm_head.weight", teacher["norm.weight"], basis.logit_scale * basis.back_ED.T),
    ):
        after_VD = trainer.model_parts[0].get_parameter(name).full_tensor()
        assert torch.equal(after_VD[unknown_V], before[name][unknown_V])
        torch.testing.assert_close(after_VD[several], map_DE @ (teacher[name][pieces[several]].mean(dim=0) * gain))


def test_a_control_starts_without_the_teachers_knowledge(config, teacher, trainer):
    """With rows of the same size, or the same rows for other tokens."""
    got = {}
    for control in ("none", "random_teacher", "shuffled_targets"):
        config.let.control = control
        initialize(trainer)
        parameters = dict(trainer.model_parts[0].named_parameters())
        got[control] = [parameters[name].full_tensor().clone() for name in ("tok_embeddings.weight", "lm_head.weight")]
    for real_VD, random_VD, shuffled_VD in zip(*got.values(), strict=True):
        assert abs(torch.corrcoef(torch.stack([real_VD.flatten(), random_VD.flatten()]))[0, 1]) < 0.05
        torch.testing.assert_close(random_VD.std(), real_VD.std(), rtol=0.1, atol=0)
        norms_V, other_V = real_VD.norm(dim=-1), shuffled_VD.norm(dim=-1)
        assert (norms_V != other_V).float().mean() > 0.9
        torch.testing.assert_close(norms_V.sort().values, other_V.sort().values)
