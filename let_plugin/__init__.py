"""Late-to-Early Training for torchtitan: a small pretrained teacher guides an early block of a larger student."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from let_plugin.alignment.layer_mapping import LayerPair as LayerPair
    from let_plugin.alignment.layer_mapping import register_layer_mapping as register_layer_mapping
    from let_plugin.alignment.losses import register_loss as register_loss
    from let_plugin.alignment.projectors import register_dimension_match as register_dimension_match
    from let_plugin.alignment.schedules import register_schedule as register_schedule
    from let_plugin.config.errors import ConfigError as ConfigError
    from let_plugin.teacher.titan.source import register_teacher_spec as register_teacher_spec
    from let_plugin.trainer import with_let as with_let

# Imported when first used: `import let_plugin` stays cheap, and does not import torch before the host is set up.
_EXPORTS = {
    "ConfigError": "let_plugin.config.errors",
    "LayerPair": "let_plugin.alignment.layer_mapping",
    "register_dimension_match": "let_plugin.alignment.projectors",
    "register_layer_mapping": "let_plugin.alignment.layer_mapping",
    "register_loss": "let_plugin.alignment.losses",
    "register_schedule": "let_plugin.alignment.schedules",
    "register_teacher_spec": "let_plugin.teacher.titan.source",
    "with_let": "let_plugin.trainer",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
