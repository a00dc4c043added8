"""The answer to one customer, and to a table of them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorasweep.advise.customer import Customer, RowError, customer_of
from lorasweep.advise.information import Information
from lorasweep.advise.kept import Kept
from lorasweep.advise.published import Published, published
from lorasweep.advise.rules.batches import Batches, batches_of
from lorasweep.advise.rules.capacity import LAYERS, Choice, choose
from lorasweep.advise.rules.costs import Arm, Costs, Machines, costs_of, hardware_of
from lorasweep.advise.rules.rates import ALPHA, Rate, rate_of
from lorasweep.advise.rules.regime import Case, Condition, conditions_of, habits_of
from lorasweep.advise.rules.workload import Workload, workload_of
from lorasweep.advise.shapes import Models, shape_of
from lorasweep.advise.table import Row
from lorasweep.advise.trace import Trace
from lorasweep.errors import SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec


@dataclass(frozen=True)
class Known:
    """What the rules rest on: catalogues, kept answers, published figures."""

    models: Models
    machines: Machines
    kept: Kept = field(default_factory=Kept)
    published: Published = field(default_factory=published)
    hardware: Hardware | None = None
    """For rows that name none."""
    information: Information = field(default_factory=dict)
    """What was measured in customers' data."""


@dataclass(frozen=True)
class Advice:
    """The answer to one customer."""

    where: str
    customer: Customer
    model: ModelSpec
    work: Workload
    choice: Choice
    rate: Rate
    """Of the chosen method; LoRA's where it is open."""
    batches: Batches
    costs: Costs
    conditions: list[Condition]
    trace: Trace
    published: Published
    """What others published, as the rules took it."""

    @property
    def name(self) -> str:
        """The customer's name."""
        return self.customer.name

    @property
    def in_catalogue(self) -> bool:
        """Whether the model is described by a file of the configuration."""
        return bool(self.model.revision or self.model.recipe)

    def plain(self) -> dict[str, Any]:
        """Return the answer as JSON values."""
        c, costs, choice = self.customer, self.costs, self.choice
        arms = {"lora": costs.lora, "full": costs.full}
        chosen = arms["full" if choice.method == "full" else "lora"]
        both = {
            f"{what}_{name}": value
            for name, arm in arms.items()
            for what, value in (
                ("gpus", arm.placed.gpus),
                ("fits", arm.fits),
                ("peak_gib", arm.placed.peak_gib),
                ("hours", arm.hours),
                ("cost_usd", arm.cost_usd),
                ("serving_gib", arm.serving_gib),
            )
        }
        sure = {n: r.sure.name.lower() for n, r in self.trace.reasons.items() if n in SURE_OF}
        return {
            "name": c.name,
            "model": self.model.name,
            "task": c.task,
            "method": choice.method,
            "by": choice.by,
            "why": choice.why,
            "layers": LAYERS,
            "rank": choice.rank,
            "alpha": ALPHA,
            "lr": self.rate.rate,
            "lr_low": self.rate.low,
            "lr_high": self.rate.high,
            "lr_source": self.rate.source,
            "batch_size": self.work.batch_size,
            "batch_size_max": self.batches.largest,
            "steps": self.work.steps,
            "steps_min": self.batches.steps_min,
            "bits": self.work.bits,
            "load": choice.load,
            "gpu": costs.hardware.name,
            "gpus": chosen.placed.gpus,
            "hours": chosen.hours,
            "cost_usd": chosen.cost_usd,
            "flops_ratio": costs.flops_ratio,
            "adapter_mib": costs.lora.file_mib,
            "model_gib": costs.full.file_mib / 1024,
            "serving_gib": chosen.serving_gib,
            **both,
            "regime": [condition.plain() for condition in self.conditions],
            "warnings": self.trace.warnings,
            "evidence": self.evidence(),
            "sure": sure,
            "error": None,
        }

    def evidence(self) -> list[str]:
        """List what the answer rests on, each once."""
        reasons = [r for name, r in self.trace.reasons.items() if name in SURE_OF]
        return list(dict.fromkeys(f"{r.name}: {r.source}" for r in reasons))


SURE_OF = (
    "method",
    "rank",
    "layers",
    "lr",
    "batch_size_max",
    "load",
    "hours_lora",
    "peak_gib_lora",
)
"""Answers whose sureness and source stand beside them."""


@dataclass(frozen=True)
class Failed:
    """A row that could not be answered."""

    where: str
    name: str
    problems: list[str]

    @property
    def error(self) -> str:
        """What is wrong, with the row."""
        return f"{self.where}: " + " ".join(self.problems)

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values, with the keys of an answer."""
        return {**dict.fromkeys(KEYS), "name": self.name, "warnings": [], "error": self.error}


KEYS = (
    *("name", "method", "layers", "rank", "lr", "lr_low", "lr_high", "lr_source"),
    *("batch_size_max", "steps_min", "load", "gpu", "gpus", "peak_gib_lora", "peak_gib_full"),
    *("flops_ratio", "hours", "cost_usd", "adapter_mib", "serving_gib", "regime", "warnings"),
    *("evidence", "error"),
)
"""Keys that every answer has."""


def advise(c: Customer, known: Known, where: str = "customer") -> Advice:
    """Answer one customer.

    Raises:
        RowError: the model, the hardware or the data are not known.
    """
    trace = Trace()
    model = shape_of(c, known.models)
    _check_plan(c, model)
    hardware = hardware_of(c, known.machines, known.hardware)
    work = workload_of(c, model.name, known.information, known.published, trace)
    choice = choose(c, model, work, known.kept, known.published, trace)
    shared = (choice.rank, work, known.kept, known.published)
    lora = rate_of(c, model, "lora", *shared, trace)
    rate = rate_of(c, model, "full", *shared, trace) if choice.method == "full" else lora
    batches = batches_of(c, work, known.kept, known.published, trace)
    costs = costs_of(c, model, choice.rank, work, hardware, trace)
    case = Case(c, model, work, choice, lora, batches)
    conditions = conditions_of(case, known.kept, known.published)
    for habit in habits_of(case, known.kept, known.published):
        trace.warn(habit)
    return Advice(
        where,
        c,
        model,
        work,
        choice,
        rate,
        batches,
        costs,
        conditions,
        trace,
        published=known.published,
    )


def _check_plan(c: Customer, model: ModelSpec) -> None:
    """Refuse a planned rank or planned layers that the model cannot have."""
    if c.rank is None and c.layers is None:
        return
    layers = c.layers or LAYERS
    smallest = max(1, model.n_active_experts) if "mlp" in parse_layers(layers) else 1
    try:
        LoRA(rank=c.rank or smallest, layers=layers).check(model)
    except SpecError as error:
        text = str(error).replace("method.", "")
        raise RowError([f"column {'rank' if c.rank else 'layers'}: {text}"]) from None


def answers(rows: Iterable[Row], known: Known) -> list[Advice | Failed]:
    """Answer every row; a row that is wrong says why and stops no other."""
    found: list[Advice | Failed] = []
    seen: Counter[str] = Counter()
    for row in rows:
        name = str(row.values.get("name") or "").strip()
        try:
            if row.problem:
                raise RowError([row.problem])
            c = customer_of(row.values)
            seen[c.name] += 1
            if seen[c.name] > 1:
                raise RowError(
                    [
                        f"column name: {c.name!r} stands in the table before. Give each customer "
                        "a name of its own."
                    ]
                )
            found.append(advise(c, known, row.where))
        except RowError as error:
            found.append(Failed(row.where, name, error.problems))
    return found


def totals(found: Iterable[Advice | Failed]) -> Mapping[str, Any]:
    """Sum a table up: how many of each method, and what each choice for everyone would cost."""
    given = list(found)
    good: list[Advice] = [a for a in given if isinstance(a, Advice)]
    counts = Counter(a.choice.method for a in good)

    both = [a for a in good if None not in (a.costs.lora.cost_usd, a.costs.full.cost_usd)]

    def chosen(a: Advice) -> Arm:
        return a.costs.full if a.choice.method == "full" else a.costs.lora

    def cost(arms: Iterable[Arm]) -> float:
        return float(sum(arm.cost_usd or 0.0 for arm in arms))

    return {
        "customers": len(given),
        **{method: counts[method] for method in ("lora", "full", "open")},
        "errors": len(given) - len(good),
        "cost_usd": cost(chosen(a) for a in good),
        "comparable": len(both),
        "cost_usd_of_these": cost(chosen(a) for a in both),
        "cost_usd_lora": cost(a.costs.lora for a in both),
        "cost_usd_full": cost(a.costs.full for a in both),
        "serving_gib_lora": _shared_gib(good),
        "serving_gib_full": sum(a.costs.full.serving_gib for a in good),
    }


def _shared_gib(good: Iterable[Advice]) -> float:
    """Return the memory of all customers' adapters on one base a model."""
    bases = {a.model: a.costs.full.file_mib for a in good}
    adapters = sum(a.customer.adapters_served * a.costs.lora.file_mib for a in good)
    return (sum(bases.values()) + adapters) / 1024
