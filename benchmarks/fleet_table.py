"""Write customers to time a fleet with: rows, table, and a small base model for the rows.

Rows are drawn by fixed random streams, so the same call writes the same table.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.data.synthetic import dialect, skills
from lorasweep.models import load as models
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.streams import stream
from lorasweep.train import pretrain

FEWEST, MOST = 20, 400
"""Rows of a customer, log-uniform between them."""
BATCHES = (1, 2, 4)
LONGEST_TEXT = 300
"""Rows of GSM8K with more characters are left out, so that an update takes a second or less."""
SYMBOLS = "abcdefghijklmnopqrstuvwxyz012345"
DIALECTS = 8
DIALECT = {"rule_shift": 0.25, "shift_rank": 2.0}
"""Generator parameters, as at scale tiny."""
Row = dict[str, str]


def write_table(
    folder: Path, model: str, count: int, updates: tuple[int, int], rows: Sequence[Row] | None
) -> Path:
    """Write `count` customers' table, and their rows into data/ beside it; return its path.

    Args:
        updates: fewest and most updates of a run.
        rows: every second customer gets some of them; None: all customers get rows of dialects.
    """
    (folder / "data").mkdir(parents=True)
    path = folder / "customers.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", "model", "task", "data", "batch_size", "steps"])
        for k in range(count):
            rng = stream("bench", "customer", k)
            n = round(float(np.exp(rng.uniform(np.log(FEWEST), np.log(MOST)))))
            if rows is None:
                mine = _dialect(rng, n, k)
            elif k % 2:
                pairs = (skills.instance(rng, 1 + k % 3) for _ in range(n))
                mine = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
            else:
                mine = [rows[int(i)] for i in rng.choice(len(rows), n, replace=False)]
            data = folder / "data" / f"customer-{k:03d}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in mine))
            steps = int(rng.integers(updates[0], updates[1] + 1))
            size = BATCHES[int(rng.integers(len(BATCHES)))]
            table.writerow([data.stem, model, "sft", str(data), size, steps])
    return path


def gsm8k(data_dirs: Sequence[str]) -> list[Row]:
    """Return the short rows of GSM8K's training split.

    Raises:
        FileNotFoundError: it is in none of `data_dirs`.
    """
    tried = [Path(d) / "gsm8k" / "train.jsonl" for d in data_dirs]
    found = next((p for p in tried if p.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"no GSM8K at {' or '.join(map(str, tried))}. Type `make data/gsm8k/train.jsonl`."
        )
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    return [r for r in rows if len(r["question"]) + len(r["answer"]) <= LONGEST_TEXT]


def symbol_tokenizer(symbols: Sequence[str], unknown: str, **special: str) -> Any:
    """Return a tokenizer of symbols; `unknown` is the one that stands for all other characters.

    `special`: eos_token and pad_token.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=unknown))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def write_base(spec: ModelSpec, models_dirs: Sequence[str], folder: Path) -> Path:
    """Write a base model with a tokenizer of SYMBOLS (the first is EOS); return its config.json."""
    pretrain.ensure(spec, list(models_dirs))
    model: Any = models.load(spec, models_dirs).model
    tokenizer = symbol_tokenizer(SYMBOLS, SYMBOLS[0], eos_token=SYMBOLS[0])
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder / "config.json"


def _dialect(rng: np.random.Generator, count: int, k: int) -> list[Row]:
    """Draw sequences of dialect k; lengths differ between customers and between rows."""
    longest = int(rng.integers(24, 65))
    table = dialect.transition(DIALECT, "bench", k % DIALECTS)
    tokens = dialect.sample(table, rng, count, longest)
    texts = ["".join(SYMBOLS[t] for t in row) for row in tokens]
    lengths = rng.integers(longest // 2, longest + 1, size=count)
    return [{"prompt": t[:3], "completion": t[3:n]} for t, n in zip(texts, lengths)]
