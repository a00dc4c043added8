"""Configuration files and the command line -> a checked request. The only importer of hydra and
omegaconf.

Knows the schema and the groups. Refuses to know torch: composing works on a login node.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.schema import ACTIONS, FORMATS, MIRRORS, Config, writable
from lorasweep.errors import SpecError, unknown
from lorasweep.launch.slurm import resources as jobs
from lorasweep.methods.registry import method_classes, spec_from
from lorasweep.plan import detect
from lorasweep.plan.hardware import from_plain
from lorasweep.spec.canonical import build
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec, validate
from lorasweep.sweep.grid import Point, around, expand, fields_of, geom
from lorasweep.sweep.question import Sweep, check_sweep
from lorasweep.sweep.request import Request


def conf_dir() -> Path:
    """Find the shipped configuration: one level up in a checkout, inside the package in a wheel.

    The checkout is looked at first: an editable install leaves a stale copy in site-packages.
    """
    here = Path(__file__).resolve().parents[1]
    for path in (here.parent / "conf", here / "conf"):
        if (path / "config.yaml").is_file():
            return path
    raise SpecError(f"no configuration beside {here}. Reinstall lorasweep.")


def register() -> None:
    """Tell Hydra the schema, the methods and the resolvers."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, cls in method_classes().items():
        store.store(group="method", name=name, node=writable(cls))
    for name, function in (("geom", geom), ("around", around)):
        OmegaConf.register_new_resolver(
            name, lambda *args, f=function: OmegaConf.create(f(*map(float, args))), replace=True
        )


def shipped_model(name: str) -> ModelSpec:
    """Return a shipped model's spec by name, outside a command line."""
    return compose_request([f"model={name}"]).points[0].spec.model


def compose_request(overrides: Sequence[str]) -> Request:
    """Return the request that the command line `python -m lorasweep OVERRIDES` makes, for other
    programs."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_configuration("config", list(overrides), run_mode=RunMode.RUN)
        HydraConfig.instance().set_config(cfg)
        cfg = copy.deepcopy(cfg)
        with flag_override(cfg, ["struct", "readonly"], False):
            del cfg["hydra"]
        return request(cfg)


_ENV = {
    "runs_dir": "LORASWEEP_RUNS",
    "reports_dir": "LORASWEEP_REPORTS",
    "models_dir": "LORASWEEP_MODELS",
    "data_dir": "LORASWEEP_DATA",
}


def request(cfg: DictConfig, settings: Any = None) -> Request:
    """Turn the composed configuration into a checked Request; SpecError lists what is wrong with
    any point.

    settings: Hydra's own part of the configuration, if it is not the running command's.
    """
    settings = settings or HydraConfig.get()
    overrides = list(settings.overrides.task)
    _refuse_shadows(
        [Path(s.path) for s in settings.runtime.config_sources if s.provider == "command-line"]
    )
    choices = settings.runtime.choices
    config = _object(cfg)
    _one_of("action", config.action, ACTIONS)
    _one_of("format", config.format, FORMATS)
    _one_of("mirror", config.mirror, MIRRORS)
    _places(config.exec)
    jobs.check(config.cluster)
    jobs.check_pack_size(config.exec, config.cluster)
    sweep_name = choices.get("sweep")
    common = {
        "action": config.action,
        "format": config.format,
        "mirror": config.mirror,
        "table": config.table,
        "run": config.run,
        "out": config.out,
        "sample": config.sample,
        "watch": config.watch,
        "prune": config.prune,
        "scale": config.scale.name,
        "exec": config.exec,
        "cluster": config.cluster,
        "hardware": _hardware(config),
    }
    base = _run_spec(config)
    if sweep_name is None:
        if config.prune:
            raise SpecError(
                "prune=true needs a sweep (+sweep=NAME): it cancels queued runs that are no longer "
                "part of one."
            )
        points = []
        if config.action in ("run", "plan", "status", "cancel", "verify", "measure_packs"):
            validate(base)
            points = [Point(base.method.name, base)]
        return Request(**common, sweep_name=None, sweep=None, points=points)
    sweep = config.sweep
    check_sweep(sweep_name, sweep)
    if sweep.parts:
        rest = [
            o for o in overrides if o != f"+sweep={sweep_name}" and not o.startswith("sweep.parts=")
        ]
        parts = [_part(rest, name) for name in sweep.parts]
        return Request(**common, sweep_name=sweep_name, sweep=sweep, points=[], parts=parts)
    _refuse_overwritten(overrides, sweep_name, sweep)
    points = expand(base, sweep, _lookup("model", overrides), _lookup("dataset", overrides))
    return Request(**common, sweep_name=sweep_name, sweep=sweep, points=points)


def _part(overrides: list[str], name: str) -> Request:
    """Compose one sweep of a sweep that is made of sweeps, with the same command line otherwise."""
    names = option_names("sweep")
    if name not in names:
        raise SpecError(unknown("sweep", name, names))
    cfg = hydra_compose(
        "config", overrides=[*overrides, f"+sweep={name}"], return_hydra_config=True
    )
    settings = cfg.hydra
    with flag_override(cfg, ["struct", "readonly"], False):
        del cfg["hydra"]
        return request(cfg, settings)


def _object(cfg: DictConfig) -> Any:
    """Resolve everything, check types, and build real objects: a Config, or that of one group."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise SpecError(
                f"not set: {', '.join(missing)}. Choose model=..., dataset=..., method=... or set "
                "the key."
            )
        OmegaConf.resolve(cfg)
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise SpecError(
            f"configuration: {str(error).splitlines()[0]} (key {error.full_key or '?'})"
        ) from None


def _run_spec(config: Config) -> RunSpec:
    keys = {f.name for f in dataclasses.fields(RunSpec)} & vars(config).keys()
    values = dataclasses.asdict(config)
    return spec_from({key: values[key] for key in keys})


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(unknown(name, value, allowed))


def _places(exec_: Exec) -> None:
    """Fill places from the environment where the command line left the default, and make them
    absolute."""
    for name, variable in _ENV.items():
        value = getattr(exec_, name)
        default = getattr(Exec(), name)
        if value == default and os.environ.get(variable):
            value = (
                os.environ[variable].split(os.pathsep)
                if isinstance(default, list)
                else os.environ[variable]
            )
        one = not isinstance(value, list)
        paths = [str(Path(p).expanduser().absolute()) for p in ([value] if one else value)]
        setattr(exec_, name, paths[0] if one else paths)
    for name in ("max_attempts",):
        if getattr(exec_, name) < 1:
            raise SpecError(f"exec.{name}={getattr(exec_, name)}: at least 1.")
    for name in ("workers", "threads", "micro_batch_size", "pack_size"):
        value = getattr(exec_, name)
        if value is not None and value < 1:
            raise SpecError(f"exec.{name}={value}: at least 1, or null to choose by the machine.")


def _hardware(config: Config) -> dict[str, Any]:
    """Check the hardware that was chosen; empty: this machine."""
    if config.hardware == {"name": detect.NAME}:
        return {}
    name = from_plain(config.hardware).name
    if config.action != "plan":
        raise SpecError(
            f"hardware={name} with action={config.action}: only action=plan plans for other "
            "hardware. Add action=plan, or leave hardware out."
        )
    return config.hardware


def _lookup(group: str, overrides: list[str]) -> Callable[[str], Any]:
    """Return a function name -> spec for the names on an axis: one more composition a name, kept.

    The sweep is left out of it: models and data sets do not depend on it, and it takes longest.
    """
    cls = {"model": ModelSpec, "dataset": DatasetSpec}[group]
    kept = [o for o in overrides if not o.lstrip("+~").startswith(("sweep=", "sweep."))]

    @cache
    def look(name: str) -> Any:
        try:
            cfg = hydra_compose("config", overrides=[*kept, f"{group}={name}"])
        except Exception as error:
            names = option_names(group)
            if name not in names:
                raise SpecError(unknown(group, str(name), names)) from None
            raise SpecError(f"{group} {name!r}: {error}") from None
        return build(cls, dataclasses.asdict(_object(cfg[group])))

    return look


def option_names(group: str) -> list[str]:
    """List the options of a group: shipped, and the user's from --config-dir."""
    from hydra.core.global_hydra import GlobalHydra

    return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


def _refuse_overwritten(overrides: list[str], name: str, sweep: Sweep) -> None:
    """A value given on the command line that every arm's axis replaces would be lost in silence:
    refuse it."""
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        axis = key.removeprefix("method.")
        arms = [arm for arm, axes in sweep.arms.items() if axis in fields_of(axes)]
        if (
            key == "method"
            or (axis in fields_of(sweep.axes))
            or (arms and not key.startswith(("sweep.", "scale.")))
        ):
            place = (
                f"sweep.axes.{axis}"
                if axis in sweep.axes
                else f"sweep.arms.{arms[0]}.{axis}"
                if arms
                else "arms"
            )
            hint = (
                f"Write {place}=[...] instead."
                if place != "arms"
                else "Drop an arm with ~sweep.arms.NAME instead."
            )
            raise SpecError(
                f"{text!r} has no effect on sweep {name!r}, whose grid sets {axis!r}. {hint}"
            )


def _refuse_shadows(user_dirs: list[Path]) -> None:
    """Hydra takes our file, silently, where a user's --config-dir holds one of the same name:
    refuse that."""
    ours = conf_dir()
    for folder in user_dirs:
        for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else []:
            relative = path.relative_to(folder)
            if (ours / relative).exists() and not path.samefile(ours / relative):
                raise SpecError(
                    f"{path} has the name of a shipped file and would be ignored: rename it "
                    f"(for example {relative.with_stem('my_' + relative.stem)})."
                )
