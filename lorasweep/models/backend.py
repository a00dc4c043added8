"""Name the numerical backend of a loaded model, which is recorded with every result."""

from torch import nn

from lorasweep.models.cpu_llama.model import cpu_llama_for


def backend(model: nn.Module, processes: int = 1) -> str:
    """Name the implementation and the device: 'cpu_llama on cpu', 'transformers on cuda'.

    Of several processes also how many: 'transformers on cuda, 8 processes'.
    """
    passes = "transformers" if cpu_llama_for(model) is None else "cpu_llama"
    more = f", {processes} processes" if processes > 1 else ""
    return f"{passes} on {next(model.parameters()).device.type}{more}"
