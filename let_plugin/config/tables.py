"""The `[let]` and `[runtime]` tables. The text below each field is what docs/configuration.md says about it."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Gt, Interval


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """The `[runtime]` table: where the run executes, and what it says."""

    device: Literal["auto", "cpu"] = "auto"
    """"auto": the accelerator that torch reports, else the CPU. "cpu": the CPU (gloo) in any case."""

    log: Literal["plain", "titan"] = "plain"
    """What the console says. "plain": a line for each logged step, for people. "titan": torchtitan's own
    output. `--log` is short for `--runtime.log`."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The `[let.teacher]` table: the small, frozen, pretrained model."""

    path: str = ""
    """A folder in Hugging Face format, a hub name ("org/name"), a .gguf file, or, with `spec`, a folder with a
    torchtitan checkpoint (DCP) or safetensors. Relative paths start at the working directory."""

    revision: str = ""
    """Branch, tag or commit of a teacher on the hub. Empty: the newest of its main branch."""

    spec: str = ""
    """A torchtitan ModelSpec: "model:flavor" ("llama3:1B"), or a name given to `register_teacher_spec`. Empty:
    torchtitan runs a Llama, by its config.json, and `transformers` any other. "transformers": it runs a Llama, too."""

    tokenizer_path: str = ""
    """Folder with the teacher's tokenizer.json, or Llama-3's tokenizer.model. Empty: the folder or file of `path`."""

    check_vocabulary: bool = True
    """Compare the vocabularies of both models at start-up. Turn it off only for a teacher without a tokenizer."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the teacher's weights and maths. "auto": the student's `training.mixed_precision_param`."""

    tensor_parallel: bool = False
    """Cut the teacher among the tensor-parallel ranks, by torchtitan's plan for it. Off: each runs all of it."""

    rows: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of each microbatch's rows that it runs on, rounded up to a row; other rows in each step. The rest has no
    target, and does not count in the alignment loss."""

    final_norm: bool = True
    """Whether the state of its last block is taken after the final norm (what `transformers` returns last)."""

    center: bool = False
    """Subtract each layer's running mean over the steps before, so that a few large channels do not dominate."""

    center_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    """Weight of the past in that mean."""

    features: str = ""
    """Folder with states made by `let-teacher export`. The run reads them, and of the teacher a head or start alone."""

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
    """"gradient": let/grad_cosine. "validation": the student's held-out loss minus `teacher_loss`."""

    threshold: Annotated[float, Interval()] = 0.0  # finite, as all numbers with bounds
    """The alignment ends when the smoothed value has stayed below it."""

    smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Weight of the past in the exponential moving average of the value."""

    patience: Annotated[int, Ge(1)] = 3
    """How many measurements in a row must be below the threshold."""

    teacher_loss: Annotated[float | None, Gt(0)] = None
    """The teacher's loss on the validation data, in nats per token. Not given: measured once, with its own head."""


@dataclass(kw_only=True, slots=True)
class TokenAlignmentConfig:
    """The `[let.token_alignment]` table: a teacher with another tokenizer than the student's."""

    enable: bool = False
    """Encode the text with the teacher's tokenizer too, and align tokens by where they end. See docs/teachers.md."""

    teacher_seq_len: Annotated[int | None, Ge(1)] = None
    """Tokens of the teacher per row; the rest of a row is not aligned. Not given: a quarter more than the student's
    `training.seq_len`, up to the teacher's longest sequence."""


@dataclass(kw_only=True, slots=True)
class InitConfig:
    """The `[let.init]` table: a run from scratch starts in the teacher's basis. See docs/strategies.md."""

    parts: Literal["none", "embeddings", "head", "both"] = "none"
    """What is set from the teacher's, through the dimension match: the token embeddings, the language-model head."""

    embedding_scale: Annotated[float | None, Gt(0)] = None
    """Factor of the embeddings. Not given: that with which they are as large as the student's own first ones."""

    head_scale: Annotated[float | None, Gt(0)] = None
    """Factor of the head. Not given: that with which the student's logits are as large as the teacher's."""

    upper_blocks: Literal["keep", "zero"] = "keep"
    """"zero": the output projections of the blocks above the aligned one start at 0, so that these pass states on."""


# At most one of them is given.
STOPS = ("stop_step", "stop_tokens", "stop_fraction")


@dataclass(kw_only=True, slots=True)
class TermConfig:
    """A term of the loss: what of the teacher guides the student, how strongly, and until when."""

    signal: Literal["states", "logits", "labels"] = "states"
    """"states" (the paper's): blocks are drawn to the teacher's states. "logits": logit distillation at the student's
    head. "labels": the cross-entropy of each block's output through the student's own head; it needs no teacher."""

    name: str = ""
    """Names the term in metrics, as in let.NAME/lambda. Empty: its signal, with a number if others have the same."""

    weight: Annotated[float, Ge(0)] = 0.1
    """lambda0, the weight of the term at step 0 (0.1: best of the paper's grid 0.01 ... 3)."""

    weight_by: Literal["loss", "gradient"] = "loss"
    """What `weight` is a weight of. "loss": the term's loss. "gradient": lambda is `weight` times the mean ratio of two
    gradients' norms, the student's own and the term's: 0.3 pulls 0.3 times as hard as the student's own loss."""

    weight_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Weight of the past steps in that mean."""

    schedule: str = "linear"
    """How lambda falls from `weight` to 0 at the stop step. "linear" is the paper's. See docs/strategies.md."""

    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Options of the schedule, by name."""

    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which lambda first rises linearly to `weight`. The stop step stays."""

    stop_step: Annotated[int | None, Ge(0)] = None
    """S_stop: from this step on (0-based) the term is gone. At most one `stop_*` may be given."""

    stop_tokens: Annotated[int | None, Ge(0)] = None
    """S_stop in tokens of the whole job, rounded up to a step."""

    stop_fraction: Annotated[float | None, Interval(ge=0, le=1)] = None
    """S_stop as a fraction of `training.steps`, rounded down. 0.5 if no `stop_*` is given: the paper states none."""

    adaptive_stop: AdaptiveStopConfig = field(default_factory=AdaptiveStopConfig)

    layer_mapping: str = "L2E"
    """Which student blocks meet which teacher layers. "L2E" (the paper's): the teacher's last layer and the student's
    block at one third of its depth. See docs/strategies.md."""

    layer_mapping_options: dict[str, Any] = field(default_factory=dict)
    """Options of the layer mapping, by name: of the letters' the depths `early`, `middle` and `late`."""

    student_block: int | None = None
    """0-based index of the student block whose output is aligned, instead of the mapping's choice."""

    pairs: Annotated[list[PairConfig], tyro.conf.Fixed] = field(default_factory=list)
    """The pairs, given one by one: an array of tables {student, teacher, weight}. Replaces `layer_mapping`."""

    dimension_match: str = "interpolate"
    """How one width becomes the other. "interpolate" (the paper's): 1-D linear. See docs/strategies.md."""

    dimension_match_options: dict[str, Any] = field(default_factory=dict)
    """Options of the dimension match, by name. For the interpolation `align_corners`, as in torch."""

    projector: ProjectorConfig = field(default_factory=ProjectorConfig)

    loss: str = "cosine"
    """Alignment loss per token. "cosine" (the paper's): the negative cosine similarity. See docs/strategies.md."""

    loss_options: dict[str, Any] = field(default_factory=dict)
    """Options of the loss, by name."""

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    """For "logits": how the student's predictions q differ from the teacher's p. KL(p || q), KL(q || p), or the mean of
    both's divergences from (p + q) / 2."""

    temperature: Annotated[float, Gt(0)] = 1.0
    """For "logits": the temperature of both models' predictions."""

    top_k: Annotated[int | None, Ge(1)] = None
    """For "logits": how many of the teacher's likeliest tokens are told apart, with ties; the rest are one class."""

    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """For "logits": the student's own loss counts 1 - alpha where the schedule is 1, and 1 from the stop step on."""


@dataclass(kw_only=True, slots=True)
class LetConfig(TermConfig):
    """The `[let]` table. Its presence in a TOML file turns LET on; without it the run is plain torchtitan."""

    enable: bool = False
    """Turns LET on or off. A `[let]` table in a TOML file sets it, unless the table says `enable = false`."""

    terms: Annotated[list[TermConfig], tyro.conf.Fixed] = field(default_factory=list)
    """Several terms, in place of the one that `[let]` itself is: an array of tables. See docs/strategies.md."""

    control: Literal["none", "random_teacher", "shuffled_targets"] = "none"
    """Takes the teacher's knowledge away, and leaves all else: with random matrices, or other tokens' states."""

    diagnosis_freq: Annotated[int, Ge(0)] = 1
    """let/grad_cosine and let/grad_ratio are measured in logged steps that are multiples of this. 0: never."""

    math_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the maths of the states: resizing, normalizing, the loss and its gradient."""

    cuda_graphs: bool = False
    """Keep torchtitan's CUDA graphs from the first step on. Off: they wait until the alignment has ended."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    token_alignment: TokenAlignmentConfig = field(default_factory=TokenAlignmentConfig)

    init: InitConfig = field(default_factory=InitConfig)
