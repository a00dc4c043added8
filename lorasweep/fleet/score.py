"""Count the test prompts that are greedily answered as in a row, before and after training."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.data import rewards
from lorasweep.data.examples import Example, answer_of, prompt_of
from lorasweep.errors import DataError
from lorasweep.fleet.rows import shown
from lorasweep.fleet.serving import Server
from lorasweep.launch.torch_trainer import TorchTrainer
from lorasweep.plan import detect
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint, files
from lorasweep.sweep.request import Request

MOST, SHORT, LARGE, MORE = 200, 32, 500_000_000, 4
"""Prompts of a run that are asked; with score=auto, tokens of the longest right answer, and without
a GPU parameters of the base (more is slow); tokens beyond that answer, for another split of it."""
KEPT = "exact.json"  # in a run's folder


class Questions:
    """The distinct prompts of a run's test rows, in order of length, and their right answers."""

    def __init__(self, run: RunSpec, request: Request, trainer: TorchTrainer) -> None:
        """Read the rows, and load the base. DataError: the rows cannot be asked."""
        spec, found = run.dataset, dict[bytes, list[Example]]()
        if spec.source == "synthetic" or spec.mask == "all":
            raise DataError("the test rows are no texts of a prompt and an answer")
        if spec.verifier:
            rewards.check_available(spec)
        base = self.base = trainer.base(run, request.exec)
        data, form = trainer.data(run, request.exec, base), shown(spec, [], base.tokenizer)
        read = rewards.of_text(spec, base.tokenizer, form["end"])
        self.ends, self.stop = read.ends, form["stop"]
        self._of = read.of if spec.verifier else lambda pairs: []
        self._texts = [base.tokenizer.decode(end) for end in self.ends]
        for row in data.test:
            last = np.flatnonzero(np.diff(row.loss, prepend=False) & row.loss)[-1]
            row = Example(row.tokens, row.loss & (np.arange(len(row.loss)) >= last))
            if not row.loss[-1] or self._read(answer_of(row), True)[1]:  # else cut
                found.setdefault(prompt_of(row).tobytes(), []).append(row)
        if not found:
            raise DataError("max_length cuts the answers of all test rows")
        lengths = (len(answer_of(row)) - 1 for own in found.values() for row in own)
        self.longest = max(run.max_new_tokens, *lengths, 0)
        self.most, self.of = self.longest * (1 + bool(spec.verifier)) + MORE, len(found)
        self._rows = sorted([*found.values()][:MOST], key=lambda own: len(prompt_of(own[0])))
        self.prompts = [prompt_of(own[0]) for own in self._rows]

    def _read(self, tokens: np.ndarray, last: bool = False) -> tuple[str, bool]:
        """Return the text before its first or last end, and whether it has one."""
        said = self.base.tokenizer.decode(tokens)  # with special tokens, which may be the answer
        at = [said.rfind(text) if last else said.find(text) for text in self._texts]
        return said[: min((k for k in at if k >= 0), default=None)].strip(), max(at, default=0) >= 0

    def right(self, answers: list[np.ndarray], ended: list[bool]) -> list[bool]:
        """Return whether the answer to each prompt is a row's, or the verifier accepts it."""
        found = []
        for own, tokens, over in zip(self._rows, answers, ended):
            (said, ends), pairs = self._read(tokens), [(row, tokens) for row in own]
            same = said in [self._read(answer_of(row), True)[0] for row in own]
            found.append((over or ends) and (same or 1.0 in self._of(pairs)))
        return found


def count(run: RunSpec, request: Request, trainer: TorchTrainer) -> dict[str, Any]:
    """Count right answers of the base and of a run's weights, once; or say in `text` why not."""
    from lorasweep.train.loop import attached, frozen_in_bf16
    from lorasweep.train.sampling import sample

    folder, auto, right = Path(request.exec.runs_dir, run.id), request.score == "auto", []
    try:
        found = files.read_json(folder / KEPT)
        if request.score == "never" or (isinstance(found, dict) and "text" in found):
            return {} if request.score == "never" else found
        if (weights := checkpoint.load_weights(folder)) is None:
            raise DataError(f"the weights of run {run.id} were not kept")
        if auto and run.model.n_params > LARGE and not detect.gpus():
            raise DataError("the base is large, and there is no GPU. score=always counts")
        asked = Questions(run, request, trainer)
        if auto and asked.longest > SHORT:
            raise DataError(f"answers have up to {asked.longest} tokens. score=always counts")
        model, greedy = asked.base.model, np.full((1, len(asked.prompts), asked.most), np.nan)
        for trained in (nullcontext(), attached([run], asked.base, [weights])):
            with trained, frozen_in_bf16(model, run.precision):
                given = model, [asked.prompts], greedy, asked.ends, run.precision
                (said,) = sample(*given, forward_parts=16)  # at most 12 at once
            right.append(asked.right(said.tokens, said.ended.tolist()))
        found = counts(right[0], right[1], asked.of)
        files.write_atomic(folder / KEPT, json.dumps(found).encode())
    except Exception as error:  # of any kind, as the adapter is written nevertheless
        why = " ".join(word.rpartition("/")[2] for word in str(error).split())  # names no folder
        return {"text": f"not counted: {why}"}
    return found


def served(run: RunSpec, request: Request, trainer: TorchTrainer, server: Server, name: str) -> str:
    """Return how many answers of a server are right, beside those of `count`; '': none are kept."""
    if not (kept := files.read_json(Path(request.exec.runs_dir, run.id, KEPT))):
        return ""
    try:
        asked = Questions(run, request, trainer)
        prompts = [{"prompt": p.tolist(), "skip_special_tokens": False} for p in asked.prompts]
        found = server.complete(name, prompts, max_tokens=asked.most, **asked.stop)
        said = [answer["choices"][0] for answer in found]
        texts = asked.base.tokenizer([c["text"] for c in said], add_special_tokens=False).input_ids
        right = asked.right([*map(np.array, texts)], [c["finish_reason"] == "stop" for c in said])
        return f"{sum(right)} of {kept['prompts']} (here {kept['after']})"
    except Exception as error:  # the number is only shown
        return f"not counted: {error}"


def counts(before: list[bool], after: list[bool], of: int) -> dict[str, Any]:
    """Return the counts, with 95% intervals of the share after and of the difference in points.

    The share: Clopper and Pearson (1934). The difference: by the answers that changed, compatible
    with McNemar's exact test (Fay and Lumbard 2021, doi 10.1002/sim.8829; exact2x2 in R).
    """
    from scipy.special import betaincinv

    n, k, was, tiny = len(after), sum(after), sum(before), 1e-9
    gained, p = sum(y > x for x, y in zip(before, after)), (np.arange(512) + 0.5) / 512
    m = 2 * gained - (k - was)  # answers that changed

    def lower(x: int) -> float:
        net = 2 * betaincinv(x or tiny, m - x + 1, p) - 1
        shares = (betaincinv(m + i or tiny, n - m + 1 - i or tiny, p) for i in (0, 1))
        return min(float(np.quantile(np.outer(share, net), 0.025)) for share in shares)

    low = float(betaincinv(k or tiny, n - k + 1, 0.025))
    high = float(betaincinv(k + 1, n - k or tiny, 0.975))
    points = [100 * d for d in ((k - was) / n, lower(gained), -lower(m - gained))]
    text = f"{was} of {n} before, {k} of {n} after [{low:.0%}, {high:.0%}]; difference "
    text += "{:.0f} points [{:.0f}, {:.0f}]".format(*points)
    text += f" (the first {n} of {of:,} test prompts)" * (of > n)
    found = {"prompts": n, "of": of, "before": was, "after": k, "text": text}
    return {**found, "share": [low, high], "difference": points}
