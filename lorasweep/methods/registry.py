"""The methods by name. They import torch only when attached: planning needs just their fields."""

from typing import Any

from lorasweep import plugins
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.peft import PEFT
from lorasweep.spec.method import Method
from lorasweep.spec.run import RunSpec
from lorasweep.spec.values import build

METHODS: dict[str, type[Method]] = {"fullft": FullFT, "lora": LoRA, "peft": PEFT}


def method_class(name: str) -> type[Method]:
    """Look up a method by name, shipped or of a package; SpecError: unknown, twice or broken."""

    def fits(cls: type[Method]) -> bool:
        return issubclass(cls, Method) and cls().name == name

    return plugins.find("method", name, METHODS, fits)


def spec_from(plain: dict[str, Any]) -> RunSpec:
    """Rebuild a RunSpec from its canonical dict; SpecError: a key, type or method is wrong."""
    fields = plain.get("method", {})
    of_peft = "config" in fields and not plugins.offers("method").get(fields.get("name", ""))
    method = PEFT if of_peft else method_class(fields.get("name", "???"))
    return build(RunSpec, {**plain, "method": build(method, plain["method"])})
