"""Compose configuration files and the command line into a checked request, without torch.

Hydra composes the chosen files, such as +sweep=NAME, scale=NAME and model=NAME. What the sweep says
at the scale replaces the sweep; then the other settings of the command line are applied. A sweep
can have a block for each scale:

    axes: {seed: 100}               # shared by all scales
    arms: {lora: {method: lora}}
    scales:
      smoke: {arms: {lora: {rank: 4, lr: 5e-3}}}
      tiny: {arms: {lora: {rank: [1, 16], lr: "${around:1.4e-3,5,2}"}}}

The block is merged over the keys above it: mappings key by key, other values replaced. A scale with
`extends: OTHER` (in conf/scale) takes the block of OTHER first, then the scale's block.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lorasweep import plugins
from lorasweep.config.catalogue import conf_dir
from lorasweep.config.folders import exec_of
from lorasweep.config.foreign import checked, trainer_of, without_unembedding
from lorasweep.data.column_names import as_served
from lorasweep.errors import ClusterError, DataError, ModelError, NotAtScale, SpecError, unknown
from lorasweep.methods.registry import METHODS, method_class, spec_from
from lorasweep.models.describe import describe_model
from lorasweep.plan import detect
from lorasweep.plan.budget import parse_budget
from lorasweep.spec import recommended
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.spec.model import ModelSpec, Recipe
from lorasweep.spec.run import RunSpec, validate
from lorasweep.spec.trainer import TrainerSpec
from lorasweep.spec.values import UNSET, fields, misfits, problems_of
from lorasweep.sweep.grid import GENERATOR_PARAMS, WHOLE, Point, around, expand, fields_of, geom
from lorasweep.sweep.question import Search, Sweep, axes_of, check_directions, made
from lorasweep.sweep.request import HASH_DIGITS, Request, Settings, runs_hash
from lorasweep.sweep.search import check_search

GROUPS = ("model", "dataset")
FORM = ("format", "prompt_field", "completion_field", "mask", "render")
"""Fields of a data set that say how a row is read."""
SETTINGS = [f.name for f in dataclasses.fields(Settings)]
FREE = {
    "sweep",
    "customer",
    "columns",
    "hardware",
    "generator_params",
    "options",
    "shapes",
    "fields",
}
"""Mappings that take new keys, with a + before them."""
PARTS = ("method", "exec", "dataset", "cluster")
"""Groups in which a setting without its group is looked for."""
SELECT_FILES = ("+sweep=", "scale=")
CHANGE_NO_RUNS = (
    *("sweep=", "scale=", "exec.", "cluster=", "cluster.", "hardware=", "hardware."),
    *(f"{key}=" for key in SETTINGS),
)
"""Beginnings of options, without + and ~, that do not change the requested runs."""
CHANGE_CLAIMS = ("sweep.claims", "sweep.rounds")
CHOOSE_PARTS = ("model=", "dataset=", "method=")
READER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C, several times as fast, where PyYAML was built with it."""


def defaults_of(cls: type) -> dict[str, Any]:
    """Return the defaults of a dataclass of settings as plain values, by the key of YAML files."""
    given = cls()
    values = {f.key: getattr(given, f.name) for f in fields(cls)}
    parts = {k: defaults_of(type(v)) for k, v in values.items() if dataclasses.is_dataclass(v)}
    plain = {k: json.loads(json.dumps(v)) for k, v in values.items() if k not in parts}
    return values | parts | plain


SCHEMA = {
    **defaults_of(Settings),
    **defaults_of(RunSpec),
    "trainer": {**defaults_of(TrainerSpec), "script": "", "max_h": Exec().trainer_max_h},
    "serve": {},  # a file in conf/serve; a request has its name
    "arms": "",  # names of the sweep's arms to train, one or a list; empty: all
    # `extends`: another scale, whose block of a sweep is merged before the block of this one
    "scale": {"name": UNSET, "extends": "", "about": ""},
    "cluster": defaults_of(Cluster),
    "exec": defaults_of(Exec),
    "hardware": {},
    "sweep": {},
}
"""The keys of the configuration with their defaults; types are checked where values are made."""


# ---------------------------------------------------------------- command lines


class Own(NamedTuple):
    """A model or data set of the user's own, which no configuration file describes."""

    given: str
    spec: ModelSpec | DatasetSpec
    folder: str
    """Where it is found (exec.models_dir, exec.data_dir); empty on the hub."""
    n_train: int
    """Number of training rows; 0 for a model."""


def shipped_model(name: str) -> ModelSpec:
    """Return the spec of a shipped model."""
    return compose_request([f"model={name}"]).points[0].spec.model


def compose_request(overrides: Sequence[str], *folders: str) -> Request:
    """Return the request of the command `python -m lorasweep OVERRIDES`; see `composer`."""
    with composer(*folders) as compose:
        return compose(overrides)


@contextmanager
def composer(*folders: str) -> Iterator["Composer"]:
    """Open Hydra on the shipped configuration and the user's folders (--config-dir)."""
    store = ConfigStore.instance()
    store.store(name="schema", node=SCHEMA)
    for name, cls in METHODS.items():
        store.store(group="method", name=name, node=defaults_of(cls))
    for name, function in (("geom", geom), ("around", around)):
        OmegaConf.register_new_resolver(
            name, lambda *args, f=function: OmegaConf.create(f(*map(float, args))), replace=True
        )
    OmegaConf.register_new_resolver(
        "recommended", lambda name: OmegaConf.create({"v": vars(recommended)[name]}).v, replace=True
    )
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield Composer(folders)


class Composer:
    """Composes command lines while Hydra is open; describes each model and data set once."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.folders = [Path(folder).absolute() for folder in folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise SpecError(f"--config-dir {folder}: no such folder.")
            for path in sorted(folder.glob("*/*.yaml")):
                shipped = conf_dir() / path.relative_to(folder)
                in_code = path.parent.name == "method" and path.stem in METHODS
                if in_code or (shipped.exists() and not path.samefile(shipped)):
                    raise SpecError(
                        f"{path} has the name of a shipped file and would be ignored. Rename it, "
                        f"for example to my_{path.name}."
                    )
        self._own: dict[str, Own] = {}
        """By the option of the group with which it is registered."""
        self._looked_up: dict[tuple[str, ...], Any] = {}
        self._of_packages: dict[Path, None] = {}  # folders of which a file was named

    def options(self, group: str) -> list[str]:
        """List the options of a group, all that are installed; none: there is no such group."""
        return sorted(self._files(group) | plugins.offers(group).keys())

    def _files(self, group: str) -> set[str]:
        """Return the options of a group that are shipped or of the user."""
        folders = [*self.folders, conf_dir()]
        names = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
        return names | METHODS.keys() if group == "method" else names

    def about(self, group: str, key: str) -> dict[str, str]:
        """Return what each file of a group says at a key, such as the question of a sweep."""
        found: dict[str, str] = {}
        packages = [o.folder for several in plugins.offers(group).values() for o in several]
        for folder in dict.fromkeys([*self.folders, conf_dir(), *packages]):
            for path in sorted((folder / group).glob("*.yaml")):
                with suppress(yaml.YAMLError, OSError, ValueError):  # named where it is used
                    said = yaml.load(path.read_text(encoding="utf-8"), READER)
                    for part in key.split("."):
                        said = said.get(part) if isinstance(said, dict) else None
                    found.setdefault(path.stem, " ".join(str(said or "").split()))
        return found

    def composed(self, typed: Sequence[str]) -> DictConfig:
        """Return the configuration of a command line, with the sweep at its scale.

        Raises:
            SpecError: a file, model, data set or key does not exist, or the sweep's file is wrong.
            NotAtScale: the sweep does not have the scale.
        """
        chosen, changes = list[str](), list[Override]()
        methods = {*self.options("method")} - SCHEMA.keys()  # of a package: any name
        asked, action = (_value_of(k, typed) for k in ("sweep", "action"))
        replaced = dict[str, list[Any]]()
        for text in typed:
            try:
                override = OverridesParser.create().parse_override(text)
            except HydraException as error:
                raise SpecError(f"{text!r}: {error}. Expected KEY=VALUE.") from None
            group, value = override.key_or_group, override.value()
            is_group, method = bool(self.options(group)), group.partition(".")[0]
            whole = group in (method, f"{method}.method")  # no field of an arm
            if override.package is not None or (method in methods and (whole or not asked)):
                one_run = f" For one run: method={method} method.{group[len(method) + 1 :]}=..."
                raise SpecError(
                    f"{text!r}: expected KEY=VALUE. METHOD.FIELD is for the arms of a sweep."
                    + one_run * (method in methods and not whole)
                )
            if asked and (method in methods or group in GROUPS):
                replaced[group] = _listed(override)
                value = replaced[group][0]
            is_one = isinstance(value, str | int | float) or not (is_group or group in replaced)
            if not is_one or (override.is_sweep_override() and group not in replaced):
                axis = f"{group}=A,B" if group in replaced else f"'sweep.axes.{group}=[A,B]'"
                raise SpecError(
                    f"{text!r}: expected one value of {group}."
                    + f" Several, as an axis of a sweep: {axis}." * (action != "rate")
                )
            if is_group:
                option = self._option(group, str(value), typed)
                chosen.append(f"{text.partition('=')[0]}={quoted(option)}")
            elif group not in replaced:
                changes.append(override)
        folders = [*self.folders, *self._of_packages]
        path = ",".join(quoted(f"file://{folder}") for folder in folders)
        cfg = hydra_compose("config", [f"hydra.searchpath=[{path}]", *chosen])
        if cfg.model.recipe:
            cfg.model.recipe = {**defaults_of(Recipe), **cfg.model.recipe}
        if cfg.sweep:
            cfg.sweep = sweep = _at_scale(asked, cfg)
            for key in () if sweep["parts"] else replaced:  # else each part has them
                now: Any = OmegaConf.to_container(cfg.sweep.arms, resolve=True)
                _replace_axis(sweep, key, replaced[key], cfg.dataset.source == "synthetic", now)
                cfg.sweep = sweep
        known: Any = OmegaConf.to_container(cfg, resolve=False)
        if wrong := next((key for key in known if key not in SCHEMA), None):
            raise SpecError(f"a configuration file: {unknown('setting', str(wrong), SCHEMA)}")
        in_files = [_check_key(known, override) for override in changes]
        for override, was in zip(changes, in_files, strict=True):
            key, value = override.key_or_group, override.value()
            is_text = isinstance(was, str) and was != UNSET and "${" not in was
            if is_text and isinstance(value, int | float):
                value = str(override.input_line).partition("=")[2]  # such as an id of digits alone
            try:
                with open_dict(cfg):
                    if override.is_delete():
                        parent, _, name = key.rpartition(".")
                        del (OmegaConf.select(cfg, parent) if parent else cfg)[name]
                    else:
                        OmegaConf.update(cfg, key, value, force_add=True)
            except (OmegaConfBaseException, TypeError, ValueError) as error:
                first = str(error).partition("\n")[0]
                raise SpecError(f"{override.input_line!r}: {first}") from None
        return cfg

    def _option(self, group: str, given: str, typed: Sequence[str]) -> str:
        """Return the option of a group for a name; a model or data set without a file is described.

        Raises:
            SpecError: there is no such option, model or data set.
        """
        known, name = self.options(group), given.removesuffix(".yaml")
        if name in plugins.offers(group):
            self._of_package(group, name)
        if name in known:
            return given
        if group not in GROUPS or not given:  # an empty path would be the current folder
            raise SpecError(
                f"{unknown(group, given, known)} A file of your own, DIR/{group}/{given}.yaml, is "
                "found with --config-dir DIR."
            )
        keys = (f"{group}.", "exec.models_dir=", "+exec.models_dir=")
        parsed = OverridesParser.create().parse_overrides([o for o in typed if o.startswith(keys)])
        settings = {o.key_or_group: o.value() for o in parsed}
        named = {f: str(settings[f"{group}.{f}"]) for f in FORM if f"{group}.{f}" in settings}
        key = json.dumps([group, given, named]).encode()
        option = f"own-{hashlib.sha256(key).hexdigest()[:16]}"
        if option not in self._own:
            own = _described(group, given, known, named, settings.get("exec.models_dir"))
            name, kind = own.spec.name, type(own.spec)
            same = [o for o in self._own.values() if (o.spec.name, type(o.spec)) == (name, kind)]
            other = [o.given for o in same if o.spec != own.spec]
            if other := other + ["a configuration file"] * (name in known):
                raise SpecError(
                    f"{group}={given}: {other[0]} has the name {name!r}, too, and results are kept "
                    "by name. Rename one."
                )
            values = json.loads(json.dumps(dataclasses.asdict(own.spec)))
            node = literal({f.key: values[f.name] for f in fields(kind)})
            ConfigStore.instance().store(group=group, name=option, node=node)
            self._own[option] = own
        return option

    def _of_package(self, group: str, name: str) -> None:
        """Make Hydra find an option of an installed package; SpecError: twice or broken."""
        if group == "method":
            node = defaults_of(method_class(name))
            return ConfigStore.instance().store(group=group, name=name, node=node)

        def read(offer: plugins.Offer) -> Any:
            self._of_packages[offer.folder] = None
            return OmegaConf.load(offer.folder / group / f"{name}.yaml")

        files = dict.fromkeys(self._files(group))
        plugins.find(group, name, files, lambda v: group == "sweep" or v.name == name, read)

    def _own_of(self, points: Iterable[Point]) -> list[Own]:
        """Return the models and data sets of some runs that were described here."""
        wanted = {(type(x), x.name) for p in points for x in (p.spec.model, p.spec.dataset)}
        return [o for o in self._own.values() if (type(o.spec), o.spec.name) in wanted]

    # ------------------------------------------------------------ the request

    def __call__(self, typed: Sequence[str], whole: str = "") -> Request:
        """Return the request of a command line; `whole`: the sweep whose part it is.

        Raises:
            SpecError: the configuration or a run of the sweep is not valid.
        """
        request = self._request(typed, whole)
        owned, kinds = self._own_of(request.points), {"model": ModelSpec, "dataset": DatasetSpec}
        for own in owned:
            data = {p.spec.dataset for p in request.points if p.spec.model == own.spec}
            named = (
                request.data
                or request.action == "rate"
                or any(k.split(".")[-1] == "dataset" for k in request.given)
            )
            if not named and (made_up := next((d for d in data if d.source == "synthetic"), None)):
                raise SpecError(
                    f"model={own.given} on {made_up.name!r}, an artificial language: which rows? "
                    f"Add dataset=ROWS, a file. (If it is meant: dataset={made_up.name}.)"
                )
        for key, group in (("models_dir", "model"), ("data_dir", "dataset")):
            more = [o.folder for o in owned if o.folder and type(o.spec) is kinds[group]]
            more += [str(folder / group) for folder in self._of_packages]  # beside their YAML
            changes: Any = {key: [*dict.fromkeys([*getattr(request.exec, key), *more])]}
            request.exec = dataclasses.replace(request.exec, **changes)
        request.described += [o.spec.name for o in owned]
        return request

    def _request(self, typed: Sequence[str], whole: str) -> Request:
        config = _plain(self.composed(typed))
        for key, default in SCHEMA.items():
            if isinstance(default, dict) and not isinstance(config[key], dict):
                raise SpecError(f"{key}={config[key]!r}: expected its settings, {key}.NAME=VALUE.")
        given = [o.lstrip("+~").partition("=")[0] for o in typed]
        if changed := next((key for key in given if key.startswith("serve.")), None):
            raise SpecError(
                f"{changed} changes a rule of a server. Copy a file of conf/serve to "
                "DIR/serve/NAME.yaml, change it there, and add --config-dir=DIR serve=NAME."
            )
        config["serve"], sweep_name = _value_of("serve", typed, "peft"), _value_of("sweep", typed)
        values = {name: config[name] for name in SETTINGS}
        for problem in problems_of(Settings, values):
            raise SpecError(problem)
        cluster, texts = config["cluster"], [f.key for f in fields(Cluster) if f.kind is str]
        cluster |= {k: str(cluster[k]) for k in texts if cluster[k] is not None}  # account=123
        if isinstance(options := cluster["options"], dict):
            cluster["options"] = {name: str(value) for name, value in options.items()}
        for problem in problems_of(Cluster, cluster, "cluster."):
            raise ClusterError(problem)
        if values["rates"] == "advised":
            values["rates"] = 1
        elif not isinstance(values["rates"], int):
            raise SpecError(f"rates={values['rates']!r}. Expected a number; with a fleet: advised.")
        machine = config["hardware"]
        request = Request(
            **values,
            scale=config["scale"]["name"],
            exec=exec_of(config["exec"], given),
            cluster=Cluster(**cluster),
            hardware={} if machine == {"name": detect.NAME} else machine,
            folders=[*map(str, self.folders), str(conf_dir())],
            given=given,
            sweep_name=sweep_name or None,
            sweep=None,
            points=[],
        )
        for problem in request.cluster.problems():
            raise ClusterError(problem)
        base = _run_spec(config)
        if base.trainer.command:
            request = checked(request, *trainer_of(config["trainer"])[1:])
        if not sweep_name:
            for problem in misfits(base):
                raise SpecError(problem)
            if not request.customers:  # a fleet uses this run as a template
                validate(base)
            request.points = without_unembedding([Point(base.method.name, base)])
            return request
        request.sweep = sweep = _sweep(sweep_name, config, self.options("model"))
        if sweep.parts:
            if whole:
                raise SpecError(f"sweep {sweep_name!r} has parts: it can be no part of {whole!r}.")
            rest = [o for o in typed if not o.startswith(("+sweep=", "sweep.parts="))]
            for name in sweep.parts:
                with suppress(NotAtScale):
                    request.parts.append(self([*rest, f"+sweep={name}"], sweep_name))
            if not request.parts:
                raise NotAtScale(f"no part of sweep {sweep_name!r} has scale {request.scale!r}.")
            if any(p.changed for p in request.parts) or "sweep.parts" in given:
                titles = "\n".join(p.title for p in request.parts)
                request.changed = hashlib.sha256(titles.encode()).hexdigest()[:HASH_DIGITS]
            return request
        _refuse_overwritten(typed, sweep_name, sweep)
        request.points = self._expand(base, sweep, typed)
        check_directions(sweep_name, sweep, {p.spec.objective for p in request.points})
        if sweep.search is not None:
            self._begin_search(request, sweep.search)
        changes = [o for o in typed if not o.lstrip("+").startswith(CHANGE_NO_RUNS)]
        asked, stated = runs_hash(request.points, sweep), ""
        # files contain overrides that choose models, data sets or methods
        if changes and not any(o.startswith(CHOOSE_PARTS) for o in changes):
            with suppress(SpecError):  # some sweeps are complete only with the command line
                selected = [o for o in typed if o.startswith(SELECT_FILES)]
                of_files = _plain(self.composed(selected))
                in_file = _sweep(sweep_name, of_files)
                stated = runs_hash(self._expand(_run_spec(of_files), in_file, selected), in_file)
        if changes and asked != stated:
            request.changed, request.changes = asked, changes
        else:
            request.changes = [o for o in typed if o.lstrip("+~").startswith(CHANGE_CLAIMS)]
        return request

    def _expand(self, base: RunSpec, sweep: Sweep, typed: Sequence[str]) -> list[Point]:
        """Expand a sweep into runs; names on the axes model and dataset are looked up."""

        # a shipped sweep or scale sets no other group, so all sweeps look a name up once
        kinds = ("sweep", "scale")
        shipped = {f"{k}={f.stem}" for k in kinds for f in (conf_dir() / k).glob("*.yaml")}

        @functools.cache
        def ours(group: str) -> set[str]:
            return _shipped(group) - plugins.offers(group).keys()

        def look_up(group: str, name: str) -> Any:
            own = (f"{group}.",) * (group in GROUPS)  # an arm's method has its defaults
            concerned = ("sweep=", "scale=", "exec.models_dir=", *own)
            given = [o for o in typed if o.lstrip("+~").startswith(concerned)]
            if not isinstance(name, str):
                raise SpecError(f"{group}={name!r}: expected a name. A number needs quotes.")
            if name in ours(group) and shipped.issuperset(o.lstrip("+") for o in given):
                given = []
            key = (group, name, *given)
            if key not in self._looked_up:
                if given or name not in ours(group) or not (values := _read(group, name)):
                    values = _plain(self.composed([*given, f"{group}={quoted(name)}"])[group])
                run = spec_from({"method": {"name": "lora"}, group: values})
                self._looked_up[key] = getattr(run, group)
            return self._looked_up[key]

        return without_unembedding(expand(base, sweep, look_up))

    def _begin_search(self, request: Request, how: Search) -> None:
        """Set the form of the user's own rows and the updates that the command line leaves open."""
        check_search(request.points)
        if request.points[0].spec.trainer.command:
            how.prefix = 1  # the first updates of a run of another trainer are not ours to measure
        if how.seeds > (most := request.sweep.rounds + 1):  # a look after each from the second on
            raise SpecError(f"sweep.search.seeds={how.seeds}: sweep.rounds allows up to {most}.")
        sweep, own = request.sweep, self._own_of(request.points)
        spec, changes = request.points[0].spec, dict[str, Any]()
        stated = {*request.given}.union(*map(fields_of, [sweep.axes, *sweep.arms.values()]))
        rows = next((o.n_train for o in own if o.n_train), 0)
        if rows and not {"dataset.render", "dataset.template"} & stated:
            from lorasweep.models.load import tokenizer_of  # only here: it imports torch

            fetched = request.cluster.kind == "slurm" and request.action != "fetch"
            try:
                dirs = [*request.exec.models_dir, *(o.folder for o in own if o.folder)]
                if getattr(tokenizer_of(spec.model, dirs, fetched), "chat_template", None):
                    form = as_served(spec.dataset.format, "chat_template")
                    changes["dataset"] = dataclasses.replace(spec.dataset, **form)
            except (OSError, ValueError) as error:
                if request.action != "plan":  # for which a base need not be here
                    hint = "Or set dataset.render=chat_template or role_eos."
                    raise SpecError(f"{error} {hint}") from None
        if rows and "steps" not in stated:
            rows = min(rows, spec.dataset.n_train or rows)
            wanted = math.ceil(how.epochs * rows / spec.batch_size)
            changes["steps"] = min(max(wanted, how.min_steps), how.max_steps)
        request.points = [
            Point(p.arm, dataclasses.replace(p.spec, **changes)) for p in request.points
        ]
        steps = request.points[0].spec.steps
        asked = request.exec.keep_weights
        keep = request.exec.world_size == 1  # else every process holds a part of the weights
        kept: Any = {"keep_weights": asked or keep}
        if keep and not asked:
            ids = sorted(p.id for p in request.points)
            kept["prune_weights"] = hashlib.sha256("".join(ids).encode()).hexdigest()[:12]
        short = how.short_steps(steps) if how.prefix > 1 else None
        request.exec = dataclasses.replace(request.exec, short_steps=short, **kept)
        parse_budget(request.budget, steps)


def _described(
    group: str, given: str, options: Sequence[str], named: Mapping[str, str], models_dir: Any
) -> Own:
    """Describe a model or data set by a file, a folder or a place on the hub."""
    dirs: list[str] = []
    try:
        if group == "model":
            dirs = exec_of({} if models_dir is None else {"models_dir": models_dir}).models_dir
            return Own(given, *describe_model(given, dirs), 0)
        from lorasweep.fleet.rows import named_rows

        return Own(given, *named_rows(given, named))
    except (ModelError, DataError, OSError) as error:
        path = Path(given).expanduser()
        if any(p.exists() for p in (path, *(Path(d, given) for d in dirs))):
            raise SpecError(f"{group}={given}: {error}") from None
        beside = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")])
        raise SpecError(f"{unknown(group, given, [*options, *beside])} {error}") from None


def quoted(text: str) -> str:
    """Return text as Hydra reads it whatever its characters."""
    inner = re.sub(r"(\\*)'", r"\1\1\'", text)  # a backslash counts only before a quote
    return f"'{inner}{inner[len(inner.rstrip(chr(92))) :]}'"


def literal(value: Any) -> Any:
    """Return a value in which OmegaConf resolves no `${...}`; mappings and lists are entered."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: literal(v) for key, v in value.items()}
    return [*map(literal, value)] if isinstance(value, list) else value


def _value_of(key: str, typed: Sequence[str], default: str = "") -> str:
    """Return the value of a setting on the command line, without quotes."""
    found = [o.partition("=")[2] for o in typed if o.lstrip("+").startswith(f"{key}=")]
    return found[-1].strip("'\"") if found else default


def _at_scale(name: str, cfg: DictConfig) -> dict[str, Any]:
    """Return what a sweep's file says at the scale of `cfg`, with all its keys."""
    values: Any = OmegaConf.to_container(cfg.sweep, resolve=False)
    if blocks := values.pop("scales", None):
        if not isinstance(blocks, dict) or {*map(type, blocks.values())} - {dict, type(None)}:
            raise SpecError(f"sweep {name!r}, scales: expected SCALE: {{KEY: VALUE}} for each.")
        scales = [scale for scale in (cfg.scale.extends, cfg.scale.name) if scale in blocks]
        if not scales:
            raise NotAtScale(
                f"this sweep has no scale {cfg.scale.name!r}. Its file has: {', '.join(blocks)}."
            )
        for scale in scales:
            values = _merged(values, blocks[scale] or {})
    for problem in problems_of(Sweep, values):
        if "${" not in problem:  # what such a value becomes is checked when it has been resolved
            at = f"sweep {name!r} at scale {cfg.scale.name}"
            raise SpecError(f"{at}: {problem} (docs/sweep_files.md)")
    return dataclasses.asdict(Sweep(**values))


def _listed(override: Override) -> list[Any]:
    """Return the values of an option: of a list, of A,B, or one."""
    value: Any = override.value()
    if override.is_choice_sweep():
        value = [getattr(v, "text", v) for v in value.list]  # of a quoted string
    return value if isinstance(value, list) and value else [value]


def _replace_axis(
    sweep: dict[str, Any], key: str, values: list[Any], synthetic: bool, now: dict[str, Any]
) -> None:
    """Replace an axis at every depth: model or dataset, or METHOD.FIELD in all arms of the method.

    Generator parameters go if the new data set is not synthetic. `now`: the arms, resolved, for
    those of other methods that refer to a mapping of which a field goes.
    """
    method, _, field = key.rpartition(".")
    gone = {field} | ({GENERATOR_PARAMS} if field == "dataset" and not synthetic else set())
    arms = [axes for axes in sweep["arms"].values() if not method or axes["method"] == method]
    if method and not arms:
        raise SpecError(f"{key}: no arm of the sweep has method={method}. Leave it out.")
    for arm, axes in sweep["arms"].items() if method else ():
        if axes["method"] != method:
            axes |= {k: v for k, v in now[arm].items() if field in fields_of({k: v}) - {k}}

    def strip(axes: Any) -> None:
        for part in axes if isinstance(axes, list) else [axes]:
            if isinstance(part, dict):
                for name in gone & part.keys():
                    del part[name]
                for name, inner in part.items():
                    if name not in WHOLE:
                        strip(inner)

    for axes in arms if method else [sweep["axes"], *arms]:
        strip(axes)
    for axes in arms if method else [sweep["axes"]] * (len(values) > 1):
        axes[field] = values if len(values) > 1 else values[0]


def _merged(top: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """Merge plain mappings. OmegaConf's merge would also change the values that `${...}` names."""
    both = {
        k: _merged(top[k], v)
        for k, v in block.items()
        if isinstance(v, dict) and isinstance(top.get(k), dict)
    }
    return {**top, **block, **both}


def _check_key(known: Any, override: Override) -> Any:
    """Return what the files say at an override's key, None if nothing.

    Raises:
        SpecError: no such key exists, which nothing would read, or it cannot be left out.
    """
    key, given = override.key_or_group, str(override.input_line)
    if key.startswith("sweep.") and not known["sweep"]:
        raise SpecError(f"{given!r} changes a sweep. Add one: +sweep=NAME.")
    if key.startswith(("scale.", "sweep.scales")):
        raise SpecError(
            f"{given!r} has no effect: a scale is chosen whole. Write scale=NAME; sweep.axes, "
            "sweep.arms and sweep.replicate change it."
        )
    if override.is_delete() and FREE.isdisjoint(key.split(".")[:-1]):
        raise SpecError(f"{given!r} removes a setting that must have a value. Set it: KEY=VALUE.")
    node, path = known, list[str]()
    for name in key.split("."):
        if not isinstance(node, dict) or "[" in name:
            return None
        if name not in node:
            break
        node, path = node[name], [*path, name]
    else:
        return node
    free = not FREE.isdisjoint(path)
    if free and (override.is_add() or override.is_force_add()):
        return None
    inside = [f"{part}.{name}" for part in PARTS if not path and name in known[part]]
    names = inside or [".".join([*path, str(key)]) for key in node]
    add = f" To add it: +{given}" if free and not override.is_delete() else ""
    raise SpecError(f"{given!r}: {unknown('setting', '.'.join([*path, name]), names)}{add}")


def _sweep(name: str, config: dict[str, Any], models: Sequence[str] = ()) -> Sweep:
    """Make the sweep of a configuration, with the arms that arms=NAME or arms=[NAME,...] names."""
    sweep, arms = made(name, config["sweep"], models), config["arms"]
    chosen = [str(arm) for arm in (arms if isinstance(arms, list) else [arms]) if arm]
    if wrong := next((arm for arm in chosen if arm not in sweep.arms), None):
        raise SpecError(unknown("arm", wrong, sweep.arms))
    if chosen:
        sweep.arms = {arm: axes for arm, axes in sweep.arms.items() if arm in chosen}
    return sweep


def _shipped(group: str) -> set[str]:
    """Return the names of a group's shipped options."""
    names = {path.stem for path in (conf_dir() / group).glob("*.yaml")}
    return names | (METHODS.keys() if group == "method" else set())


def _read(group: str, name: str) -> Any:
    """Return the values of a shipped option as Hydra does, in a tenth of its time.

    {}: only Hydra can read the file, as it is written in another way than the shipped ones.
    """
    if group == "method" and name in METHODS:
        return defaults_of(METHODS[name])
    own: Any = OmegaConf.load(conf_dir() / group / f"{name}.yaml")
    listed = own.pop("defaults", ["_self_"]) if isinstance(own, DictConfig) else [None]
    *parents, last = listed if isinstance(listed, ListConfig | list) and listed else [None]
    if last != "_self_" or not all(isinstance(p, str) and p in _shipped(group) for p in parents):
        return {}
    before = [_read(group, p) for p in parents]
    whole: Any = OmegaConf.merge(*before or [SCHEMA[group] if group in GROUPS else {}], own)
    return _plain(whole) if all(before) else {}


def _plain(cfg: DictConfig) -> Any:
    """Resolve interpolations, and return the values of a configuration or of one group."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise SpecError(
                f"not set: {', '.join(missing)}. Choose model=NAME, dataset=NAME or method=NAME, "
                "or set the key."
            )
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise SpecError(f"configuration: {message} (key {error.full_key or '?'})") from None


def _run_spec(config: dict[str, Any]) -> RunSpec:
    trainer = trainer_of(config["trainer"])[0]
    return spec_from({**{f.key: config[f.key] for f in fields(RunSpec)}, "trainer": trainer})


def _refuse_overwritten(typed: Sequence[str], name: str, sweep: Sweep) -> None:
    """Refuse values of the command line that the sweep's grid, or a later option, replaces."""
    keys = {text.lstrip("+~").partition("=")[0] for text in typed}
    set_by = {arm: {"method"} | fields_of(axes_of(a)) for arm, a in sweep.arms.items()}
    for text in typed:
        key, _, value = text.lstrip("+~").partition("=")
        axis = key.removeprefix("sweep.axes.").removeprefix("method.")
        parts = [f"sweep.arms.{arm}" for arm, axes in set_by.items() if axis in axes]
        if key.startswith("sweep.axes."):  # an arm's own values win
            parts = parts if len(parts) == len(sweep.arms) else []
        elif key in GROUPS or key.partition(".")[0] in {a["method"] for a in sweep.arms.values()}:
            method, _, axis = key.rpartition(".")  # replaced before these
            arms = [n for n, a in sweep.arms.items() if not method or a["method"] == method]
            parts = ["sweep.axes"] * (not method) + [f"sweep.arms.{arm}" for arm in arms]
            parts = [part for part in parts if f"{part}.{axis}" in keys]
        elif axis in fields_of(sweep.axes):
            parts = ["sweep.axes"]
        if key == "method" and sweep.search:
            like: Any = next((a for a in sweep.arms.values() if "rank" in a), {})
            arm = json.dumps(like | {"method": value}).replace('"', "")
            has = [f"arms={arm}" for arm, axes in sweep.arms.items() if axes["method"] == value]
            hint = " or ".join(has) or f"'+sweep.arms.{value}={arm}', an arm more"
            raise SpecError(f"{text!r} has no effect: {name!r} has several methods. Write {hint}.")
        if parts:
            if key.startswith("method.") and parts != ["sweep.axes"]:
                parts = sorted({sweep.arms[part.split(".")[2]]["method"] for part in parts})
            hint = " or ".join(f"{part}.{axis}={value}" for part in parts)
            raise SpecError(
                f"{text!r} has no effect: the grid of sweep {name!r} sets {axis!r}. Write {hint}."
            )
