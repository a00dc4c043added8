"""Any method of PEFT that adapts matrices: the class of a config and its fields (`method=peft`).

A file in conf/method names them, such as `dora`. PEFT makes the adapter and saves it; targets,
loop, rows and checkpoints are those of every method. A named config imports torch and PEFT.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from lorasweep.errors import RankTooLarge, SpecError, TrainingError, check_installed, unknown
from lorasweep.methods.trainables import Trainables
from lorasweep.spec.method import Method
from lorasweep.spec.model import Matrix, ModelSpec
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.spec.values import ABOVE_0, FrozenDict, Is, encode

if TYPE_CHECKING:
    import torch

UNFIT = re.compile("AdaLora|Adamss|Shadow|Poly|AdaptionPrompt|Pvera|TrainableTokens")
"""Classes that train by more than the gradient of the loss, draw numbers, or adapt no matrices."""
RANK = ("oft_block_size", "boft_block_size", "r")
ALPHA = ("lora_alpha", "alpha", "randlora_alpha", "psoft_alpha")
"""Fields that `rank` and `alpha` set: the first one that the class has."""
OURS = re.compile(
    "modules|layer|pattern|megatron|target_p|token|runtime|tying|bdlora|_config$|^bias$"
)
"""Fields that nobody sets: `layers` says which matrices are adapted, all in one way."""
REWRITES = ("pissa", "olora")
"""Starts of LoRA that take the adapter out of the base's weights."""
STARTS = ("True", "False", "gaussian", "orthogonal", *REWRITES)
"""Starts of LoRA that need no rows and no quantised base."""
PREFIX = "base_model.model."


@dataclass(frozen=True)
class PEFT(Method):
    """A method of PEFT, with the fields of its config resolved."""

    name: str = "peft"
    config: str = ""
    """PEFT's class, such as LoHaConfig."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the class without rank and alpha. Resolved: all that are not empty, and peft_type.
    So a field that a later PEFT adds with an empty default changes no id."""
    rank: Annotated[int | None, Is("null: the class's default", 1)] = None
    """Field r of the class; of OFT and BOFT the size of a block."""
    alpha: Annotated[float | None, Is("null: the class's default", ABOVE_0, 1e6)] = None
    layers: str = "all"
    """Layer sets joined by '+': attention, mlp, unembedding. 'all' means all three."""
    MAX_PACK: ClassVar[int | None] = 1
    LIBRARY: ClassVar[str] = "peft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config:  # else the defaults, of which no run is made
            found = self.made()
            rank, alpha, defaults = _fields(type(found))
            kept = {k: v for k, none in defaults.items() if (v := getattr(found, k)) or v != none}
            plain = json.dumps(kept | {"peft_type": found.peft_type.value}, default=sorted)
            vars(self)["fields"] = FrozenDict(json.loads(plain))
            vars(self)["rank"] = getattr(found, rank, None)
            vars(self)["alpha"] = (size := getattr(found, alpha, None)) and float(size)

    def made(self, modules: Sequence[str] = ()) -> Any:
        """Return PEFT's config for modules with these names (last part)."""
        found = _config(self.config, encode(dict(self.fields)), self.rank, self.alpha)
        return dataclasses.replace(found, target_modules=sorted({*modules}))

    @property
    def rewrites(self) -> bool:
        return str(self.fields.get("init_lora_weights")).startswith(REWRITES)

    def check(self, model: ModelSpec) -> None:
        if not self.config or self.name in ("lora", "fullft"):
            hint = "such as LoHaConfig, and another name; or choose method=dora, pissa or oft."
            raise SpecError(f"method={self.name}: set method.config to a class of PEFT, {hint}")
        super().check(model)
        if model.n_experts and "mlp" in self.target_layers():
            raise SpecError(f"method={self.name}: experts need method=lora, or layers=attention.")
        _trained(self, model)

    def n_trainable(self, model: ModelSpec) -> int:
        return sum(n * m.count for m, n in _trained(self, model))

    def step_flops(self, model: ModelSpec, n_tokens: int) -> float:
        # As LoRA's, with 4 operations per weight of factors that are not trained, as VeRA's. Left
        # out is work that does not grow with the tokens, such as the norms of DoRA.
        rank, flops = self.rank or 0, 4.0 * model.n_active_params
        for m, n in _trained(self, model):
            flops += (6.0 * n + 4.0 * max(0, rank * (m.d_in + m.d_out) - n)) * m.count
        return n_tokens * flops

    def attach(self, base: Any, targets: Any, methods: Sequence[Any], seeds: Sequence[int]) -> Any:
        return PeftAdapter(base, targets, self, seeds[0])


# ---------------------------------------------------------------- PEFT's configs


def _fields(cls: Any) -> tuple[str, str, dict[str, Any]]:
    """Return the fields of rank and alpha ('': none), and the others that are set, by default."""
    from peft import PeftConfig

    plain = cls()
    found = {f.name: getattr(plain, f.name) for f in dataclasses.fields(cls)}
    rank, alpha = (next((f for f in some if f in found), "") for some in (RANK, ALPHA))
    ours = {*vars(PeftConfig()), rank, alpha}
    return rank, alpha, {k: v for k, v in found.items() if k not in ours and not OURS.search(k)}


@cache
def _config(name: str, given: str, rank: int | None, alpha: float | None) -> Any:
    """Make a config of PEFT without modules; SpecError: the class or a field cannot be used."""
    check_installed("peft", "method=peft")
    import peft

    every = {k: v for k, v in vars(peft).items() if k.endswith("Config")}
    fit = {k: v for k, v in every.items() if hasattr(v, "target_modules") and not UNFIT.match(k)}
    if name not in fit:
        why = "Other classes do not adapt matrices by the gradient of the loss alone."
        raise SpecError(f"{unknown('method.config: usable class of PEFT', name, fit)} {why}")
    fields, cls = json.loads(given), fit[name]
    *sizes, allowed = _fields(cls)
    for key, value in fields.items():
        if key not in (*allowed, "peft_type"):
            hint = " Set method.rank or method.alpha." * (key in sizes)
            raise SpecError(unknown(f"{name}: method.fields", key, allowed) + hint)
        if type(allowed.get(key)) is bool and type(value) is not bool and "init" not in key:
            raise SpecError(f"method.fields.{key}={value!r}: expected true or false.")
        if key.endswith("dropout") and value:
            raise SpecError(f"method.fields.{key}={value}: runs have no dropout. Leave it out.")
    start = str(fields.get("init_lora_weights", True))
    if not start.startswith(STARTS) or (start.startswith(REWRITES) and fields.get("use_dora")):
        raise SpecError(
            f"method.fields.init_lora_weights={start}: allowed are true, false, gaussian, "
            "orthogonal, and without use_dora pissa, pissa_niter_N and olora."
        )
    for what, size, key in (("rank", rank, sizes[0]), ("alpha", alpha, sizes[1])):
        if size is not None and not key:
            has = ", ".join(sorted(allowed))
            raise SpecError(f"method.{what}={size:g}: {name} has none. method.fields has: {has}.")
        fields |= {key: size} if size is not None else {}
    try:
        return cls(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise SpecError(f"method.config={name}: PEFT refuses its fields: {error}") from None


@cache
def _trained(method: PEFT, model: ModelSpec) -> list[tuple[Matrix, int]]:
    """Let PEFT count the trained parameters of a matrix of each kind, on the device 'meta'."""
    from peft import get_peft_model
    from torch import nn
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as Linear  # as in runs

    matrices = model.matrices(method.target_layers())
    smallest = min(m.smaller for m in matrices)
    if method.config == "LoraConfig" and not 1 <= (method.rank or 0) <= smallest:
        where = f"with layers {method.layers}: from 1 to {smallest}, the smallest side of a matrix"
        raise RankTooLarge(f"method.rank={method.rank}. Allowed {where}.")
    names, empty = [f"m{k}" for k in range(len(matrices))], nn.ModuleDict()
    for layer in "ab":  # two layers, to see whether they share tensors
        kinds = (Linear(m.d_in, m.d_out, bias=False, device="meta") for m in matrices)
        empty[layer] = nn.ModuleDict(dict(zip(names, kinds)))
    try:
        with _quiet():
            warnings.filterwarnings("error", "Invalid")  # a size that PEFT would replace
            attached = get_peft_model(empty, method.made(names), low_cpu_mem_usage=True)
    except (ValueError, TypeError, RuntimeError, UserWarning) as error:
        sides = ", ".join(f"{m.d_in}x{m.d_out}" for m in matrices)
        what = f"method={method.name} method.rank={method.rank} on matrices {sides}"
        raise SpecError(f"{what}: PEFT refuses it: {error} Change rank or fields.") from None
    trained = {n: p.numel() for n, p in attached.named_parameters() if p.requires_grad}
    of = [sum(s for n, s in trained.items() if f".a.{name}." in n) for name in names]
    if 2 * sum(of) != sum(trained.values()):
        raise SpecError(f"method.config={method.config}: its matrices share trained tensors.")
    return [*zip(matrices, of)]


# ---------------------------------------------------------------- the adapter of a run


@contextmanager
def _quiet(seed: int = 0) -> Iterator[None]:
    """Silence PEFT's warnings, and seed torch's generator, whose state is put back."""
    import torch

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


@contextmanager
def _restored(base: Any, targets: Mapping[str, Any]) -> Iterator[None]:
    """Let PEFT change copies of the targets; at the end the base is as before, also on errors."""
    import torch
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    flags, known = {n: p.requires_grad for n, p in base.named_parameters()}, {*vars(base)}
    try:
        for name, linear in targets.items():
            # its class keeps it from being held in bf16: DoRA and others read the weights
            copy = deepcopy(linear).to(torch.promote_types(linear.weight.dtype, torch.float32))
            copy.__class__ = NonDynamicallyQuantizableLinear
            base.set_submodule(name, copy)
        yield
    finally:
        for name, linear in targets.items():
            base.set_submodule(name, linear)
        for name in vars(base).keys() - known:
            delattr(base, name)
        for name, p in base.named_parameters():
            p.requires_grad_(flags[name])


class PeftAdapter(Trainables):
    """PEFT's model of one run. No norm or spectrum fits every method: none is recorded."""

    def __init__(self, base: Any, targets: Mapping[str, Any], method: PEFT, seed: int) -> None:
        """Attach the adapter; its random numbers come from the stream 'init' of the seed."""
        import torch
        from peft import get_peft_model

        self.method, config = method, method.made([n.rpartition(".")[2] for n in targets])
        with ExitStack() as attached:
            attached.enter_context(_restored(base, targets))
            try:
                with _quiet(int(stream("init", seed, "peft").integers(2**63))):
                    self.model = get_peft_model(base, config)
            except (ValueError, TypeError) as error:
                raise SpecError(f"method={method.name}: PEFT cannot attach it: {error}") from error
            named = self.model.named_parameters()
            self._trained = {n.removeprefix(PREFIX): p for n, p in named if p.requires_grad}
            for name, linear in targets.items():
                inner = base.get_submodule(name).get_base_layer()
                if torch.equal(inner.weight, linear.weight.to(inner.weight.dtype)):
                    inner.weight = linear.weight.requires_grad_(False)  # holds no second copy
            self._attached = attached.pop_all()

    def parameters(self) -> "dict[str, torch.Tensor]":
        return dict(self._trained)

    def detach(self) -> None:
        self._attached.close()


def save(
    folder: Path, base: Any, targets: Any, spec: RunSpec, weights: Any, place: Sequence[str | None]
) -> None:
    """Let PEFT write a run's adapter; one taken out of the base's weights gets twice the rank.

    Args:
        base, targets: the untouched base in fp32, and its adapted matrices.
        weights: the trained tensors, by the names of `parameters`.
        place: name and revision with which PEFT finds the base.

    Raises:
        TrainingError: the adapter, loaded on the base, gives other logits.
    """
    import torch
    from peft import PeftModel

    tokens = torch.arange(64, device=base.device)[None] % base.config.vocab_size
    how: dict[str, Any] = {"save_embedding_layers": False}
    adapter = PeftAdapter(base, targets, cast(PEFT, spec.method), spec.seed)
    try:
        config = adapter.model.peft_config["default"]
        (config.base_model_name_or_path, config.revision), config.task_type = place, "CAUSAL_LM"
        with TemporaryDirectory() as start, _quiet(), torch.no_grad():
            if adapter.method.rewrites:
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
    if not (gap := float((found - wanted).abs().max() / wanted.abs().max())) < 1e-3:
        why = f"gives logits that differ by {gap:.1%} from the run's. Choose other method.fields."
        raise TrainingError(f"the adapter that PEFT wrote {why} Nothing was written.")
