"""Column names and values that other people's tables use, and suggestions for unknown ones."""

import difflib
import re
from collections.abc import Iterable

NEEDED = ("model", "lr", "test_nll")
OPTIONAL = (
    *("method", "rank", "status", "dataset", "batch_size", "seed", "hidden_size", "layers"),
    *("alpha", "steps", "nll_start", "scope", "schedule", "precision"),
)
ALIASES = {
    theirs: name
    for name, all_theirs in {
        "lr": ("learning_rate", "learningrate", "peak_lr", "max_lr"),
        "rank": ("lora_r", "lora_rank", "r"),
        "test_nll": (
            *("eval_loss", "test_loss", "val_loss", "valid_loss", "validation_loss"),
            *("loss", "nll", "eval_nll"),
        ),
        "model": ("model_id", "model_name", "base_model", "model_name_or_path"),
        "status": ("state",),
        "method": ("tuning", "peft_type"),
        "alpha": ("lora_alpha",),
        "batch_size": ("bs", "global_batch_size"),
        "steps": ("max_steps", "n_steps"),
        "seed": ("random_seed",),
        "hidden_size": ("hidden", "width", "d_model"),
        "layers": ("target_modules",),
        "dataset": ("dataset_name", "task"),
    }.items()
    for theirs in all_theirs
}
"""Column names in use elsewhere: suggested in error messages, never mapped silently."""
STATUS = {
    **dict.fromkeys(("done", "finished", "completed", "complete", "success", "ok"), "done"),
    **dict.fromkeys(("diverged", "nan", "inf"), "diverged"),
    **dict.fromkeys(
        ("failed", "crashed", "killed", "preempted", "running", "stopped", "cancelled"),
        "failed",
    ),
}
"""Words for how a run ended, including W&B's. Failed runs are left out: a failure does not
show whether the learning rate was good."""
METHODS = dict.fromkeys(
    (
        *("full", "fft", "full_ft", "full-ft"),
        *("full_finetuning", "full-finetuning", "full fine-tuning", "sft_full"),
    ),
    "fullft",
)
"""Other names of full fine-tuning."""


def missing(column: str, names: list[str]) -> str:
    """Return the error message for a missing column, with the likeliest of the existing names."""
    aliases = [n for n in names if ALIASES.get(n.lower().replace(" ", "_")) == column]
    likely = aliases or difflib.get_close_matches(column, names, 1, 0.5)
    hint = (
        f" It may be {likely[0]!r}: add --map {likely[0]}={column}."
        if likely
        else f" Map one to it: --map YOUR_COLUMN={column}."
    )
    return f"there is no column {column!r}.{hint} The file has: {', '.join(names)}."


def did_you_mean(name: str, names: Iterable[object]) -> str:
    """Suggest the most similar name, as a sentence; empty if none is similar."""
    close = difflib.get_close_matches(name, list(map(str, names)), 1, 0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


_PARAMETERS = re.compile(r"(\w+)\((\w+=[^()]+)\)")
SHARES = {"rule_shift": "rules", "new_exceptions": "exceptions"}
"""Parameters of generators that are the share of something that is new."""


def in_words(text: str) -> str:
    """Return a text in which the parameters behind a data set's name are words.

    "dialect(new_exceptions=0, rule_shift=1)" is "dialect (no new exceptions, all rules new)".
    """

    def words(found: re.Match[str]) -> str:
        said = []
        for key, _, value in (part.partition("=") for part in found[2].split(", ")):
            what = SHARES.get(key)
            if what is None:
                said.append(f"{key.replace('_', ' ')} {value}")
            elif float(value) == 0:
                said.append(f"no new {what}")
            else:
                share = 100 * float(value)
                said.append(f"all {what} new" if share == 100 else f"{share:g}% of the {what} new")
        return f"{found[1]} ({', '.join(said)})"

    return _PARAMETERS.sub(words, text)
