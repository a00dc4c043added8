"""Any method of PEFT that adapts matrices: the class of a config and its fields (`method=peft`).

A file in conf/method names them, such as `dora`. PEFT makes the adapter and saves it; targets,
loop, rows and checkpoints are those of every method. A named config imports torch and PEFT.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from lorasweep.errors import RankTooLarge, SpecError, TrainingError, check_installed, unknown
from lorasweep.methods.trainables import Target, Trainables
from lorasweep.spec.method import Method, parse_layers
from lorasweep.spec.model import Matrix, ModelSpec
from lorasweep.spec.streams import stream
from lorasweep.spec.values import ABOVE_0, FrozenDict, Is, encode

if TYPE_CHECKING:
    import torch
    from torch import nn

TESTED = ("LoraConfig", "VeraConfig", "OFTConfig", "LoHaConfig", "LoKrConfig", "HRAConfig")
"""Classes with tests here. Others that adapt matrices work as far as PEFT alone makes them work."""
RANK = {"OFTConfig": "oft_block_size", "BOFTConfig": "boft_block_size"}
"""The field that `rank` sets, where it is not `r`."""
ALPHA = ("lora_alpha", "alpha", "randlora_alpha", "psoft_alpha")
OURS = {
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"),
    *("peft_version", "target_modules", "exclude_modules", "layers_to_transform", "bias"),
    *("layers_pattern", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "rank_pattern", "alpha_pattern", "runtime_config", "megatron_config"),
    *("megatron_core", "ensure_weight_tying"),
}
"""Fields that are not set: `layers` says which matrices are adapted, all in one way."""
LOOPS = ("AdaLoraConfig", "AdamssConfig", "ShadowConfig", "PolyConfig", "AdaptionPromptConfig")
"""Classes whose training needs more than the gradient of the loss."""
OF_DATA = ("eva", "corda", "lora_ga", "loftq")
"""Starts of LoRA that need rows or a quantised base."""
REWRITES = ("pissa", "olora")
"""Starts of LoRA that take the adapter out of the base's weights."""
PREFIX = "base_model.model."


@dataclass(frozen=True)
class PEFT(Method):
    """A method of PEFT: its config, resolved."""

    name: str = "peft"
    config: str = ""
    """PEFT's class, such as LoHaConfig."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the class but for rank and alpha. Resolved: all that are not empty, so that a field
    which a later PEFT adds with an empty default changes no id; and `peft_type`."""
    rank: Annotated[int | None, Is("null: the class's default", 1)] = None
    """Field r of the class; of OFT and BOFT the size of a block."""
    alpha: Annotated[float | None, Is("null: the class's default", ABOVE_0, 1e6)] = None
    layers: str = "all"
    """Layer sets joined by '+': attention, mlp, unembedding. 'all' means all three."""
    MAX_PACK: ClassVar[int | None] = 1
    ONE_PROCESS: ClassVar[bool] = True
    LIBRARY: ClassVar[str] = "peft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config:  # else the defaults, of which no run is made
            given = encode(dict(self.fields))
            vars(self).update(_resolved(self.config, given, self.rank, self.alpha))

    def check(self, model: ModelSpec) -> None:
        if not self.config:
            raise SpecError(
                f"method={self.name}: no method.config, the name of one of PEFT's classes. Tested: "
                f"{', '.join(TESTED)}. Or choose method=dora, pissa, olora, vera or oft."
            )
        layers = parse_layers(self.layers)
        if model.n_experts and "mlp" in layers:
            raise SpecError(
                f"method={self.name} on {model.name!r}: experts are adapted by method=lora only. "
                "Use method.layers=attention."
            )
        _trained(self.canonical, model.matrices(layers))

    @property
    def rewrites(self) -> bool:
        """Whether PEFT takes the adapter out of the base's weights: they are held twice."""
        return str(self.fields.get("init_lora_weights", "")).startswith(REWRITES)

    def rank_of(self, matrix: Matrix) -> int | None:
        return self.rank

    def n_copied(self, model: ModelSpec) -> int:
        matrices = model.matrices(parse_layers(self.layers))
        return sum(m.size for m in matrices) if self.rewrites else 0

    def n_trainable(self, model: ModelSpec) -> int:
        matrices = model.matrices(parse_layers(self.layers))
        return sum(n * m.count for n, m in zip(_trained(self.canonical, matrices), matrices))

    def step_flops(self, model: ModelSpec, n_tokens: int) -> float:
        # As LoRA's: the products with the factors, which VeRA has but does not train. Work that
        # does not grow with the tokens is left out, such as the norms of DoRA.
        matrices, rank = model.matrices(parse_layers(self.layers)), self.rank or 0
        trained = _trained(self.canonical, matrices)
        sides = (max(n, rank * (m.d_in + m.d_out)) * m.count for n, m in zip(trained, matrices))
        return n_tokens * (4.0 * model.n_active_params + 6.0 * sum(sides))

    def target_layers(self) -> tuple[str, ...]:
        return parse_layers(self.layers)

    def made(self, modules: Sequence[str]) -> Any:
        """Return PEFT's config for modules with these names (last part)."""
        sizes = {"rank": self.rank, "alpha": self.alpha}
        names = {k: f for k, f in zip(sizes, _size_fields(self.config)) if f}
        own = {k: json.loads(encode(v)) for k, v in self.fields.items() if k != "peft_type"}
        own |= {f: sizes[k] for k, f in names.items()}
        return _class(self.config)(**own, target_modules=sorted(modules))

    def attach(
        self,
        base: "nn.Module",
        targets: dict[str, Target],
        methods: Sequence[Method],
        seeds: Sequence[int],
    ) -> "PeftAdapter":
        if len(methods) != 1:
            raise SpecError(f"method={self.name} trains one run at a time. Set exec.pack_size=1.")
        return PeftAdapter(base, targets, self, seeds[0])


# ---------------------------------------------------------------- PEFT's configs


@cache
def _class(name: str) -> Any:
    """Return a class of PEFT's configs that adapts matrices by a loss's gradient; or SpecError."""
    check_installed("peft", "method=peft")
    import peft
    from peft import PeftConfig

    cls, tested = getattr(peft, name, None), f"Tested: {', '.join(TESTED)}."
    if not (isinstance(cls, type) and issubclass(cls, PeftConfig)):
        raise SpecError(f"{unknown('method.config', name, TESTED)} It is none of PEFT's classes.")
    if "target_modules" not in (f.name for f in dataclasses.fields(cls)):
        raise SpecError(f"method.config={name} adapts no matrices. {tested}")
    if name in LOOPS:
        raise SpecError(f"method.config={name} needs a training loop of its own. {tested}")
    return cls


def _size_fields(name: str) -> tuple[str | None, str | None]:
    """Return the fields of rank and alpha of a class; None: it has none."""
    known = {f.name for f in dataclasses.fields(_class(name))}
    wanted = ((RANK.get(name, "r"),), ALPHA)
    rank, alpha = (next((f for f in some if f in known), None) for some in wanted)
    return rank, alpha


@cache
def _resolved(name: str, given: str, rank: int | None, alpha: float | None) -> dict[str, Any]:
    """Return `fields`, `rank` and `alpha` of a config as PEFT resolves them; or SpecError."""
    cls, fields, sizes = _class(name), json.loads(given), _size_fields(name)
    fields.pop("peft_type", None)
    makers = {f.name: f.default_factory for f in dataclasses.fields(cls)}
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    defaults |= {k: make() for k, make in makers.items() if make is not dataclasses.MISSING}
    allowed = defaults.keys() - OURS - {*sizes, "peft_type"}
    for key, value in fields.items():
        if key not in allowed:
            hint = " Set method.rank or method.alpha." * (key in sizes)
            raise SpecError(unknown(f"field of {name} (method.fields)", key, allowed) + hint)
        kind = type(defaults[key])
        numbers = kind in (int, float) and type(value) in (int, float)
        if kind in (bool, int, float) and not (numbers or type(value) is kind or "init" in key):
            raise SpecError(f"method.fields.{key}={value!r}: expected {kind.__name__}.")
    for what, size, key in (("rank", rank, sizes[0]), ("alpha", alpha, sizes[1])):
        if size is not None and not key:
            raise SpecError(
                f"method.{what}={size:g}: {name} has no {what}. Set method.{what}=null, and "
                f"method.fields: {', '.join(sorted(allowed))}."
            )
        fields |= {key: size} if size is not None else {}
    try:
        config = cls(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise SpecError(f"method.config={name}: PEFT refuses its fields: {error}") from None
    found = {k: v.value if isinstance(v, Enum) else v for k, v in vars(config).items()}
    start = str(found.get("init_lora_weights"))
    for key, value in found.items():
        if key.endswith("dropout") and value:
            raise SpecError(f"method.fields.{key}={value}: runs have no dropout. Set it to 0.")
    if start.startswith(OF_DATA) or (start.startswith(REWRITES) and found["use_dora"]):
        raise SpecError(
            f"method.fields.init_lora_weights={start}: it needs rows or a quantised base, or "
            "does not go with use_dora. Allowed: true, gaussian, orthogonal; without it also "
            "pissa and olora."
        )
    kept = {k: v for k, v in found.items() if k in allowed and (v or v != defaults[k])}
    plain = json.loads(json.dumps(kept | {"peft_type": found["peft_type"]}, default=sorted))
    chosen = {k: found[f] if f else None for k, f in zip(("rank", "alpha"), sizes)}
    alpha = chosen["alpha"]
    return {**chosen, "alpha": alpha and float(alpha), "fields": _frozen(plain)}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return FrozenDict({k: _frozen(v) for k, v in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


@cache
def _trained(canonical: str, matrices: tuple[Matrix, ...]) -> tuple[int, ...]:
    """Count the trained parameters of one matrix of each kind, by PEFT on the device 'meta'."""
    from peft import get_peft_model
    from torch import nn

    method, smallest = PEFT(**json.loads(canonical)), min(m.smaller for m in matrices)
    if method.config == "LoraConfig" and not 1 <= (method.rank or 0) <= smallest:
        raise RankTooLarge(
            f"method.rank={method.rank}. Allowed with layers {method.layers}: from 1 to "
            f"{smallest}, the smallest side of an adapted matrix."
        )
    config = method.made([f"m{k}" for k in range(len(matrices))])
    if method.rewrites:
        config.init_lora_weights = False  # nothing to decompose
    model = nn.Module()
    for k, m in enumerate(matrices):
        model.add_module(f"m{k}", nn.Linear(m.d_in, m.d_out, bias=False, device="meta"))
    try:
        with _quiet():
            warnings.filterwarnings("error", "Invalid")  # a size that PEFT would replace
            attached = get_peft_model(model, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, RuntimeError, UserWarning) as error:
        sides = ", ".join(f"{m.d_in}x{m.d_out}" for m in matrices)
        raise SpecError(
            f"method={method.name} with rank {method.rank} on matrices {sides}: PEFT refuses it: "
            f"{error} Choose another method.rank, other method.fields or method.layers."
        ) from None
    found = [0] * len(matrices)
    for name, p in attached.named_parameters():
        if p.requires_grad:
            found[int(name.removeprefix(PREFIX).split(".")[0][1:])] += p.numel()
    return tuple(found)


# ---------------------------------------------------------------- the adapter of a run


@contextmanager
def _quiet(seed: int = 0) -> Iterator[None]:
    """Let PEFT warn nobody, and draw from torch's generator with this seed, which is put back."""
    import torch

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


@contextmanager
def _restored(base: Any, targets: Mapping[str, Any]) -> Iterator[None]:
    """Let PEFT change copies of the targets; at the end the base is as before, also on errors."""
    import torch
    from torch import nn
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    flags, known = {n: p.requires_grad for n, p in base.named_parameters()}, {*vars(base)}
    try:
        for name, linear in targets.items():
            # by its class exempt from rounding to bf16 before the run: DoRA and others read weights
            sides = linear.in_features, linear.out_features
            copy = NonDynamicallyQuantizableLinear(sides[0], sides[1], device="meta")
            kind = torch.promote_types(linear.weight.dtype, torch.float32)
            copy.weight = nn.Parameter(linear.weight.detach().to(kind, copy=True))
            copy.bias = linear.bias
            base.set_submodule(name, copy)
        yield
    finally:
        for name, linear in targets.items():
            base.set_submodule(name, linear)
        for name in vars(base).keys() - known:
            delattr(base, name)
        for name, p in base.named_parameters():
            p.grad = None
            p.requires_grad_(flags[name])


class PeftAdapter(Trainables):
    """PEFT's model of one run, around a base that `detach` restores."""

    def __init__(self, base: Any, targets: Mapping[str, Any], method: PEFT, seed: int) -> None:
        """Attach the adapter; its random numbers come from the stream 'init' of the seed."""
        import torch
        from peft import get_peft_model

        self._restored = _restored(base, targets)
        self._restored.__enter__()
        try:
            modules = {name.rpartition(".")[2] for name in targets}
            with _quiet(int(stream("init", seed, "peft").integers(2**63))):
                self.model = get_peft_model(base, method.made(sorted(modules)))
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            self._trained = {n.removeprefix(PREFIX): p for n, p in trained}
            for name, linear in targets.items():
                inner = base.get_submodule(name).get_base_layer()
                if torch.equal(inner.weight, linear.weight.to(inner.weight.dtype)):
                    inner.weight = linear.weight.requires_grad_(False)  # holds no second copy
        except BaseException as error:
            self.detach()
            if isinstance(error, ValueError | TypeError):
                raise SpecError(f"method={method.name}: PEFT cannot attach it: {error}") from error
            raise

    def parameters(self) -> "dict[str, torch.Tensor]":
        return dict(self._trained)

    def norms(self) -> list[dict[str, float]]:
        return [{}]  # no measure fits every method

    def spectra(self) -> list[dict[str, dict[str, float]]]:
        return [{}]

    def detach(self) -> None:
        self._restored.__exit__(None, None, None)


def save(
    folder: Path,
    base: Any,
    targets: Mapping[str, Any],
    method: PEFT,
    seed: int,
    weights: "Mapping[str, torch.Tensor]",
    place: tuple[str, str | None],
) -> None:
    """Let PEFT write a run's adapter as a folder that it loads on the base, and load it to compare.

    An adapter that was taken out of the base's weights becomes one of twice the rank.

    Args:
        base, targets: the untouched base in fp32, and its adapted matrices.
        weights: the trained tensors, by the names of `parameters`.
        place: name and revision with which PEFT finds the base.

    Raises:
        TrainingError: the loaded adapter gives other logits than the trained weights.
    """
    import torch
    from peft import PeftModel

    tokens = torch.arange(64, device=base.device)[None] % base.config.vocab_size
    adapter = PeftAdapter(base, targets, method, seed)
    try:
        config = adapter.model.peft_config["default"]
        config.base_model_name_or_path, config.revision = place
        config.task_type = "CAUSAL_LM"
        how: dict[str, Any] = {"save_embedding_layers": False}
        with TemporaryDirectory() as start, _quiet(), torch.no_grad():
            if method.rewrites:
                adapter.model.save_pretrained(start, **how)
                how["path_initial_model_for_weight_conversion"] = start
            for name, p in adapter.parameters().items():
                p.copy_(weights[name])
            wanted = base(input_ids=tokens).logits
            adapter.model.save_pretrained(folder, **how)
    finally:
        adapter.detach()
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in
    with _restored(base, targets), _quiet(), torch.no_grad():
        found = PeftModel.from_pretrained(base, str(folder))(input_ids=tokens).logits
    gap = float((found - wanted).abs().max() / wanted.abs().max())
    if not gap < 1e-3:
        raise TrainingError(
            f"the adapter that PEFT wrote gives logits that differ by {gap:.1%} from the run's. "
            "Nothing was written. Choose other method.fields."
        )
