"""What imports what, read from source files: every import counts, wherever it stands.

An import inside a function counts, and so does a module's name that is a string: the argument of
`importlib.import_module`, an entry of a registry ("package.module:name"), the module after `-m`.
An f-string counts as an import of every module under its prefix. Imports for the type checker
alone (`if TYPE_CHECKING:`) do not count.
"""

import ast
import graphlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Graph = dict[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def nodes(tree: ast.Module, top_only: bool = False) -> Iterator[ast.AST]:
    """All nodes that run; with top_only, those that run when the module is imported."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            children = list(node.orelse)
        elif top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            children = []
        stack += children


def imported(tree: ast.Module, top_only: bool = False) -> set[str]:
    """Names that import statements bring in: `from a import b` gives a and a.b."""
    found = set()
    for node in nodes(tree, top_only):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the whole name"
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def packages(tree: ast.Module, top_only: bool = False) -> set[str]:
    """Top-level packages that a file imports, by a statement or by `import_module("...")`."""
    literal = {
        node.args[0].value
        for node in nodes(tree, top_only)
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
        and isinstance(node.args[0], ast.Constant)
    }
    return {name.split(".")[0] for name in imported(tree, top_only) | literal}


def named_in_strings(tree: ast.Module, modules: Iterable[str]) -> set[str]:
    """Modules that strings name: "a.b", "a.b:attribute", "a.b.attribute", and f"a.{x}" for all under a."""
    modules, found = set(modules), set()
    whole = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(:\w+)?")
    for node in nodes(tree):
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            prefix = str(node.values[0].value)
            if re.fullmatch(r"([A-Za-z_]\w*\.)+", prefix):
                found |= {m for m in modules if m.startswith(prefix)}
        elif isinstance(node, ast.Constant) and whole.fullmatch(str(node.value)):
            name = node.value.split(":")[0]
            found |= {name} & modules or {name.rpartition(".")[0]} & modules
    return found


def graph_of(trees: Mapping[str, ast.Module]) -> Graph:
    """For every module of `trees`, the modules among them that it reaches."""
    return {
        name: ((imported(tree) | named_in_strings(tree, trees)) & set(trees)) - {name}
        for name, tree in trees.items()
    }


def grouped(graph: Graph, group) -> Graph:
    """The same graph between groups of modules; `group(module)` names a module's group."""
    found: Graph = {}
    for module, reached in graph.items():
        found.setdefault(group(module), set()).update(map(group, reached))
    return {name: reached - {name} for name, reached in found.items()}


def circle(graph: Graph) -> list[str]:
    """A circle of nodes, the first one also at the end; empty if there is none."""
    try:
        graphlib.TopologicalSorter({name: sorted(graph[name]) for name in sorted(graph)}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []
