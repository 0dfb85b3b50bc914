"""The `[let]` and `[runtime]` tables, and how they join a torchtitan configuration.

Importing this module imports neither torch nor torchtitan: `[runtime] device` has to be known before they are.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Gt, Interval


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """The `[runtime]` table: where the run executes."""

    device: Literal["auto", "cpu"] = "auto"
    """
    "auto" takes the accelerator that torch reports, and the CPU if there is none; "cpu" takes the CPU (gloo) even
    where there is an accelerator.
    """


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The `[let.teacher]` table: the small, frozen, pretrained model."""

    path: str = ""
    """
    Where the teacher is: a folder in Hugging Face format (config.json + safetensors), a hub name ("org/name"), a
    .gguf file, or, together with `spec`, a folder with a torchtitan checkpoint (DCP) or Hugging Face safetensors.
    Relative paths are relative to the working directory, as torchtitan's are.
    """

    revision: str = ""
    """Branch, tag or commit of a teacher on the hub. Empty: the newest of its main branch."""

    spec: str = ""
    """
    Name of a torchtitan ModelSpec: one added by `register_teacher_spec`, or "model:flavor" of torchtitan's own
    ("llama3:1B"). A registered spec may bring its own `path` and `tokenizer_path`. Empty: torchtitan runs a Llama,
    whose spec is made from its config.json, and `transformers` any other. "transformers": it runs a Llama, too.
    """

    tokenizer_path: str = ""
    """
    Folder with the teacher's tokenizer.json, or Llama-3's tokenizer.model. Empty: the teacher's own folder, or the GGUF
    file itself.
    """

    check_vocabulary: bool = True
    """
    Compare the teacher's vocabulary with the student's tokenizer token by token at start-up, and refuse a mismatch.
    Only turn it off for a teacher that comes without a tokenizer and is known to share the student's.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the teacher's weights and maths. "auto": the student's `training.mixed_precision_param`."""

    tensor_parallel: bool = False
    """
    Cut the teacher's weights and its work among the tensor-parallel ranks as the student's are, by the plan of its
    `spec`. Its heads must then divide by the degree. Off: each of these ranks runs the whole teacher on its share of
    the rows, or on all of them if they do not divide.
    """

    final_norm: bool = True
    """Whether the state of its last block is taken after the final norm (what `transformers` returns last)."""

    center: bool = False
    """
    Subtract from each layer's states their running mean over the steps before: a few large channels, the same for every
    token, no longer dominate the cosine. Never a mean over the sequence or the batch itself, which would tell a token
    of later ones.
    """

    center_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    """Weight of the past in that mean."""

    features: str = ""
    """
    Folder with the teacher's states of the training data, made beforehand by `let-teacher export`. The run reads them
    and loads no teacher; `path` and `spec` may then stay empty. Whatever it does not fit is refused at start-up.
    """

    trust_remote_code: bool = False
    """Let `transformers` run Python code that comes with the checkpoint. Off: such a teacher is refused."""


@dataclass(kw_only=True, slots=True)
class PairConfig:
    """One of `let.pairs`: which student block is aligned with which teacher layer."""

    student: int
    """0-based index of the student block; negative: from the end."""

    teacher: int | Literal["embedding"] = -1
    """0-based index of the teacher block whose output it is; negative: from the end. "embedding": what enters it."""

    weight: Annotated[float, Ge(0)] = 1.0
    """Factor of this pair's loss, beside lambda."""


@dataclass(kw_only=True, slots=True)
class ProjectorConfig:
    """The `[let.projector]` table: where the dimension match stands and, if it learns, how."""

    side: Literal["teacher", "student"] = "teacher"
    """Whether the teacher's states are brought to the student's width, or the student's to the teacher's."""

    lr_multiplier: Annotated[float, Ge(0)] = 1.0
    """Factor of the student's learning rate."""

    weight_decay: Annotated[float | None, Ge(0)] = None
    """Weight decay; the student's if not given."""


@dataclass(kw_only=True, slots=True)
class AdaptiveStopConfig:
    """The `[let.adaptive_stop]` table: an end of the alignment before the stop step, by what is measured."""

    criterion: Literal["none", "gradient", "validation"] = "none"
    """
    What is measured. "gradient": let/grad_cosine, on the steps that measure it. "validation": the student's held-out
    loss minus `teacher_loss`, after each validation.
    """

    threshold: Annotated[float, Interval()] = 0.0  # finite, as all numbers with bounds
    """The alignment ends when the smoothed value has stayed below it."""

    smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Weight of the past in the exponential moving average of the value."""

    patience: Annotated[int, Ge(1)] = 3
    """How many measurements in a row must be below the threshold."""

    teacher_loss: Annotated[float | None, Gt(0)] = None
    """
    The teacher's own loss on the validation data, in nats per token, for "validation". If it is not given, it is
    measured once, with the teacher's language-model head.
    """


@dataclass(kw_only=True, slots=True)
class TokenAlignmentConfig:
    """The `[let.token_alignment]` table: a teacher with another tokenizer than the student's."""

    enable: bool = False
    """
    Encode the student's text anew with the teacher's tokenizer, in the data loader (`dataloader.num_workers`), and
    align each of the student's tokens with the teacher's last one that ends at or before it. See docs/teachers.md.
    """

    teacher_seq_len: Annotated[int | None, Ge(1)] = None
    """
    Tokens of the teacher per row of `training.seq_len` of the student's. What does not fit is cut off and not aligned.
    Not given: a quarter more than the student's, rounded up to a multiple of 16, or the teacher's longest sequence.
    """


@dataclass(kw_only=True, slots=True)
class LetConfig:
    """The `[let]` table. Its presence in a TOML file turns LET on; without it the run is plain torchtitan."""

    enable: bool = False
    """Turns LET on or off. A `[let]` table in a TOML file sets it, unless the table says `enable = false`."""

    target: Literal["teacher", "labels", "logits"] = "teacher"
    """
    What the blocks are drawn to. "labels" is a control without a teacher: the cross-entropy of the block's output,
    through the student's own norm and head, takes the place of the alignment loss, with the same weight and schedule.
    "logits" is a baseline, logit distillation: the student's predictions are drawn to the teacher's.
    """

    temperature: Annotated[float, Gt(0)] = 1.0
    """Temperature of both models' predictions, for `target = "logits"`."""

    control: Literal["none", "random_teacher", "shuffled_targets"] = "none"
    """
    Takes the teacher's knowledge away and leaves all else, to see whether a gain comes from it. "random_teacher": its
    matrices are drawn anew; "shuffled_targets": each token gets the state of another token of the microbatch.
    """

    weight: Annotated[float, Ge(0)] = 0.1
    """lambda0, the weight of the alignment loss at step 0 (0.1: best of the paper's grid 0.01 ... 3)."""

    schedule: str = "linear"
    """How lambda falls from `weight` to 0 at the stop step. "linear" is the paper's. See docs/strategies.md."""

    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Options of the schedule, by name."""

    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which lambda first rises linearly to `weight`; the schedule follows, until the same stop step."""

    stop_step: Annotated[int | None, Ge(0)] = None
    """
    S_stop in optimizer steps: from this step on (0-based) lambda is 0 and the teacher is gone. At most one of the
    three `stop_*` is given.
    """

    stop_tokens: Annotated[int | None, Ge(0)] = None
    """S_stop in tokens of the whole job, rounded up to a step."""

    stop_fraction: Annotated[float | None, Interval(ge=0, le=1)] = None
    """
    S_stop as a fraction of `training.steps`, rounded down. Without any `stop_*`: 0.5. (The paper does not state its
    S_stop.)
    """

    adaptive_stop: AdaptiveStopConfig = field(default_factory=AdaptiveStopConfig)

    layer_mapping: str = "L2E"
    """
    Which student blocks meet which teacher layers. "L2E" (the paper's): the teacher's last layer and the student's
    block at one third of its depth; likewise "L2M", "L2L", "M2E", "M2M", "M2L"; "uniform": several pairs.
    """

    layer_mapping_options: dict[str, Any] = field(default_factory=dict)
    """Options of the layer mapping, by name: `early`, `middle` and `late`, the depths that the letters stand for."""

    student_block: int | None = None
    """0-based index of the student block whose output is aligned, instead of the mapping's choice."""

    pairs: Annotated[list[PairConfig], tyro.conf.Fixed] = field(default_factory=list)
    """The pairs, given one by one: an array of tables {student, teacher, weight}. Replaces `layer_mapping`."""

    dimension_match: str = "interpolate"
    """
    How the teacher's width becomes the student's. "interpolate" (the paper's): 1-D linear along the channels.
    "linear": a learned linear map that starts as the interpolation. More: docs/strategies.md.
    """

    dimension_match_options: dict[str, Any] = field(default_factory=dict)
    """
    Options of the dimension match, by name. For the interpolation `align_corners`, as in
    torch.nn.functional.interpolate. (The paper does not state it.)
    """

    projector: ProjectorConfig = field(default_factory=ProjectorConfig)

    loss: str = "cosine"
    """Alignment loss per token. "cosine": the negative cosine similarity (the paper's). More: docs/strategies.md."""

    loss_options: dict[str, Any] = field(default_factory=dict)
    """Options of the loss, by name."""

    diagnosis_freq: Annotated[int, Ge(0)] = 1
    """
    Every how many steps, of those that are logged, the gradient of the alignment is compared with that of the student's
    own loss (let/grad_cosine, let/grad_ratio). 0: never.
    """

    math_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the alignment maths: resizing, normalising, the loss and its gradient."""

    cuda_graphs: bool = False
    """
    Keep torchtitan's CUDA graph capture while LET is on. Off by default, as few of LET's options have been
    compared with and without it (tests/gpu): LET then sets `training.disable_cuda_graphs`, and says so.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    token_alignment: TokenAlignmentConfig = field(default_factory=TokenAlignmentConfig)
