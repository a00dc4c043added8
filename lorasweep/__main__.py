"""`python -m lorasweep +sweep=lr_ratio`: compose, then act. The Hydra entry, and user errors
without traceback."""

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 some runs failed, 2 the request was wrong, 130
    stopped."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from yaml import YAMLError

    from lorasweep.config import compose
    from lorasweep.errors import LorasweepError

    def fail(message: str) -> None:
        print(f"lorasweep: {message}", file=sys.stderr)
        sys.exit(2)

    if any(a in ("-m", "--multirun") for a in sys.argv[1:]):
        fail(
            "-m (Hydra multirun) is not used here: a sweep's axes are lists. See `python -m lorasweep --help`."
        )
    compose.register()

    @hydra.main(config_path=str(compose.conf_dir()), config_name="config", version_base="1.3")
    def run(cfg: DictConfig) -> None:
        from lorasweep.cli.actions import act

        try:
            code = act(compose.request(cfg))
        except LorasweepError as error:
            fail(str(error))
        except BrokenPipeError:  # the reader (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        if code:
            sys.exit(code)

    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # as Ctrl-C: workers checkpoint, then leave
    os.environ.setdefault(
        "HYDRA_FULL_ERROR", "1"
    )  # errors reach the handlers below instead of Hydra's printer
    if Path(sys.argv[0]).name == "__main__.py":
        sys.argv[0] = "lorasweep"
    try:
        run()
    except HydraException as error:
        cause = error.__cause__
        fail(str(error) if cause is None or str(cause) in str(error) else f"{error}\n{cause}")
    except YAMLError as error:
        fail(f"a configuration file is not valid YAML: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
