"""Warnings of libraries: those that a user can do nothing about are gone, and no others."""

import logging
import warnings

from torchtitan.tools import utils

from let_plugin.runtime import console

TITAN = ("root", "base", "initial_load_model_only=True has no effect without an initial_load_path.")
ENUMS = ("torch.utils._pytree", "_pytree", "x: Calling register_constant() on Enum subclasses is deprecated")
DTENSOR = ("torch.distributed.tensor._dispatch", "DTensor random operators may not have complete support on {} device")


def test_what_is_logged():
    console.quiet()
    for logger, module, message in (TITAN, ENUMS):
        said = [(module, message), ("mine", message), (module, f"Mind: {message[:9]}")]
        records = [logging.LogRecord(logger, logging.WARNING, f"{file}.py", 1, text, None, None) for file, text in said]
        assert [bool(logging.getLogger(logger).filter(record)) for record in records] == [False, True, True]


def test_what_torchtitan_says_of_a_device(caplog):
    for device in ("CPU (x86_64, 2 cores)", "RTX 9999"):
        utils.get_peak_flops(device)
    assert caplog.messages == ["Peak flops undefined for: RTX 9999, fallback to A100"]


def test_what_python_warns_of():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        console.quiet()
        for module, device in ((DTENSOR[0], "cpu"), (DTENSOR[0], "xpu"), ("mine", "cpu")):
            warnings.warn_explicit(f"{DTENSOR[1].format(device)} mesh", UserWarning, "x.py", 1, module=module)
    assert len(said) == 2 and "xpu" in str(said[0].message)
