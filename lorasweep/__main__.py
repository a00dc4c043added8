"""The command line, `python -m lorasweep ...`: compose the request with Hydra, then act on it."""

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lorasweep.errors import LorasweepError
from lorasweep.launch.process import hangups_ignored

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Run the command line.

    Exit status: 0 done, 1 some runs failed, 2 the request was wrong, 130 interrupted.
    """
    given = sys.argv[1:]
    if not given:
        from lorasweep.cli import actions
        from lorasweep.config.folders import conf_dir

        print(actions.front_page(conf_dir()), end="")
        return
    if given[0] == "--follow" and len(given) == 2:  # command of a follow-up job
        from lorasweep.cli import actions

        sys.exit(actions.follow_up(given[1]))
    if {"-m", "--multirun"} & {*given}:
        _fail("-m (Hydra multirun) is not supported: use a sweep instead, +sweep=NAME.")
    if importlib.util.find_spec("hydra") is None:
        _fail(
            f"hydra is not installed for {sys.executable}. Activate the environment in which "
            "lorasweep is installed (after make run: . .venv/bin/activate), or pip install -e ."
        )
    from hydra.errors import HydraException
    from yaml import YAMLError

    # signals act like Ctrl-C: workers write a checkpoint, then stop
    if "LORASWEEP_JOB" in os.environ:
        from lorasweep.launch.slurm.job import Signals

        Signals()
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if not hangups_ignored():
            signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        _compose_and_act(given)
    except (HydraException, LorasweepError) as error:
        cause = str(error.__cause__ or "").partition("\n")[0]
        named = isinstance(error, LorasweepError) or cause in str(error)
        _fail(str(error) if named else f"{error}\n{cause}")
    except YAMLError as error:
        _fail(f"a configuration file is not valid YAML: {error}")
    except BrokenPipeError:  # the reader (head, less) closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # such as a full disk
        why = f"{error.filename or 'a file'} cannot be written or read ({error.strerror or error})"
        _fail(f"{why}. Name another, or correct it, and run again: finished runs are kept.")
    except KeyboardInterrupt:
        sys.exit(130)


def _compose_and_act(given: list[str]) -> None:
    """Compose the request with Hydra and do its action; --help and such are Hydra's alone."""
    import hydra

    from lorasweep.cli import actions
    from lorasweep.config import compose

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--cfg", "-c")
    named, rest = parser.parse_known_args(given)
    flags, typed = ([t for t in rest if t.startswith("-") == is_flag] for is_flag in (True, False))
    if "--resolve" in flags and not named.cfg:
        _fail("--resolve is only for --cfg job.")
    composer, prepared = compose.Composer(*named.config_dir), None
    compose.register(actions.help_template)
    if {*flags} <= {"--resolve"}:
        with compose.opened():
            prepared = composer.prepare(typed)
        flags += [f"--cfg={named.cfg}"] if named.cfg else []
        sys.argv[1:] = [*flags, *prepared.overrides]
    if Path(sys.argv[0]).name == "__main__.py":
        sys.argv[0] = "lorasweep"
    # so that errors reach the handlers of `main`; otherwise Hydra prints them and exits
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    failed: list[Exception] = []

    def do(cfg: "DictConfig") -> None:
        if prepared is None:
            _fail(f"{' '.join(flags)} is not supported. See `python -m lorasweep --help`.")
        try:
            request = composer.request(cfg, prepared)
            actions.check(request)
            status = actions.act(request)
        except Exception as error:  # Hydra would print a line of its own before it
            failed.append(error)
        else:
            sys.exit(status)

    folder = str(compose.conf_dir())
    hydra.main(config_path=folder, config_name="config", version_base="1.3")(do)()
    if failed:
        raise failed[0]


def _fail(message: str) -> NoReturn:
    print(f"lorasweep: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
