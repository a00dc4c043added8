"""Finds the methods: one file of this folder each, with its class under the name METHOD.

Imports only the standard library at the top, as the methods do: planning needs their fields without
torch.
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
    """Return the methods by name: of each file of this folder that sets METHOD."""
    found: dict[str, type[Method]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if "\nMETHOD = " in path.read_text():  # the folder's other files need torch: not imported
            found[path.stem] = importlib.import_module(f"lorasweep.methods.{path.stem}").METHOD
    return found


def method_class(name: str) -> type[Method]:
    """Look a method up by name; raise SpecError with the list of names."""
    classes = method_classes()
    if name not in classes:
        raise SpecError(unknown("method", str(name), classes))
    return classes[name]


def spec_from(plain: dict[str, Any]) -> RunSpec:
    """Rebuild a RunSpec from its canonical dict, whatever its method."""
    return from_plain(plain, method_classes())
