"""The rules of the house: which way rooms depend, who may import what, docstrings, words.

A room is a folder of `lorasweep` or `analysis`. Every import counts (tests/imports.py).
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import imports

ROOT = Path(__file__).resolve().parent.parent
FILES = [p for house in ("lorasweep", "analysis") for p in sorted((ROOT / house).rglob("*.py"))]
PATHS = {imports.module_name(p, ROOT): str(p.relative_to(ROOT)) for p in FILES}
TREES = {module: ast.parse((ROOT / path).read_text()) for module, path in PATHS.items()}
GRAPH = imports.graph_of(TREES)

# From the bottom; rooms on one line do not know each other. A room uses those below it only.
ORDER = {
    "lorasweep": [
        ["errors"],
        ["spec"],
        ["methods", "data"],
        ["sweep"],
        ["store"],
        ["tracking"],
        ["plan"],
        ["models", "advise"],
        ["train", "fleet"],
        ["launch"],
        ["config"],
        ["cli"],
        ["bench", "__main__"],
    ],
    "analysis": [
        ["runs"],
        ["inference"],
        ["optimum"],
        ["measures"],
        ["questions"],
        ["report"],
        ["tables"],
        ["validation", "__main__"],
    ],
}
RANK = {
    f"{house}.{room}": rank
    for house, floors in ORDER.items()
    for rank, rooms in enumerate(floors)
    for room in rooms
} | {"lorasweep": -1, "analysis": -1}
DOOR = "lorasweep.cli.answer"  # the only module of lorasweep that reaches `analysis`
STRANGERS = {
    "lorasweep.train": r"lorasweep\.(store\.(?!checkpoint)|plan|tracking|sweep|methods\.(lora|fullft))\b"
}

TORCH = r"lorasweep/(train|models|methods|bench)/|lorasweep/launch/(trainer|measure_packs)\.py"
ONLY_IN = {
    "hydra": r"lorasweep/(config/.*|__main__)\.py",
    "omegaconf": r"lorasweep/(config/.*|__main__)\.py",
    "wandb": r"lorasweep/tracking/wandb\.py",
    "submitit": r"lorasweep/launch/slurm/",
    "rich": r"lorasweep/cli/",
    "torch": TORCH,
    "transformers": TORCH,
    "peft": r"lorasweep/bench/",
    "trl": r"lorasweep/bench/",
    "tokenizers": r"lorasweep/bench/",
    "datasets": r"lorasweep/(data|bench)/",
    "safetensors": TORCH + r"|lorasweep/(methods|store|cli)/",
    "matplotlib": r"analysis/report/plots\w*\.py",
    "plotly": r"analysis/report/interactive/",
    "IPython": r"analysis/report/notebook\.py",
}
STANDARD_LIBRARY_ONLY = r"lorasweep/(errors\.py|spec/(?!streams\.py)|sweep/)"
NOUNS_OF_NOTHING = {"utils", "util", "helpers", "common", "misc", "manager"}
# `whose`, `beside` and `knobs` are keys of kept answers, where they stay.
PRIVATE_WORDS = re.compile(
    "told|untold|mend|mended|upkeep|several|company|thereof|knobs|places|kin|lean|ask|"
    "usual|findings|holes|ours"
)


def room(module):
    return ".".join(module.split(".")[:2])


def report(found):
    """Fail with all violations, one a line."""
    assert not found, "\n".join([f"{len(found)} found:", *sorted(found)])


def test_every_room_is_in_the_order():
    assert {room(m) for m in PATHS} <= RANK.keys()


def test_rooms_depend_only_downwards():
    upward = {
        f"{module} -> {reached}"
        for module, others in GRAPH.items()
        for reached in others
        if module.split(".")[0] == reached.split(".")[0]
        and room(module) != room(reached)
        and RANK[room(reached)] >= RANK[room(module)]
    }
    report(upward)


def test_no_circles_of_files():
    report([m for circle in imports.circles(GRAPH) for m in circle])


def test_no_circles_of_folders():
    folders = imports.grouped(GRAPH, room)
    report([r for circle in imports.circles(folders) for r in circle])


def test_the_two_houses_meet_at_one_door():
    report(
        [
            f"{module} -> {reached}"
            for module, others in GRAPH.items()
            for reached in others
            if module.split(".")[0] != reached.split(".")[0]
            and not (module == DOOR and reached.startswith("analysis."))
        ],
    )


def test_the_loop_knows_no_store_and_no_method():
    report(
        [
            f"{module} -> {reached}"
            for module, others in GRAPH.items()
            for reached in others
            if re.match(STRANGERS.get(room(module), "$"), reached)
        ]
    )
    text = (ROOT / "lorasweep/train/loop.py").read_text()
    assert not re.search(r"['\"](lora|fullft|sft)['\"]", text)


def test_packages_are_imported_only_where_they_belong():
    found = []
    for module, path in PATHS.items():
        for package in imports.packages(TREES[module]) & ONLY_IN.keys():
            if not re.match(ONLY_IN[package], path):
                found.append(f"{path}: {package}")
        outside = imports.packages(TREES[module]) - {"lorasweep"} - sys.stdlib_module_names
        if outside and re.match(STANDARD_LIBRARY_ONLY, path):
            found.append(f"{path}: {sorted(outside)}")
        if outside & ONLY_IN.keys() and path.startswith("lorasweep/methods/"):
            top = imports.packages(TREES[module], top_only=True)
            if "stacked" not in path and top & ONLY_IN.keys():
                found.append(f"{path}: at the top {sorted(top & ONLY_IN.keys())}")
    report(found)


@pytest.mark.parametrize("house", ORDER)
def test_importing_everything_but_the_training_side_imports_no_torch(house):
    """In one process: what plans, launches, asks and answers starts in a second."""
    heavy = r"lorasweep\.(train|models|bench|methods\.stacked)\b"
    modules = [m for m in PATHS if m.startswith(house) and not re.match(heavy, m)]
    code = (
        f"import sys, importlib\nfor m in {sorted(modules)!r}: importlib.import_module(m)\n"
        "bad = {'torch', 'transformers', 'wandb', 'submitit'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_modules_are_named_by_what_they_hold():
    report([p for p in PATHS.values() if Path(p).stem in NOUNS_OF_NOTHING])


def test_modules_and_public_names_say_what_they_do():
    found = [module for module, tree in TREES.items() if not ast.get_docstring(tree)]
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found += [] if ast.get_docstring(node) else [f"{module}.{node.name}"]
    report(found)


def test_a_room_is_a_docstring_and_re_exports_nothing():
    found = []
    for module, path in PATHS.items():
        rest = TREES[module].body[1:]
        if module == "lorasweep":
            rest = [n for n in rest if not isinstance(n, ast.Assign)]  # __version__
        if path.endswith("__init__.py") and rest:
            found.append(path)
    report(found)


def identifiers(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.split(".")[-1]


def test_names_are_standard_words():
    words = Counter(
        f"{PATHS[module]}: {word.lower()}"
        for module, tree in TREES.items()
        for name in identifiers(tree)
        for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
        if PRIVATE_WORDS.fullmatch(word.lower())
    )
    report(list(words.elements()))


def test_the_graph_sees_every_kind_of_import_and_circle():
    """The instrument itself, on planted files: a circle hidden in a function and in a string."""
    trees = {
        "a.top": "from a.low import x",
        "a.low": "def f():\n    import importlib\n    importlib.import_module(f'a.plug.{f}')",
        "a.plug.one": "REGISTRY = {'two': 'a.plug.two:make'}",
        "a.plug.two": "import subprocess\nsubprocess.run(['python', '-m', 'a.top'])",
        "a.types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.top import y",
        "a.free": "'a.top is only prose here'",
    }
    graph = imports.graph_of({name: ast.parse(text) for name, text in trees.items()})
    assert graph["a.low"] == {"a.plug.one", "a.plug.two"}
    assert graph["a.types"] == graph["a.free"] == set()
    assert imports.circles(graph) == [["a.low", "a.plug.one", "a.plug.two", "a.top"]]
    rooms = imports.grouped(graph, lambda m: m.rpartition(".")[0])
    assert imports.circles(rooms) == [["a", "a.plug"]]
