"""Compare mathematical answers by math-verify; run as a program, by `rewards`.

Reads one line per pair: a JSON list of the gold answer and the answer, in LaTeX, without the box.
Writes `ready`, then one line per pair: right, wrong, or unread if one of them cannot be read. Any
pair may hang or take all memory. Then the parent ends this process; if the parent is gone, an alarm
does. This file imports nothing of lorasweep, to start quickly.
"""

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

MEMORY_BYTES = 4 << 30
"""Limit on the address space of this process: a tower of powers would take all memory."""


@lru_cache(1 << 16)
def read(answer: str) -> Any:
    """Parse the content of a box by math-verify; empty if it cannot be read."""
    return parse(f"$\\boxed{{{answer}}}$", parsing_timeout=None)


def judge(gold: str, answer: str) -> str:
    """Return right, wrong or unread. The order matters: `verify` is not symmetric."""
    try:
        wanted, found = read(gold), read(answer)
        if not wanted or not found:
            return "unread"
        same = gold == answer or verify(wanted, found, timeout_seconds=None)
    except (MemoryError, RecursionError):
        return "unread"
    return "right" if same else "wrong"


def main(limit_s: int) -> None:
    """Answer until standard input ends. A pair that takes over `limit_s` ends the process."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to stderr
    logging.disable()  # math-verify warns at every call that no time limit is set
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.alarm(limit_s)  # without a handler: the kernel ends the process
        verdict = judge(*json.loads(line))
        signal.alarm(0)
        print(verdict, file=out, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
