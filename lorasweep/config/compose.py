"""Compose configuration files and the command line into a checked request, without torch.

Hydra composes twice. First only the chosen files, such as +sweep=NAME, scale=NAME and model=NAME:
so it is known which keys there are, and what the sweep says at the scale. Then all of the command
line, over the sweep at that scale. A sweep can have a block for each scale:

    axes: {seed: 100}               # shared by all scales
    arms: {lora: {method: lora}}
    scales:
      smoke: {arms: {lora: {rank: 4, lr: 5e-3}}}
      tiny: {arms: {lora: {rank: [1, 16], lr: "${around:1.4e-3,5,2}"}}}

The block is merged over the keys above it: mappings key by key, other values replaced. A scale with
`extends: OTHER` (in conf/scale) takes the block of OTHER first, then the scale's block.
"""

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.folders import conf_dir, exec_of
from lorasweep.config.own import GROUPS, Names
from lorasweep.config.schema import Config, writable
from lorasweep.data.own import as_served
from lorasweep.errors import NotAtScale, SpecError, unknown
from lorasweep.launch.slurm.planning import check as check_cluster
from lorasweep.methods.registry import METHODS, spec_from
from lorasweep.plan import detect
from lorasweep.plan.budget import parse_budget
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Cluster
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec, validate
from lorasweep.spec.values import build, misfits, problems_of
from lorasweep.sweep.grid import Point, around, expand, fields_of, geom
from lorasweep.sweep.question import Search, Sweep, axes_of, check_directions, made
from lorasweep.sweep.request import HASH_DIGITS, Request, Settings, runs_hash
from lorasweep.sweep.search import check_search

SETTINGS = [f.name for f in dataclasses.fields(Settings)]
AT_SCALE = "at_scale"
"""Group of Hydra's store with the sweeps of this command at their scale."""
FREE = {"sweep", "customer", "hardware", "generator_params", "options", "shapes"}
"""Mappings that take new keys, with a + before them."""
PARTS = ("method", "exec", "dataset", "cluster")
"""Groups in which a setting without its group is looked for."""
SETS_MORE = re.compile(r"^(#\s*@package\s+(?!sweep\s*$)|defaults\s*:)", re.MULTILINE)
"""Matches the lines by which a sweep's file also sets groups other than the sweep."""
PATHS = "out|table|data|model|dataset|customers|exec\\.\\w+_dir"
HOME = re.compile(rf"(?:{PATHS})=\W*(~[^/,\]'\"]+)")
"""Finds the home folder of a user in a setting, as in out=~ann/best."""
SELECT_FILES = ("+sweep=", "scale=")
CHANGE_NO_RUNS = (
    *("hydra.", "sweep=", "scale=", "exec.", "cluster=", "cluster.", "hardware=", "hardware."),
    *(f"{key}=" for key in (*SETTINGS, "rates")),
)
"""Beginnings of options, without + and ~, that do not change the requested runs."""
CHANGE_CLAIMS = ("sweep.claims", "sweep.rounds")
CHOOSE_PARTS = ("model=", "dataset=", "method=")


def register(help_template: Callable[[], str] = str) -> None:
    """Register schema, methods and resolvers with Hydra.

    `help_template` returns the page of --help, in which Hydra replaces $APP_CONFIG_GROUPS.
    """
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
def opened() -> Iterator[None]:
    """Open Hydra on the shipped configuration."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@contextmanager
def composer() -> Iterator[Callable[[Sequence[str]], Request]]:
    """Open Hydra to compose many command lines; models and data sets are looked up once."""
    register()
    with opened():
        yield Composer().compose


class Prepared(NamedTuple):
    """A command line after the first composition."""

    typed: list[str]
    overrides: list[str]
    """The command line of the second composition."""
    files: DictConfig
    """The first composition, with the sweep at its scale: what the files say."""


class Composer:
    """Composes command lines while Hydra is open; describes each model and data set once.

    `folders`: the user's folders of configuration (--config-dir).
    """

    def __init__(self, *folders: str) -> None:
        self.folders = [str(Path(folder).absolute()) for folder in folders]
        if missing := [folder for folder in self.folders if not Path(folder).is_dir()]:
            raise SpecError(f"--config-dir {missing[0]}: no such folder.")
        self.names = Names()
        self._looked_up: dict[tuple[str, ...], Any] = {}

    def compose(self, typed: Sequence[str]) -> Request:
        """Return the request of a command line."""
        found = self.prepare(typed)
        return self.request(hydra_compose("config", found.overrides), found)

    def prepare(self, typed: Sequence[str]) -> Prepared:
        """Compose the chosen files, and check names and keys of the command line.

        Raises:
            SpecError: a file, model, data set or key does not exist, or the sweep's file is wrong.
            NotAtScale: the sweep does not have the scale.
        """
        parser = OverridesParser.create()

        def parse(text: str) -> Override:
            try:
                return parser.parse_override(text)
            except HydraException as error:
                raise SpecError(f"{text!r}: {error}. Expected KEY=VALUE.") from None

        for text in typed:
            if (home := HOME.match(text)) and os.path.expanduser(home[1]) == home[1]:
                raise SpecError(f"{text!r}: there is no user {home[1][1:]!r}. Name another folder.")
        path = [o for o in typed if o.startswith("hydra.searchpath=")]
        for o in path:
            folders = parse(o).value()
            if not isinstance(folders, list) or not all(isinstance(f, str) for f in folders):
                raise SpecError(f"{o!r}: expected a list of folders, hydra.searchpath=[DIR].")
            self.folders += [str(f).removeprefix("file://") for f in folders]
        _refuse_shadows(self.folders)
        overrides, chosen, problems = [], self._path(), []
        for text in (o for o in typed if o not in path):
            key = text.partition("=")[0]
            group = key.lstrip("+").partition("@")[0]
            if self.options(group) or group.startswith("hydra/"):
                try:
                    value = parse(text).value()
                    if not isinstance(value, str | int | float):
                        raise SpecError(
                            f"{text!r}: expected one name of {group}. Several, as an axis of a "
                            f"sweep: 'sweep.axes.{group}=[A,B]'."
                        )
                    text = f"{key}={self.option(group, value, typed)}"
                except SpecError as error:
                    problems.append(str(error))
                chosen.append(text)
            else:
                overrides.append(text)
        if problems:
            raise SpecError("\n".join(problems))
        files = hydra_compose("config", chosen)
        if files.sweep:
            name = next(o for o in chosen if o.startswith("+sweep=")).removeprefix("+sweep=")
            node = {"sweep": _at_scale(name, files)}
            option = hashlib.sha256(repr([name, node]).encode()).hexdigest()[:16]
            ConfigStore.instance().store(group=AT_SCALE, name=option, node=node, package="_global_")
            files.sweep = node["sweep"]
            chosen = [*self._without_sweep(chosen), f"+{AT_SCALE}={option}"]
        known = OmegaConf.to_container(files, resolve=False)
        for text in (o for o in overrides if not o.lstrip("+~").startswith("hydra.")):
            _check_key(known, parse(text))
        return Prepared([*typed], [*chosen, *overrides], files)

    def _path(self) -> list[str]:
        escaped = [folder.replace("\\", "\\\\").replace("'", "\\'") for folder in self.folders]
        quoted = (f"'file://{folder}'" for folder in escaped)
        return [f"hydra.searchpath=[{','.join(quoted)}]"] if self.folders else []

    def _without_sweep(self, overrides: Sequence[str]) -> list[str]:
        """Leave out +sweep=NAME, unless it is the user's and its file also sets other groups."""
        names = [o.removeprefix("+sweep=") for o in overrides if o.startswith("+sweep=")]
        files = [Path(f, "sweep", f"{name}.yaml") for name in names for f in self.folders]
        more = any(f.is_file() and SETS_MORE.search(f.read_text()) for f in files)
        return [o for o in overrides if more or not o.startswith("+sweep=")]

    def options(self, group: str) -> list[str]:
        """List the options of a group, shipped and of the user; none: there is no such group."""
        folders = [*map(Path, self.folders), conf_dir()]
        names = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
        return sorted(names | METHODS.keys() if group == "method" else names)

    def option(self, group: str, value: Any, typed: Sequence[str]) -> Any:
        """Return the option of a group for a name; a model or data set without a file is described.

        Raises:
            SpecError: there is no such option, model or data set.
        """
        name, known = str(value).removesuffix(".yaml"), self.options(group)
        if name in known or group.startswith("hydra/"):
            return value
        if group in GROUPS:
            keys = (f"{group}.", "exec.models_dir=", "+exec.models_dir=")
            here = [o for o in typed if o.startswith(keys)]
            parsed = OverridesParser.create().parse_overrides(here)
            settings = {o.key_or_group: o.value() for o in parsed}
            return self.names.option(group, str(value), known, settings)
        raise SpecError(
            f"{unknown(group, name, known)} A file of your own, DIR/{group}/{name}.yaml, is found "
            "with --config-dir DIR."
        )

    # ------------------------------------------------------------ the request

    def request(self, cfg: DictConfig, found: Prepared) -> Request:
        """Check the second composition and return its Request.

        Raises:
            SpecError: the configuration or a run of the sweep is not valid.
        """
        request = self._request(cfg, found)
        for own in self.names.of(request.points):
            key = "models_dir" if isinstance(own.spec, ModelSpec) else "data_dir"
            dirs = dict.fromkeys([*getattr(request.exec, key), *filter(None, [own.folder])])
            changes: dict[str, Any] = {key: list(dirs)}
            request.exec = dataclasses.replace(request.exec, **changes)
            request.described.append(own.spec.name)
        return request

    def _request(self, cfg: DictConfig, found: Prepared) -> Request:
        typed, config = found.typed, _object(cfg)
        plain = [o.lstrip("+~") for o in typed]
        given = [o.partition("=")[0] for o in plain]
        if changed := next((o for o in plain if o.startswith("serve.")), None):
            raise SpecError(
                f"{changed!r} changes a rule of a server. Copy a file of conf/serve to "
                "DIR/serve/NAME.yaml, change it there, and add --config-dir=DIR serve=NAME."
            )
        named = {o.partition("=")[0]: o.partition("=")[2].strip("'\"") for o in plain}
        config.serve, sweep_name = named.get("serve", "peft"), named.get("sweep")
        values = {name: getattr(config, name) for name in SETTINGS}
        for problem in misfits(Settings(**values)):
            raise SpecError(problem)
        if isinstance(config.rates, str) and config.rates != "advised":
            raise SpecError(f"rates={config.rates!r}. Expected a number, or with a fleet: advised.")
        hardware = {} if config.hardware == {"name": detect.NAME} else config.hardware
        folders = [key.removeprefix("exec.") for key in given if key.startswith("exec.")]
        exec_ = exec_of(dataclasses.asdict(config.exec), folders)
        cluster = Cluster(**dataclasses.asdict(config.cluster))
        check_cluster(cluster, exec_)
        common: dict[str, Any] = {
            **values,
            "rates": 1 if config.rates == "advised" else config.rates,
            "scale": config.scale.name,
            "exec": exec_,
            "cluster": cluster,
            "hardware": hardware,
            "folders": [*self.folders, str(conf_dir())],
            "given": given,
        }
        base = _run_spec(config)
        if sweep_name is None:
            for problem in misfits(base):
                raise SpecError(problem)
            if not config.customers:  # a fleet uses this run as a template
                validate(base)
            points = [Point(base.method.name, base)]
            return Request(**common, sweep_name=None, sweep=None, points=points)
        sweep = _sweep(sweep_name, config, self.options("model"))
        request = Request(**common, sweep_name=sweep_name, sweep=sweep, points=[])
        if sweep.parts:
            rest = [o for o in typed if not o.startswith((f"+sweep={sweep_name}", "sweep.parts="))]
            for name in sweep.parts:
                with suppress(NotAtScale):
                    request.parts.append(self.compose([*rest, f"+sweep={name}"]))
            if any(p.changed for p in request.parts) or "sweep.parts" in given:
                titles = "\n".join(p.title for p in request.parts)
                request.changed = hashlib.sha256(titles.encode()).hexdigest()[:HASH_DIGITS]
            return request
        _refuse_overwritten(typed, sweep_name, sweep)
        request.points = self._expand(config, sweep, typed)
        check_directions(sweep_name, sweep, {p.spec.objective for p in request.points})
        if sweep.search is not None:
            self._begin_search(request, sweep.search)
        changes = [o for o in typed if not o.lstrip("+").startswith(CHANGE_NO_RUNS)]
        asked, stated = runs_hash(request.points, sweep), ""
        # files contain overrides that choose models, data sets or methods
        if changes and not any(o.startswith(CHOOSE_PARTS) for o in changes):
            with suppress(SpecError):  # some sweeps are complete only with the command line
                of_files = _object(found.files)
                in_file = _sweep(sweep_name, of_files)
                chosen = [o for o in typed if o.startswith(SELECT_FILES)]
                stated = runs_hash(self._expand(of_files, in_file, chosen), in_file)
        if changes and asked != stated:
            request.changed, request.changes = asked, changes
        else:
            request.changes = [o for o in typed if o.lstrip("+~").startswith(CHANGE_CLAIMS)]
        return request

    def _expand(self, config: Config, sweep: Sweep, typed: Sequence[str]) -> list[Point]:
        """Expand a sweep into runs; names on the axes model and dataset are looked up."""
        files = self._without_sweep([o for o in typed if o.startswith(SELECT_FILES)])

        def look_up(group: str, cls: type[ModelSpec] | type[DatasetSpec], name: str) -> Any:
            of_group = [o for o in typed if o.lstrip("+~").startswith(f"{group}.")]
            key = (group, name, *files, *of_group)
            if key not in self._looked_up:
                chosen = f"{group}={self.option(group, name, typed)}"
                try:
                    cfg = hydra_compose("config", [*self._path(), *files, *of_group, chosen])
                except HydraException as error:
                    raise SpecError(f"{group} {name!r}: {error}") from None
                self._looked_up[key] = build(cls, dataclasses.asdict(_object(cfg[group])))
            return self._looked_up[key]

        problems = []
        for group, name in dict.fromkeys(_named(sweep.axes, *sweep.arms.values())):
            try:
                self.option(group, name, typed)
            except SpecError as error:
                problems.append(str(error))
        if problems:
            raise SpecError("\n".join(problems))
        models, datasets = (
            partial(look_up, "model", ModelSpec),
            partial(look_up, "dataset", DatasetSpec),
        )
        return expand(_run_spec(config), sweep, models, datasets)

    # ------------------------------------------------------------ a search on the user's own rows

    def _begin_search(self, request: Request, how: Search) -> None:
        """Set the form of rows and the updates that the command line leaves open."""
        check_search(request.points, how)
        sweep = request.sweep
        assert sweep is not None
        if not {"dataset.render", "dataset.template"} & {*request.given}:
            self._set_form(request)
        on_axes = fields_of(sweep.axes).union(*(fields_of(axes_of(a)) for a in sweep.arms.values()))
        spec = request.points[0].spec
        n_rows = next((o.n_train for o in self.names.of(request.points) if o.n_train), 0)
        if n_rows and "steps" not in request.given and "steps" not in on_axes:
            n_rows = min(n_rows, spec.dataset.n_train or n_rows)
            wanted = math.ceil(how.epochs * n_rows / spec.batch_size)
            steps = min(max(wanted, how.min_steps), how.max_steps)
            _replace_all(request, steps=steps)
        steps = request.points[0].spec.steps
        keep = request.exec.world_size == 1  # else every process holds a part of the weights
        request.exec = dataclasses.replace(
            request.exec, short_steps=how.short_steps(steps), keep_weights=keep
        )
        parse_budget(request.budget, steps)

    def _set_form(self, request: Request) -> None:
        """Render the user's own rows by the base's chat template, if it has one."""
        own, spec = self.names.of(request.points), request.points[0].spec
        if all(isinstance(o.spec, ModelSpec) for o in own):
            return
        from lorasweep.models.load import tokenizer_of  # only here: it imports torch

        fetched = request.cluster.kind == "slurm" and request.action != "fetch"
        try:
            dirs = [*request.exec.models_dir, *(o.folder for o in own if o.folder)]
            tokenizer = tokenizer_of(spec.model, dirs, fetched)
        except (OSError, ValueError) as error:
            if request.action == "plan":  # a base need not be here
                return
            raise SpecError(f"{error} Or set dataset.render=chat_template or role_eos.") from None
        if getattr(tokenizer, "chat_template", None):
            form = as_served(spec.dataset.format, "chat_template")
            _replace_all(request, dataset=dataclasses.replace(spec.dataset, **form))


def _replace_all(request: Request, **changes: Any) -> None:
    request.points = [Point(p.arm, dataclasses.replace(p.spec, **changes)) for p in request.points]


def _at_scale(name: str, cfg: DictConfig) -> dict[str, Any]:
    """Return what a sweep's file says at the scale of `cfg`, with all its keys."""
    values: Any = OmegaConf.to_container(cfg.sweep, resolve=False)
    if blocks := values.pop("scales", None):
        scales = [scale for scale in (cfg.scale.extends, cfg.scale.name) if scale in blocks]
        if not scales:
            raise NotAtScale(
                f"this sweep has no scale {cfg.scale.name!r}. Its file has: {', '.join(blocks)}."
            )
        for scale in scales:
            values = _merged(values, blocks[scale] or {})
    for problem in problems_of(Sweep, values):
        if "${" not in problem:  # what such a value becomes is checked when Hydra has resolved it
            at = f"sweep {name!r} at scale {cfg.scale.name}"
            raise SpecError(f"{at}: {problem} (docs/sweep_files.md)")
    return dataclasses.asdict(Sweep(**values))


def _merged(top: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """Merge plain mappings. OmegaConf's merge would also change the values that `${...}` names."""
    both = {
        k: _merged(top[k], v)
        for k, v in block.items()
        if isinstance(v, dict) and isinstance(top.get(k), dict)
    }
    return {**top, **block, **both}


def _check_key(known: Any, override: Override) -> None:
    """Raise SpecError if an override sets a key that does not exist.

    Hydra would accept it with a + before it, and nothing would read it.
    """
    node, path, given = known, list[str](), str(override.input_line)
    if override.key_or_group.startswith("sweep.") and not known["sweep"]:
        raise SpecError(f"{given!r} changes a sweep. Add one: +sweep=NAME.")
    if override.key_or_group.startswith("scale."):
        raise SpecError(f"{given!r}: a scale is chosen whole. Write scale=NAME.")
    if override.key_or_group.startswith("sweep.scales"):
        raise SpecError(
            f"{given!r} has no effect: the file's scales are read before. Write sweep.axes, "
            "sweep.arms or sweep.replicate instead, which change the chosen scale."
        )
    for name in override.key_or_group.split("."):
        if not isinstance(node, dict) or "[" in name:
            return
        if name not in node:
            break
        node, path = node[name], [*path, name]
    else:
        return
    free = not FREE.isdisjoint(path)
    if free and (override.is_add() or override.is_force_add()):
        return
    if inside := [part for part in PARTS if not path and name in known[part]]:
        raise SpecError(f"{given!r}: no such setting. Did you mean '{inside[0]}.{name}'?")
    is_run_field = name in known or name in known["method"]
    if free and not override.is_delete() and (is_run_field or path[0] != "sweep"):
        raise SpecError(f"{given!r}: {'.'.join(path)} has no {name!r} yet. To add it: +{given}")
    names = [".".join([*path, str(key)]) for key in node]
    raise SpecError(f"{given!r}: {unknown('setting', '.'.join([*path, name]), names)}")


def _sweep(name: str, config: Config, models: Sequence[str] = ()) -> Sweep:
    """Make the sweep of a configuration, with the arms that arms=NAME or arms=[NAME,...] names."""
    sweep = made(name, {k: v for k, v in config.sweep.items() if k != "scales"}, models)
    chosen = [config.arms] if isinstance(config.arms, str) else list(config.arms)
    if wrong := next((arm for arm in chosen if arm and arm not in sweep.arms), None):
        raise SpecError(unknown("arm", str(wrong), sweep.arms))
    if any(chosen):
        sweep.arms = {arm: axes for arm, axes in sweep.arms.items() if arm in chosen}
    return sweep


def _named(*axes: Any) -> Iterator[tuple[str, str]]:
    """Yield (group, name) of the models and data sets on axes, also inside mappings."""
    for values in axes:
        for key, value in values.items() if isinstance(values, dict) else ():
            for one in value if isinstance(value, list) else [value]:
                if key in GROUPS and isinstance(one, str):
                    yield key, one
                yield from _named(one)


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


def _refuse_overwritten(typed: Sequence[str], name: str, sweep: Sweep) -> None:
    """Refuse values of the command line that the sweep's grid replaces."""
    for text in typed:
        key, _, value = text.lstrip("+~").partition("=")
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


def _refuse_shadows(user_folders: Sequence[str]) -> None:
    """Refuse files of --config-dir with the name of a shipped file: Hydra would ignore them."""
    for folder in map(Path, user_folders):
        for path in sorted(folder.glob("*/*.yaml")):
            shipped = conf_dir() / path.relative_to(folder)
            if shipped.exists() and not path.samefile(shipped):
                raise SpecError(
                    f"{path} has the name of a shipped file and would be ignored. Rename it, "
                    f"for example to my_{path.name}."
                )
