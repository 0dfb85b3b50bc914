"""What is left of an alignment after its end: weak references to all that it has brought along, storage included."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from let_plugin.alignment.tap import Tap
from let_plugin.guidance.guidance import Guidance
from let_plugin.guidance.heads import AuxiliaryHead
from let_plugin.guidance.projectors import LearnedProjector
from let_plugin.teacher.base import Teacher

# What the alignment makes, wherever it is kept.
OURS = [f"let_plugin.alignment.{name}" for name in ("projectors", "running_mean", "tap", "pair")]
OURS += [f"let_plugin.guidance.{name}" for name in ("distillation", "guidance", "heads", "projectors", "signals")]
OURS += ["let_plugin.teacher.sharding", "let_plugin.teacher.retokenized"]


class Leftovers:
    """Watches a trainer.

    Attributes:
        watched: Names of what there was in the last step of the alignment.
        alive: Those of it that are still there when the trainer has ended the alignment, with no further garbage
            collection; None if it has not ended.
    """

    def __init__(self, trainer: Any) -> None:
        self.watched: list[str] = []
        self.alive: list[str] | None = None
        self._references: dict[str, Any] = {}
        gc.collect()
        self._before = set(map(id, _instances()))
        train_step, end_alignment = trainer.train_step, trainer._end_alignment

        def watch(data_iterator: Any) -> None:
            train_step(data_iterator)
            if trainer.guidance is not None:
                self._references = {name: _references(part) for name, part in _parts(trainer.guidance)}
                self.watched = list(self._references)

        def end(terms: Any) -> None:
            end_alignment(terms)
            if trainer.guidance is not None:
                return
            self.alive = [name for name, is_alive in self._references.items() if is_alive()]
            self.alive += [repr(type(o)) for o in _instances() if id(o) not in self._before]

        trainer.train_step, trainer._end_alignment = watch, end


def _parts(guidance: Guidance) -> Iterator[tuple[str, Any]]:
    yield "guidance", guidance
    if guidance.teacher is not None:
        yield from _parts_of_teacher(guidance.teacher)
    for signal in guidance.signals:
        yield f"signal {signal.term.name}", signal
        for i, tap in enumerate(signal.taps):
            yield from _named(f"tap {i} {signal.term.name}".strip(), tap)
    learners = [learner for signal in guidance.signals for learner in signal.learners]
    for projector in (learner for learner in learners if not isinstance(learner, AuxiliaryHead)):
        yield from _named(projector.name, projector)
        if isinstance(projector, LearnedProjector):
            yield from _parts_of_module(projector.name, projector._module)
            yield from _named(f"{projector.name} weights", projector.weights)
            yield f"{projector.name} schedule", projector._schedulers
            for optimizer in projector._optimizers:
                yield f"{projector.name} optimizer", optimizer
                for i, state in enumerate(optimizer.state.values()):
                    yield from _named(f"{projector.name} optimizer state {i}", state)
    if guidance._center is not None:
        yield from _named("center", guidance._center)


def _parts_of_teacher(teacher: Teacher) -> Iterator[tuple[str, Any]]:
    yield "teacher states", teacher._states
    yield from _parts_of_module("teacher", teacher)
    for name, module in teacher.named_modules():
        if hasattr(module, "_get_fsdp_state"):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                gathered = [tensor for parameter in group.fsdp_params for tensor in parameter.all_gather_outputs]
                yield from ((f"teacher FSDP {name} gathered {i}", tensor) for i, tensor in enumerate(gathered))


def _parts_of_module(name: str, module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for kind in ("modules", "parameters", "buffers"):
        for own, part in getattr(module, f"named_{kind}")():
            yield f"{name} {kind[:-1]} {own}", part


def _named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An object and the tensors in its attributes, or those in a dict; but for parameters, which are the student's."""
    if not isinstance(value, dict):
        yield name, value
        value = vars(value)
    for attribute, tensor in value.items():
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, torch.nn.Parameter):
            yield f"{name} {attribute}", tensor


def _references(part: Any) -> Any:
    """() -> whether the object is there, or, of a tensor, its memory."""
    reference = weakref.ref(part)
    if not isinstance(part, torch.Tensor):
        return lambda: reference() is not None
    storage = StorageWeakRef((part._local_tensor if isinstance(part, DTensor) else part).untyped_storage())
    return lambda: reference() is not None or not storage.expired()


def _instances() -> list[Any]:
    """All objects of classes that only an alignment makes; those that nothing refers to any more count as well."""
    return [o for o in gc.get_objects() if type(o).__module__ in OURS or issubclass(type(o), Teacher | Tap)]
