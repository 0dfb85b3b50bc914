"""torchtitan configuration functions for tests: `base = "tests.support.tiny"`."""

from let_plugin.bench.paper import config_registry as paper
from let_plugin.demo import config_registry as demo
from let_plugin.runtime.models import llama_spec
from let_plugin.teacher.titan.source import register_teacher_spec
from tests.support.data_loaders import GlobalOrderDataLoader

STUDENT = {"num_layers": 4, "num_heads": 2}
TEACHER = {"num_layers": 2, "num_heads": 2}
STUDENT_DIM, TEACHER_DIM, VOCAB_SIZE = 48, 32, 4096

register_teacher_spec(
    "tiny_teacher", lambda: llama_spec("tiny_teacher", dim=TEACHER_DIM, hidden_dim=64, vocab_size=VOCAB_SIZE, **TEACHER)
)


def tiny(vocab_size=VOCAB_SIZE):
    """A student of 4 blocks x 48 in fp32, on the demo's text; every data layout sees the same global batches."""
    config = demo.student()
    config.model_spec = llama_spec("tiny", dim=STUDENT_DIM, hidden_dim=96, vocab_size=vocab_size, **STUDENT)
    config.loss.loss_fn.global_vocab_size = vocab_size
    config.training.mixed_precision_param = "float32"
    config.training.steps = 4
    config.training.local_batch_size = 4
    config.training.seq_len = 64
    config.lr_scheduler.warmup_steps = 2
    config.metrics.log_freq = 1
    config.metrics.enable_tensorboard = False
    config.validator.enable = False
    config.activation_checkpoint = None
    config.debug.enable_structured_logging = False
    config.dataloader = GlobalOrderDataLoader.Config(dataset="let_demo_train", ignore_every=7)
    return config


def tiny_odd():
    """The tiny student with a vocabulary and widths that three ranks do not divide."""
    config = tiny(VOCAB_SIZE + 1)
    config.model_spec = llama_spec("tiny_odd", dim=44, hidden_dim=95, vocab_size=VOCAB_SIZE + 1, **STUDENT)
    return config


def tiny_padded():
    """The tiny student with a few rows more than there are tokens."""
    return tiny(VOCAB_SIZE + 6)


def tiny_paper():
    """The paper's 3B configuration around a student of 4 blocks x 64, on the demo's text and tokenizer."""
    config, demo_config = paper.llama_3b_smollm(), demo.student()
    shape = {"dim": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 128}
    config.model_spec = llama_spec("tiny_paper", **shape, vocab_size=VOCAB_SIZE, embedding_init_std=0.02)
    config.loss = demo_config.loss
    config.hf_assets_path = demo_config.hf_assets_path
    config.dataloader = demo_config.dataloader
    config.compile.enable = False
    config.validator.enable = False
    config.checkpoint.enable = False
    config.debug.enable_structured_logging = False
    return config


def tiny_float8():
    """The tiny student with torchtitan's Float8 linear layers, emulated: they run without the hardware."""
    from torchtitan.components.quantization.float8 import Float8LinearConverter

    config = tiny()
    converter = Float8LinearConverter.Config(emulate=True, filter_fqns=["lm_head"]).build()
    config.model_spec.model = converter.convert(config.model_spec.model)
    return config


def _qwen3(flavor):
    """torchtitan's own configuration, with two blocks and the demo's vocabulary."""
    from torchtitan.models.qwen3 import model_registry

    config = tiny()
    config.model_spec = model_registry(flavor)
    model = config.model_spec.model
    model.vocab_size = model.tok_embeddings.num_embeddings = model.lm_head.out_features = VOCAB_SIZE
    model.layers = model.layers[:2]
    return config


def tiny_qwen3():
    """torchtitan's qwen3 of debug size (tied embeddings)."""
    return _qwen3("debugmodel")


def tiny_mixture_of_experts():
    """torchtitan's mixture-of-experts qwen3 of debug size, with 4 of its 64 experts."""
    config = _qwen3("debugmodel_moe")
    for layer in config.model_spec.model.layers:
        moe = layer.moe
        routed = moe.routed_experts
        for part in (moe, moe.router, routed.inner_experts, routed.token_dispatcher):
            part.num_experts = 4
        moe.router.gate.out_features = 4
        moe.router.top_k = routed.token_dispatcher.top_k = 2
    return config
