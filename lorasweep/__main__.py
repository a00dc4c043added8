"""The command line, `python -m lorasweep ...`: compose the request with Hydra, then act on it."""

import argparse
import importlib.util
import os
import signal
import sys
from typing import Any, NoReturn

from lorasweep.errors import LorasweepError


def main() -> None:
    """Run the command line.

    Exit status: 0 done, 1 some runs failed, 2 the request was wrong, 130 interrupted.
    """
    given = sys.argv[1:]
    if given[:1] == ["--follow"] and len(given) == 2:  # command of a follow-up job
        from lorasweep.follow_up import follow_up

        sys.exit(follow_up(given[1]))
    if importlib.util.find_spec("hydra") is None:
        _fail(
            f"hydra is not installed for {sys.executable}. Activate the environment in which "
            "lorasweep is installed (after make run: . .venv/bin/activate), or pip install -e ."
        )
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    stdout: Any = sys.stdout  # escapes what it cannot hold, as half of an emoji in a column's name
    stdout.reconfigure(errors="backslashreplace")
    # signals act like Ctrl-C: workers write a checkpoint, then stop
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        _compose_and_act(given)
    except (HydraException, OmegaConfBaseException, LorasweepError) as error:
        cause = str(error.__cause__ or "").partition("\n")[0]
        named = isinstance(error, LorasweepError) or cause in str(error)
        _fail(str(error) if named else f"{error}\n{cause}")
    except (YAMLError, UnicodeDecodeError) as error:
        _fail(f"a configuration file is not valid YAML in UTF-8: {error}")
    except BrokenPipeError:  # the reader (head, less) closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # such as a full disk
        why = f"{error.filename or 'a file'} cannot be written or read ({error.strerror or error})"
        _fail(f"{why}. Name another, or correct it, and run again: finished runs are kept.")
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        _fail("a folder that begins with ~NAME: there is no such user. Name another folder.")
    except KeyboardInterrupt:
        sys.exit(130)


def _compose_and_act(given: list[str]) -> None:
    """Compose the request, and do its action or show the configuration."""
    from omegaconf import OmegaConf

    from lorasweep.cli import actions
    from lorasweep.config.compose import composer
    from lorasweep.work.search import as_begun

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--help", "-h", action="store_true")
    named, rest = parser.parse_known_args(given)
    if (flags := [t for t in rest if t.startswith("-")]) or named.cfg not in (None, "job"):
        shown = " ".join(flags) or f"--cfg {named.cfg}"
        _fail(f"{shown} is not supported (several values: +sweep=NAME). See --help, and --cfg job.")
    with composer(*named.config_dir) as compose:
        if rest[:1] == ["help"]:
            named.help, rest = True, rest[1:]
        if named.help or not (rest or named.cfg):
            print(actions.help_of(rest, compose) if named.help else actions.front_page(compose))
            return
        rest = actions.as_overrides(rest, compose.options("sweep"))
        if named.cfg:
            print(OmegaConf.to_yaml(compose.composed(rest)), end="")
            return
        request = as_begun(compose(rest), rest, compose)
    actions.check(request)
    sys.exit(actions.act(request))


def _fail(message: str) -> NoReturn:
    print(f"lorasweep: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
