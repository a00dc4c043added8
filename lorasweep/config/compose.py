"""Turn configuration files and the command line into a checked request.

Without torch, so that composing works on a login node.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.actions import Action, check_action
from lorasweep.config.folders import conf_dir, exec_of
from lorasweep.config.ignored import refuse_overwritten, refuse_shadows
from lorasweep.config.loader import install, without_hydra
from lorasweep.config.schema import FORMATS, MIRRORS, Config, writable
from lorasweep.errors import NotAtScale, SpecError, unknown
from lorasweep.launch.slurm.resources import check as check_cluster
from lorasweep.launch.slurm.resources import check_pack_size
from lorasweep.methods.registry import METHODS, spec_from
from lorasweep.plan import detect
from lorasweep.plan.hardware import from_plain
from lorasweep.spec.canonical import build
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Cluster
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec, validate
from lorasweep.sweep.grid import Point, around, expand, geom
from lorasweep.sweep.question import check_directions, check_sweep
from lorasweep.sweep.request import HASH_DIGITS, Request, runs_hash

REQUEST_KEYS = (
    *("action", "format", "mirror", "table", "run", "out"),
    *("sample", "max_difference", "watch", "prune"),
    *("customers", "customer", "why", "write_sweep", "data", "rates", "instead_of_full"),
)
"""Settings of the command itself, which a request keeps as they are."""
SETS_MORE = re.compile(r"^(#\s*@package\s+(?!sweep\s*$)|defaults\s*:)", re.MULTILINE)
"""Matches lines with which a sweep's file sets more than the sweep."""
SELECT_FILES = ("+sweep=", "scale=")
CHANGE_NO_RUNS = (
    *SELECT_FILES,
    *(f"{key}=" for key in REQUEST_KEYS),
    *("exec.", "+exec.", "cluster=", "cluster.", "+cluster.", "hardware=", "hardware."),
)
"""Starts of overrides that change how runs are trained and shown, not which runs are asked for."""
CHOOSE_PARTS = ("model=", "dataset=", "method=")


def register(help_template: Callable[[], str] = str) -> None:
    """Register the schema, the methods, the resolvers and the loader of sweeps with Hydra.

    `help_template` returns the page of --help, in which Hydra replaces $APP_CONFIG_GROUPS.
    """
    install()
    OmegaConf.register_new_resolver("help_template", help_template, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, cls in METHODS.items():
        store.store(group="method", name=name, node=writable(cls))
    for name, function in (("geom", geom), ("around", around)):
        OmegaConf.register_new_resolver(
            name, lambda *args, f=function: OmegaConf.create(f(*map(float, args))), replace=True
        )


def shipped_model(name: str) -> ModelSpec:
    """Return the spec of a shipped model by name, for other programs."""
    return compose_request([f"model={name}"]).points[0].spec.model


def compose_request(overrides: Sequence[str]) -> Request:
    """Return the request of `python -m lorasweep OVERRIDES`, for other programs."""
    from hydra import initialize_config_dir
    from hydra.types import RunMode

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_configuration("config", list(overrides), run_mode=RunMode.RUN)
        HydraConfig.instance().set_config(cfg)
        return request(without_hydra(cfg))


def request(cfg: DictConfig, settings: Any = None) -> Request:
    """Turn the composed configuration into a checked Request.

    `settings`: Hydra's own part of the configuration; None: that of the running command.

    Raises:
        SpecError: the configuration or any run of the sweep is not valid.
    """
    if settings is None:
        settings = HydraConfig.get()
        _looked_up.clear()
    overrides = list(settings.overrides.task)
    sources = settings.runtime.config_sources
    refuse_shadows([Path(s.path) for s in sources if s.provider == "command-line"])
    config = _object(cfg)
    for name, allowed in (("format", FORMATS), ("mirror", MIRRORS)):
        _one_of(name, getattr(config, name), allowed)
    exec_ = exec_of(dataclasses.asdict(config.exec))
    cluster = Cluster(**dataclasses.asdict(config.cluster))
    check_cluster(cluster)
    check_pack_size(exec_, cluster)
    sweep_name = settings.runtime.choices.get("sweep")
    action = check_action(config, sweep_name)
    common = {
        **{name: getattr(config, name) for name in REQUEST_KEYS},
        "rates": _rates(config.rates),
        "scale": config.scale.name,
        "exec": exec_,
        "cluster": cluster,
        "hardware": _hardware(action, config),
        "folders": [s.path for s in sources if s.schema == "file"],
        "given": [text.lstrip("+~").partition("=")[0] for text in overrides],
    }
    base = _run_spec(config)
    if sweep_name is None:
        return Request(**common, sweep_name=None, sweep=None, points=_single(action, config, base))
    sweep = config.sweep
    check_sweep(sweep_name, sweep, option_names("model"))
    if sweep.parts:
        own = (f"+sweep={sweep_name}", "sweep.parts=")
        rest = [o for o in overrides if not o.startswith(own)]
        parts = [part for name in sweep.parts for part in _part(rest, name)]
        return Request(
            **common,
            sweep_name=sweep_name,
            sweep=sweep,
            points=[],
            parts=parts,
            changed=_changed_parts(parts, overrides),
        )
    refuse_overwritten(overrides, sweep_name, sweep)
    files: DictConfig = GlobalHydra.instance().config_loader().as_in_files  # type: ignore[attr-defined]
    alone = _sets_only_itself(sweep_name, sources)
    points = _expand(config, overrides, alone)
    check_directions(sweep_name, sweep, {p.spec.objective for p in points})
    request = Request(**common, sweep_name=sweep_name, sweep=sweep, points=points)
    changes = [o for o in overrides if not o.startswith(CHANGE_NO_RUNS)]
    asked = runs_hash(points, sweep)
    if changes and asked != _hash_in_files(files, changes, overrides, alone):
        request.changed, request.changes = asked, changes
    return request


def _expand(config: Config, overrides: Sequence[str], alone: bool) -> list[Point]:
    """Expand the sweep of a configuration. `alone`: its file sets nothing but the sweep."""
    files = [o for o in overrides if o.startswith(SELECT_FILES)]
    if alone:  # leave it out, as composing it takes longest
        files = [o for o in files if not o.startswith("+sweep=")]

    def look_up(group: str) -> Callable[[str], Any]:
        of_group = [o for o in overrides if o.lstrip("+~").startswith(f"{group}.")]
        return _lookup(group, [*files, *of_group])

    return expand(_run_spec(config), config.sweep, look_up("model"), look_up("dataset"))


def _hash_in_files(
    files: DictConfig, changes: Sequence[str], overrides: Sequence[str], alone: bool
) -> str:
    """Return the hash of the runs that the sweep's files ask for; empty if it is not known."""
    if any(o.startswith(CHOOSE_PARTS) for o in changes):  # `files` holds these choices
        return ""
    try:
        config = _object(files)
        points = _expand(config, [o for o in overrides if o.startswith(SELECT_FILES)], alone)
    except SpecError:  # complete only with the command line, as a sweep of any model
        return ""
    return runs_hash(points, config.sweep)


def _single(action: Action, config: Config, run: RunSpec) -> list[Point]:
    """Return the run of a command without a sweep; none for actions on the whole store."""
    if config.prune and not config.customers:
        raise SpecError(
            "prune=true cancels queued runs that are no longer part of a sweep, so it needs "
            "+sweep=NAME, or customers=FILE."
        )
    if not action.needs_run:
        return []
    if not config.customers:  # each customer's runs are made of it
        validate(run)
    return [Point(run.method.name, run)]


def _changed_parts(parts: Sequence[Request], overrides: Sequence[str]) -> str:
    """Return a hash of the parts if the command line changed them or their runs, else ''."""
    if not any(p.changed for p in parts) and not any("sweep.parts=" in o for o in overrides):
        return ""
    titles = "\n".join(p.title for p in parts)
    return hashlib.sha256(titles.encode()).hexdigest()[:HASH_DIGITS]


def _part(overrides: list[str], name: str) -> list[Request]:
    """Compose one part of a sweep that consists of sweeps, with the rest of the command line.

    Empty if the part does not have this scale.
    """
    names = option_names("sweep")
    if name not in names:
        raise SpecError(unknown("sweep", name, names))
    with suppress(NotAtScale):
        part = [*overrides, f"+sweep={name}"]
        cfg = hydra_compose("config", overrides=part, return_hydra_config=True)
        return [request(without_hydra(cfg), cfg.hydra)]
    return []


def _object(cfg: DictConfig) -> Any:
    """Resolve interpolations, check types, and build a Config, or the object of one group."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise SpecError(
                f"not set: {', '.join(missing)}. Choose model=NAME, dataset=NAME or method=NAME, "
                "or set the key."
            )
        OmegaConf.resolve(cfg)
        found: Any = OmegaConf.to_object(cfg)
        return Config(**found) if isinstance(found, dict) else found
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise SpecError(f"configuration: {message} (key {error.full_key or '?'})") from None


def _run_spec(config: Config) -> RunSpec:
    keys = {f.name for f in dataclasses.fields(RunSpec)} & vars(config).keys()
    values = dataclasses.asdict(config)
    return spec_from({key: values[key] for key in keys})


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(unknown(name, value, allowed))


def _hardware(action: Action, config: Config) -> dict[str, Any]:
    """Check and return the chosen hardware; empty for this machine."""
    if config.hardware == {"name": detect.NAME}:
        return {}
    name = from_plain(config.hardware).name
    if "hardware" not in action.reads and config.cluster.kind != "slurm":
        raise SpecError(
            f"hardware={name} with action={action.name}: only action=plan, action=advise and "
            "cluster=slurm are for other hardware. Add action=plan, or leave hardware out."
        )
    return config.hardware


def _rates(value: int | str) -> int:
    """Return how many learning rates are tried; `advised`, of a fleet, is one."""
    if isinstance(value, str) and value != "advised":
        raise SpecError(f"rates={value!r}. Expected a number, or for a fleet advised.")
    return 1 if isinstance(value, str) else value


def _sets_only_itself(sweep_name: str, sources: Iterable[Any]) -> bool:
    """Return whether a sweep's file sets only the sweep, as the shipped ones do.

    With `@package _global_` or a defaults list, a user's file may also set fields of models or data
    sets.
    """
    files = (Path(s.path, "sweep", f"{sweep_name}.yaml") for s in sources if s.schema == "file")
    found = next((path for path in files if path.is_file()), None)
    return found is not None and not SETS_MORE.search(found.read_text())


_looked_up: dict[tuple[str, ...], Any] = {}
"""Specs of names on axes, which the parts of a sweep share. Emptied at the start of a command."""


def _lookup(group: str, overrides: list[str]) -> Callable[[str], Any]:
    """Return a function from a name on an axis to its spec. Each name is composed once."""
    cls = {"model": ModelSpec, "dataset": DatasetSpec}[group]

    def look(name: str) -> Any:
        key = (group, name, *overrides)
        if key not in _looked_up:
            _looked_up[key] = spec_named(name)
        return _looked_up[key]

    def spec_named(name: str) -> Any:
        try:
            cfg = hydra_compose("config", overrides=[*overrides, f"{group}={name}"])
        except Exception as error:
            names = option_names(group)
            if name not in names:
                raise SpecError(unknown(group, str(name), names)) from None
            raise SpecError(f"{group} {name!r}: {error}") from None
        return build(cls, dataclasses.asdict(_object(cfg[group])))

    return look


def option_names(group: str) -> list[str]:
    """List the options of a group, the shipped ones and those in the user's --config-dir."""
    return sorted(GlobalHydra.instance().config_loader().get_group_options(group))
