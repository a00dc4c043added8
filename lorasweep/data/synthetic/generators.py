"""All synthetic data sets by name. A new generator is one entry here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from lorasweep.data.examples import Data, Parameter, parameters
from lorasweep.data.synthetic import dialect, facts, skills
from lorasweep.errors import DataError, unknown
from lorasweep.spec.dataset import DatasetSpec


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
    "bandit": Generator(facts.VOCAB, facts.BANDIT, facts.BANDIT_LENGTH, facts.load_bandit, True),
    "dialect": Generator(
        *(dialect.VOCAB, dialect.PARAMETERS, 4, dialect.load),
        check=lambda spec: dialect.checked(spec.generator_params, f"dataset {spec.name!r}"),
    ),
    "facts": Generator(
        facts.VOCAB, facts.FACTS, facts.FACT, facts.load_facts, check=facts.check_facts
    ),
    "skills": Generator(skills.VOCAB, skills.SKILLS, skills.LONGEST, skills.load_skills),
    "words": Generator(skills.VOCAB, {}, skills.LONGEST_WORDS, skills.load_words, True),
}


def generator(name: str) -> Generator:
    """Return a generator by name (the data set's location); raise DataError if there is none."""
    if name not in GENERATORS:
        raise DataError(unknown("synthetic data set", name, GENERATORS))
    return GENERATORS[name]


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
