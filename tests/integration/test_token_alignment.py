"""A teacher with another tokenizer in real runs: against plain PyTorch, in every layout, killed and resumed."""

import pytest
import torch

from let_plugin.demo import TOKENIZER
from let_plugin.tokens.alignment import Retokenizer
from tests.integration.test_strategies import LAYOUTS
from tests.support import jobs, reference, tokenizer_kinds
from tests.support.config_registry import STUDENT, TEACHER

TEACHER_SEQ_LEN = 128  # of 64 of the student's
ARGS = ["--training.steps", 5, "--let.stop-step", 4, "--checkpoint.enable", "--checkpoint.interval", 2]
ARGS += ["--dataloader.ignore_every", 0]  # the labels that the probe records are those that the data loader has made


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_kinds.write(tokenizer_kinds.metaspace(), folder, bos="<s>", eos="</s>")
    return folder


def write_config(folder, tiny_teacher, tokenizer_folder):
    text = jobs.TINY.format(folder=folder / "out", teacher=tiny_teacher[0])
    text = text.replace(f'"{TOKENIZER[TOKENIZER.index("let_plugin") :]}"', f'"{tokenizer_folder}"')
    config = folder / "cross.toml"
    config.write_text(f"{text}token_alignment = {{enable = true, teacher_seq_len = {TEACHER_SEQ_LEN}}}\n")
    return config


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_teacher, tokenizer_folder):
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = write_config(folder, tiny_teacher, tokenizer_folder)
    return jobs.probe(folder / "out", config, *ARGS), jobs.metrics(folder / "out")


def test_gradients_weights_and_metrics_equal_the_reference(uninterrupted, tiny_teacher, tokenizer_folder):
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    probe, metrics = uninterrupted
    student, teacher = (HuggingFaceTokenizer(tokenizer_path=str(path)) for path in (TOKENIZER, tokenizer_folder))
    retokenizer = Retokenizer(student, teacher, teacher_seq_len=TEACHER_SEQ_LEN)

    def retokenize(batch):
        extras = retokenizer({"input": batch[0], "positions": batch[1]}, batch[2])
        return extras["teacher_tokens"], extras["teacher_positions"], extras["teacher_index"]

    shapes = {"student_shape": STUDENT, "teacher_shape": TEACHER, "block": 0, "retokenize": retokenize}
    steps, weights = reference.train(
        probe["initial"], tiny_teacher[1], probe["batches"], probe["lrs"], weight=0.5, stop_step=4, **shapes
    )
    for got, expected in zip(probe["gradients"], steps, strict=True):
        assert jobs.relative_difference(got, expected["gradients"]) <= 1e-6
    assert jobs.relative_difference(probe["final"], weights) <= 1e-6
    active = [line for line in metrics if line["let/active"]]
    assert [line["let/cosine"] for line in active] == pytest.approx([s["cosine"] for s in steps[:4]], abs=1e-6)
    for line, batch in zip(active, probe["batches"], strict=False):
        counts_BL = batch[2] != reference.IGNORE_INDEX
        fraction = (counts_BL & (retokenize(batch)[2] >= 0)).sum() / counts_BL.sum()
        assert line["let/aligned_fraction"] == pytest.approx(fraction.item()) and fraction > 0.9
    assert "let/aligned_fraction" not in metrics[-1]


@pytest.mark.slow
def test_killed_and_resumed_with_a_worker_equals_uninterrupted(tmp_path, uninterrupted, tiny_teacher, tokenizer_folder):
    config = write_config(tmp_path, tiny_teacher, tokenizer_folder)
    args = [*ARGS, "--dataloader.num_workers", 1]
    jobs.kill(tmp_path / "out", config, *args, step=4)
    resumed = jobs.probe(tmp_path / "out", config, *args)
    expected, metrics = uninterrupted
    assert len(resumed["gradients"]) == 3
    for name, weight in expected["final"].items():
        assert torch.equal(resumed["final"][name], weight), name
    last = {line["step"]: line for line in jobs.metrics(tmp_path / "out")}
    for line in metrics:
        for key in ("loss_metrics/global_avg_loss", "let/cosine", "let/aligned_fraction"):
            assert last[line["step"]].get(key) == line.get(key), (line["step"], key)


@pytest.mark.slow
def test_every_layout_gives_the_same_gradients(tmp_path, tiny_teacher, tokenizer_folder):
    config = write_config(tmp_path, tiny_teacher, tokenizer_folder)
    start = [*jobs.seed_checkpoint(tmp_path / "seed", config), "--training.steps", 2, "--training.max_norm", 1e9]
    start += ["--let.stop_step", 2]
    layouts = {
        "FSDP2": LAYOUTS["FSDP2"][1],
        "pipeline": LAYOUTS["pipeline"][1],
        "TP": ["--parallelism.tensor_parallel_degree", 2],
        "CP": ["--parallelism.context_parallel_degree", 2],
    }
    cases = {name: (config, [*start, *args, "--dump_folder", tmp_path / name]) for name, args in layouts.items()}
    alone = {"alone": (config, start), "off": (config, [*start, "--let.no-enable"])}
    single, several = jobs.train_many(tmp_path, alone, 1), jobs.train_many(tmp_path, cases, 2)
    for result in (*single.values(), *several.values()):
        assert "error" not in result, result["error"]
    expected = single["alone"]
    assert jobs.relative_difference(expected["gradients"], single["off"]["gradients"]) > 1e-3
    for name, result in several.items():
        assert jobs.relative_difference(result["gradients"], expected["gradients"]) <= 1e-5, name
        for got, line in zip(result["logged"], expected["logged"], strict=True):
            for key in ("loss", "let/cosine", "let/aligned_fraction"):
                assert got.get(key) == pytest.approx(line.get(key), rel=1e-5, abs=1e-5), (name, key)
