"""Supervised fine-tuning: the NLL in nats per loss token, averaged over a member's batch.

Sums and counts are kept separately and divided once, so micro-batches change only rounding.

Shapes: N members.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorasweep.data.batches import Batch, by_length, collate, eval_batches, merge
from lorasweep.data.examples import Data, Example, prompts_of
from lorasweep.models.cpu_llama.model import cpu_llama_for
from lorasweep.models.head import check_rows_stay_apart
from lorasweep.models.sharding import Mesh
from lorasweep.spec.metric import METRICS
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import EVALUATION, Record, phase
from lorasweep.train.objectives.base import DATA_SHA256, Evaluation, refuse_other_data
from lorasweep.train.objectives.held_out import (
    evaluate,
    evaluate_exact,
    floors,
    gain_se,
    more_than_a_row,
    row_nlls,
)
from lorasweep.train.objectives.nll import nll_sums

if TYPE_CHECKING:
    from torch import nn

    from lorasweep.models.load import Base

DIVERGED_NLL_FACTOR, DIVERGED_PATIENCE = 1.5, 8
"""See Divergence. Assumptions, not tuned."""
ROWS = "rows"
"""Key of the summed NLL of each row among measures, which is not recorded."""
EVAL_TOKENS, GPU_EVAL_TOKENS = 1024, 8192
"""Padded tokens per evaluation forward: per member on a CPU, of all members on a GPU. On a CPU it
does not depend on the pack size, so that held-out losses are summed over the same rows in every
pack."""


@dataclass
class Divergence:
    """Judge from a run's train NLLs, update by update, whether it has diverged.

    It has if its NLL is above DIVERGED_NLL_FACTOR times the base's for DIVERGED_PATIENCE updates in
    a row. Relative, because an absolute bound would mean something else for every model.

    The base's NLL is the larger of two that no update has changed yet: of the first update's rows,
    whose loss is taken before the weights change, and of the held-out rows. The first makes rows
    that are harder than the held-out ones no divergence. Later losses cannot be the reference: a
    learning rate that is far too high shows in the second one, and a mean over a few would hide it.
    The held-out rows stand in where the first batch is small and happens to be easy. What an excess
    of caution costs is time; a false call costs the run.
    """

    held_out: float
    """NLL of the held-out rows before training."""
    first: float | None = None
    """NLL of the first update; None before it."""
    above: int = 0
    """Updates in a row above the bound."""

    def note(self, nll: float) -> bool:
        """Take up an update's train NLL; return whether the run has diverged."""
        if self.first is None:
            self.first = nll
        bound = DIVERGED_NLL_FACTOR * max(self.held_out, self.first)
        self.above = self.above + 1 if nll > bound else 0
        return self.above >= DIVERGED_PATIENCE


class SupervisedFineTuning:
    """Supervised fine-tuning on examples with a loss mask; each run has a data set."""

    metric = METRICS["sft"]

    def __init__(
        self,
        data: Mapping[str, Data],
        precision: str,
        micro_batch_size: int | None = None,
        join_rows: bool = False,
        forward_parts: int = 1,
    ) -> None:
        """Set up the objective.

        `data`: run id -> the run's data set; runs may share one. `micro_batch_size`: sequences per
        member and forward pass; None: all of an update. `join_rows`, `forward_parts`: see
        Exec.
        """
        self._data, self._precision, self._micro_batch_size = data, precision, micro_batch_size
        self._join_rows = join_rows
        self._start: dict[str, Record] = {}
        self._start_rows: dict[str, np.ndarray | None] = {}
        self._retain_start: dict[str, float] = {}
        self._divergence: dict[str, Divergence] = {}
        self._unknown_start: set[str] = set()
        self._code_nats = dict.fromkeys(data, 0.0)
        self._n_loss: dict[str, int] = {}
        self._forward_parts = forward_parts
        self._eval_tokens = max(1, EVAL_TOKENS // forward_parts)
        self._mesh = Mesh()
        self._held_out: dict[tuple[int, ...], list[Batch]] = {}

    def start(self, base: "Base", members: Sequence[RunSpec]) -> list[Record]:
        """Measure the base's NLL on each data set, and on its pretraining rows, once."""
        self._mesh = base.mesh
        if self._join_rows and cpu_llama_for(base.model) is None:
            check_rows_stay_apart(base.model)
        if next(base.model.parameters()).device.type != "cpu":
            self._eval_tokens = max(1, GPU_EVAL_TOKENS // len(members) // self._forward_parts)
        for member in members:
            data = self._data[member.id]
            key = f"{member.dataset.canonical}/{member.draw}/{self._precision}"
            for name, examples in ((key, data.test), (f"{key}/retain", data.retain)):
                if examples and name not in base.at_start:
                    by_row = name == key and bool(data.validation)
                    base.at_start[name] = self._measure(base.model, [examples], [by_row])[0]
            found = dict(base.at_start[key])
            self._start_rows[member.id] = found.pop(ROWS, None)
            self._start[member.id] = found
            self._divergence[member.id] = Divergence(found[self.metric.name])
            if data.retain:
                self._retain_start[member.id] = base.at_start[f"{key}/retain"][self.metric.name]
        return [self._start[m.id] for m in members]

    def batches(self, model: "nn.Module", step: int, members: Sequence[RunSpec]) -> list[Batch]:
        """Return the micro-batches of update `step`, with rows of similar length together.

        Of several processes, too: neighbours are one for each, of the same number of rows.
        """
        rows = [self._rows(m, step) for m in members]
        for member, own in zip(members, rows):
            self._n_loss[member.id] = sum(b.n_loss for b in own)
        return [merge(parts) for parts in zip(*rows)]

    def _rows(self, member: RunSpec, step: int) -> list[Batch]:
        size = member.batch_size
        processes = self._mesh.size
        rows = processes * min(self._micro_batch_size or size, size // processes)
        examples = self._data[member.id].train(member.seed, step * size, size)
        examples = sorted(examples, key=lambda e: len(e.tokens))
        parts = [examples[k : k + rows] for k in range(0, size, rows)]
        shares = [(part, len(part) // processes) for part in parts]
        batches = [part[k : k + n] for part, n in shares for k in range(0, len(part), n)]
        return [collate(batch, self._join_rows) for batch in batches]

    def weights(self, batch: Batch) -> torch.Tensor:
        """Count each member's loss tokens, [N]."""
        return torch.from_numpy(batch.weight_NM.sum(1))

    def loss(self, model: "nn.Module", batch: Batch) -> torch.Tensor:
        """Return the summed NLL in nats of each member, [N]."""
        return nll_sums(model, batch, self._precision)

    def metrics(self, losses: Sequence[float]) -> list[Record]:
        """Record the mean loss in nats per token."""
        return [{"train_nll": nll} for nll in losses]

    def diverged(self, run: str, loss: float) -> bool:
        """Add to the code length, and judge the loss: see Divergence."""
        self._code_nats[run] += loss * self._n_loss[run]
        return self._divergence[run].note(loss)

    def evaluate(
        self, model: "nn.Module", members: Sequence[RunSpec], final: bool
    ) -> list[Evaluation]:
        """Return each member's held-out NLL, and what belongs to it.

        For text its bits per byte; with exact_loss its parts; `code_nats`, the summed train NLL of
        all updates so far, each measured before the update: the length of a prequential code of the
        training data (Dawid 1984). At the end of training also `test_nll_curve`, the NLL on the
        rows of the earlier evaluations, so that a learning curve can be read to its end. Where
        there are validation rows, these are the rows of the earlier evaluations; the others choose
        nothing, and at the end the standard error of the gain on them is recorded (`gain_se`).
        """
        tests = [self._data[m.id].test for m in members]
        validations = [self._data[m.id].validation for m in members]
        firsts = [
            v or t[: m.dataset.n_test_curve or None] for m, v, t in zip(members, validations, tests)
        ]
        rows = tests if final else firsts
        found = self._measure(model, rows, [final and bool(v) for v in validations])
        at_first = found
        if final and (any(validations) or any(len(f) < len(t) for f, t in zip(firsts, tests))):
            at_first = self._measure(model, firsts, [False] * len(firsts))
        for member, test, measures, first in zip(members, tests, found, at_first):
            bytes_per_token = _bytes_per_token(test)
            if bytes_per_token is not None:
                measures["test_bpb"] = measures[self.metric.name] / math.log(2) / bytes_per_token
            if final:
                measures[self.metric.on_part] = first[self.metric.name]
            after, before = measures.pop(ROWS, None), self._start_rows[member.id]
            if after is not None and before is not None:
                prompts = _prompts(member, test)
                measures["gain_se"] = gain_se(before, after, _loss_tokens(test), prompts)
            measures["code_nats"] = self._code_nats[member.id]
        return [Evaluation(m, len(r)) for m, r in zip(found, rows)]

    def _measure(
        self, model: "nn.Module", rows: Sequence[Sequence[Example]], by_row: Sequence[bool]
    ) -> list[Record]:
        """Return the NLL of each member on its rows, over true distributions if all have them.

        `by_row`: of which members also the summed NLL of each row, ROWS, is wanted.
        """
        batches = [self._batched(r) for r in rows]
        with phase(EVALUATION, more_than_a_row(batches)):
            return self._measure_batches(model, rows, batches, by_row)

    def _measure_batches(
        self,
        model: "nn.Module",
        rows: Sequence[Sequence[Example]],
        batches: Sequence[list[Batch]],
        by_row: Sequence[bool],
    ) -> list[Record]:
        if all(b.truth is not None for own in batches for b in own):
            return evaluate_exact(model, batches, self._precision, self.metric.name, self._mesh)
        # whether a loss is summed by rows, which rounds in another way, depends on no other member
        sums: Sequence[np.ndarray] = ()
        nlls: Sequence[float] = ()
        if any(by_row):
            sums = row_nlls(model, rows, batches, self._precision, self._mesh)
        if not all(by_row):
            nlls = evaluate(model, batches, self._precision, self._mesh)
        name = self.metric.name
        return [
            {name: float(sums[k].sum() / _loss_tokens(own).sum()), ROWS: sums[k]}
            if wanted
            else {name: nlls[k]}
            for k, (own, wanted) in enumerate(zip(rows, by_row, strict=True))
        ]

    def at_end(self, model: "nn.Module", members: Sequence[RunSpec]) -> list[Record]:
        """Measure what is left of the pretraining task, where the data set has rows of it."""
        rows = [self._data[m.id].retain for m in members]
        some = next(filter(None, rows), None)
        if some is None:
            return [{} for _ in members]
        # a forward pass has rows of every member: one without any gets another's, uncounted
        batches = [self._batched(own or some) for own in rows]
        with phase(EVALUATION, more_than_a_row(batches)):
            nlls = evaluate(model, batches, self._precision, self._mesh)
        return [
            {"retain_nll": nll, "retain_start": self._retain_start[m.id]} if own else {}
            for m, own, nll in zip(members, rows, nlls)
        ]

    def facts(self, member: RunSpec) -> Record:
        """Return the NLL before training, and what identifies and describes the data set.

        `bits_...`: what is new in the training data of the whole run, where the generator is known.
        """
        data = self._data[member.id]
        bits = data.bits(member.steps * self._n_loss[member.id]) if data.bits else {}
        prompts = _prompts(member, data.test)
        return {
            "nll_start": self._start[member.id][self.metric.name],
            "floor_nats": data.entropy_floor_nats,
            "n_test": len(data.test),
            **({"n_test_prompts": len(set(prompts))} if prompts else {}),
            "n_train": data.n_train,
            DATA_SHA256: None if member.id in self._unknown_start else data.sha256,
            **({"data_commit": data.commit} if data.commit else {}),
            **floors(data.test, "floor"),
            **{f"bits_{measure}": value for measure, value in bits.items()},
        }

    def state(self, run: str) -> dict[str, Any]:
        """Return what divergence is judged by, the code length, and the fingerprint."""
        known = run not in self._unknown_start
        sha256 = {DATA_SHA256: self._data[run].sha256} if known else {}
        judged = self._divergence[run]
        return {
            "above": judged.above,
            "first_nll": judged.first,
            "code_nats": self._code_nats[run],
            **sha256,
        }

    def load_state(self, run: str, state: dict[str, Any]) -> None:
        """Restore the values of `state`, and check the data.

        A checkpoint from before fingerprints does not tell its data: the result will not, either.
        One from before code lengths has none. One from before divergence rule 2 has no first NLL:
        the next update's stands for it, and updates above the old bound are not counted.

        Raises:
            DataError: the run was started on other data.
        """
        judged = self._divergence[run]
        judged.first = state.get("first_nll")
        judged.above = 0 if judged.first is None else state["above"]
        self._code_nats[run] = state.get("code_nats", math.nan)
        if DATA_SHA256 not in state:
            self._unknown_start.add(run)
        else:
            refuse_other_data(run, state[DATA_SHA256], self._data[run].sha256)

    def _batched(self, examples: Sequence[Example]) -> list[Batch]:
        """Lay held-out examples out, once: an update's evaluations share them."""
        key = tuple(map(id, examples))  # the data sets are held, so ids are not reused
        if key not in self._held_out:
            self._held_out[key] = eval_batches(examples, self._eval_tokens, self._join_rows)
        return self._held_out[key]


def _loss_tokens(examples: Sequence[Example]) -> np.ndarray:
    """Count the loss tokens of each row, in the order in which rows are evaluated."""
    return np.array([int(examples[i].loss.sum()) for i in by_length(examples)])


def _prompts(member: RunSpec, examples: Sequence[Example]) -> list[int] | None:
    """Return the number of each row's prompt, as rows are evaluated; None if not held out by it."""
    if member.dataset.held_out_by != "prompt":
        return None
    return prompts_of([examples[i] for i in by_length(examples)])


def _bytes_per_token(examples: Sequence[Example]) -> float | None:
    """Return UTF-8 bytes per loss token; None if the tokens are not text or the text is empty."""
    n_bytes = [e.n_bytes for e in examples if e.n_bytes is not None]
    if len(n_bytes) < len(examples):
        return None
    return sum(n_bytes) / sum(int(e.loss.sum()) for e in examples) or None
