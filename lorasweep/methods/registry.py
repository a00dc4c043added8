"""The methods by name. They import torch only when attached: planning needs just their fields."""

from typing import Any

from lorasweep import plugins
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import Method
from lorasweep.spec.run import RunSpec
from lorasweep.spec.values import build

METHODS: dict[str, type[Method]] = {"fullft": FullFT, "lora": LoRA}


def method_class(name: str) -> type[Method]:
    """Look up a method by name, shipped or of a package; SpecError: unknown, twice or broken."""

    def fits(cls: type[Method]) -> bool:
        return issubclass(cls, Method) and cls().name == name

    return plugins.find("method", name, METHODS, fits)


def spec_from(plain: dict[str, Any]) -> RunSpec:
    """Rebuild a RunSpec from its canonical dict; SpecError: a key, type or method is wrong."""
    method = method_class(plain.get("method", {}).get("name", "???"))
    return build(RunSpec, {**plain, "method": build(method, plain["method"])})
