"""Supervised fine-tuning: the NLL in nats per loss token, averaged over a member's batch.

Sums and counts are kept separately and divided once, so micro-batches change only rounding.

Shapes: N members.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lorasweep.data.batches import Batch, collate, eval_batches, merge, padded
from lorasweep.data.examples import Data, Example
from lorasweep.errors import DataError
from lorasweep.models.cpu_llama.model import cpu_llama_for
from lorasweep.models.head import hidden_states, logits_of
from lorasweep.models.precision import COMPUTE_DTYPES, autocast
from lorasweep.spec.metric import Metric
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import Record
from lorasweep.train.objectives.base import Evaluation

if TYPE_CHECKING:
    from torch import nn

    from lorasweep.models.load import Base

DIVERGED_NLL_FACTOR = 1.5
"""A run has diverged if its train NLL is above this multiple of its held-out NLL at step 0 for
DIVERGED_PATIENCE updates in a row. Relative, because an absolute bound would mean something else
for every model."""
DIVERGED_PATIENCE = 8
"""Assumption, not tuned."""
DATA_SHA256 = "data_sha256"
"""Key of the data's fingerprint in results and checkpoints."""
EVAL_TOKENS, GPU_EVAL_TOKENS = 1024, 8192
"""Padded tokens per evaluation forward: per member on a CPU, of all members on a GPU. On a CPU it
does not depend on the pack size, so that held-out losses are summed over the same rows in every
pack."""
LOGITS, GPU_LOGITS = 1 << 24, 1 << 26
"""Logits that transformers' passes compute at once. On a GPU that is half a thousand positions of a
vocabulary of 128,256 and about 1.3 GB with what the loss needs. Assumption: not measured on a GPU.
"""


class SupervisedFineTuning:
    """Supervised fine-tuning on examples with a loss mask; each run has a data set."""

    metric = Metric()

    def __init__(
        self, data: Mapping[str, Data], precision: str, micro_batch_size: int | None = None
    ) -> None:
        """Set up the objective.

        `data`: run id -> the run's data set; runs may share one. `micro_batch_size`: sequences per
        member and forward pass; None: all of an update.
        """
        self._data, self._precision, self._micro_batch_size = data, precision, micro_batch_size
        self._nll_start: dict[str, float] = {}
        self._retain_start: dict[str, float] = {}
        self._updates_above = dict.fromkeys(data, 0)
        self._unknown_start: set[str] = set()
        self._eval_tokens = EVAL_TOKENS
        self._held_out: dict[tuple[int, ...], list[Batch]] = {}

    def start(self, base: "Base", members: Sequence[RunSpec]) -> list[float]:
        """Measure the base's NLL on each data set, and on its pretraining rows, once."""
        if next(base.model.parameters()).device.type != "cpu":
            self._eval_tokens = max(1, GPU_EVAL_TOKENS // len(members))
        for member in members:
            data = self._data[member.id]
            key = f"{member.dataset.canonical}/{self._precision}"
            for name, examples in ((key, data.test), (f"{key}/retain", data.retain)):
                if examples and name not in base.start_nll:
                    batches = [self._batched(examples)]
                    base.start_nll[name] = evaluate(base.model, batches, self._precision)[0]
            self._nll_start[member.id] = base.start_nll[key]
            if data.retain:
                self._retain_start[member.id] = base.start_nll[f"{key}/retain"]
        return [self._nll_start[m.id] for m in members]

    def batches(self, model: "nn.Module", step: int, members: Sequence[RunSpec]) -> list[Batch]:
        """Return the micro-batches of update `step`, with rows of similar length together."""
        return [merge(parts) for parts in zip(*(self._rows(m, step) for m in members))]

    def _rows(self, member: RunSpec, step: int) -> list[Batch]:
        size = member.batch_size
        rows = min(self._micro_batch_size or size, size)
        examples = self._data[member.id].train(member.seed, step * size, size)
        examples = sorted(examples, key=lambda e: len(e.tokens))
        return [collate(examples[k : k + rows]) for k in range(0, size, rows)]

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
        """Count updates in a row whose loss is far above the loss before training."""
        above = loss > DIVERGED_NLL_FACTOR * self._nll_start[run]
        self._updates_above[run] = self._updates_above[run] + 1 if above else 0
        return self._updates_above[run] >= DIVERGED_PATIENCE

    def evaluate(
        self, model: "nn.Module", members: Sequence[RunSpec], final: bool
    ) -> list[Evaluation]:
        """Return each member's held-out NLL, and for text its bits per byte."""
        rows = []
        for member in members:
            test, n_curve = self._data[member.id].test, member.dataset.n_test_curve
            rows.append(test if final else test[:n_curve])
        nlls = evaluate(model, [self._batched(r) for r in rows], self._precision)
        found = []
        for member, nll, examples in zip(members, nlls, rows):
            measures = {self.metric.name: nll}
            bytes_per_token = _bytes_per_token(self._data[member.id].test)
            if bytes_per_token is not None:
                measures["test_bpb"] = nll / math.log(2) / bytes_per_token
            found.append(Evaluation(measures, len(examples)))
        return found

    def at_end(self, model: "nn.Module", members: Sequence[RunSpec]) -> list[Record]:
        """Measure what is left of the pretraining task, where the data set has rows of it."""
        rows = [self._data[m.id].retain for m in members]
        some = next(filter(None, rows), None)
        if some is None:
            return [{} for _ in members]
        # a forward pass has rows of every member: one without any gets another's, uncounted
        nlls = evaluate(model, [self._batched(own or some) for own in rows], self._precision)
        return [
            {"retain_nll": nll, "retain_start": self._retain_start[m.id]} if own else {}
            for m, own, nll in zip(members, rows, nlls)
        ]

    def facts(self, member: RunSpec) -> Record:
        """Return the NLL before training, and what identifies and describes the data set."""
        data = self._data[member.id]
        return {
            "nll_start": self._nll_start[member.id],
            "floor_nats": data.entropy_floor_nats,
            "n_test": len(data.test),
            "n_train": data.n_train,
            DATA_SHA256: None if member.id in self._unknown_start else data.sha256,
            **({"data_commit": data.commit} if data.commit else {}),
        }

    def state(self, run: str) -> dict[str, Any]:
        """Return the updates in a row above the divergence bound, and the data's fingerprint."""
        known = run not in self._unknown_start
        sha256 = {DATA_SHA256: self._data[run].sha256} if known else {}
        return {"above": self._updates_above[run], **sha256}

    def load_state(self, run: str, state: dict[str, Any]) -> None:
        """Restore the updates in a row above the divergence bound, and check the data.

        A checkpoint from before fingerprints does not tell its data: the result will not, either.

        Raises:
            DataError: the run was started on other data.
        """
        self._updates_above[run] = state["above"]
        if DATA_SHA256 not in state:
            self._unknown_start.add(run)
        elif state[DATA_SHA256] != self._data[run].sha256:
            raise DataError(
                f"run {run} was started on other data (fingerprint {state[DATA_SHA256]}) than are "
                f"there now ({self._data[run].sha256}). Get those data back, or delete the folder "
                f"{run} in the run folder, which starts the run anew."
            )

    def _batched(self, examples: Sequence[Example]) -> list[Batch]:
        """Lay held-out examples out, once: an update's evaluations share them."""
        key = tuple(map(id, examples))  # the data sets are held, so ids are not reused
        if key not in self._held_out:
            self._held_out[key] = eval_batches(examples, self._eval_tokens)
        return self._held_out[key]


def nll_sums(model: "nn.Module", batch: Batch, precision: str) -> torch.Tensor:
    """Return the summed NLL in nats of each member, [N], on the model's device.

    Logits are computed at the loss positions only, and never more than a chunk of them at once.
    """
    passes = cpu_llama_for(model)
    if passes is not None:
        return passes.nll_sums(batch, COMPUTE_DTYPES[precision])
    device = next(model.parameters()).device
    tokens, positions, targets, weight = (torch.from_numpy(a).to(device) for a in padded(batch))
    members, (rows, width) = len(batch.lengths), positions.shape
    config: Any = model.config
    most = LOGITS if device.type == "cpu" else GPU_LOGITS
    step = max(1, most // (rows * config.get_text_config().vocab_size))
    if step >= width:
        with autocast(precision, device):
            logits = model(input_ids=tokens, logits_to_keep=positions, use_cache=False).logits
        return _sums(logits, targets, weight, members)

    def part(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with autocast(precision, device):
            # contiguous: of a slice, a product would take one copy of the weight per row
            return _sums(logits_of(model, hidden.contiguous()), targets, weight, members)

    with autocast(precision, device):
        hidden = hidden_states(model, tokens, positions)
    sums = []
    for chunk in zip(*(x.split(step, 1) for x in (hidden, targets, weight))):
        # the backward pass computes a chunk's logits again: kept, they would be whole after all
        sums.append(checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False))
    return torch.stack(sums).sum(0)


def _sums(
    logits_RPV: torch.Tensor, targets_RP: torch.Tensor, weight_RP: torch.Tensor, members: int
) -> torch.Tensor:
    """Return each member's summed cross-entropy, [N]; its rows are neighbours."""
    if logits_RPV.dtype in (torch.bfloat16, torch.float16):
        logits_RPV = logits_RPV.float()
    nll = F.cross_entropy(logits_RPV.flatten(0, 1), targets_RP.flatten(), reduction="none")
    return (nll * weight_RP.flatten().to(nll.dtype)).view(members, -1).sum(1)


@torch.no_grad()
def evaluate(model: "nn.Module", batches: Sequence[list[Batch]], precision: str) -> list[float]:
    """Return each member's NLL in nats per loss token, from its list of held-out batches.

    It is the summed NLL divided by the token count. A member with fewer batches than another
    repeats its own; the repeats do not count.
    """
    device = next(model.parameters()).device
    total = torch.zeros(len(batches), dtype=torch.float64, device=device)
    for k in range(max(map(len, batches))):
        merged = merge([own[k % len(own)] for own in batches])
        sums = nll_sums(model, merged, precision).double()
        if not all(k < len(own) for own in batches):
            counts = torch.tensor([k < len(own) for own in batches], device=device)
            sums = torch.where(counts, sums, 0.0)
        total += sums
    n_loss = torch.tensor([sum(b.n_loss for b in own) for own in batches], device=device)
    return (total / n_loss).tolist()


def _bytes_per_token(examples: Sequence[Example]) -> float | None:
    """Return UTF-8 bytes per loss token; None if the tokens are not text."""
    n_bytes = [e.n_bytes for e in examples if e.n_bytes is not None]
    if len(n_bytes) < len(examples):
        return None
    return sum(n_bytes) / sum(int(e.loss.sum()) for e in examples)
