"""The training loop, linear, for one pack of N runs over one base model; one run is N = 1.

Knows a method only by its Trainables. Refuses to know the store, the launcher, configuration files
and
mirrors: it yields events, and whoever called writes them down.
Shapes: N members, B sequences a member, T tokens, P predicted places, V vocabulary.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lorasweep.data.batches import Batch, collate, eval_batches, merge
from lorasweep.data.examples import Data
from lorasweep.models.load import Base
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import Event, Record, State
from lorasweep.train.objectives.sft import evaluate, nll_sums
from lorasweep.train.optim import AdamW

DIVERGED_NLL_FACTOR = 1.5
"""A member diverges when its train NLL stays above this multiple of its held-out NLL at step 0 ...
(relative, because an absolute bound such as 2.0 nats means something else for every model)."""
DIVERGED_PATIENCE = 8
"""... for this many updates in a row; a value that is not finite counts at once. Assumption, not
tuned."""
EVAL_TOKENS, GPU_EVAL_TOKENS = 1024, 8192
"""Padded tokens of one member in an evaluation forward on a CPU, of all members on a GPU (where
whole logits exist). On a CPU it is not divided by the pack's size, so that held-out losses are
summed over the same rows whatever the pack."""


def eval_steps(steps: int) -> list[int]:
    """List the log-spaced steps at which the held-out loss is taken: 1, 2, 3, 4, 6, 8, 12, ... and
    the last.

    The list of a long run begins with that of a short one, so a constant-rate run holds all its
    prefixes.
    """
    powers = [2**k for k in range(steps.bit_length() + 1)]
    return sorted({s for s in (*powers, *(3 * p // 2 for p in powers[1:])) if s < steps} | {steps})


def train(
    pack: Sequence[RunSpec],
    base: Base,
    data: Data,
    micro_batch_size: int | None = None,
    resume: dict[str, State] | None = None,
) -> Iterator[Event]:
    """Train the runs of `pack` together and yield an Event an update.

    `resume` maps every run id of the pack to its state, all at one step, as snapshot() gave it.
    """
    # ---------------------------------------------------------------- setup
    model = base.model
    device = next(model.parameters()).device
    specs, ids = list(pack), [s.id for s in pack]
    first = specs[0]
    batch_size = first.batch_size
    rows = min(micro_batch_size or batch_size, batch_size)
    share = EVAL_TOKENS if device.type == "cpu" else max(1, GPU_EVAL_TOKENS // len(specs))
    n_curve = min(first.dataset.n_test_curve, len(data.test))
    test, curve = eval_batches(data.test, share), eval_batches(data.test[:n_curve], share)
    bytes_per_token = _bytes_per_token(data)

    # Before the first update every method is the base model itself, so this is measured once a
    # base.
    key = f"{first.dataset.canonical}/{first.precision}"
    if key not in base.start_nll:
        base.start_nll[key] = evaluate(model, test, 1, first.precision)[0]
    nll_start = base.start_nll[key]
    retain = eval_batches(data.retain, share) if data.retain else []
    if retain and f"{key}/retain" not in base.start_nll:
        base.start_nll[f"{key}/retain"] = evaluate(model, retain, 1, first.precision)[0]

    trainables = first.method.attach(
        model, first.model, [s.method for s in specs], [s.seed for s in specs]
    )
    try:
        optimizer = AdamW.start(trainables, specs)
        step, curves, above, tokens_seen = (
            0,
            {i: [] for i in ids},
            dict.fromkeys(ids, 0),
            dict.fromkeys(ids, 0),
        )
        times: dict[str, list[float]] = {i: [] for i in ids}
        if resume is None:
            for i in ids:
                curves[i].append({"step": 0, "examples": 0, "tokens": 0, "test_nll": nll_start})
        else:
            step = _load(resume, ids, trainables, optimizer)
            for i in ids:
                meta = resume[i]["meta"]
                curves[i], above[i], tokens_seen[i] = (
                    list(meta["curve"]),
                    meta["above"],
                    meta["tokens"],
                )
        evaluations = {i: set(eval_steps(s.steps)) for i, s in zip(ids, specs)}

        # ---------------------------------------------------------------- loop
        while specs:
            started = time.perf_counter()
            batches = [_batch(data, s.seed, step, batch_size, rows) for s in specs]
            counts = [sum(b.n_loss for b in parts) for parts in batches]
            per_member = torch.tensor(counts, device=device)
            total, laid_out = torch.zeros(len(specs), dtype=torch.float64), 0
            for parts in zip(*batches):
                merged = merge(parts)
                laid_out += merged.tokens_NX.shape[1]
                sums = nll_sums(model, merged, first.precision)
                (sums / per_member).sum().backward()
                total += sums.detach().double().cpu()
            if step == 0:  # kept beside the loss at the start: where the first gradient lies
                for i, squares in zip(ids, optimizer.grad_squares()):
                    curves[i][0]["grad_share"] = _by_layer_set(squares, first)
            norms = optimizer.grad_norms()
            optimizer.step(step, norms)
            optimizer.zero_grad()
            step += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # else the time would be that of asking
            seconds = time.perf_counter() - started

            # ------------------------------------------------------------ records
            losses = (total / torch.tensor(counts, dtype=torch.float64)).tolist()
            records: dict[str, Record] = {}
            for i, spec, parts, nll, norm in zip(ids, specs, batches, losses, norms):
                n_tokens = sum(b.n_tokens for b in parts)
                tokens_seen[i] += n_tokens
                records[i] = {
                    "step": step,
                    "examples": step * spec.batch_size,
                    "tokens": tokens_seen[i],
                    "train_nll": nll,
                    "grad_norm": norm,
                    "step_s": seconds / len(specs),
                    "tokens_per_s": n_tokens * len(specs) / seconds,
                    "padding": 1 - n_tokens / laid_out,
                }
                times[i].append(seconds / len(specs))
                bad = not math.isfinite(nll) or not math.isfinite(norm)
                above[i] = above[i] + 1 if nll > DIVERGED_NLL_FACTOR * nll_start else 0
                if bad or above[i] >= DIVERGED_PATIENCE:
                    records[i]["diverged"] = True
            last = {i for i, s in zip(ids, specs) if step == s.steps}
            diverged = {i for i in ids if records[i].get("diverged")}

            # ------------------------------------------------------------ held-out loss
            due = {i for i in ids if step in evaluations[i] and i not in diverged}
            norms_now = dict(zip(ids, trainables.norms())) if due else {}
            for members, batches_, items in (
                (due & last, test, len(data.test)),
                (due - last, curve, n_curve),
            ):
                nlls = evaluate(model, batches_, len(specs), first.precision) if members else []
                for i, nll in zip(ids, nlls):
                    if i not in members:
                        continue
                    records[i] |= {"test_nll": nll, **norms_now[i], "test_items": items}
                    if bytes_per_token is not None:
                        records[i]["test_bpb"] = nll / math.log(2) / bytes_per_token
                    keep = ("step", "examples", "tokens", "test_nll", *norms_now[i])
                    curves[i].append({k: records[i][k] for k in keep})
                    if not math.isfinite(nll):
                        diverged.add(i)
            forgotten = (
                evaluate(model, retain, len(specs), first.precision)
                if retain and last - diverged
                else []
            )
            spectra = trainables.spectra() if last - diverged else []
            ended: dict[str, tuple[str, Record]] = {}
            for k, i in enumerate(ids):
                if i in diverged or i in last:
                    final = {
                        "nll_start": nll_start,
                        "floor_nats": data.floor_nats,
                        "steps_done": step,
                        "tokens": tokens_seen[i],
                        "train_nll": records[i]["train_nll"],
                        "curve": curves[i],
                        "base_sha256": base.sha256,
                        "n_test": len(data.test),
                        "n_train": data.n_train,
                    }
                    if i in last - diverged:
                        times[i].sort()
                        final |= {"spectra": spectra[k], "step_s": times[i][len(times[i]) // 2]}
                        if retain:
                            final |= {
                                "retain_nll": forgotten[k],
                                "retain_start": base.start_nll[f"{key}/retain"],
                            }
                    if i not in diverged:
                        names = ("test_nll", "test_bpb", "norm_a", "norm_b", "norm_delta")
                        final |= {k: records[i][k] for k in names if k in records[i]}
                    ended[i] = ("diverged" if i in diverged else "done", final)

            def snapshot(step: int = step, ids: list[str] = ids) -> dict[str, State]:
                metas = {
                    i: {"curve": curves[i], "above": above[i], "tokens": tokens_seen[i]}
                    for i in ids
                }
                return {
                    i: _member_state(k, step, ids, trainables, optimizer, metas[i])
                    for k, i in enumerate(ids)
                }

            yield Event(step, records, ended, snapshot)

            # ------------------------------------------------------------ compaction
            stay = [k for k, i in enumerate(ids) if i not in ended]
            if len(stay) < len(ids):
                ids, specs = [ids[k] for k in stay], [specs[k] for k in stay]
                if stay:
                    optimizer.keep(stay)
    finally:
        trainables.detach()


def _batch(data: Data, seed: int, step: int, batch_size: int, rows: int) -> list[Batch]:
    """Return update `step`'s batch of one member, in micro-batches of `rows` sequences of like
    length."""
    examples = sorted(data.train(seed, step * batch_size, batch_size), key=lambda e: len(e.tokens))
    return [collate(examples[k : k + rows]) for k in range(0, batch_size, rows)]


def _by_layer_set(squares: dict[str, float], spec: RunSpec) -> dict[str, float]:
    """Share of the squared gradient by layer set; embedding and norms are 'rest'."""
    total, found = sum(squares.values()), {}
    for name, value in squares.items():
        where = spec.model.set_of(name)
        found[where] = found.get(where, 0.0) + value / total if total > 0 else math.nan
    return found


def _bytes_per_token(data: Data) -> float | None:
    """Return UTF-8 bytes per loss-bearing held-out token; None where tokens are no text."""
    if any(e.n_bytes is None for e in data.test):
        return None
    return sum(e.n_bytes for e in data.test) / sum(int(e.loss.sum()) for e in data.test)


def _member_state(
    k: int, step: int, ids: list[str], trainables: Any, optimizer: AdamW, meta: Record
) -> State:
    """Return references to member k's tensors, and what else its continuation needs."""
    tensors = {}
    for name, p in optimizer.params.items():
        of_member, members = trainables.part_of(name)
        if k in range(members.start, members.stop):
            for kind, source in (
                ("param", p),
                ("m", optimizer.exp_avg[name]),
                ("v", optimizer.exp_avg_sq[name]),
            ):
                part = source.detach()
                tensors[f"{kind}/{of_member}"] = (
                    part[k - members.start] if trainables.stacked else part
                )
    return {"tensors": tensors, "meta": {"step": step, "layout": list(ids), **meta}}


@torch.no_grad()
def _load(resume: dict[str, State], ids: list[str], trainables: Any, optimizer: AdamW) -> int:
    steps = {resume[i]["meta"]["step"] for i in ids}
    if len(steps) != 1:
        raise ValueError(f"the members' states are at different steps: {steps}")
    for name, p in optimizer.params.items():
        of_member, members = trainables.part_of(name)
        for k in range(members.start, members.stop):
            tensors = resume[ids[k]]["tensors"]
            for kind, target in (
                ("param", p),
                ("m", optimizer.exp_avg[name]),
                ("v", optimizer.exp_avg_sq[name]),
            ):
                (target[k - members.start] if trainables.stacked else target).copy_(
                    tensors[f"{kind}/{of_member}"]
                )
    return steps.pop()
