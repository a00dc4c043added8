"""Compare mathematical answers by math-verify; run as a program, by `rewards`.

Reads one line per pair: a JSON list of the gold answer and the answer, in LaTeX, without the box.
Writes `ready`, then one line per pair: right, wrong, or unread if one of them cannot be read. Any
pair may hang or take all memory: an alarm ends this process, whatever it does and whether or not
the parent is still there. This file imports nothing of lorasweep, to start quickly.
"""

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

START_S = 120
"""Time limit to import math-verify, which takes 1 to 3 s."""
MEMORY_BYTES = 4 << 30
"""Limit on the address space of this process: a tower of powers would take all memory."""


@lru_cache(1 << 16)
def read(answer: str) -> Any:
    """Parse the content of a box by math-verify; empty if it cannot be read."""
    from math_verify import parse

    return parse(f"$\\boxed{{{answer}}}$", parsing_timeout=None)


def judge(gold: str, answer: str) -> str:
    """Return right, wrong or unread. The order matters: `verify` is not symmetric."""
    from math_verify import verify

    try:
        wanted, found = read(gold), read(answer)
        if not wanted or not found:
            return "unread"
        same = gold == answer or verify(wanted, found, timeout_seconds=None)
    except (MemoryError, RecursionError):
        return "unread"
    return "right" if same else "wrong"


def main(limit_s: float) -> None:
    """Answer until standard input ends. A pair that takes over `limit_s` ends the process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])  # a parent may have blocked it
    signal.alarm(START_S)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to stderr
    logging.disable()  # math-verify warns at every call that no time limit is set
    judge("1", "1")  # imports it
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.alarm(0)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        verdict = judge(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(verdict, file=out, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
