"""Write a small sweep that tests the advice for a customer, as files for --config-dir."""

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from lorasweep.customers.advice import Advice
from lorasweep.customers.pages import render
from lorasweep.customers.rules.capacity import ranks_of
from lorasweep.customers.rules.rates import family_of, law_rate
from lorasweep.customers.rules.workload import GROUP
from lorasweep.data import fields, load, own, rewards
from lorasweep.errors import SpecError
from lorasweep.store import folders

FOLDER = "settle"
STEPS = 1000
"""Maximum number of updates. tinker-cookbook asks for this many where possible."""
LIMITS = {"rates": 5, "apart": 2, "allowed": 5, "points": 3, "group": GROUP}
"""rates, apart: number of learning rates of a curve, and the factor between them. allowed: accepted
regret, in percent of the gain. points: accepted difference of the reward, in hundredths
(sweeps/rl.yaml). group: samples per problem in RL."""
FACTOR = 10.0
"""LoRA's middle learning rate / full fine-tuning's, for model families without a published law."""
RL_FACTOR = 3.0
"""The same ratio in RL. Public sweeps found 2 to 4 (zhu in published.yaml)."""


def plain_name(name: str) -> str:
    """Return a name in small letters, digits and underscores, for files and options."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "customer"


def write(advice: Advice, folder: Path, alone: bool = True) -> list[str]:
    """Write a customer's sweep below `folder`; return lines with the files and the next commands.

    `alone`: no other customer has the same `plain_name`; else the files' names get a digest.

    Raises:
        SpecError: no verifier can check the customer's answers, or a file cannot be written.
    """
    c, model, rank = advice.customer, advice.model, advice.choice.rank
    name, rewarded = f"settle_{plain_name(c.name)}", c.task == "rl"
    if not alone:
        name += f"_{hashlib.sha256(c.name.encode()).hexdigest()[:8]}"
    steps = min(advice.work.steps or STEPS, STEPS)
    share = _share(advice, steps)
    in_catalogue = c.model.lower() in advice.known.models and bool(model.revision or model.recipe)
    lora, full = middle_rates(advice)
    low = max((r for r in ranks_of(model) if r < rank), default=rank)
    dataset = _dataset(advice, name)
    sweep = render(
        "sweep.yaml",
        name=name,
        rewarded=rewarded,
        method=advice.choice.method,
        model=model.name if in_catalogue else name,
        steps=steps,
        share=share,
        batch_size=advice.work.batch_size,
        max_length=advice.work.max_length,
        ranks=sorted({low, rank}),
        lora=lora,
        full=full,
        **LIMITS,
    )
    files = {f"sweep/{name}.yaml": sweep, f"dataset/{name}.yaml": _text(dataset)}
    if not in_catalogue:
        shape = {k: v for k, v in model.plain().items() if v is not None}
        files[f"model/{name}.yaml"] = _text({**shape, "name": name})
    with folders.replaced(folder, "", whole=False) as partial:
        for path, text in files.items():
            (partial / path).parent.mkdir(exist_ok=True)
            (partial / path).write_text(text)
    lines = [f"wrote {folder / path}" for path in files]
    if c.data is None:
        lines.append(f"put the rows in DATA_DIR/{name}/train.jsonl and test.jsonl (exec.data_dir)")
    elif not own.is_on_hub(c.data):
        rows = own.path_of(c.data)
        if not (test := rows.with_name(f"test{rows.suffix}")).is_file():
            lines.append(
                f"put held-out rows in {test.name} beside {rows}, and write the sweep again: "
                "otherwise its runs are evaluated on training rows"
            )
    if share:
        lines.append(f"{share}. All of them: sweep.axes.steps=[{advice.work.steps}]")
    if rewarded:
        lines.append(f"answers are checked by verifier: {dataset['verifier']}")
    command = f"python -m lorasweep --config-dir {folder} +sweep={name} precision=bf16"
    return [
        *lines,
        f"show its cost: {command} action=plan hardware={advice.costs.hardware.name}",
        f"run it: {command}",
    ]


def _share(advice: Advice, steps: int) -> str:
    """Say which share of the data the sweep sees, and what it loads its rank with; '' if all."""
    work, load = advice.work, advice.choice.load
    seen = steps * work.batch_size
    if work.rows is None or work.steps is None or steps >= work.steps:
        return ""
    what = "episodes" if advice.customer.task == "rl" else "rows"
    said = f"its runs see {seen:,} of {work.rows:,.0f} {what}"
    if load is None:
        return said
    here = f"{load * seen / work.rows:.2g}, not {load:.2g}"
    return f"{said}, so the load of rank {advice.choice.rank} is {here}"


def _text(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def middle_rates(advice: Advice) -> tuple[float, float]:
    """Return the middle learning rates of LoRA and full fine-tuning."""
    rate, full = advice.rate.rate, advice.choice.method == "full"
    if advice.customer.task == "rl":
        return (RL_FACTOR * rate, rate) if full else (rate, rate / RL_FACTOR)
    if full:
        return FACTOR * rate, rate
    family, published = family_of(advice.model), advice.known.published
    law = law_rate(published, family, advice.model.hidden_size, "full") if family else None
    return rate, law or rate / FACTOR


def _dataset(advice: Advice, name: str) -> dict[str, Any]:
    """Return the customer's data set as fields; without a file, the rows have format messages."""
    c, verifier = advice.customer, "math"
    sizes = {"max_length": advice.work.max_length, "n_test": 512, "n_test_curve": 64}
    if c.data is None:
        form = {"format": "messages", "mask": "completion", "too_long": "cut_or_skip"}
        values = {"name": name, "source": "jsonl", "location": name, **form, **sizes}
    else:
        spec = own.dataset_of(c.data, name)
        values = {k: v for k, v in {**spec.plain(), **sizes}.items() if v not in ({}, "", None)}
    if c.task != "rl":
        return values
    if c.data is not None:  # choose by the first row
        where, row = next(load.sources_of(spec, ["."])[0].rows())
        listed = spec.format in fields.LISTS
        gold = "" if listed else fields.prompt_and_completion(spec, row, where)[1]
        if rewards.integer(gold) is not None:
            verifier = "integer"
        elif rewards.boxed(gold) is None:
            raise SpecError(
                f"write_sweep={c.name}: no verifier can check the answers in {c.data}. Expected "
                "two columns, such as prompt and completion, and completions that end in a whole "
                "number after '####' or in a result in \\boxed{}."
            )
    form = {"format": "prompt_completion", "mask": "completion", "too_long": "skip"}
    return {**values, **form, "verifier": verifier}
