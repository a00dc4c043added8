"""The small sweep that would settle a customer's question, as files for --config-dir."""

import re
from pathlib import Path
from typing import Any

import yaml

from lorasweep.advise.advice import Advice
from lorasweep.advise.customer import GROUP
from lorasweep.advise.rules.capacity import ranks_of
from lorasweep.advise.rules.rates import law_rate
from lorasweep.advise.shapes import family_of
from lorasweep.data import own
from lorasweep.data.verifiers import reading
from lorasweep.errors import SpecError

FOLDER = "settle"
STEPS = 1000
"""Most updates of the sweep: what tinker-cookbook asks for where possible."""
RATES, APART = 5, 2
ALLOWED = 5.0
"""What LoRA may give up in the claim, percent of the gain: the analysis has this one limit."""
POINTS = 3
"""Hundredths of the reward that count as no difference, as in sweeps/rl.yaml."""
RL_FACTOR = 3.0
"""Between the middle rates in reinforcement learning: public sweeps say 2 to 4 (zhu)."""
FACTOR = 10.0
"""Between LoRA's and full fine-tuning's middle rates, where no law knows the model's family."""


def plain_name(name: str) -> str:
    """Return a customer's name in small letters, digits and underscores: for files and options."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "customer"


def write(advice: Advice, folder: Path) -> list[str]:
    """Write the sweep of a customer below `folder`; return what was written and what to type.

    Raises:
        SpecError: nothing verifies the answers in a customer's rows, or the files cannot be
            written.
    """
    c = advice.customer
    name = f"settle_{plain_name(c.name)}"
    rewarded = c.task == "rl"
    sweep, dataset = _sweep(advice, name), _dataset(advice, name)
    if rewarded:
        sweep, dataset = _of_rewards(advice, sweep), _verified(advice, dataset)
    files = {f"sweep/{name}.yaml": "# @package sweep\n" + _text(sweep)}
    files[f"dataset/{name}.yaml"] = _text(dataset)
    if not advice.in_catalogue:
        files[f"model/{name}.yaml"] = _text(_model(advice, name))
    try:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    except OSError as error:
        raise SpecError(f"out={folder}: {error}") from None
    lines = [f"wrote {folder / path}" for path in files]
    if c.data is None:
        lines.append(f"put the rows in DATA_DIR/{name}/train.jsonl and test.jsonl (exec.data_dir)")
    elif not own.is_on_hub(c.data) and not own.path_of(c.data).with_name("test.jsonl").is_file():
        lines.append(
            f"put held-out rows in test.jsonl beside {own.path_of(c.data)}, and write this again: "
            "without them the sweep would be judged on the rows it trains on"
        )
    if rewarded:
        lines.append(
            f"answers are read by verifier: {dataset['verifier']}. The plan does not count the "
            "time of sampling them"
        )
    command = f"python -m lorasweep --config-dir {folder} +sweep={name} precision=bf16"
    return [
        *lines,
        f"what it takes: {command} action=plan hardware={advice.costs.hardware.name}",
        f"run it: {command}",
    ]


def _text(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _sweep(advice: Advice, name: str) -> dict[str, Any]:
    work, choice = advice.work, advice.choice
    lora, full = middle_rates(advice)
    around = "${{around:{:.3g},{},{}}}"
    low = max((r for r in ranks_of(advice.model) if r < choice.rank), default=choice.rank)
    ranks = sorted({low, choice.rank})
    return {
        "question": "Does LoRA give up anything on these data, at this rank?",
        "source": "the adviser: its answer was " + choice.method,
        "how": (
            f"LoRA at rank {choice.rank} and one below against full fine-tuning, each at its "
            "best of "
            f"{RATES} rates a factor {APART} apart, with fresh seeds at the best ones. A run of "
            "few "
            "updates does not show what a longer one would."
        ),
        "claims": {
            "no_regret": {
                "text": "at the highest rank LoRA gives up nothing",
                "source": "ours",
                "measure": f"loss(LoRA) - loss(full fine-tuning) - {ALLOWED:g}% of the gain, nats",
                "estimand": "over_allowed_top_rank",
                "expected": -0.01,
                "margin": [-10, 0],
                "primary": True,
            },
            "order": {
                "text": "LoRA's best rate is of the order of 10 times full fine-tuning's",
                "source": "study",
                "measure": "best LoRA rate / best full fine-tuning rate",
                "estimand": "lr_ratio",
                "expected": 10,
                "margin": [5, 20],
            },
        },
        "axes": {
            "model": [advice.model.name if advice.in_catalogue else name],
            "dataset": [name],
            "batch_size": [work.batch_size],
            "steps": [min(work.steps or STEPS, STEPS)],
            "seed": [0],
        },
        "arms": {
            "fullft": {"method": "fullft", "lr": around.format(full, RATES, APART)},
            "lora": {"method": "lora", "rank": ranks, "lr": around.format(lora, RATES, APART)},
        },
        "replicate": {"seeds": [1, 2, 3], "n_lrs": 2},
        "analysis": "lr_ratio",
    }


def _of_rewards(advice: Advice, sweep: dict[str, Any]) -> dict[str, Any]:
    """Return the sweep for sampled answers that are rewarded: judged in points of the reward."""
    claims = {
        "no_regret": {
            "text": "at the highest rank LoRA reaches full fine-tuning's reward",
            "source": "ours",
            "measure": "reward(highest rank) - reward(full fine-tuning), points",
            "estimand": "points_top_rank",
            "expected": 0,
            "margin": [-POINTS, POINTS],
            "better": "higher",
            "primary": True,
        },
        "order": sweep["claims"]["order"],
    }
    axes = {
        **sweep["axes"],
        "objective": ["policy_gradient"],
        "batch_size": [max(GROUP, advice.work.batch_size // GROUP * GROUP)],
        "group_size": [GROUP],
        "max_new_tokens": [advice.work.max_length // 2],
    }
    return {**sweep, "claims": claims, "axes": axes, "analysis": "rl"}


def _verified(advice: Advice, dataset: dict[str, Any]) -> dict[str, Any]:
    """Return the data set with what verifies its answers, as the customer's first row has them.

    Raises:
        SpecError: nothing does.
    """
    c = advice.customer
    form = {"format": "prompt_completion", "mask": "completion", "too_long": "skip"}
    if c.data is None:
        return {**dataset, **form, "verifier": "math"}
    spec = own.dataset_of(c.data)
    gold = own.first_answer(spec, c.data)
    verifier = "integer" if reading.integer(gold) is not None else "math"
    if spec.format != form["format"] or (verifier == "math" and reading.boxed(gold) is None):
        raise SpecError(
            f"write_sweep={c.name}: nothing verifies the answers in {c.data}. Expected two "
            "columns, such as prompt and completion, and completions that end in a whole number "
            "behind '####' or in a result in \\boxed{}."
        )
    return {**dataset, **form, "verifier": verifier}


def middle_rates(advice: Advice) -> tuple[float, float]:
    """Return the middle rates of LoRA and of full fine-tuning."""
    if advice.customer.task == "rl":
        rate = advice.rate.rate
        full = advice.choice.method == "full"
        return (RL_FACTOR * rate, rate) if full else (rate, rate / RL_FACTOR)
    family = family_of(advice.model)
    law = law_rate(advice.published, family, advice.model.hidden_size, "full") if family else None
    if advice.choice.method == "full":
        return FACTOR * advice.rate.rate, advice.rate.rate
    return advice.rate.rate, law or advice.rate.rate / FACTOR


def _dataset(advice: Advice, name: str) -> dict[str, Any]:
    """Describe the customer's rows: their own form, or messages where no file was named."""
    c = advice.customer
    kept = {"max_length": advice.work.max_length, "n_test": 512, "n_test_curve": 64}
    if c.data is None:
        form = {"format": "messages", "mask": "last_assistant", "too_long": "cut_or_skip"}
        return {"name": name, "source": "jsonl", "location": name, **form, **kept}
    values = own.dataset_of(c.data, name).plain()
    return {k: v for k, v in {**values, **kept}.items() if v not in ({}, "", None)}


def _model(advice: Advice, name: str) -> dict[str, Any]:
    shape = advice.model.plain()
    for key in ("attention", "mlp", "unembedding", "recipe"):
        shape.pop(key, None)
    return {**shape, "name": name}
