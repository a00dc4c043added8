"""Read the result out of the text of a solution."""

import re
from decimal import Decimal

BOX = re.compile(r"\\(?:boxed|fbox)\s*")
NUMBER = re.compile(r"([-+]?\d+)(\.0*)?")


def integer(text: str) -> Decimal | None:
    """Return the whole number behind the last '####' of a solution, or in its last box, or None.

    Commas, dollar signs, spaces and a final full stop are ignored. It is a Decimal, exact for any
    number of digits: Python refuses to read an int of over 4,300.
    """
    found = marked(text) or boxed(text) or ""
    number = NUMBER.fullmatch(re.sub(r"[,$\s]|\\\$", "", found).removesuffix("."))
    return Decimal(number[1]) if number else None


def marked(solution: str) -> str | None:
    """Return the text behind the last '####' (GSM8K's form) without commas; None without a mark."""
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
