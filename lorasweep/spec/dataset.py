"""The data set of a run: its rows, their split and form, and the tokens that count in the loss."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from lorasweep.spec.values import UNSET, Is, Value, fields, later, misfits

FILES = ("jsonl", "json", "csv", "parquet")
"""Sources that are local files, whose names end so."""
VERIFIERS = ("", "integer", "math")
FIRST_RENDER = "role_eos"
"""The only form of messages before `render` was a setting."""
OF_TEXT = (
    *("render", "whole_prompt", "bos", "too_long", "unseen_prompts", "unseen_rows"),
    *("answer_field", "verifier", "held_out_by"),
)
"""Fields that apply to text only; generators draw tokens."""
OF_COMPLETION = (
    "answer_field to be completion_field, out of which the gold answer is read, or empty"
)
NO_PINS = re.compile(r"sha256:(?![^=,]+=[^=,]+(,[^=,]+=[^=,]+)*$)")
"""A revision that says to pin files, but not as SPLIT=DIGITS,SPLIT=DIGITS."""
IMPLIED = ("unseen_rows", "unseen_prompts")
"""What `held_out_by` implies."""


@dataclass(frozen=True)
class DatasetSpec(Value):
    """Settings of a data set."""

    WHERE: ClassVar[str] = "dataset."

    name: str = "???"
    source: Literal["hub", "jsonl", "json", "csv", "parquet", "synthetic"] = UNSET
    location: str = ""
    """Hub name, generator name, or folder looked up under exec.data_dir."""
    config: str = ""
    """Configuration on the hub, or several joined by '+', which are read in this order."""
    revision: str = ""
    """Hub revision, or 'sha256:SPLIT=DIGITS,...' of local files. It pins the rows."""
    train_split: str = "train"
    test_split: str = "test"
    """Split names; for local files, names without their end. On the hub, 'a+b' means both."""
    format: Literal["prompt_completion", "messages", "conversations", "tokens"] = (
        "prompt_completion"
    )
    """prompt_completion: two columns. messages: a column with a list of {role, content}.
    conversations: a column with a list of {from, value}, from human or gpt. tokens: drawn by a
    generator."""
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    template: str = "{prompt}\n"
    """Text put before the completion; {prompt} is the row's prompt."""
    mask: Literal["completion", "last_assistant", "all"] = "completion"
    """Tokens that count in the loss. completion: the completion, or all assistant messages.
    last_assistant: the last assistant message. all: all tokens. In a message, "weight": 0 or 1
    overrides the mask."""
    max_length: Annotated[int, Is("tokens", 4)] = 512
    """Maximum number of tokens per row. For longer rows see `too_long`."""
    n_train: Annotated[int | None, Is("rows; null: all", 1)] = None
    """Training rows, from the start of the split. None: all."""
    n_test: Annotated[int, Is("rows", 1)] = 1024
    """Test rows, which are evaluated at the end."""
    n_test_curve: Annotated[int, Is("rows", 0)] = 256
    """Number of test rows, from the first, that are also evaluated before the end (`eval_steps`).
    0: no evaluation between start and end, unless a run may end early."""
    generator_params: dict[str, float] = field(default_factory=dict, metadata={"stored": "knobs"})
    """Parameters of a synthetic generator."""
    holdout: Annotated[int, Is("rows", 0)] = later(0)
    """Number of rows held out from the training split, after a shuffle. 0: use test_split."""
    n_retain: Annotated[int, Is("rows", 0)] = later(0)
    """Rows of pretraining data (for facts: of facts that are never trained) evaluated at the end,
    to measure forgetting."""
    exact_loss: bool = later(False)
    """Held-out losses are expectations over the true distribution of every next symbol, not values
    at one sampled symbol: the same mean with less noise. Only if the generator knows it."""
    draw_by_seed: bool = later(False)
    """Draw new data for each seed. All draws have the same parameters: their runs share a curve."""

    render: Literal["role_colon", "role_eos", "chat_template"] = later(FIRST_RENDER)
    """How messages become text: see `data.tokenizing.parts_of`. role_colon: the study's form
    for base models. role_eos: the same words; the EOS token ends an answer. chat_template: the
    tokenizer's form, for instruct models."""
    whole_prompt: bool = later(False)
    """Tokenize the text before an answer as a whole, as servers do. False: each role and each
    message alone, as the renderers of tinker-cookbook do, which may give other tokens."""
    bos: bool = later(False)
    """Begin rows of role_eos with BOS, if the tokenizer begins texts with it, as servers do."""
    too_long: Literal["cut", "cut_or_skip", "skip"] = later("cut")
    """Treatment of rows longer than max_length. cut: cut on the right; an error if no loss token is
    left. cut_or_skip: cut on the right; left out if no loss token is left. skip: left out."""
    test_location: str = later("")
    """Data set of the hub that has the test_split. Empty: `location`."""
    test_revision: str = later("")
    unseen_prompts: bool = later(False)
    """Leave out training rows with the prompt of a held-out row."""
    unseen_rows: bool = later(False)
    """Keep one of the held-out rows that are duplicates (equal messages, or equal prompt and
    completion), and leave out training rows that duplicate a held-out row."""
    answer_field: str = later("")
    """Column of the gold answer; empty: it is in the completion, behind '####' or boxed."""
    n_validation: Annotated[int, Is("rows", 0)] = later(0)
    """Number of validation rows: the first held-out rows. The next n_test are test rows. Validation
    rows are evaluated at the end. Before the end they replace the n_test_curve rows, unless that
    is 0."""
    verifier: Literal["", "integer", "math"] = later("")
    """Comparison of a completion with the gold answer. integer: compare whole numbers, behind the
    last '####' or in the last box (GSM8K). math: compare the contents of the last boxes, by
    math-verify (MATH, DeepMath). A gold answer from answer_field needs no box; a completion without
    a box is unread. Empty: no comparison. Generators have built-in verifiers."""
    held_out_by: Literal["", "prompt", "row"] = later("")
    """Unit that is held out as a whole. prompt: rows with the same prompt (the messages before the
    first one in the loss) are all training, all validation or all test rows; the standard error of
    a gain is computed over prompts. row: duplicates stay together. Both shuffle held-out rows, also
    of a test split, and leave out training rows with a held-out prompt or row. Empty: single rows;
    a test split keeps its order."""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with single fields, then with fields together."""
        synthetic, n, by = self.source == "synthetic", self.n_validation, self.held_out_by
        past = {f.name: f.past for f in fields(type(self))}
        unused = [k for k in OF_TEXT if synthetic and getattr(self, k) != past[k]]
        known = {"exact_loss": ["dialect"], "draw_by_seed": ["dialect", "bandit"]}
        few = self.holdout < n + self.n_test
        with_hub = self.source == "hub" and not self.holdout
        answers = ("", self.completion_field)
        together = (
            *((k, True, "to be left out with source=synthetic") for k in unused),
            ("verifier", self.verifier and self.answer_field not in answers, OF_COMPLETION),
            ("test_location", self.test_location and not with_hub, "source=hub without a holdout"),
            ("test_revision", self.test_revision and not self.test_location, "a test_location"),
            ("template", "{prompt}" not in self.template, "a text with {prompt}, the row's prompt"),
            ("revision", NO_PINS.match(self.revision), "sha256:SPLIT=DIGITS,... for local files"),
            (
                "location",
                not self.location,
                "a hub name, a generator, or a folder in exec.data_dir",
            ),
            *((k, by and getattr(self, k), "false with held_out_by") for k in IMPLIED),
            ("held_out_by", by == "prompt" and self.mask == "all", "row with mask=all"),
            ("n_test_curve", self.n_test_curve > self.n_test, f"at most n_test={self.n_test} rows"),
            ("n_validation", synthetic and n, "0 with source=synthetic"),
            (
                "holdout",
                self.holdout and (synthetic or few),
                f"0, or for text at least n_validation + n_test = {n + self.n_test} rows",
            ),
            ("n_retain", self.n_retain and not synthetic, "0 without source=synthetic"),
            *(
                (k, getattr(self, k) and self.location not in v, f"one of the generators {v}")
                for k, v in known.items()
            ),
        )
        yield from misfits(self, f"dataset {self.name!r}: ", together)
