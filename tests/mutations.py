"""Breaks one line of the package at a time and records which test notices.

    python -m tests.mutations              all of MUTATIONS; writes tests/mutations.md
    python -m tests.mutations 3 17         those two only; writes nothing

Each mutation is applied to a copy of the checkout. The named tests must pass before anything is
broken, and at least one must fail after it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests/mutations.md"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "-rf"]


@dataclass(frozen=True)
class Mutation:
    """One broken line.

    Attributes:
        what: What breaks, in words.
        file: Path in let_plugin/.
        old: The code that is replaced; it occurs once in the file.
        new: What takes its place.
        tests: Arguments of pytest: the tests that are expected to notice.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS: list[Mutation] = [
    Mutation(
        "sign of the cosine's gradient",
        "alignment/losses.py",
        "cosine_BL1 / student_norm_BL1.square()) - target_BLD * across_BL1",
        "cosine_BL1 / student_norm_BL1.square()) + target_BLD * across_BL1",
        "tests/unit/alignment/test_losses.py",
    ),
    Mutation(
        "a token that does not count is masked",
        "alignment/losses.py",
        "backward((coefficient * counts_BL).to(loss_BL.dtype))",
        "backward((coefficient * torch.ones_like(counts_BL)).to(loss_BL.dtype))",
        "tests/unit/alignment",
    ),
    Mutation(
        "the pair's weight",
        "alignment/pair.py",
        "result = self._loss(student_BLD, match(teacher_BLE), counts_BL, coefficient * self._weight)",
        "result = self._loss(student_BLD, match(teacher_BLE), counts_BL, coefficient)",
        "tests/unit/alignment tests/unit/guidance",
    ),
    Mutation(
        "the schedule is off by one",
        "alignment/schedules.py",
        "return max(0, stop_step - step) / stop_step",
        "return max(0, stop_step - step - 1) / stop_step",
        "tests/unit/alignment/test_schedules.py",
    ),
    Mutation(
        "the gradient is injected once",
        "alignment/tap.py",
        "added_BLD = waiting.pop()",
        "added_BLD = waiting[0]",
        "tests/unit/alignment/test_tap.py",
    ),
    Mutation(
        "the tap is inert in evaluation",
        "alignment/tap.py",
        "if target_BLE is None or not output_BLD.requires_grad:",
        "if target_BLE is None:",
        "tests/unit/alignment/test_tap.py",
    ),
    Mutation(
        "the tap leaves no trace",
        "alignment/tap.py",
        "            handle.remove()",
        "            handle.id",
        "tests/unit/alignment/test_tap.py",
    ),
    Mutation(
        "one third of the depth",
        "alignment/layer_mapping.py",
        "exact.denominator, 1) - 1",
        "exact.denominator, 1)",
        "tests/unit/alignment/test_layer_mapping.py",
    ),
    Mutation(
        "the running mean does not see its own batch",
        "alignment/running_mean.py",
        "1 - self._momentum)\n        self._correction",
        "self._momentum)\n        self._correction",
        "tests/unit/alignment/test_running_mean.py",
    ),
    Mutation(
        "the divisor is the step's number of valid tokens",
        "guidance/guidance.py",
        "tap.coefficient.fill_(self._lambda).div_(global_valid_tokens)",
        "tap.coefficient.fill_(self._lambda).div_(global_valid_tokens + 1)",
        "tests/integration/test_reference.py",
    ),
    Mutation(
        "ignored labels have no target",
        "teacher/sharding.py",
        "counts_BL = share.rows(labels_BL) != IGNORE_INDEX",
        "counts_BL = share.rows(labels_BL) != IGNORE_INDEX - 1",
        "tests/unit/guidance tests/unit/teacher/test_sharding.py",
    ),
    Mutation(
        "the rank's part of the sequence",
        "teacher/sharding.py",
        'index_L.chunk(student.tp)[student.get_mesh("tp").get_local_rank()]',
        "index_L.chunk(student.tp)[0]",
        "tests/integration/test_matrix.py -k '[TP and eager and not FSDP2'",
    ),
    Mutation(
        "the rank's rows",
        "teacher/sharding.py",
        "return tensor_BL.chunk(self._num_peers)[self._mesh.get_local_rank()]",
        "return tensor_BL.chunk(self._num_peers)[0]",
        "tests/integration/test_matrix.py -k '[TP and eager and not FSDP2'",
    ),
    Mutation(
        "a projector's gradients are summed over the ranks",
        "guidance/projectors.py",
        'return [Replicate() if name == "tp" and not sequence_parallel else Partial() for name in names]',
        "return [Replicate() for name in names]",
        "tests/integration/test_strategies.py -k 'linear and FSDP2'",
    ),
    Mutation(
        "a projector's optimizer resumes",
        "guidance/projectors.py",
        'self._optimizers.load_state_dict(state_dict["optimizer"])',
        'state_dict["optimizer"]',
        "tests/unit/guidance",
    ),
    Mutation(
        "a projector stays out of the student's state dict",
        "guidance/projectors.py",
        "        del state_dict[name]",
        "        state_dict[name]",
        "tests/unit/guidance",
    ),
    Mutation(
        "the adaptive stop resumes",
        "alignment/adaptive_stop.py",
        'self._num_measured, self._num_below, stop_step = state_dict["counts"].tolist()',
        'self._num_measured, _, stop_step = state_dict["counts"].tolist()',
        "tests/unit/alignment/test_adaptive_stop.py",
    ),
    Mutation(
        "lambda is 0 from the stop step on",
        "trainer.py",
        "if steps_taken < self.stopping.step:",
        "if steps_taken <= self.stopping.step:",
        "tests/unit/test_trainer.py",
    ),
    Mutation(
        "the teacher is freed at the stop",
        "trainer.py",
        "        self.guidance.remove()\n        self.guidance = None",
        "        self._kept = self.guidance.teacher\n        self.guidance.remove()\n        self.guidance = None",
        "tests/unit/test_trainer.py",
    ),
    Mutation(
        "replicas shuffle alike",
        "guidance/guidance.py",
        'seed=dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0',
        "seed=torch.distributed.get_rank()",
        "tests/integration/test_strategies.py -k shuffled",
    ),
    Mutation(
        "the state of other settings is refused",
        "runtime/checkpoint.py",
        'if not torch.equal(state_dict["identity"], self._identity):',
        "if False:",
        "tests/unit/runtime/test_checkpoint.py",
    ),
    Mutation(
        "pickled weights are refused",
        "teacher/hf/files.py",
        "if not {SINGLE_FILE, INDEX} & names:",
        "if not names:",
        "tests/unit/teacher/hf",
    ),
    Mutation(
        "a checkpoint's metadata runs no code",
        "runtime/dcp_files.py",
        "            return _KNOWN[module_name, global_name]",
        "            return super().find_class(module_name, global_name)",
        "tests/unit/runtime/test_dcp_files.py",
    ),
    Mutation(
        "NaN in a teacher's weights is refused",
        "teacher/hf/checkpoint.py",
        "        if not_finite:",
        "        if False:",
        "tests/unit/teacher/hf",
    ),
    Mutation(
        "no token meets one that ends later",
        "tokens/alignment.py",
        'np.searchsorted(ends_M, ends_N, side="right") - 1',
        'np.searchsorted(ends_M, ends_N, side="left")',
        "tests/unit/tokens/test_token_alignment.py",
    ),
    Mutation(
        "stored states of another teacher are refused",
        "teacher/stored/features.py",
        'fingerprints.teacher(let)) != stored["teacher"]["fingerprint"]',
        "fingerprints.teacher(let)) is None",
        "tests/unit/teacher/stored",
    ),
    Mutation(
        "another vocabulary is refused",
        "preflight/teacher_checks.py",
        "if differing := compare_vocabularies(student, teacher):",
        "if differing := compare_vocabularies(student, student):",
        "tests/unit/preflight",
    ),
    Mutation(
        "an unknown key is an error",
        "config/overlay.py",
        "                self._unknown(join(key, name), name, value, cls)",
        "                join(key, name)",
        "tests/unit/config",
    ),
    Mutation(
        "a share of the steps is exact",
        "config/plan.py",
        "int(Fraction(str(",
        "int(float(str(",
        "tests/unit/config/test_plan.py",
    ),
    Mutation(
        "only complete rounds are compared",
        "bench/frame.py",
        "if all(key in own for own in by_label.values())]",
        "if any(key in own for own in by_label.values())]",
        "tests/unit/bench",
    ),
]


def pytest(folder: Path, tests: str) -> tuple[bool, str]:
    """Whether the tests pass in `folder`, and the first that fails."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, *shlex.split(tests)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode in (0, 1, 2), result.stdout[-2000:] + result.stderr[-2000:]
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, flags=re.M)
    return result.returncode == 0, failed.group(1) if failed else ""


def check(folder: Path, mutation: Mutation) -> str:
    """The test that notices the mutation, or "" if none does."""
    path = folder / "let_plugin" / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file}: {text.count(mutation.old)} places have {mutation.old!r}"
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        return pytest(folder, mutation.tests)[1]
    finally:
        path.write_text(text)


def main(numbers: list[int]) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv*", "outputs", "__pycache__"))
        chosen = [(i, m) for i, m in enumerate(MUTATIONS, 1) if not numbers or i in numbers]
        for tests in dict.fromkeys(mutation.tests for _, mutation in chosen):
            passed, failed = pytest(folder, tests)
            if not passed:
                print(f"{failed} fails before anything is broken")
                return 1
        rows = []
        for number, mutation in chosen:
            noticed = check(folder, mutation)
            rows.append((number, mutation, noticed))
            print(f"{number:2d} {mutation.what}: {noticed or 'NOT CAUGHT'}", flush=True)
    caught = sum(bool(noticed) for *_, noticed in rows)
    print(f"{caught} of {len(rows)} caught")
    if not numbers:
        lines = [
            "# Mutations",
            "",
            "`python -m tests.mutations` breaks one line at a time and runs the tests that should notice.",
            f"{caught} of {len(rows)} were caught.",
            "",
            "| | what breaks | line | becomes | caught by |",
            "| ---: | --- | --- | --- | --- |",
        ]
        for number, m, noticed in rows:
            old, new = (" ".join(s.split()).replace("|", "\\|") for s in (m.old, m.new))
            lines.append(f"| {number} | {m.what} | {m.file}: `{old}` | `{new}` | {noticed or '**none**'} |")
        TABLE.write_text("\n".join(lines) + "\n")
    return caught != len(rows)


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
