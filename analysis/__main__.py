"""Judge a sweep again, or analyse any table of runs. Trains nothing and needs no torch."""

import importlib.util
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 for success, 2 for a wrong request."""
    if importlib.util.find_spec("pandas") is None:
        where = "Activate the environment in which lorasweep is installed"
        print(f"analysis: {sys.executable} has no pandas. {where}.", file=sys.stderr)
        return 2
    from analysis.runs.table import TableError
    from analysis.tables import commands

    try:
        commands.run(list(sys.argv[1:] if argv is None else argv) or ["--help"])
    except TableError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.filename or 'a file'} cannot be written or read"
        print(f"analysis: {what}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
