"""Hydra's configuration loader, which also describes names and merges the chosen scale's block.

`model=` and `dataset=` may name a model or data set that no file describes
(`lorasweep.config.own`). A sweep can have a block for each scale:

    axes: {seed: 100}               # shared by all scales
    arms: {lora: {method: lora}}
    scales:
      smoke: {arms: {lora: {rank: 4, lr: 5e-3}}}
      tiny: {arms: {lora: {rank: [1, 16], lr: "${around:1.4e-3,5,2}"}}}

The block is merged over the keys above it: mappings key by key, other values replaced. This happens
before the command line is applied, so `~sweep.arms.fullft` can remove what a scale states. A scale
with `extends: OTHER` (in conf/scale) takes the block of OTHER first, then the scale's block.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config import own
from lorasweep.config.folders import conf_dir
from lorasweep.errors import NotAtScale, SpecError, unknown
from lorasweep.sweep.question import Sweep

PARTS = ("method", "exec", "dataset", "cluster")
"""Groups in which a setting without its group is looked for."""


class ScaleLoader(ConfigLoaderImpl):
    """Hydra 1.3's loader, which also refuses unknown keys of a sweep's file."""

    as_in_files: DictConfig
    """The last composed sweep as in its files, before overrides of single keys."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.looked_up: dict[tuple[str, ...], Any] = {}
        """Cache of the models and data sets that an axis names, by group, name and overrides."""
        self.names = own.Names()
        self._overrides: list[Override] = []

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **more: Any
    ) -> DictConfig:
        """Compose after describing what `model=` and `dataset=` name, if no file does."""
        typed: dict[str, str] = {}
        described, problems = list(overrides), []
        for k, text in enumerate(overrides):
            key = text.partition("=")[0]
            if (group := key.lstrip("+")) not in own.GROUPS:
                continue
            name = OverridesParser.create().parse_override(text).value()
            try:
                if isinstance(name, str):
                    described[k] = f"{key}={self.option(group, name, overrides)}"
                    typed[described[k]] = text
            except SpecError as error:
                problems.append(str(error))
        if problems:
            raise SpecError("\n".join(problems))
        self._overrides = OverridesParser.create().parse_overrides(described)
        try:
            cfg = super().load_configuration(config_name, described, *args, **more)
        except MissingConfigException as error:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            if not group or error.options is None:
                raise
            raise SpecError(
                f"{unknown(group, name, error.options)} A file of your own, "
                f"DIR/{group}/{name}.yaml, is found with --config-dir DIR."
            ) from None
        cfg.hydra.overrides.task = [typed.get(o, o) for o in cfg.hydra.overrides.task]
        return cfg

    def option(self, group: str, name: str, overrides: Sequence[str]) -> str:
        """Return the option of a group for a name, described if no file does. Raises SpecError."""
        shipped = conf_dir() / group / f"{name.removesuffix('.yaml')}.yaml"
        if "/" not in name and shipped.is_file():  # the common case, found quickly
            return name
        options = self.get_group_options(group, config_name="config", overrides=list(overrides))
        if name in options:
            return name
        keys = (f"{group}.", "exec.models_dir=", "+exec.models_dir=")
        set_here = [o for o in overrides if o.startswith(keys)]
        parsed = OverridesParser.create().parse_overrides(set_here)
        values = {o.key_or_group: o.value() for o in parsed}
        return self.names.option(group, name, options, values)

    def _load_single_config(self, default: Any, repo: Any) -> Any:
        loaded = super()._load_single_config(default, repo)
        group, _, name = str(default.config_path).partition("/")
        if group != "sweep":
            return loaded
        values: Any = OmegaConf.to_container(loaded.config, resolve=False)
        known = [field.name for field in fields(Sweep)]
        if odd := [k for k in values.get(group) or () if k not in known]:
            raise SpecError(f"{group} {name!r}: {unknown('key', str(odd[0]), known)}")
        return loaded

    def _compose_config_from_defaults_list(self, defaults: Any, repo: Any) -> DictConfig:
        # the step after which Hydra applies overrides of single keys
        cfg = super()._compose_config_from_defaults_list(defaults, repo)
        blocks, scale = cfg.sweep.scales, cfg.scale
        if blocks:
            names = [name for name in (scale.extends, scale.name) if name in blocks]
            if not names:
                raise NotAtScale(
                    f"this sweep has no scale {scale.name!r}. Its file has: {', '.join(blocks)}."
                )
            values: Any = OmegaConf.to_container(cfg.sweep, resolve=False)
            by_scale = values.pop("scales")
            for name in names:
                values = _merged(values, by_scale[name] or {})
            try:
                cfg.sweep = OmegaConf.merge(OmegaConf.structured(Sweep), values)
            except OmegaConfBaseException as error:
                given = (o.value() for o in self._overrides if o.key_or_group == "sweep")
                message = str(error).strip().partition("\n")[0]
                raise SpecError(
                    f"sweep {next(given, '')!r}, scales.{names[-1]}: {message}. Allowed there: "
                    f"{', '.join(f.name for f in fields(Sweep))} (docs/sweep_files.md)."
                ) from None
        if cfg.sweep.arms:
            self.as_in_files = without_hydra(cfg)
        for override in self._overrides:
            key = override.key_or_group
            if key.startswith("sweep.") and not (cfg.sweep.arms or cfg.sweep.parts):
                raise SpecError(f"{override.input_line!r} changes a sweep. Add one: +sweep=NAME.")
            if not repo.group_exists(key):
                _check_key(cfg, override)
        return cfg


def _check_key(cfg: DictConfig, override: Override) -> None:
    """Raise SpecError if an override sets a key that does not exist.

    Hydra would accept it with a + before it, and nothing would read it. Only mappings without a
    schema, such as sweep.axes, take new keys.
    """
    node: Any = cfg
    path: list[str] = []
    for name in override.key_or_group.split("."):
        if not isinstance(node, DictConfig) or node._is_none() or "[" in name:
            return
        if name not in [*node]:  # `in node` is false for a key without a value
            break
        node, path = node._get_node(name), [*path, name]
    else:
        return
    takes_new = OmegaConf.get_type(node) is dict
    if takes_new and (override.is_add() or override.is_force_add()):
        return
    given = str(override.input_line)
    if inside := [part for part in PARTS if not path and name in cfg[part]]:
        raise SpecError(f"{given!r}: no such setting. Did you mean '{inside[0]}.{name}'?")
    is_run_field = name in cfg or name in cfg.method
    if takes_new and not override.is_delete() and (is_run_field or path[0] != "sweep"):
        raise SpecError(f"{given!r}: {'.'.join(path)} has no {name!r} yet. To add it: +{given}")
    names = [".".join([*path, str(key)]) for key in node if key != "hydra"]
    raise SpecError(f"{given!r}: {unknown('setting', '.'.join([*path, name]), names)}")


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Return a copy of a composed configuration without Hydra's own part."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def _merged(top: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """Merge plain mappings. OmegaConf's merge would also change the values that `${...}` names."""
    both = {
        k: _merged(top[k], v)
        for k, v in block.items()
        if isinstance(v, dict) and isinstance(top.get(k), dict)
    }
    return {**top, **block, **both}
