"""All synthetic data sets by name (a new one is an entry of GENERATORS), and the small ones.

facts: keys of three symbols with values of four symbols out of 16. A value has exactly 16 bits, to
measure how much a method can store. The base model knows the format (facts=0), or also a fixed set
of facts (facts, set, fresh). The NLL of new values under the base is ln 16 per symbol; each bit
below that was stored. Held-out rows are the trained facts. Rows of `n_retain` hold facts that are
never trained.

bandit: keys with one hidden label out of 16, so 4 bits per context. The base model knows the
format, not the labels. The same rows teach labels by cross-entropy, or by the reward of a sampled
symbol. Held-out rows are the trained contexts. With draw_by_seed, each seed has its own contexts
and labels.

skills: copy, reverse, sort, addition, word problems; each character is a token. The base model is
pretrained on easier instances (difficulty 1), so that fine-tuning (difficulty 2) teaches the skill
and not the format.

words: new words for three skills, to be learned from rewards. `cort` means sort, `sverse` reverse,
`sopy` copy. The base model knows these skills by the old words, so correct completions are rare at
first but not impossible.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from lorasweep import plugins
from lorasweep.data.examples import (
    Data,
    Example,
    Parameter,
    Rewards,
    generated,
    parameters,
    same_tokens,
    shuffled,
    with_fingerprint,
)
from lorasweep.data.synthetic import dialect
from lorasweep.errors import DataError, SpecError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

VOCAB = 48
"""Number of symbols; a few are never used."""

# ---------------------------------------------------------------- facts and bandit

VALUES, KEYS, SEPARATOR = 16, 31, 47
KEY, VALUE = 3, 4
FACT = 1 + KEY + VALUE
"""Symbols per fact: a separator, the key, the value."""
FACTS = {
    # number of facts to store; 0: new facts in every row
    "facts": Parameter(512, 0, KEYS**KEY // 2, whole=True),
    "set": Parameter(0, whole=True),  # seed of the set of facts
    # share of training rows with facts that never repeat, to pretrain a base that knows some facts
    "fresh": Parameter(0, 0, 1),
}
BANDIT = {
    "contexts": Parameter(64, 1, KEYS**KEY, whole=True),
    "set": Parameter(0, whole=True),  # seed of the contexts and their labels
}


def check_facts(spec: DatasetSpec) -> None:
    """Raise DataError if facts do not fill the rows."""
    where, row = f"dataset {spec.name!r}", spec.max_length // FACT
    count = spec.generator_params.get("facts", FACTS["facts"].default)
    if spec.max_length % FACT:
        raise DataError(f"{where}: max_length={spec.max_length}. Allowed: a multiple of {FACT}.")
    if count % row:
        raise DataError(
            f"{where}: generator_params.facts={count:g}. Allowed: 0, or a multiple of {row}, the "
            "facts of a row."
        )


def load_facts(spec: DatasetSpec) -> Data:
    """Make the facts. The loss covers the values, or with mask=all every symbol but the first."""
    params = parameters(spec.generator_params, FACTS, f"dataset {spec.name!r}")
    count, row = int(params["facts"]), spec.max_length // FACT
    loss = np.tile(np.arange(FACT) > KEY, row)
    if spec.mask == "all":
        loss = np.arange(spec.max_length) > 0

    def rows_of(keys: np.ndarray, values: np.ndarray) -> list[Example]:
        separators = np.full((len(keys), 1), SEPARATOR)
        facts = np.concatenate([separators, keys, values], 1).astype(np.int32)
        return [Example(tokens, loss) for tokens in facts.reshape(-1, spec.max_length)]

    def draw(rng: np.random.Generator, rows: int) -> list[Example]:
        keys = rng.integers(VALUES, VALUES + KEYS, size=(rows * row, KEY))
        return rows_of(keys, rng.integers(VALUES, size=(rows * row, VALUE)))

    if not count:
        test = draw(stream("data", spec.name, spec.test_split), spec.n_test)
        data = Data(generated(spec, draw), test, n_train=None)
        return with_fingerprint(data, "new facts in every row")
    rng = stream("facts", int(params["set"]))
    unseen = spec.n_retain * row
    if count + unseen > KEYS**KEY:
        raise DataError(
            f"dataset {spec.name!r}: n_retain={spec.n_retain}, and there are {KEYS**KEY} keys: "
            f"{count} for facts, {row} a row. Lower n_retain or generator_params.facts."
        )
    number = rng.permutation(KEYS**KEY)[: count + unseen]
    keys = VALUES + np.stack([number // KEYS**k % KEYS for k in range(KEY)], 1)
    values = rng.integers(VALUES, size=(count + unseen, VALUE))

    def train(seed: int, start: int, rows: int) -> list[Example]:
        """Serve each fact once per epoch, in a new order; an epoch may end inside a row."""
        here = ("data", spec.name, spec.train_split)
        order = np.arange(start * row, (start + rows) * row)
        epochs = {
            int(e): stream(*here, seed, int(e)).permutation(count)
            for e in np.unique(order // count)
        }
        picked = np.array([epochs[p // count][p % count] for p in order.tolist()])
        shown_keys, shown_values = keys[picked], values[picked]
        for k in range(rows if params["fresh"] else 0):
            # one stream per row, so that a row is the same in every batch
            rng = stream(*here, "fresh", seed, start + k)
            if rng.random() < params["fresh"]:
                of_row = slice(k * row, (k + 1) * row)
                shown_keys[of_row] = rng.integers(VALUES, VALUES + KEYS, size=(row, KEY))
                shown_values[of_row] = rng.integers(VALUES, size=(row, VALUE))
        return rows_of(shown_keys, shown_values)

    def bits(n_tokens: int) -> dict[str, float]:
        """Return the bits in the values of the facts seen in `n_tokens` loss tokens."""
        return {"generator": min(count, n_tokens // VALUE) * VALUE * math.log2(VALUES)}

    shown = stream("data", spec.name, spec.test_split).permutation(count)[: spec.n_test * row]
    data = Data(
        train,
        rows_of(keys[shown], values[shown]),
        n_train=count // row,
        retain=rows_of(keys[count:], values[count:]),
        entropy_floor_nats=0.0,
        bits=None if params["fresh"] or spec.mask == "all" else bits,
    )
    return with_fingerprint(data, f"fresh {params['fresh']}", keys[:count], values[:count])


def load_bandit(spec: DatasetSpec, draw: int | None = None) -> Data:
    """Draw the contexts and their labels; the loss covers the label.

    Each number `draw` gives other contexts and labels.
    """
    params = parameters(spec.generator_params, BANDIT, f"dataset {spec.name!r}")
    count = int(params["contexts"])
    rng = stream("bandit", int(params["set"]), *(() if draw is None else ("draw", draw)))
    # drawn in order from one stream: a smaller number of contexts has the first ones of a larger
    numbers = rng.permutation(KEYS**KEY)[:count]
    keys = VALUES + np.stack([numbers // KEYS**k % KEYS for k in range(KEY)], 1)
    labels = rng.integers(VALUES, size=KEYS**KEY)[:count]
    tokens = np.concatenate([np.full((count, 1), SEPARATOR), keys, labels[:, None]], 1)
    loss = np.arange(tokens.shape[1]) > KEY
    rows = [Example(row, loss) for row in tokens.astype(np.int32)]
    data = Data(
        shuffled(spec, rows),
        rows[: spec.n_test],
        n_train=count,
        entropy_floor_nats=0.0,
        rewards=Rewards(same_tokens, (), exact=True, choices=VALUES),
    )
    return with_fingerprint(data, tokens)


# ---------------------------------------------------------------- skills and words

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789+-*=:>.?"
SKILLS = {"difficulty": Parameter(2, 1, 3, whole=True)}
LONGEST = 48
"""Upper bound on the number of symbols of an instance of `skills` (the longest seen has 46)."""
WORDS: dict[str, Callable[[list[str]], list[str]]] = {
    "cort": sorted,
    "sverse": lambda letters: letters[::-1],
    "sopy": list,
}
LENGTHS = (4, 5)
"""Possible numbers of letters in an instance of `words`."""


def _row(prompt: str, answer: str, spec: DatasetSpec) -> Example:
    """Return a row with the loss on answer and line end; with mask=all, on symbols 1 and later."""
    text = f"{prompt}{answer}\n"[: spec.max_length]
    tokens = np.array([ALPHABET.index(c) for c in text], dtype=np.int32)
    loss = np.arange(len(tokens)) >= (1 if spec.mask == "all" else len(prompt))
    return Example(tokens, loss, int(loss.sum()))


def load_skills(spec: DatasetSpec) -> Data:
    """Make the task `skills`."""
    params = parameters(spec.generator_params, SKILLS, f"dataset {spec.name!r}")
    difficulty = int(params["difficulty"])

    def draw(rng: np.random.Generator, count: int, difficulty: int = difficulty) -> list[Example]:
        return [_row(*instance(rng, difficulty), spec) for _ in range(count)]

    test = draw(stream("data", spec.name, spec.test_split), spec.n_test)
    retain = draw(stream("data", spec.name, "retain"), spec.n_retain, 1)
    data = Data(generated(spec, draw), test, n_train=spec.n_train, retain=retain)
    return with_fingerprint(data, f"difficulty {difficulty}")


def instance(rng: np.random.Generator, difficulty: int) -> tuple[str, str]:
    """Draw one (prompt, answer). All five skills are equally likely."""
    kind = int(rng.integers(5))
    if kind < 3:
        n = int(rng.integers(2 * difficulty, 2 + 4 * difficulty))
        letters = [chr(97 + int(i)) for i in rng.integers(26, size=n)]
        name = ("copy", "reverse", "sort")[kind]
        answer = (letters, letters[::-1], sorted(letters))[kind]
        return f"{name} {''.join(letters)}>", "".join(answer)
    a, b = (int(x) for x in rng.integers(1, 10**difficulty, size=2))
    if kind == 3:
        return f"{a}+{b}>", str(a + b)
    who = ("ann", "bob", "eve", "tom", "sue", "max")[int(rng.integers(6))]
    thing = ("nuts", "pens", "cups", "hats")[int(rng.integers(4))]
    if rng.integers(2):
        return f"{who} has {a} {thing} and buys {b}. how many?>", str(a + b)
    a, b = max(a, b), min(a, b)
    return f"{who} has {a} {thing} and sells {b}. how many?>", str(a - b)


def load_words(spec: DatasetSpec) -> Data:
    """Make the task `words`."""

    def draw(rng: np.random.Generator, count: int) -> list[Example]:
        rows = []
        for _ in range(count):
            word = tuple(WORDS)[int(rng.integers(len(WORDS)))]
            size = LENGTHS[int(rng.integers(len(LENGTHS)))]
            letters = [chr(97 + int(i)) for i in rng.integers(26, size=size)]
            rows.append(_row(f"{word} {''.join(letters)}>", "".join(WORDS[word](letters)), spec))
        return rows

    data = Data(
        train=generated(spec, draw),
        test=draw(stream("data", spec.name, spec.test_split), spec.n_test),
        n_train=spec.n_train,
        rewards=Rewards(same_tokens, ((ALPHABET.index("\n"),),), exact=True),
    )
    return with_fingerprint(data, ", ".join(WORDS))


# ---------------------------------------------------------------- all


@dataclass(frozen=True)
class Generator:
    """A synthetic data set."""

    vocab: int
    """Number of symbols."""
    parameters: Mapping[str, Parameter]
    shortest: int
    """Smallest max_length, with which no answer is cut off."""
    load: Callable[..., Data]
    """(spec) -> data; with `draw_by_seed`, (spec, draw=number) -> data."""
    verified: bool = False
    """Whether completions can be rewarded."""
    check: Callable[[DatasetSpec], Any] = lambda spec: None
    """Raises DataError for what `parameters` and `shortest` do not say."""


GENERATORS = {
    "bandit": Generator(VOCAB, BANDIT, 1 + KEY + 1, load_bandit, True),
    "dialect": Generator(dialect.VOCAB, dialect.PARAMETERS, 4, dialect.load),
    "facts": Generator(VOCAB, FACTS, FACT, load_facts, check=check_facts),
    "skills": Generator(VOCAB, SKILLS, LONGEST, load_skills),
    "words": Generator(VOCAB, {}, len("sverse ") + 2 * LENGTHS[-1] + 2, load_words, True),
}


def generator(name: str) -> Generator:
    """Return a generator by name (a data set's location); DataError: none, two, or a broken one."""
    try:
        return plugins.find("generator", name, GENERATORS, lambda g: isinstance(g, Generator))
    except SpecError as error:
        raise DataError(str(error)) from None


def check(spec: DatasetSpec) -> None:
    """Raise DataError if a parameter is unknown or out of range, or rows are too short."""
    found, where = generator(spec.location), f"dataset {spec.name!r}"
    parameters(spec.generator_params, found.parameters, where)
    if spec.max_length < found.shortest:
        raise DataError(
            f"{where}: max_length={spec.max_length}. Allowed: {found.shortest} or more."
        )
    found.check(spec)


def load(spec: DatasetSpec, draw: int | None = None) -> Data:
    """Make the data. All draws share the fingerprint of the data without a draw."""
    check(spec)
    if draw is None:
        return generator(spec.location).load(spec)
    return replace(generator(spec.location).load(spec, draw=draw), sha256=_first_sha256(spec))


@cache
def _first_sha256(spec: DatasetSpec) -> str | None:
    return load(spec).sha256
