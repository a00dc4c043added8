"""Reward completions by the verifier of a data set: right (1), wrong (0), or unreadable (None).

Mathematical answers are compared in processes that end when a check takes too long: math-verify's
time limit is a signal with a handler, which works in the main thread only and not inside C calls.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.data.examples import CHUNK, Data, Example, Rewards, answer_of, prompt_of
from lorasweep.data.synthetic.generators import GENERATORS, generator
from lorasweep.errors import DataError, check_installed
from lorasweep.spec.dataset import VERIFIERS, DatasetSpec

TURN = "User:"
"""Text that ends a completion with render=role_colon."""
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
NUMBER = re.compile(r"([-+]?\d+)(\.0*)?")
LIMIT_S = 10.0
"""Time limit of a check; the default limits of math-verify are 5 s to read and 5 s to compare."""
MOST_PROCESSES = 8
MOST_KNOWN = 1 << 18
"""Largest number of cached verdicts."""
VERDICTS = {"right": 1.0, "wrong": 0.0, "unread": None}


def of_text(spec: DatasetSpec, tokenizer: Any, end: str | None = None) -> Rewards:
    """Reward what `spec.verifier` reads as the gold answer; `end`: its last text, beside EOS."""
    ends: list[tuple[int, ...]] = [(tokenizer.eos_token_id,)]
    if stop := TURN if spec.render == "role_colon" else (end or "").strip() or end:
        ends.append(tuple(tokenizer(stop, add_special_tokens=False).input_ids))
    # a gold answer that is the whole completion of the row needs no box; a sampled answer does
    whole_completion = bool(spec.answer_field)

    def text(tokens: np.ndarray) -> str:
        ids = tokens.tolist()
        own = next((ids[: -len(e)] for e in ends if tuple(ids[-len(e) :]) == e), ids)
        return tokenizer.decode(own, skip_special_tokens=True).strip()

    def of_texts(texts: Sequence[tuple[str, str]]) -> list[float | None]:
        if spec.verifier == "integer":
            numbers = [(integer(gold), integer(answer)) for gold, answer in texts]
            return [None if found is None else float(found == gold) for gold, found in numbers]
        read = [(gold if whole_completion else boxed(gold), boxed(a)) for gold, a in texts]
        readable = {k: (g, a) for k, (g, a) in enumerate(read) if g is not None and a is not None}
        verdicts = _checks_of(os.getpid()).check(list(readable.values()))
        found = dict(zip(readable, verdicts, strict=True))
        return [found.get(k) for k in range(len(texts))]

    def of_all(pairs: Sequence[tuple[Example, np.ndarray]]) -> list[float | None]:
        return of_texts([(text(answer_of(row)), text(answer)) for row, answer in pairs])

    def of_gold(rows: Sequence[Example]) -> list[float | None]:
        own = [text(answer_of(row)) for row in rows]
        in_box = spec.verifier == "math" and whole_completion
        return of_texts([(gold, f"\\boxed{{{gold}}}" if in_box else gold) for gold in own])

    return Rewards(of_all, tuple(ends), of_gold=of_gold)


def check_available(spec: DatasetSpec) -> None:
    """Raise DataError if completions cannot be rewarded. Needs no rows."""
    if not (generator(spec.location).verified if spec.source == "synthetic" else spec.verifier):
        generated = ", ".join(name for name, g in GENERATORS.items() if g.verified)
        raise DataError(
            f"dataset {spec.name!r} has no verifier, so completions cannot be rewarded. Choose one "
            f"that has ({generated}), set verifier ({', '.join(filter(None, VERIFIERS))}) in the "
            "file of a text data set, or set objective=sft."
        )
    if spec.verifier == "math":
        check_installed("math_verify", "verifier=math")
    if spec.mask != "completion":
        where = f"dataset {spec.name!r}: mask={spec.mask} does not say where an answer starts"
        raise DataError(f"{where}. Set mask=completion.")


def check_rows(spec: DatasetSpec, data: Data, max_new_tokens: int) -> None:
    """Raise DataError if a prompt leaves no room for a completion or a gold answer is unreadable.

    If training rows are generated without limit, the first CHUNK are checked.
    """
    assert data.rewards is not None
    first = data.train(0, 0, data.n_train or CHUNK)
    reward = data.rewards.of
    of_gold = data.rewards.of_gold or (lambda own: reward([(r, answer_of(r)) for r in own]))
    for split, rows in (("held-out", data.test), ("training", first)):
        where = f"dataset {spec.name!r}, {split} row"
        lengths = [len(prompt_of(row)) + max_new_tokens for row in rows]
        if (longest := max(lengths, default=0)) > spec.max_length:
            raise DataError(
                f"{where} {lengths.index(longest)}: its prompt, the longest, has "
                f"{longest - max_new_tokens} tokens, which with max_new_tokens={max_new_tokens} is "
                f"more than max_length={spec.max_length}. Set dataset.max_length={longest}, or "
                "lower max_new_tokens."
            )
        for k, (row, found) in enumerate(zip(rows, of_gold(rows), strict=True)):
            if (answers := int((np.diff(row.loss.astype(np.int8), prepend=0) == 1).sum())) > 1:
                raise DataError(
                    f"{where} {k} has {answers} answers in the loss. A reward judges the answer to "
                    'one prompt. Set "weight": 0 on the other answers, or split the row.'
                )
            if found != 1.0:
                raise DataError(
                    f"{where} {k}: the gold answer of the row cannot be read or is not rewarded "
                    f"(verifier={spec.verifier or 'exact'}, {len(answer_of(row))} tokens). Correct "
                    "the row, raise dataset.max_length so that it is not cut, or set too_long=skip."
                )


def integer(text: str) -> Decimal | None:
    """Return the whole number behind the last '####', or in the last box, or None.

    Commas, dollar signs, spaces and a final full stop are ignored. A Decimal, because Python
    refuses to read an int of over 4,300 digits.
    """
    found = marked(text) or boxed(text) or ""
    number = NUMBER.fullmatch(re.sub(r"[,$\s]|\\\$", "", found).removesuffix("."))
    return Decimal(number[1]) if number else None


def marked(solution: str) -> str | None:
    """Return the text behind the last '####' (GSM8K's form) without commas, or None."""
    _, mark, rest = solution.rpartition("####")
    lines = rest.strip().splitlines()
    return lines[0].strip().replace(",", "") if mark and lines else None


def boxed(solution: str) -> str | None:
    r"""Return the content of the last \boxed{...} or the word behind \boxed (MATH), or None."""
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


# ---------------------------------------------------------------- processes that check answers


class MathChecks:
    """A few processes that check answers. They end with this object or the present process."""

    def __init__(self, processes: int, limit_s: float = LIMIT_S) -> None:
        """Prepare the processes; each is started when it is first needed."""
        self._threads = ThreadPoolExecutor(processes)
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for _ in range(processes):
            self._free.put(_Worker(limit_s))
        self._known: dict[tuple[str, str], float | None] = {}

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return for each (gold answer, answer) 1, 0, or None if one of them cannot be read.

        None also for a pair that takes too long. Raises DataError if no process starts.
        """

        def checked(pair: tuple[str, str]) -> float | None:
            worker = self._free.get()
            try:
                return VERDICTS.get(worker.answer(json.dumps(pair)))
            finally:
                self._free.put(worker)

        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        new = [p for p in dict.fromkeys(pairs) if p not in self._known]
        self._known.update(zip(new, self._threads.map(checked, new)))
        return [self._known[p] for p in pairs]


@cache
def _checks_of(process: int) -> MathChecks:
    """Return the processes that all data sets of this process share."""
    here = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(process)) if here else os.cpu_count() or 1
    return MathChecks(min(MOST_PROCESSES, cores))


class _Worker:
    """One process that checks answers. It is started again whenever it has ended."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None

    def answer(self, question: str) -> str:
        """Return the line that answers a question; empty after a timeout or two dead processes."""
        for _ in range(2):  # the system may have ended the process, as when out of memory
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):
                print(question, file=process.stdin, flush=True)
            if found := process.stdout.readline().strip():
                return found
            self._process = None
            self._end()
            if process.returncode == -signal.SIGALRM:
                break
        return ""

    def _start(self) -> "subprocess.Popen[str]":
        program = str(Path(__file__).with_name("math_worker.py"))
        command, pipe = [sys.executable, "-P", program, str(self._limit_s)], subprocess.PIPE
        how: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, **how, text=True)
        self._end = weakref.finalize(self, _end, process)  # at the latest at exit
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            self._end()
            raise DataError(f"no process starts that verifies answers: {' '.join(command)}")
        self._process = process
        return process


def _end(process: "subprocess.Popen[str]") -> None:
    """End a process, and close its pipes: of many that took too long, all files would stay open."""
    process.kill()
    with suppress(BrokenPipeError), process:
        pass
