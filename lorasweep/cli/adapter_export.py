"""Save a finished LoRA run as a PEFT adapter. The weights of a run are not kept (a sweep has
thousands), so the run is trained again, alone, with the threads and micro-batch that made it: the
same training to rounding, and on the same processor the same bits if it was made alone (tests).
"""

from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Exec


def export_adapter(
    plain_spec: dict[str, Any], layout: dict[str, Any], exec_: Exec, out: Path
) -> None:
    """Train the run again under `layout` (threads, micro_batch_size) and write its adapter to the
    folder `out`."""
    from lorasweep.launch.worker import TorchTrainer
    from lorasweep.methods.stacked.linear import save_peft

    spec = spec_from(plain_spec)
    if spec.method.name != "lora":
        raise SpecError(f"a {spec.method.name} run has no adapter. Choose a lora run.")
    rid, state = spec.id, None
    for event in TorchTrainer()([spec], Exec(**{**vars(exec_), **layout}), None):
        state = event.snapshot()[rid]
    params = {
        k.removeprefix("param/"): v for k, v in state["tensors"].items() if k.startswith("param/")
    }
    save_peft(
        out, params, spec.method.rank, spec.method.alpha, spec.model.location or spec.model.name
    )
