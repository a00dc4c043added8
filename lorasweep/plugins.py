"""What other installed packages add, by entry points of the group `lorasweep`.

    conf = "package.folder"              a folder with sweep/, model/ or dataset/, of YAML files
    "method.NAME" = "module:Class"       a subclass of spec.method.Method
    "generator.NAME" = "module:object"   a Generator of data.synthetic.generators

Names are listed without an import; a module is imported when its name is asked for.
"""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lorasweep.errors import SpecError, unknown

entries: Callable[[], Any] = cache(lambda: list(entry_points(group="lorasweep")))


class Offer(NamedTuple):
    """Something that an installed package offers under a name."""

    package: str  # its name and version
    entry: EntryPoint
    folder: Path = Path()  # of a file: the one that the entry point `conf` names


@cache
def offers(kind: str) -> dict[str, list[Offer]]:
    """Return what packages offer, by name; `kind`: of an entry point, or a folder of `conf`."""
    found = dict[str, list[Offer]]()
    for entry in entries():
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?"
        if entry.name.startswith(f"{kind}."):
            found.setdefault(entry.name.split(".", 1)[1], []).append(Offer(package, entry))
        elif entry.name == "conf" and kind in ("sweep", "model", "dataset"):
            top, *below = entry.value.split(".")
            for root in getattr(find_spec(top), "submodule_search_locations", None) or ():
                folder = Path(root, *below)
                for path in folder.glob(f"{kind}/*.yaml"):
                    found.setdefault(path.stem, []).append(Offer(package, entry, folder))
    return found


def find(
    kind: str, name: str, shipped: Mapping[str, Any], fits: Callable[[Any], bool], read: Any = None
) -> Any:
    """Return the thing of a name; one of a package is loaded now, by `read(offer)` if given.

    Raises:
        SpecError: nothing has the name, or two; or the package is broken.
    """
    if not (found := offers(kind).get(name, [])):
        if name in shipped:
            return shipped[name]
        raise SpecError(unknown(kind, str(name), [*shipped, *offers(kind)]))
    owners = [*(o.package for o in found), *["lorasweep (or your files)"] * (name in shipped)]
    remove = " or ".join(f"pip uninstall {o.package.split()[0]}" for o in found)
    if len(owners) > 1:
        raise SpecError(f"{kind} {name!r} is in {' and in '.join(owners)}. Keep one: {remove}.")
    try:
        if fits(thing := read(found[0]) if read else found[0].entry.load()):
            return thing
        why = f"it is not a {kind} with this name"
    except (Exception, SystemExit) as error:  # of the code of others
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise SpecError(
        f"{kind} {name!r} of {owners[0]} cannot be used: {why}. Correct it, or {remove}."
    )
