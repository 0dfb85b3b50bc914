"""Runs that start in the teacher's basis: the same weights in every layout, and only where a run begins."""

import shutil

import pytest
import torch

from let_plugin.alignment.projectors import Interpolate, RandomOrthonormal
from tests.support import jobs

pytestmark = pytest.mark.slow

# No alignment, so no teacher but at the start; and one from the other side, with a target that has no teacher either.
ALONE = """\
weight = 0.0
dimension_match = "random"
init = {parts = "both", embedding_scale = 0.5, upper_blocks = "zero"}"""
LABELS = 'signal = "labels"\nprojector.side = "student"\ninit = {parts = "head", head_scale = 2.0}'
LAYOUTS = jobs.LAYOUTS | {
    "HSDP": ["--parallelism.data_parallel_replicate_degree", 2, "--training.local_batch_size", 2],
    **{b: [*jobs.LAYOUTS["TP"], "--parallelism.spmd_backend", b] for b in ("spmd_types", "full_dtensor")},
}
ONE_STEP = ["--training.steps", 1, "--let.stop_step", 1]


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """(name, lines of the table) -> a TOML file with the teacher's, whose weights are `write.teacher`."""
    folder = tmp_path_factory.mktemp("initialization")

    def write(name, lines):
        config = folder / f"{name}.toml"
        text = jobs.TINY.format(folder=folder / name, teacher=folder / "teacher")
        config.write_text(text.replace("weight = 0.5", lines))
        return config

    write.folder, write.teacher = folder, jobs.make_teacher(folder / "teacher", with_head=True)
    return write


@pytest.fixture(scope="module")
def starts(write):
    """(processes, name) -> what the run did."""
    alone, labels, off = write("alone", ALONE), write("labels", LABELS), write("off", ALONE + "\nenable = false")
    one = {"alone": (alone, ONE_STEP), "labels": (labels, ONE_STEP), "off": (off, ONE_STEP)}
    two = {name: (alone, [*ONE_STEP, *layout]) for name, layout in LAYOUTS.items()}
    return [jobs.train_many(write.folder, cases, n + 1) for n, cases in enumerate((one, two))]


def test_the_start_is_that_of_the_formulas_and_all_else_as_it_was(starts, write):
    """To the bit."""
    initial, off, weights = starts[0]["alone"]["initial"], starts[0]["off"]["initial"], write.teacher
    basis_DE = RandomOrthonormal(32, 48).weight
    head_VE = weights["lm_head.weight"] * weights["norm.weight"]
    inverse_ED = torch.linalg.pinv(basis_DE.double()).float()
    scale = basis_DE.double().norm().item() / 48**0.5
    expected = dict(off)
    expected["tok_embeddings.weight"] = weights["tok_embeddings.weight"] @ basis_DE.T * 0.5
    expected["lm_head.weight"] = head_VE @ inverse_ED * scale
    for name in off:
        if name.startswith(("layers.1.", "layers.2.", "layers.3.")) and name.endswith(("wo.weight", "w2.weight")):
            expected[name] = torch.zeros_like(off[name])
    assert sum(not bool(tensor.any()) for tensor in expected.values()) == 6
    assert initial.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(initial[name], tensor), name
    assert [step["let/active"] for step in starts[0]["alone"]["logged"]] == [0.0]  # and no teacher runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_alike(starts, layout):
    initial, expected = starts[1][layout]["initial"], starts[0]["alone"]["initial"]
    assert initial.keys() == expected.keys()
    for name, tensor in initial.items():
        if not name.startswith("layers.") or not expected[name].any():  # DTensor draws the others in its own way
            assert torch.equal(tensor, expected[name]), name


def test_on_the_students_side_the_head_is_the_map_itself(starts, write):
    initial, off, weights = starts[0]["labels"]["initial"], starts[0]["off"]["initial"], write.teacher
    map_ED = Interpolate(48, 32)(torch.eye(48)[None])[0].T
    head_VE = weights["lm_head.weight"] * weights["norm.weight"]
    torch.testing.assert_close(initial.pop("lm_head.weight"), 2 * head_VE @ map_ED)
    for name, tensor in initial.items():
        assert torch.equal(tensor, off[name]), name
    assert "let/auxiliary_loss" in starts[0]["labels"]["logged"][0]


def test_a_run_that_resumes_goes_on_from_its_checkpoint_alone(write, tmp_path):
    """Its teacher may be gone by then."""
    config = write("resumed", ALONE)
    save = ["--checkpoint.enable", "--checkpoint.interval", 2, "--checkpoint.no-last-save-model-only"]
    expected = jobs.probe(tmp_path / "whole", config, *save)
    jobs.kill(tmp_path / "killed", config, *save, step=3)
    shutil.move(write.folder / "teacher", write.folder / "moved")
    resumed = jobs.probe(tmp_path / "killed", config, *save)
    shutil.move(write.folder / "moved", write.folder / "teacher")
    assert len(resumed["gradients"]) == 2
    for name, weight in expected["final"].items():
        assert torch.equal(resumed["final"][name], weight), name
