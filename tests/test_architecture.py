"""Rules of the code: which way rooms depend, which packages they import, docstrings, versions.

A room is a folder of `lorasweep` or `analysis`; `benchmarks` may import both, and only tests import
it. Every import counts, wherever it stands. So does a module's name that is a string: the argument of
`importlib.import_module`, an entry of a registry ("package.module:name"), the module after `-m`; an
f-string counts as an import of every module under its prefix. Imports for the type checker alone
(`if TYPE_CHECKING:`) do not count.
"""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lorasweep

Graph = dict[str, set[str]]


def nodes(tree: ast.Module, top_only: bool = False) -> Iterator[ast.AST]:
    """All nodes that run; with top_only, those that run when the module is imported."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack += node.orelse
        elif not (
            top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ):
            stack += ast.iter_child_nodes(node)


def imported(tree: ast.Module, top_only: bool = False) -> set[str]:
    """Names that import statements bring in: `from a import b` gives a and a.b; and the arguments
    of `import_module`."""
    found = set()
    for node in nodes(tree, top_only):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the whole name"
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def packages(tree: ast.Module, top_only: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imported(tree, top_only)}


def graph_of(trees: Mapping[str, ast.Module]) -> Graph:
    """For every module of `trees`, the modules among them that it reaches, also by a string: "a.b",
    "a.b:attribute", "a.b.attribute", and f"a.{x}" for all under a."""
    graph: Graph = {}
    for module, tree in trees.items():
        found = imported(tree)
        for node in nodes(tree):
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                prefix = str(node.values[0].value)
                if re.fullmatch(r"([A-Za-z_]\w*\.)+", prefix):
                    found |= {m for m in trees if m.startswith(prefix)}
            elif isinstance(node, ast.Constant) and "." in str(node.value):
                name = str(node.value).split(":")[0]
                found.add(name if name in trees else name.rpartition(".")[0])
        graph[module] = (found & trees.keys()) - {module}
    return graph


def check_no_circle(graph: Graph, group=lambda module: module) -> None:
    """Raise graphlib.CycleError if the graph between groups of modules has a circle."""
    found: Graph = {}
    for module, reached in graph.items():
        found.setdefault(group(module), set()).update(set(map(group, reached)) - {group(module)})
    graphlib.TopologicalSorter(found).prepare()


ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = [
    p for h in ("lorasweep", "analysis", "benchmarks") for p in sorted((ROOT / h).rglob("*.py"))
]
PATHS = {
    path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path
    for path in (str(p.relative_to(ROOT)) for p in FILES)
}
TREES = {module: ast.parse((ROOT / path).read_text()) for module, path in PATHS.items()}
GRAPH = graph_of(TREES)
ARROWS = [(module, other) for module, others in GRAPH.items() for other in others]

# From the bottom; a room uses those below it only. `methods` and `data` do not know each other.
ORDER = {
    "lorasweep": "errors < plugins < spec < methods data < sweep < store < tracking < plan < models < train"
    " < launch < check < advise < fleet < config < work < cli < follow_up < __main__",
    "analysis": "runs < inference < optimum < measures < questions < report < tables < __main__",
}
RANK = {
    f"{house}.{room}": rank
    for house, order in ORDER.items()
    for rank, floor in enumerate(order.split(" < "))
    for room in floor.split()
} | {"lorasweep": -1, "analysis": -1}
DOOR = "lorasweep.work.answer"  # the only module of lorasweep that reaches `analysis`
LAW = {
    ("lorasweep.advise.rates", r)
    for r in ("analysis", "analysis.measures", "analysis.measures.laws")
}
NOT_IN_TRAIN = r"lorasweep\.(store\.(?!checkpoint)|plan|tracking|sweep|methods\.(lora|fullft))\b"

TORCH = r"lorasweep/(train|models|methods)/|lorasweep/launch/torch_trainer\.py"
TORCH += r"|lorasweep/check/measures\.py"
ONLY_IN = {
    **dict.fromkeys(("hydra", "omegaconf"), r"lorasweep/(config/.*|__main__)\.py"),
    "wandb": r"lorasweep/tracking/wandb\.py",
    "submitit": r"lorasweep/launch/slurm/",
    **dict.fromkeys(("torch", "transformers"), TORCH),
    **dict.fromkeys(("trl", "tokenizers"), "$"),
    "peft": r"lorasweep/methods/",
    "datasets": r"lorasweep/data/",
    "safetensors": TORCH + r"|lorasweep/(methods|store|work)/",
    "jinja2": r"lorasweep/(advise/pages|cli/plans)\.py|analysis/report/",
    "matplotlib": r"analysis/report/plots\w*\.py",
    "plotly": r"analysis/report/report\.py",
    "IPython": r"analysis/report/notebook\.py",
}
STANDARD_LIBRARY_ONLY = r"lorasweep/(errors\.py|spec/(?!streams\.py)|sweep/)"
NOUNS_OF_NOTHING = {"utils", "util", "helpers", "common", "misc", "manager"}


def room(module):
    return ".".join(module.split(".")[:2])


def house(module):
    return module.split(".")[0]


def report(found):
    """Fail with all violations, one a line."""
    assert not found, "\n".join([f"{len(found)} found:", *sorted(found)])


def test_rooms_depend_only_downwards_without_circles_and_packages_meet_at_one_module():
    ours = [(m, r) for m, r in ARROWS if house(m) != "benchmarks"]
    inside = [(m, r) for m, r in ours if house(m) == house(r) and room(m) != room(r)]
    assert {room(m) for m in PATHS if house(m) != "benchmarks"} <= RANK.keys()
    report([f"{m} -> {r}" for m, r in inside if RANK[room(r)] >= RANK[room(m)]])
    across = [(m, r) for m, r in ours if house(m) != house(r)]
    allowed = {*LAW, *((DOOR, r) for _, r in across if house(r) == "analysis")}
    report([f"{m} -> {r}" for m, r in across if (m, r) not in allowed])
    check_no_circle(GRAPH)
    check_no_circle(GRAPH, room)


def test_the_loop_knows_no_store_and_no_method():
    in_train = [(m, r) for m, r in ARROWS if room(m) == "lorasweep.train"]
    report([f"{m} -> {r}" for m, r in in_train if re.match(NOT_IN_TRAIN, r)])
    text = (ROOT / "lorasweep/train/loop.py").read_text()
    assert not re.search(r"['\"](lora|fullft|sft)['\"]", text)


def test_packages_are_imported_only_where_they_belong():
    found = []
    for module, path in PATHS.items():
        if house(module) == "benchmarks":
            continue
        for package in packages(TREES[module]) & ONLY_IN.keys():
            if not re.match(ONLY_IN[package], path):
                found.append(f"{path}: {package}")
        outside = packages(TREES[module]) - {"lorasweep"} - sys.stdlib_module_names
        if outside and re.match(STANDARD_LIBRARY_ONLY, path):
            found.append(f"{path}: {sorted(outside)}")
        if outside & ONLY_IN.keys() and path.startswith("lorasweep/methods/"):
            top = packages(TREES[module], top_only=True)
            if "stacked" not in path and top & ONLY_IN.keys():
                found.append(f"{path}: at the top {sorted(top & ONLY_IN.keys())}")
    report(found)


def test_importing_everything_but_the_training_side_imports_no_torch():
    """In one process: what plans, launches, asks and answers starts in a second."""
    models = "bases|forward|load|sharding"
    heavy = rf"lorasweep\.(train|models\.({models})|methods\.stacked|check)\b|benchmarks\b"
    modules = [m for m in PATHS if not re.match(heavy, m)]
    code = (
        f"import sys, importlib\nfor m in {sorted(modules)!r}: importlib.import_module(m)\n"
        "bad = {'torch', 'transformers', 'wandb', 'submitit'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_modules_are_described_and_named_by_what_they_hold_and_rooms_re_export_nothing():
    found = [p for p in PATHS.values() if Path(p).stem in NOUNS_OF_NOTHING]
    for module, tree in TREES.items():
        found += [] if ast.get_docstring(tree) else [module]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found += [] if ast.get_docstring(node) else [f"{module}.{node.name}"]
        rest = [n for n in tree.body[1:] if module != "lorasweep" or not isinstance(n, ast.Assign)]
        found += [module] if rest and PATHS[module].endswith("__init__.py") else []
    report(found)


def test_the_graph_sees_every_kind_of_import():
    texts = {
        "a.top": "from a.low import x",
        "a.low": "def f():\n    importlib.import_module(f'a.plug.{f}')",
        "a.plug.one": "REGISTRY = {'two': 'a.plug.two:make'}",
        "a.plug.two": "subprocess.run(['python', '-m', 'a.top'])",
        "a.types": "if TYPE_CHECKING:\n    from a.top import y",
        "a.free": "'a.top is only prose here'",
    }
    graph = graph_of({name: ast.parse(text) for name, text in texts.items()})
    assert graph["a.low"] == {"a.plug.one", "a.plug.two"} and graph["a.plug.two"] == {"a.top"}
    assert graph["a.types"] == graph["a.free"] == set() and graph["a.plug.one"] == {"a.plug.two"}
    for group in (str, lambda module: module.rpartition(".")[0]):
        with pytest.raises(graphlib.CycleError):
            check_no_circle(graph, group)


def test_the_packages_are_no_longer_than_agreed():
    """Raising the number needs an entry in DECISIONS.md that says what the new lines replaced."""
    agreed = PYPROJECT["tool"]["lorasweep"]["lines"]
    ours = [ROOT / path for module, path in PATHS.items() if house(module) != "benchmarks"]
    assert sum(len(p.read_text().splitlines()) for p in ours) <= agreed


def test_one_version_is_stated_everywhere():
    version = PYPROJECT["project"]["version"]
    texts = {name: (ROOT / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md")}
    released = re.search(r"^date-released: (.*)$", texts["CITATION.cff"], re.M)[1]
    assert f"\nversion: {version}\n" in texts["CITATION.cff"] and lorasweep.__version__ == version
    heads = re.findall(r"^## (.*)$", texts["CHANGELOG.md"], re.M)
    assert heads[:2] == ["Unreleased", f"{version} ({released})"]


def versions(name):
    """Name -> version of a file of constraints; each line is one and nothing else."""
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    found = {canonicalize_name(package): Version(version) for package, version in pairs}
    assert len(found) == len(pairs) and not any(version.local for version in found.values())
    return found


def test_the_lowest_versions_are_the_lower_bounds_and_the_tested_ones_within_all_ranges():
    project, tested = PYPROJECT["project"], versions("tested.txt")
    direct = [Requirement(line) for line in project["dependencies"]]
    of = [(canonicalize_name(r.name), s) for r in direct for s in r.specifier]
    bounds = {name: Version(s.version) for name, s in of if s.operator == ">="}
    assert versions("lowest.txt") == bounds
    assert bounds.keys() == {canonicalize_name(r.name) for r in direct}
    extras = [Requirement(r) for lines in project["optional-dependencies"].values() for r in lines]
    for r in [*direct, *extras]:
        if r.name != "lorasweep":
            assert r.specifier.contains(tested[canonicalize_name(r.name)]), r
    assert "lorasweep" not in tested
