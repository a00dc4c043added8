"""Compose configuration files and the command line into a checked request, without torch."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import hydra._internal.hydra as hydra_internal
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.actions import check_action
from lorasweep.config.folders import conf_dir, exec_of
from lorasweep.config.loader import ScaleLoader, without_hydra
from lorasweep.config.own import GROUPS
from lorasweep.config.schema import Config, writable
from lorasweep.data.own import as_served
from lorasweep.errors import NotAtScale, SpecError, unknown
from lorasweep.launch.slurm.planning import check as check_cluster
from lorasweep.methods.registry import METHODS, spec_from
from lorasweep.plan import detect
from lorasweep.plan.budget import parse_budget
from lorasweep.plan.hardware import from_plain
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Cluster
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec, validate
from lorasweep.spec.values import build, misfits
from lorasweep.sweep.grid import Point, around, expand, fields_of, geom
from lorasweep.sweep.question import Search, Sweep, axes_of, check_directions, check_sweep
from lorasweep.sweep.request import HASH_DIGITS, Request, Settings, runs_hash
from lorasweep.sweep.search import check_search

SETTINGS = [f.name for f in dataclasses.fields(Settings)]
SETS_MORE = re.compile(r"^(#\s*@package\s+(?!sweep\s*$)|defaults\s*:)", re.MULTILINE)
"""Matches the lines by which a sweep's file also sets groups other than the sweep."""
SELECT_FILES = ("+sweep=", "scale=")
CHANGE_NO_RUNS = (
    *SELECT_FILES,
    *(f"{key}=" for key in (*SETTINGS, "rates")),
    *("exec.", "+exec.", "cluster=", "cluster.", "+cluster.", "hardware=", "hardware."),
)
"""Prefixes of overrides that do not change the requested runs."""
CHANGE_CLAIMS = ("sweep.claims", "sweep.rounds")
CHOOSE_PARTS = ("model=", "dataset=", "method=")


def register(help_template: Callable[[], str] = str) -> None:
    """Register the schema, methods, resolvers and the loader of sweeps with Hydra.

    `help_template` returns the page of --help, in which Hydra replaces $APP_CONFIG_GROUPS.
    """
    hydra_internal.ConfigLoaderImpl = ScaleLoader  # type: ignore[misc]
    OmegaConf.register_new_resolver("help_template", help_template, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, kind in METHODS.items():
        cls: type = kind
        store.store(group="method", name=name, node=writable(cls))
    for name, function in (("geom", geom), ("around", around)):
        OmegaConf.register_new_resolver(
            name, lambda *args, f=function: OmegaConf.create(f(*map(float, args))), replace=True
        )


def shipped_model(name: str) -> ModelSpec:
    """Return the spec of a shipped model."""
    return compose_request([f"model={name}"]).points[0].spec.model


def compose_request(overrides: Sequence[str]) -> Request:
    """Return the request of the command `python -m lorasweep OVERRIDES`."""
    with composer() as compose:
        return compose(overrides)


@contextmanager
def composer() -> Iterator[Callable[[Sequence[str]], Request]]:
    """Open Hydra to compose many command lines; models and data sets are looked up once."""

    def compose(overrides: Sequence[str]) -> Request:
        cfg = _loader().load_configuration("config", list(overrides), run_mode=RunMode.RUN)
        HydraConfig.instance().set_config(cfg)
        return request(without_hydra(cfg))

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield compose


def _loader() -> ScaleLoader:
    return GlobalHydra.instance().config_loader()  # type: ignore[return-value]


def request(cfg: DictConfig, settings: Any = None) -> Request:
    """Check a composed configuration and return its Request.

    `settings`: Hydra's part of the configuration; None: that of the running command.

    Raises:
        SpecError: the configuration or a run of the sweep is not valid.
    """
    found = _request(cfg, settings)
    for own in _loader().names.of(found.points):
        key = "models_dir" if isinstance(own.spec, ModelSpec) else "data_dir"
        dirs = dict.fromkeys([*getattr(found.exec, key), *([own.folder] if own.folder else [])])
        changes: dict[str, Any] = {key: list(dirs)}
        found.exec = dataclasses.replace(found.exec, **changes)
        found.described.append(own.spec.name)
    return found


def _request(cfg: DictConfig, settings: Any) -> Request:
    if settings is None:
        settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    sources = settings.runtime.config_sources
    _refuse_shadows([Path(s.path) for s in sources if s.provider == "command-line"])
    config = _object(cfg)
    if changed := next((o for o in overrides if o.lstrip("+~").startswith("serve.")), None):
        raise SpecError(
            f"{changed!r} changes a rule of a server. Rules are read from its file: copy one of "
            "conf/serve to DIR/serve/NAME.yaml, change it there, and add --config-dir=DIR "
            "serve=NAME."
        )
    config.serve = settings.runtime.choices["serve"]
    values = {name: getattr(config, name) for name in SETTINGS}
    for problem in misfits(Settings(**values)):
        raise SpecError(problem)
    if isinstance(config.rates, str) and config.rates != "advised":
        raise SpecError(f"rates={config.rates!r}. Expected a number, or with a fleet: advised.")
    hardware = {} if config.hardware == {"name": detect.NAME} else config.hardware
    keys = (o.lstrip("+").partition("=")[0] for o in overrides)
    typed = [key.removeprefix("exec.") for key in keys if key.startswith("exec.")]
    exec_ = exec_of(dataclasses.asdict(config.exec), typed)
    cluster = Cluster(**dataclasses.asdict(config.cluster))
    check_cluster(cluster, exec_)
    sweep_name = settings.runtime.choices.get("sweep")
    action = check_action(config, sweep_name)
    if hardware:
        machine = from_plain(hardware).name
        if "hardware" not in action.reads and config.cluster.kind != "slurm":
            raise SpecError(
                f"hardware={machine} with action={action.name}: only action=plan, action=advise "
                "and cluster=slurm are for other hardware. Add action=plan, or leave hardware out."
            )
    common = {
        **values,
        "rates": 1 if config.rates == "advised" else config.rates,
        "scale": config.scale.name,
        "exec": exec_,
        "cluster": cluster,
        "hardware": hardware,
        "folders": [s.path for s in sources if s.schema == "file"],
        "given": [o.lstrip("+~").partition("=")[0] for o in overrides],
    }
    searches = sweep_name is not None and config.sweep.search is not None
    out = config.out and action.of_search and not config.customers
    budget = config.budget
    if budget and not searches and sweep_name and action.name == "plan":
        amount = parse_budget(budget, 1)
        if amount and amount.unit == "gpuh" and hardware and from_plain(hardware).has_speeds:
            budget = ""
        else:
            raise SpecError(
                f"budget={budget}: the claims of a sweep are planned in hours of GPUs with a data "
                "sheet, for example hardware=h100 budget=500gpuh."
            )
    if not searches and (budget or out):
        key = "budget" if budget else "out"
        more = ", and for action=adapter, action=advise and action=fleet"
        more = ", and for action=plan with +sweep=NAME hardware=h100" if budget else more
        raise SpecError(
            f"{key}= is for a sweep that searches learning rates, such as +sweep=tune{more}. "
            f"{f'Sweep {sweep_name!r}' if sweep_name else 'This command'} searches none. Leave "
            f"{key} out."
        )
    base = _run_spec(config)
    if sweep_name is None:
        if config.prune and not config.customers:
            raise SpecError(
                "prune=true cancels queued runs that are no longer part of a sweep, so it needs "
                "+sweep=NAME, or customers=FILE."
            )
        if action.needs_run and not config.customers:  # a fleet uses this run as a template
            validate(base)
        points = [Point(base.method.name, base)] if action.needs_run else []
        return Request(**common, sweep_name=None, sweep=None, points=points)
    sweep = config.sweep
    check_sweep(sweep_name, sweep, option_names("model"))
    if sweep.parts:
        parts = _parts(sweep_name, sweep, overrides)
        found = Request(**common, sweep_name=sweep_name, sweep=sweep, points=[], parts=parts)
        if any(p.changed for p in parts) or any("sweep.parts=" in o for o in overrides):
            titles = "\n".join(p.title for p in parts)
            found.changed = hashlib.sha256(titles.encode()).hexdigest()[:HASH_DIGITS]
        return found
    sweep.arms = _chosen_arms(sweep, config.arms)
    _refuse_overwritten(overrides, sweep_name, sweep)
    in_files = _loader().as_in_files  # before the next composition replaces it
    # with `@package _global_` or a defaults list, a user's sweep may also set models or data sets
    candidates = (Path(folder, "sweep", f"{sweep_name}.yaml") for folder in common["folders"])
    file = next((path for path in candidates if path.is_file()), None)
    alone = file is not None and not SETS_MORE.search(file.read_text())
    points = _expand(config, overrides, alone)
    check_directions(sweep_name, sweep, {p.spec.objective for p in points})
    found = Request(**common, sweep_name=sweep_name, sweep=sweep, points=points)
    if sweep.search is not None:
        check_search(points, sweep.search)
        if not {"dataset.render", "dataset.template"} & {*found.given}:
            fetched = cluster.kind == "slurm" and action.name != "fetch"
            plans = action.name == "plan"
            found.points = points = _with_form(points, exec_.models_dir, fetched, plans)
        on_axes = fields_of(sweep.axes).union(*(fields_of(axes_of(a)) for a in sweep.arms.values()))
        if "steps" not in found.given and "steps" not in on_axes:
            found.points = points = _with_steps(points, sweep.search)
        short = sweep.search.short_steps(points[0].spec.steps)
        keep = exec_.world_size == 1  # else every process holds a part of the weights
        found.exec = dataclasses.replace(exec_, short_steps=short, keep_weights=keep)
        parse_budget(config.budget, points[0].spec.steps)
    changes = [o for o in overrides if not o.startswith(CHANGE_NO_RUNS)]
    asked = runs_hash(points, sweep)
    stated = ""
    # in_files contains overrides that choose models, data sets or methods
    if changes and not any(o.startswith(CHOOSE_PARTS) for o in changes):
        with suppress(SpecError):  # some sweeps are complete only with the command line
            config = _object(in_files)
            files = [o for o in overrides if o.startswith(SELECT_FILES)]
            stated = runs_hash(_expand(config, files, alone), config.sweep)
    if changes and asked != stated:
        found.changed, found.changes = asked, changes
    else:
        found.changes = [o for o in overrides if o.lstrip("+~").startswith(CHANGE_CLAIMS)]
    return found


def _expand(config: Config, overrides: Sequence[str], alone: bool) -> list[Point]:
    """Expand a sweep into runs; `alone`: the file of the sweep sets no other group."""
    files = [o for o in overrides if o.startswith(SELECT_FILES)]
    if alone:  # compose models and data sets without the sweep, which takes longest
        files = [o for o in files if not o.startswith("+sweep=")]

    def look_up(group: str, cls: type[ModelSpec] | type[DatasetSpec], name: str) -> Any:
        of_group = [o for o in overrides if o.lstrip("+~").startswith(f"{group}.")]
        known, key = _loader().looked_up, (group, name, *files, *of_group)
        if key not in known:
            option = _loader().option(group, str(name), overrides)
            try:
                chosen = [*files, *of_group, f"{group}={option}"]
                cfg = hydra_compose("config", overrides=chosen)
            except Exception as error:
                raise SpecError(f"{group} {name!r}: {error}") from None
            known[key] = build(cls, dataclasses.asdict(_object(cfg[group])))
        return known[key]

    models = partial(look_up, "model", ModelSpec)
    problems = []
    for group, name in dict.fromkeys(_named(config.sweep.axes, *config.sweep.arms.values())):
        try:
            _loader().option(group, name, overrides)
        except SpecError as error:
            problems.append(str(error))
    if problems:
        raise SpecError("\n".join(problems))
    return expand(_run_spec(config), config.sweep, models, partial(look_up, "dataset", DatasetSpec))


def _chosen_arms(sweep: Sweep, names: Any) -> dict[str, Any]:
    """Return the arms of a sweep that arms=NAME or arms=[NAME,...] asks for; all by default."""
    chosen = [names] if isinstance(names, str) else list(names)
    if wrong := next((name for name in chosen if name and name not in sweep.arms), None):
        raise SpecError(unknown("arm", str(wrong), sweep.arms))
    return {name: arm for name, arm in sweep.arms.items() if not any(chosen) or name in chosen}


def _with_steps(points: list[Point], how: Search) -> list[Point]:
    """Set the updates of a search on the user's own rows: `epochs` of them, within limits."""
    of_rows = {own.spec.name: own.n_train for own in _loader().names.of(points) if own.n_train}
    dataset = points[0].spec.dataset
    n_rows = of_rows.get(dataset.name)
    if n_rows is None:
        return points
    n_rows = min(n_rows, dataset.n_train or n_rows)
    wanted = math.ceil(how.epochs * n_rows / points[0].spec.batch_size)
    steps = min(max(wanted, how.min_steps), how.max_steps)
    return [Point(p.arm, dataclasses.replace(p.spec, steps=steps)) for p in points]


def _with_form(
    points: list[Point], models_dirs: list[str], fetched: bool, plans: bool
) -> list[Point]:
    """Set the form of a search on the user's own rows: the base's chat template, if it has one.

    `plans`: nothing is trained, so that a base need not be here.
    """
    own, spec = _loader().names.of(points), points[0].spec
    if all(isinstance(o.spec, ModelSpec) for o in own):
        return points
    from lorasweep.models.load import tokenizer_of  # only here: it imports torch

    try:
        dirs = [*models_dirs, *(o.folder for o in own if o.folder)]
        tokenizer = tokenizer_of(spec.model, dirs, fetched)
    except (OSError, ValueError) as error:
        if plans:
            return points
        raise SpecError(f"{error} Or set dataset.render=chat_template or role_eos.") from None
    if getattr(tokenizer, "chat_template", None):
        data = dataclasses.replace(spec.dataset, **as_served(spec.dataset.format, "chat_template"))
        points = [Point(p.arm, dataclasses.replace(p.spec, dataset=data)) for p in points]
    return points


def _named(*axes: Any) -> Iterator[tuple[str, str]]:
    """Yield (group, name) of the models and data sets on axes, also inside mappings."""
    for values in axes:
        for key, value in values.items() if isinstance(values, dict) else ():
            for one in value if isinstance(value, list) else [value]:
                if key in GROUPS and isinstance(one, str):
                    yield key, one
                yield from _named(one)


def _parts(sweep_name: str, sweep: Sweep, overrides: Sequence[str]) -> list[Request]:
    """Compose the parts of a sweep that have this scale, each with the rest of the command line."""
    own = (f"+sweep={sweep_name}", "sweep.parts=")
    rest = [o for o in overrides if not o.startswith(own)]
    names, parts = option_names("sweep"), []
    for name in sweep.parts:
        if name not in names:
            raise SpecError(unknown("sweep", name, names))
        with suppress(NotAtScale):
            part = [*rest, f"+sweep={name}"]
            cfg = hydra_compose("config", overrides=part, return_hydra_config=True)
            parts.append(request(without_hydra(cfg), cfg.hydra))
    return parts


def _object(cfg: DictConfig) -> Any:
    """Resolve interpolations, check types, and build a Config or the object of one group."""
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


def _refuse_overwritten(overrides: list[str], name: str, sweep: Sweep) -> None:
    """Refuse values of the command line that the sweep's grid replaces."""
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        if key.startswith("sweep.scales"):
            raise SpecError(
                f"{text!r} has no effect: the file's scales are read before. Write sweep.axes, "
                "sweep.arms or sweep.replicate instead, which change the chosen scale."
            )
        of_axes = key.startswith("sweep.axes.")
        axis = key.removeprefix("sweep.axes." if of_axes else "method.")
        arms = [arm for arm, axes in sweep.arms.items() if axis in fields_of(axes_of(axes))]
        if of_axes:  # an arm's own values win
            is_set = bool(arms) and len(arms) == len(sweep.arms)
        else:
            in_arms = bool(arms) and not key.startswith("sweep.")
            is_set = in_arms or axis in fields_of(sweep.axes)
        if key != "method" and not is_set:
            continue
        if axis in sweep.axes and not of_axes:
            hint = f"Write sweep.axes.{axis}=[{value.strip('[]')}] instead."
        elif arms:
            new = (f"sweep.arms.{arm}.{axis}=[{value.strip('[]')}]" for arm in arms)
            hint = f"Write {' or '.join(new)} instead."
        else:
            hint = "Remove an arm with ~sweep.arms.NAME instead."
        raise SpecError(f"{text!r} has no effect: the grid of sweep {name!r} sets {axis!r}. {hint}")


def _refuse_shadows(user_folders: list[Path]) -> None:
    """Refuse files of --config-dir with the name of a shipped file: Hydra would ignore them."""
    shipped = conf_dir()
    for folder in user_folders:
        for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else []:
            relative = path.relative_to(folder)
            if (shipped / relative).exists() and not path.samefile(shipped / relative):
                raise SpecError(
                    f"{path} has the name of a shipped file and would be ignored. Rename it, "
                    f"for example to {relative.with_stem('my_' + relative.stem)}."
                )


def option_names(group: str) -> list[str]:
    """List the options of a group, shipped and in --config-dir."""
    return sorted(_loader().get_group_options(group))
