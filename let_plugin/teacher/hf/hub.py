"""Teachers on the Hugging Face hub: fetched at start-up, the weights last, into the hub client's cache."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torchtitan.tools.logging import logger

from let_plugin.config import TeacherConfig
from let_plugin.teacher.base import bad_path
from let_plugin.teacher.hf.files import check_names

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_TIMEOUT = 6.0  # seconds until the hub counts as unreachable


def find(config: TeacherConfig) -> str | None:
    """The commit of a hub name, at `let.teacher.revision`; None if the client is offline or the hub out of reach.

    ConfigError if the hub refuses it, or it has no safetensors.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        with collected_log("huggingface_hub"):  # what it says of its retries
            info = HfApi().model_info(config.path, revision=config.revision or None, timeout=_TIMEOUT)
    except HfHubHTTPError as error:  # it was reached, and said no
        message = f"there is no such folder, and the hub refuses it: {str(error).splitlines()[0]}"
        raise bad_path(config.path, message) from error
    except Exception as error:  # no network: of the HTTP library's many types
        reason = type(error).__name__
        logger.warning(f"LET: the hub cannot be reached ({reason}): {config.path} is looked for in the cache")
        return None
    check_names((file.rfilename for file in info.siblings or []), config.path)
    return info.sha


def fetch(config: TeacherConfig, commit: str | None, *, weights: bool) -> str:
    """The folder, in the hub client's cache, with the files of a checkpoint, fetched if they are not there.

    `commit` is what `find` returns: without one, nothing is fetched. ConfigError for what cannot be had.
    """
    patterns = [*_SMALL_FILES, *(["*.py"] if config.trust_remote_code else []), *(["*.safetensors"] if weights else [])]
    options: Any = {"revision": config.revision or None, "local_files_only": commit is None}
    try:
        folder = snapshot_download(config.path, allow_patterns=patterns, **options)
    except Exception as error:  # OSError, ValueError and the hub client's own
        message = f"it cannot be fetched from the hub: {error}"
        if commit is None:
            message = "not on this machine: there is no such folder, and it is not in the hub client's cache"
        raise bad_path(config.path, message) from error
    if weights:
        check_names(os.listdir(folder), config.path)
    return folder


@contextmanager
def collected_log(library: str) -> Iterator[list[str]]:
    """Keeps a library's messages out of the log; they are collected instead."""
    said: list[str] = []
    logger, handler = logging.getLogger(library), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield said
    finally:
        logger.handlers, logger.propagate = handlers, propagate
