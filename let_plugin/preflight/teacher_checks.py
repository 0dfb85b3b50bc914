"""Checks of what can be wrong between a student and its teacher; see `checks`."""

import os
from typing import Any

from let_plugin.alignment.projectors import FittedMatch, Orthogonal
from let_plugin.config import plan
from let_plugin.guidance.initialization import OUTPUT_PROJECTION, first_upper_block, token_pieces
from let_plugin.preflight.report import Facts
from let_plugin.teacher.base import TeacherSource
from let_plugin.teacher.open import open_source, open_teacher
from let_plugin.teacher.retokenized import retokenizer, teacher_seq_len, try_out
from let_plugin.teacher.stored.features import Features
from let_plugin.tokens.vocabulary import compare_vocabularies


def find_source(facts: Facts) -> None:
    facts.source = open_source(facts.config.let.teacher)


def check_dimension_match(facts: Facts) -> None:
    """A match may refuse the two widths."""
    let, spec = facts.config.let, facts.config.model_spec
    if facts.source is None:
        return
    assert spec is not None
    for of_term in (t for t in facts.active_terms if t.term.config.signal == "states"):
        table, key = of_term.term.config, of_term.term.key
        for width in {facts.source.info.width(p.teacher, let.teacher.final_norm) for p in of_term.pairs or ()}:
            match = plan.dimension_match(table, key)(width, spec.model.dim)
            if isinstance(match, FittedMatch | Orthogonal) and let.cuda_graphs:  # matrix_exp reads on the host
                message = f"not with {table.dimension_match!r}, whose maths a captured step cannot have; leave this off"
                facts.refuse("let.cuda_graphs", message, True)


def check_sequence_length(facts: Facts) -> None:
    """Whether the teacher takes the student's rows."""
    if not isinstance(facts.source, TeacherSource) or facts.config.let.token_alignment.enable:
        return  # stored states are those of a length
    longest, seq_len = facts.source.info.max_seq_len, facts.config.training.seq_len
    if longest is not None and seq_len > longest:
        facts.refuse("training.seq_len", f"the teacher was built for at most {longest} tokens", seq_len)


def check_tensor_parallel(facts: Facts) -> None:
    """Whether the teacher can be cut over the student's tensor-parallel ranks."""
    let, degree = facts.config.let, max(facts.config.parallelism.tensor_parallel_degree, 1)
    if facts.source is None or not let.teacher.tensor_parallel:
        return
    teacher, message = facts.source.info, ""
    if let.teacher.features:
        message = "no teacher runs: its states are read from let.teacher.features"
    elif not teacher.is_native:
        message = "only torchtitan's own models have a plan for it, and transformers runs this teacher"
    else:
        heads = {"heads": teacher.num_heads, "key-value heads": teacher.num_kv_heads}
        if uneven := [f"{number} {name}" for name, number in heads.items() if number and number % degree]:
            message = f"its {' and '.join(uneven)} do not divide by parallelism.tensor_parallel_degree = {degree}"
    if message:
        facts.refuse("let.teacher.tensor_parallel", f"{message}; leave this off", True)


def check_rows(facts: Facts) -> None:
    """Whether a teacher on a share of the rows saves anything."""
    let, num_rows = facts.config.let, plan.microbatch_rows(facts.config)
    if let.teacher.rows == 1:
        return
    message = ""
    if let.teacher.features or not plan.teacher_terms(let):
        message = "no teacher runs"
    elif plan.num_teacher_rows(let, num_rows) == num_rows:
        message = f"a microbatch has {num_rows} rows, and this share of them rounds up to all"
    if message:
        facts.refuse("let.teacher.rows", f"{message}; leave this at 1", let.teacher.rows)


def check_stored_states(facts: Facts) -> None:
    """Whether the stored states are this run's."""
    features, let = facts.source, facts.config.let
    if not isinstance(features, Features):
        return
    facts.vocabulary = ["the student's tokenizer is the one that the states were made with"]
    if let.control == "random_teacher":
        message = "it needs the teacher itself, and let.teacher.features has its states only"
        facts.refuse("let.control", message, let.control)
    if _distils(facts):
        facts.attempt(open_teacher, let.teacher)  # its head is read
    is_known = all(of_term.pairs is not None and of_term.stop_step is not None for of_term in facts.active_terms)
    if is_known and facts.num_data_parallel is not None:
        layers = plan.all_teacher_layers(facts.config, features.info.num_layers)
        facts.attempt(features.check, facts.config, layers, facts.num_data_parallel)


def _distils(facts: Facts) -> bool:
    return any(of_term.term.config.signal == "logits" for of_term in facts.active_terms)


def check_token_alignment(facts: Facts) -> None:
    """Whether the two tokenizers can be matched and, on rank 0, how well the first rows of the data are."""
    config, source = facts.config, facts.source
    if not isinstance(source, TeacherSource) or not config.let.token_alignment.enable:
        return
    if _distils(facts):
        message = "logits under two tokenizers cannot be compared; take a teacher with the student's tokenizer"
        return facts.refuse("let.token_alignment.enable", message, True)
    teacher_seq_len(config, source.info)
    if facts.problems:
        return  # the data may not be readable
    student = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    retokenize = retokenizer(config, student, source)
    facts.vocabulary = ["two tokenizers, matched by bytes of text"]
    if os.environ["RANK"] == "0":
        facts.vocabulary = try_out(config, student, retokenize)


def check_vocabulary(facts: Facts) -> None:
    """Compares what each id means to student and teacher."""
    let, source, student = facts.config.let, facts.start or facts.source, facts.student_vocabulary
    if not isinstance(source, TeacherSource) or let.token_alignment.enable or student is None:
        return
    compares_logits = any(term.config.signal == "logits" for term in plan.terms(let))
    remedy = "" if compares_logits else ", or have the text encoded anew for it (let.token_alignment.enable = true)"
    # Both heads may have more rows than there are tokens; a token without a row would be an error on the device.
    if (highest := max(student.values(), default=-1)) >= source.info.vocab_size:
        rows = f"its vocabulary has {source.info.vocab_size:,} rows, the student's tokenizer ids up to {highest:,}"
        message = f"{rows}; take another teacher{remedy}"
        return facts.refuse("let.teacher.path", message, let.teacher.path)
    if not let.teacher.check_vocabulary:
        facts.vocabulary = ["not compared (let.teacher.check_vocabulary = false)"]
        return
    teacher = source.vocabulary()
    if not teacher or not student:
        message = (
            f"the {'student' if teacher else 'teacher'}'s tokenizer has no vocabulary to compare (no tokenizer.json); "
            "name the folder with it here, or, if they are the same, set let.teacher.check_vocabulary = false"
        )
        return facts.refuse("let.teacher.tokenizer_path", message, let.teacher.tokenizer_path)
    if differing := compare_vocabularies(student, teacher):
        message = (
            f"its vocabulary is not the student's: {len(differing):,} of {len(student):,} ids differ "
            f"({'; '.join(differing[:3])}). Train the student on the teacher's tokenizer (hf_assets_path), or take "
            f"another teacher{remedy}"
        )
        return facts.refuse("let.teacher.path", message, let.teacher.path)
    facts.vocabulary = ["the student's tokenizer and the teacher's agree token by token"]


def check_parts(facts: Facts) -> None:
    """Whether the student has the layers that `[let.init]` sets, and nothing else sets them."""
    parts, student, settings = facts.config.let.init.parts, facts.student, facts.config.checkpoint
    for key in ("initial_load_path", "initial_load_in_hf"):
        if settings.enable and (value := getattr(settings, key, None)):
            message = "not together with let.init: the run would start from there; leave one of the two out"
            facts.refuse(f"checkpoint.{key}", message, value)
    if student is not None and parts in ("embeddings", "both") and "tok_embeddings.weight" not in student.names:
        facts.refuse("let.init.parts", 'the student\'s embeddings are more than one weight; choose "head"', parts)
    if student is not None and student.is_tied and parts == "both":
        message = "the student's embeddings and head are one tensor, and would be two; choose one of them"
        facts.refuse("let.init.parts", message, parts)


def check_upper_blocks(facts: Facts) -> None:
    """Whether there are blocks above the aligned one, and whether it is known what they end with."""
    upper_blocks, student = facts.config.let.init.upper_blocks, facts.student
    if upper_blocks == "keep" or student is None or facts.resumption is not None:
        return
    facts.first_upper_block = first = first_upper_block(facts.config)
    message = f"there is no block above layers.{first - 1} (let.student_block)" if first == student.num_blocks else ""
    for block in (f"layers.{i}." for i in range(first, student.num_blocks)):
        if sum(name.startswith(block) and bool(OUTPUT_PROJECTION.search(name)) for name in student.names) < 2:
            message = f"it is not known which parameters of {block} are its output projections"
    if message:
        facts.refuse("let.init.upper_blocks", f'{message}; choose "keep"', upper_blocks)


def find_start(facts: Facts) -> None:
    """The teacher that the student starts from, and how many of its rows each of the student's tokens takes."""
    config: Any = facts.config
    if config.let.init.parts == "none" or facts.resumption is not None:
        return
    facts.start = facts.source if isinstance(facts.source, TeacherSource) else open_teacher(config.let.teacher)
    info = facts.start.info
    if info.width(0, False) != info.hidden_size:
        message = "its embeddings and its last states have another width than its blocks; choose another teacher"
        return facts.refuse("let.teacher.path", message, config.let.teacher.path)
    plan.basis(config, info.hidden_size)
    check_vocabulary(facts)
    if not facts.problems and os.environ["RANK"] == "0":
        tokenizer = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
        facts.pieces = token_pieces(config, tokenizer, facts.start)
