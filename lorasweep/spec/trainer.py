"""Who trains a run: our loop, or a command that leaves an adapter or a model, which we measure.

The words of a command have places, such as {lr}, that are filled for each run. No shell reads them.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorasweep.errors import unknown
from lorasweep.spec.values import Value, misfits

if TYPE_CHECKING:
    from lorasweep.spec.run import RunSpec

NEEDED = ("lr", "seed", "out")
"""Places without which all runs would be the same, or leave nothing."""
USUAL = ("warmup_steps", "weight_decay", "beta1", "beta2", "eps", "clip_norm", "precision")
PLACES = (
    *(*NEEDED, "method", "rank", "alpha", "layers", "modules", "batch_size", "steps", "schedule"),
    *("model", "rows", "resume", "script", "gpus", "max_length", *USUAL),
)
AS_USUAL = (
    *(*USUAL, "schedule", "scaling_by", "init_scale", "lr_b_ratio", "random_factor", "init_seed"),
    *("scope", "objective", "early_stopping", "test_rows"),
)
"""Settings of a run that have their default values, unless the command has a place for them."""
ALL_VALUES = "{out}/run.json"
"""A file with all values: a command that names it has a place for each."""
PLACE = re.compile(r"\{([a-z]\w*)\}")


def places_in(*words: str) -> set[str]:
    """Return the names of the places in a command's words."""
    return {name for word in words for name in PLACE.findall(word)}


@dataclass(frozen=True)
class TrainerSpec(Value):
    """A trainer: our loop if `command` is empty."""

    WHERE: ClassVar[str] = "trainer."

    name: str = "builtin"
    command: tuple[str, ...] = ()
    """The program and its arguments."""
    full: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    resume: tuple[str, ...] = ()
    """More arguments for full fine-tuning, for LoRA, and if an attempt left a checkpoint."""
    files: tuple[str, ...] = ()
    """SHA-256 of the script and of the other files of the trainer; exec.trainer_files has paths."""
    rows: Literal["tokens", "pairs", "messages"] = "tokens"
    """Form of the rows. tokens: {input_ids, labels}. pairs: {prompt, completion}."""
    in_order: bool = False
    """Whether rows=tokens are in the order of our updates, and the trainer keeps it."""

    @property
    def label(self) -> str:
        """Name with a hash of the template and its files: runs of one label may share a curve."""
        return f"{self.name}-{hashlib.sha256(self.canonical.encode()).hexdigest()[:8]}"

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the template."""
        words, given = (*self.command, *self.full, *self.lora), places_in(*self.command)
        if not self.command or self.name == "builtin":
            if self != TrainerSpec():
                yield f"trainer.name={self.name}: expected another, and trainer.command=[...]."
            return
        for name in sorted(places_in(*words, *self.resume) - {*PLACES}):
            yield f"trainer.command: {unknown('place', name, PLACES)}"
        if absent := [f"{{{name}}}" for name in NEEDED if name not in given]:
            yield f"trainer.command: no {', '.join(absent)}. Expected words such as --lr={{lr}}."
        if "resume" in places_in(*words):
            yield "trainer: {resume} belongs into trainer.resume, and into no other list."
        if self.in_order and self.rows != "tokens":
            yield f"trainer.in_order=true: expected false with trainer.rows={self.rows}."
        yield from misfits(self, self.WHERE)

    def refusals(self, run: "RunSpec") -> Iterator[str]:
        """Yield why this foreign trainer cannot train a run that our loop can."""
        method, said, lora = run.method, f"trainer={self.name}", run.method.name == "lora"
        words = (*self.command, *(self.lora if lora else self.full))
        passed = {*PLACES} if any(ALL_VALUES in w for w in words) else places_in(*words)
        layers = "modules" if "modules" in passed else "layers"
        needed = ("model", "rows", "steps", "batch_size", *("rank", "alpha", layers) * lora)
        if absent := " ".join(f"--{key}={{{key}}}" for key in needed if key not in passed):
            yield f"{said}: {method.name} needs {absent}, or {ALL_VALUES} if the program reads it."
        default: dict[str, Any] = {**vars(type(run)()), **vars(type(method)())}
        values = {**vars(run), **vars(method)}
        wrong = [f"method={method.name}"] * (method.name not in ("fullft", "lora"))
        wrong += [f"model={run.model.name}, with experts,"] * bool(run.model.n_experts)
        yield from (f"{said}: {given} is not supported. Use trainer=builtin." for given in wrong)
        if run.dataset.source == "synthetic" and self.rows != "tokens":
            yield f"{said}: trainer.rows={self.rows} needs text. Expected trainer.rows=tokens."
        for key in (k for k in AS_USUAL if k in values and k not in passed):
            if values[key] != default[key]:
                place = f", or a place {{{key}}} in its command" * (key in PLACES)
                yield f"{said} is not told of {key}={values[key]}. Expected {default[key]}{place}."
