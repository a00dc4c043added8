"""The advice for one customer, and for a table of customers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorasweep.advise.evidence import Case, Known
from lorasweep.advise.read import Customer, Failed, RowError, shape_of
from lorasweep.advise.rules.capacity import LAYERS, Choice, choose
from lorasweep.advise.rules.costs import Arm, Costs, costs_of, hardware_of
from lorasweep.advise.rules.rates import ALPHA, Rate, rate_of
from lorasweep.advise.rules.regime import Condition, conditions_of, note_habits
from lorasweep.advise.rules.workload import Batches, Workload, batches_of, workload_of
from lorasweep.errors import SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import parse_layers

KEYS = (
    *("name", "method", "layers", "rank", "lr", "lr_low", "lr_high", "lr_source"),
    *("batch_size_max", "steps_min", "load", "gpu", "gpus", "peak_gib_lora", "peak_gib_full"),
    *("flops_ratio", "hours", "cost_usd", "adapter_mib", "serving_gib", "regime", "warnings"),
    *("evidence", "error"),
)
"""Keys of every answer as JSON, also of the answer for a wrong row."""
SURE_OF = (
    *("method", "rank", "layers", "lr", "batch_size_max", "load", "hours_lora", "peak_gib_lora"),
)
"""Fields reported with confidence and source."""
OF_ARM = ("gpus", "fits", "peak_gib", "hours", "cost_usd", "serving_gib")
"""Fields of both methods, such as gpus_lora and gpus_full."""


@dataclass(frozen=True, kw_only=True)
class Advice(Case):
    """The advice for one customer. If the method is undecided, rate and costs are those of LoRA."""

    work: Workload
    choice: Choice
    rate: Rate
    batches: Batches
    costs: Costs
    conditions: list[Condition]

    @property
    def name(self) -> str:
        """The customer's name."""
        return self.customer.name

    @property
    def chosen(self) -> Arm:
        """The costs of the advised method."""
        return self.costs.full if self.choice.method == "full" else self.costs.lora

    def plain(self) -> dict[str, Any]:
        """Return the advice as JSON values."""
        costs, choice, rate, work = self.costs, self.choice, self.rate, self.work
        arms = {"lora": costs.lora, "full": costs.full}
        both = {f"{key}_{name}": getattr(arm, key) for name, arm in arms.items() for key in OF_ARM}
        reasons = [r for name, r in self.reasons.items() if name in SURE_OF]
        return {
            "name": self.name,
            "model": self.model.name,
            "task": self.customer.task,
            "method": choice.method,
            "by": choice.by,
            "why": choice.why,
            "layers": LAYERS,
            "rank": choice.rank,
            "alpha": ALPHA,
            "lr": rate.rate,
            "lr_low": rate.low,
            "lr_high": rate.high,
            "lr_source": rate.source,
            "batch_size": work.batch_size,
            "batch_size_max": self.batches.largest,
            "steps": work.steps,
            "steps_min": self.batches.steps_min,
            "bits": work.bits,
            "load": choice.load,
            "gpu": costs.hardware.name,
            "gpus": self.chosen.gpus,
            "hours": self.chosen.hours,
            "cost_usd": self.chosen.cost_usd,
            "flops_ratio": costs.flops_ratio,
            "adapter_mib": costs.lora.file_mib,
            "model_gib": costs.full.file_mib / 1024,
            "serving_gib": self.chosen.serving_gib,
            **both,
            "regime": [
                {"condition": c.name, "state": c.state, "why": c.why}
                | {"evidence": list(c.evidence), "sure": c.sure.name.lower()}
                for c in self.conditions
            ],
            "warnings": self.warnings,
            "evidence": list(dict.fromkeys(f"{r.name}: {r.source}" for r in reasons)),
            "sure": {r.name: r.sure.name.lower() for r in reasons},
            "error": None,
        }


def plain_of(found: Advice | Failed) -> dict[str, Any]:
    """Return an answer as JSON values; the answer for a wrong row has only KEYS."""
    if isinstance(found, Advice):
        return found.plain()
    return {**dict.fromkeys(KEYS), "name": found.name, "warnings": [], "error": found.error}


def advise(c: Customer, known: Known) -> Advice:
    """Advise one customer.

    Raises:
        RowError: model, hardware or data are not known, or the model cannot have the planned rank
            or layers.
    """
    case = Case(c, shape_of(c, known.models), known)
    if c.rank is not None or c.layers is not None:
        layers = c.layers or LAYERS
        smallest = max(1, case.model.n_active_experts) if "mlp" in parse_layers(layers) else 1
        try:
            LoRA(rank=c.rank or smallest, layers=layers).check(case.model)
        except SpecError as error:
            text = str(error).replace("method.", "")
            raise RowError(f"column {'rank' if c.rank else 'layers'}: {text}") from None
    hardware = hardware_of(case)
    work = workload_of(case)
    choice = choose(case, work)
    lora = rate_of(case, "lora", choice.rank, work)
    rate = rate_of(case, "full", choice.rank, work) if choice.method == "full" else lora
    batches = batches_of(case, work)
    costs = costs_of(case, choice.rank, work, hardware)
    note_habits(case, work, choice, lora, batches)
    conditions = conditions_of(case, work, choice, lora, batches)
    return Advice(
        **vars(case),
        work=work,
        choice=choice,
        rate=rate,
        batches=batches,
        costs=costs,
        conditions=conditions,
    )


def answers(customers: Iterable[Customer | Failed], known: Known) -> list[Advice | Failed]:
    """Advise every customer; an error does not affect other customers."""
    found: list[Advice | Failed] = []
    for c in customers:
        try:
            found.append(c if isinstance(c, Failed) else advise(c, known))
        except RowError as error:
            found.append(Failed(c.where, c.name, error.problems))
    return found


def totals(found: Iterable[Advice | Failed]) -> dict[str, Any]:
    """Count customers by method, and add up the costs as advised, with LoRA and with FullFT."""
    given = list(found)
    good = [a for a in given if isinstance(a, Advice)]
    counts = Counter(a.choice.method for a in good)
    both = [a for a in good if None not in (a.costs.lora.cost_usd, a.costs.full.cost_usd)]

    def cost(arms: Iterable[Arm]) -> float:
        return float(sum(arm.cost_usd or 0.0 for arm in arms))

    bases = {a.model: a.costs.full.file_mib for a in good}
    adapters = sum(a.customer.adapters_served * a.costs.lora.file_mib for a in good)
    return {
        "customers": len(given),
        **{method: counts[method] for method in ("lora", "full", "open")},
        "errors": len(given) - len(good),
        "cost_usd": cost(a.chosen for a in good),
        "comparable": len(both),
        "cost_usd_of_these": cost(a.chosen for a in both),
        "cost_usd_lora": cost(a.costs.lora for a in both),
        "cost_usd_full": cost(a.costs.full for a in both),
        "serving_gib_lora": (sum(bases.values()) + adapters) / 1024,
        "serving_gib_full": sum(a.costs.full.serving_gib for a in good),
    }
