"""What gives a run its states."""

import torch

from let_plugin.config import TeacherConfig
from let_plugin.teacher.base import OnlineStates, TeacherSource
from let_plugin.teacher.open import make_provider, open_source
from let_plugin.teacher.stored.features import Features, StoredStates
from tests.support import exports


def test_stored_states_take_the_teachers_place_where_they_are_named(config, parallel_dims, tmp_path):
    def provider():
        source = open_source(config.let.teacher)
        made = make_provider(
            source,
            config=config,
            student_tokenizer=None,
            device=torch.device("cpu"),
            parallel_dims=parallel_dims,
            layers=[1],
        )
        return source, made

    source, made = provider()
    assert isinstance(source, TeacherSource) and isinstance(made, OnlineStates)
    exports.run(config, "--out", tmp_path / "features")
    config.let.teacher.features = str(tmp_path / "features")  # the teacher is named, too
    stored, made = provider()
    assert isinstance(stored, Features) and isinstance(made, StoredStates) and made.teacher is None
    assert stored.info == source.info
    config.let.teacher = TeacherConfig(features=config.let.teacher.features)
    assert isinstance(provider()[1], StoredStates)
