"""What can be wrong between a student and its teacher. `preflight` asks; each check raises a ConfigError."""

import os
from collections.abc import Collection, Sequence

from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

from let_plugin.alignment.layer_mapping import LayerPair
from let_plugin.alignment.projectors import FittedMatch
from let_plugin.config import LetConfig, plan
from let_plugin.config.errors import ConfigError, Problem
from let_plugin.teacher.base import TeacherInfo, TeacherSource
from let_plugin.teacher.retokenized import Trial, retokenizer, teacher_seq_len, try_out
from let_plugin.teacher.stored.features import Features
from let_plugin.tokens.vocabulary import compare_vocabularies


def check_dimension_match(config: Trainer.Config, pairs: Sequence[LayerPair], teacher: TeacherInfo) -> None:
    """A match may refuse the two widths."""
    let: LetConfig = config.let
    assert config.model_spec is not None
    for width in {teacher.width(pair.teacher, let.teacher.final_norm) for pair in pairs}:
        match = plan.dimension_match(let)(width, config.model_spec.model.dim)
        if isinstance(match, FittedMatch) and let.cuda_graphs:
            raise ConfigError(
                Problem(
                    "let.cuda_graphs",
                    f"a captured step cannot refit: not with {let.dimension_match!r}",
                    True,
                )
            )


def check_sequence_length(config: Trainer.Config, teacher: TeacherInfo) -> None:
    """Whether the teacher takes the student's rows."""
    if teacher.max_seq_len is not None and config.training.seq_len > teacher.max_seq_len:
        raise ConfigError(
            Problem(
                "training.seq_len",
                f"the teacher was built for at most {teacher.max_seq_len} tokens",
                config.training.seq_len,
            )
        )


def check_tensor_parallel(let: LetConfig, teacher: TeacherInfo, degree: int) -> None:
    """Whether the teacher can be cut over the student's tensor-parallel ranks.

    Args:
        let: The `[let]` table.
        teacher: The teacher.
        degree: `parallelism.tensor_parallel_degree`.
    """
    if not let.teacher.tensor_parallel:
        return
    message = ""
    if let.teacher.features:
        message = "no teacher runs: its states are read from let.teacher.features; leave this off"
    elif not let.teacher.spec:
        message = "only torchtitan's own models have a plan for it: name one in let.teacher.spec, or leave this off"
    elif let.teacher.quantization != "none":
        message = (
            "a quantised teacher is held whole by each rank; set let.teacher.quantization to none, or leave this off"
        )
    else:
        heads = {"heads": teacher.num_heads, "key-value heads": teacher.num_kv_heads}
        uneven = [f"{number} {name}" for name, number in heads.items() if number is not None and number % degree]
        if uneven:
            message = (
                f"the teacher's {' and '.join(uneven)} do not divide by parallelism.tensor_parallel_degree = {degree}; "
                "leave this off"
            )
    if message:
        raise ConfigError(Problem("let.teacher.tensor_parallel", message, True))


def check_needs_teacher(let: LetConfig) -> None:
    """What cannot be had from stored states alone."""
    if let.target == "logits":
        message = "the teacher's language-model head is needed, and let.teacher.features has its states only"
        raise ConfigError(Problem("let.target", message, let.target))
    if let.control == "random_teacher":
        message = "there is no teacher whose weights could be drawn anew: its states are read from let.teacher.features"
        raise ConfigError(Problem("let.control", message, let.control))


def check_features(
    config: Trainer.Config,
    features: Features,
    pairs: Sequence[LayerPair],
    parallel_dims: ParallelDims,
    known: Collection[str],
) -> None:
    """Whether the stored states are this run's; a field that is wrong in itself is not complained about twice."""
    try:
        features.check(config, plan.teacher_layers(pairs), parallel_dims.dp_replicate * parallel_dims.dp_shard)
    except ConfigError as error:
        if problems := [problem for problem in error.problems if problem.key not in known]:
            raise ConfigError(problems) from error


def try_token_alignment(config: Trainer.Config, source: TeacherSource, can_read_data: bool) -> Trial | None:
    """Whether the two tokenizers can be matched and, on rank 0, how well the first rows of the data are."""
    teacher_seq_len(config, source.info)
    if not can_read_data:
        return None
    student = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    retokenize = retokenizer(config, student, source)
    return try_out(config, student, retokenize) if os.environ["RANK"] == "0" else None


def check_vocabulary(student: dict[str, int], source: TeacherSource, let: LetConfig) -> str:
    """Compares what each id means to student and teacher; returns what it has found, for the report."""
    if not let.teacher.check_vocabulary:
        return "not compared (let.teacher.check_vocabulary = false)"
    teacher = source.vocabulary()
    if not teacher or not student:
        whose = "teacher" if not teacher else "student"
        raise ConfigError(
            Problem(
                "let.teacher.tokenizer_path",
                f"the {whose}'s tokenizer has no vocabulary to compare (no tokenizer.json); "
                "name the teacher's folder here, or set let.teacher.check_vocabulary = false if the two are known to "
                "be the same",
                let.teacher.tokenizer_path,
            )
        )
    difference = compare_vocabularies(student, teacher)
    if difference.num_differing:
        raise ConfigError(
            Problem(
                "let.teacher.path",
                f"the teacher's vocabulary is not the student's: {difference.num_differing:,} of "
                f"{difference.num_student:,} ids differ ({'; '.join(difference.examples)}). Train the student on the "
                "teacher's tokenizer (hf_assets_path), take a teacher with the student's, or have the text encoded "
                "anew for the teacher (let.token_alignment.enable = true)",
                let.teacher.path,
            )
        )
    return "the student's tokenizer and the teacher's agree token by token"
