"""Problems with a solution and a gold answer, from the rows of a text data set.

Refuses to know how answers are graded.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from lorasweep.data import fields
from lorasweep.data.load import sources_of
from lorasweep.data.text import parts_of
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec

BOX = re.compile(r"\\(?:boxed|fbox)\s*")


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


def marked(solution: str) -> str | None:
    """Return what stands behind the last '####', without the commas of numbers: GSM8K's form.

    None if there is no mark.
    """
    _, mark, rest = solution.rpartition("####")
    lines = rest.strip().splitlines()
    return lines[0].strip().replace(",", "") if mark and lines else None


def boxed(solution: str) -> str | None:
    r"""Return the content of the last \boxed{...}, or the word behind \boxed: MATH's form.

    None if there is no box, or if its braces do not match.
    """
    found = list(BOX.finditer(solution))
    if not found:
        return None
    rest = solution[found[-1].end() :]
    if not rest.startswith("{"):
        word = re.match(r"[^\s$]+", rest)
        return word.group() if word else None
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", rest):  # not \{ and \}, which are signs of a set
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return rest[1 : brace.start()].strip()
    return None
