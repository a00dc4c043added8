"""All synthetic data sets by name. A new generator is one entry here."""

from collections.abc import Callable
from dataclasses import dataclass

from lorasweep.data.examples import Data
from lorasweep.data.synthetic import dialect, facts, skills
from lorasweep.errors import DataError, unknown
from lorasweep.spec.dataset import DatasetSpec


@dataclass(frozen=True)
class Generator:
    """A synthetic data set."""

    vocab: int
    """Number of symbols."""
    check: Callable[[DatasetSpec], None]
    """Raises DataError if a parameter is unknown or out of range."""
    load: Callable[..., Data]
    """(spec) -> data; with `draw_by_seed`, (spec, draw=number) -> data."""
    verified: bool = False
    """Whether completions can be rewarded."""


GENERATORS = {
    "bandit": Generator(facts.VOCAB, facts.check_bandit, facts.load_bandit, verified=True),
    "dialect": Generator(dialect.VOCAB, dialect.check, dialect.load),
    "facts": Generator(facts.VOCAB, facts.check_facts, facts.load_facts),
    "skills": Generator(skills.VOCAB, skills.check_skills, skills.load_skills),
    "words": Generator(skills.VOCAB, skills.check_words, skills.load_words, verified=True),
}


def generator(name: str) -> Generator:
    """Return a generator by name (the data set's location); raise DataError if there is none."""
    if name not in GENERATORS:
        raise DataError(unknown("synthetic data set", name, GENERATORS))
    return GENERATORS[name]
