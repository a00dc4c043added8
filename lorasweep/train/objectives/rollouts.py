"""Lay sampled answers out for the learner: rows of tokens, and what each token's loss needs.

Answers of a group that are alike up to their last token share a row, so one prompt with answers of
one token is one row. A group whose advantages are all 0 has no gradient and is left out.

Shapes: N members, M positions per member at which a token of an answer is predicted, S answers.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorasweep.data.batches import PAD_TO, Batch, merge


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    tokens: np.ndarray
    log_p: np.ndarray
    """Of each token, under the sampler."""
    advantage: float


@dataclass(frozen=True)
class Group:
    """The answers to one prompt."""

    prompt: np.ndarray
    answers: list[Answer]


@dataclass(frozen=True)
class Rollouts:
    """A part of an update's answers, for all members: the learner's MicroBatch."""

    batch: Batch
    sampler_NM: np.ndarray
    """log p of each token under the sampler; float64, 0 at filler."""
    advantage_NM: np.ndarray
    answer_NM: np.ndarray
    """Number of the answer that a token belongs to, within its member; int64, 0 at filler."""
    episodes: int
    """Answers that a member's loss is divided by: its share of all that were sampled."""

    @property
    def tokens_N(self) -> Sequence[int]:
        """Tokens of each member, without padding."""
        return self.batch.tokens_N

    @property
    def laid_out(self) -> int:
        """Tokens of one member, with padding."""
        return self.batch.laid_out


def lay_out(
    groups_N: Sequence[Sequence[Group]],
    rows: int,
    episodes: int,
    join_rows: bool,
    processes: int = 1,
) -> list[Rollouts]:
    """Return micro-batches of at most about `rows` answers a member, as many for each process.

    `groups_N`: the groups of each member that have a gradient; a member without any takes part with
    no weight. `episodes`: answers of a member in the update.
    """
    parts_N = [_parts(groups, rows) for groups in groups_N]
    some = next((parts[0] for parts in parts_N if parts), None)
    if some is None:
        raise ValueError("no member has a group")
    number = max(map(len, parts_N))
    micro_batches = []
    for k in range(number):
        own = [
            _collate(parts[k], join_rows) if k < len(parts) else _without_weight(some, join_rows)
            for parts in parts_N
        ]
        micro_batches.append(_merged(own, episodes if k == 0 else 0))
    while len(micro_batches) % processes:
        micro_batches.append(_without_signal(some, join_rows))
    return micro_batches


def _parts(groups: Sequence[Group], rows: int) -> list[list[Group]]:
    """Split a member's groups into parts of at most `rows` answers, at least one group each."""
    parts: list[list[Group]] = []
    count = 0
    for group in sorted(groups, key=_longest):
        if not parts or count + len(group.answers) > rows:
            parts.append([])
            count = 0
        parts[-1].append(group)
        count += len(group.answers)
    return parts


def _longest(group: Group) -> int:
    return len(group.prompt) + max(len(a.tokens) for a in group.answers)


def _without_weight(groups: Sequence[Group], join_rows: bool) -> Rollouts:
    """Return a micro-batch that adds nothing to a member's loss."""
    found = _collate(groups[:1], join_rows)
    nothing = np.zeros_like(found.batch.weight_NM)
    batch = dataclasses.replace(found.batch, weight_NM=nothing, tokens_N=(0,))
    return dataclasses.replace(found, batch=batch, advantage_NM=np.zeros_like(found.advantage_NM))


def _without_signal(groups: Sequence[Group], join_rows: bool) -> Rollouts:
    """Return a micro-batch of one member for a process that has none: it has no gradient."""
    found = _collate(groups[:1], join_rows)
    batch = dataclasses.replace(found.batch, tokens_N=(0,))
    return dataclasses.replace(found, batch=batch, advantage_NM=np.zeros_like(found.advantage_NM))


def _collate(groups: Sequence[Group], join_rows: bool) -> Rollouts:
    """Lay out the answers of one member."""
    tokens: list[np.ndarray] = []
    firsts: list[int] = []
    answers: list[Answer] = []
    lengths: list[int] = []
    n_tokens = at = 0
    for group in groups:
        # the last token is predicted, and nothing is predicted from it
        sharing: dict[bytes, list[Answer]] = {}
        for answer in group.answers:
            sharing.setdefault(answer.tokens[:-1].tobytes(), []).append(answer)
        for own in sharing.values():
            row = np.concatenate([group.prompt, own[0].tokens[:-1]])
            firsts += [at + len(group.prompt) - 1] * len(own)
            answers += own
            lengths.append(-(-len(row) // PAD_TO) * PAD_TO)
            tokens.append(np.pad(row, (0, lengths[-1] - len(row))))
            n_tokens += len(row)
            at += lengths[-1]
    sizes = np.array([len(a.tokens) for a in answers])
    count = int(sizes.sum())
    within = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    width = -(-count // PAD_TO) * PAD_TO

    def wide(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, width - len(values)))[None]

    batch = Batch(
        np.concatenate(tokens).astype(np.int64)[None],
        (tuple(lengths),),
        wide(np.repeat(firsts, sizes) + within),
        wide(np.concatenate([a.tokens for a in answers]).astype(np.int64)),
        wide(np.ones(count, dtype=np.float32)),
        (n_tokens,),
        join_rows=join_rows,
    )
    return Rollouts(
        batch,
        wide(np.concatenate([a.log_p for a in answers])),
        wide(np.repeat([a.advantage for a in answers], sizes)),
        wide(np.repeat(range(len(answers)), sizes)),
        0,
    )


def _merged(parts: Sequence[Rollouts], episodes: int) -> Rollouts:
    """Stack the micro-batches of members, each filled up to the longest."""
    batch = merge([p.batch for p in parts])
    width = batch.weight_NM.shape[1]

    def stacked(name: str) -> np.ndarray:
        rows = [getattr(p, name) for p in parts]
        return np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1]))) for r in rows])

    return Rollouts(
        batch, stacked("sampler_NM"), stacked("advantage_NM"), stacked("answer_NM"), episodes
    )
