"""Find the methods: each is a file in this folder that sets METHOD to its class.

Neither this file nor the methods import torch at the top, because planning needs their fields
without torch.
"""

import importlib
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError, unknown
from lorasweep.spec.method import Method
from lorasweep.spec.run import RunSpec, from_plain


@cache
def method_classes() -> dict[str, type[Method]]:
    """Return the method classes by name."""
    found: dict[str, type[Method]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if "\nMETHOD = " in path.read_text():  # other files here are not imported: some need torch
            found[path.stem] = importlib.import_module(f"lorasweep.methods.{path.stem}").METHOD
    return found


def method_class(name: str) -> type[Method]:
    """Look up a method by name.

    Raises:
        SpecError: there is no such method; the message lists all.
    """
    classes = method_classes()
    if name not in classes:
        raise SpecError(unknown("method", str(name), classes))
    return classes[name]


def spec_from(plain: dict[str, Any]) -> RunSpec:
    """Rebuild a RunSpec of any method from its canonical dict."""
    return from_plain(plain, method_classes())
