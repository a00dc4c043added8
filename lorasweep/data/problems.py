"""Problems with a solution and a gold answer, from the rows of a text data set.

Refuses to know how answers are graded.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from lorasweep.data import fields
from lorasweep.data.load import sources_of
from lorasweep.data.text import parts_of
from lorasweep.data.verifiers.reading import boxed, marked
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec


class Problem(NamedTuple):
    """One row."""

    prompt: str
    """The text before the answer, as supervised fine-tuning sees it."""
    solution: str
    answer: str
    """The gold answer as it is written in the row."""


def problems(
    spec: DatasetSpec, data_dirs: Sequence[str], held_out: bool, tokenizer: Any
) -> Iterator[Problem]:
    """Yield the problems of the training split, or the held-out ones, in the order of the rows.

    Raises:
        DataError: the data set has no prompts and completions, or a row has no gold answer.
    """
    if spec.format != "prompt_completion":
        raise DataError(
            f"dataset {spec.name!r}: format={spec.format} has no gold answers. Allowed: "
            "prompt_completion."
        )
    for where, row in sources_of(spec, data_dirs)[held_out].rows():
        parts = takewhile(lambda p: not p.in_loss, parts_of(spec, row, where, tokenizer))
        solution = fields.text_of(row, spec.completion_field, where)
        yield Problem("".join(p.text for p in parts), solution, _gold(spec, row, solution, where))


def _gold(spec: DatasetSpec, row: Any, solution: str, where: str) -> str:
    if spec.answer_field:
        return fields.text_of(row, spec.answer_field, where).strip()
    answer = marked(solution) or boxed(solution)
    if not answer:
        raise DataError(
            f"{where}: no gold answer in {spec.completion_field!r} (neither '####' nor a box). Set "
            "answer_field to the column that has it, or correct the row."
        )
    return answer
