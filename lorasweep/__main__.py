"""The command line, `python -m lorasweep ...`: compose the request with Hydra, then act on it."""

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
    from lorasweep.config.folders import conf_dir

    if len(sys.argv) == 1:
        from lorasweep.cli.help import front_page

        print(front_page(conf_dir()), end="")
        return
    if sys.argv[1] == "--follow" and len(sys.argv) == 3:  # command of a follow-up job
        from lorasweep.cli.actions import follow_up

        sys.exit(follow_up(sys.argv[2]))
    if any(a in ("-m", "--multirun") for a in sys.argv[1:]):
        _fail(
            "-m (Hydra multirun) is not supported: use a sweep instead, +sweep=NAME. "
            "See `python -m lorasweep --help`."
        )

    if importlib.util.find_spec("hydra") is None:
        _fail(
            f"hydra is not installed for {sys.executable}. Activate the environment in which "
            "lorasweep is installed (after make run: . .venv/bin/activate), or pip install -e ."
        )
    import hydra
    from hydra.errors import HydraException
    from yaml import YAMLError

    from lorasweep.cli.help import help_template
    from lorasweep.config import compose

    compose.register(help_template)
    main_of = hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
    # signals act like Ctrl-C: workers write a checkpoint, then stop
    if "LORASWEEP_JOB" in os.environ:
        from lorasweep.launch.slurm.job import Signals

        Signals()
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if not hangups_ignored():
            signal.signal(signal.SIGHUP, signal.default_int_handler)
    # so that errors reach the handlers below; otherwise Hydra prints them and exits
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if Path(sys.argv[0]).name == "__main__.py":
        sys.argv[0] = "lorasweep"
    try:
        main_of(_act)()
    except HydraException as error:
        cause = str(error.__cause__ or "").partition("\n")[0]
        _fail(str(error) if cause in str(error) else f"{error}\n{cause}")
    except LorasweepError as error:  # raised while Hydra composes
        _fail(str(error))
    except YAMLError as error:
        _fail(f"a configuration file is not valid YAML: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print(f"lorasweep: {message}", file=sys.stderr)
    sys.exit(2)


def _act(cfg: "DictConfig") -> None:
    from lorasweep.cli.actions import act
    from lorasweep.config import compose

    try:
        code = act(compose.request(cfg))
    except LorasweepError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader (head, less) closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # such as a full disk
        why = f"{error.filename or 'a file'} cannot be written or read ({error.strerror or error})"
        _fail(f"{why}. Name another, or correct it, and run again: finished runs are kept.")
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
