"""The dependency rules, the sizes and the tree: which way the parts depend on each other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("lorasweep/**/*.py"), *ROOT.glob("analysis/**/*.py")])
HEAVY = {"torch", "transformers", "peft", "datasets", "safetensors"}
MAY_USE_TORCH = {
    "calibrate",
    "decoder",
    "linears",
    "attention",
    "train",
    "execute",
    "models",
    "recipe",
    "loss",
    "optim",
    "adapters",
    "adapter_export",
    "checkpoint",
}
ONLY_IN = {
    "hydra": {"lorasweep/config/compose.py", "lorasweep/__main__.py"},
    "omegaconf": {"lorasweep/config/compose.py", "lorasweep/__main__.py"},
    "wandb": {"lorasweep/tracking/wandb.py"},
    "submitit": {"lorasweep/launch/slurm/sbatch.py"},
    "matplotlib": {"analysis/report/plots.py"},
    "plotly": {"analysis/interactive/__init__.py"},
    "IPython": {"analysis/report/notebook.py"},
}


def imports(path, top_only=False):
    """Module names imported by a file; with top_only, only those executed when it is imported."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree)
    if top_only:
        nodes, stack = [], list(tree.body)
        while stack:
            node = stack.pop()
            nodes.append(node)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                stack += list(ast.iter_child_nodes(node))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_packages_are_imported_only_where_they_belong(path):
    roots = {m.split(".")[0] for m in imports(path)}
    for package, places in ONLY_IN.items():
        assert package not in roots or name(path) in places, package
    if path.parts[-2] == "lorasweep" and path.stem not in MAY_USE_TORCH:
        assert not roots & HEAVY
    if path.is_relative_to(ROOT / "analysis"):
        assert not roots & {"torch", "transformers", "hydra", "submitit", "lorasweep", "wandb"}


@pytest.mark.parametrize("module", ["spec", "grid"])
def test_pure_modules_use_the_standard_library_only(module):
    roots = {m.split(".")[0] for m in imports(ROOT / "lorasweep" / f"{module}.py")} - {"lorasweep"}
    assert roots <= sys.stdlib_module_names


@pytest.mark.parametrize("path", sorted((ROOT / "lorasweep" / "methods").glob("*.py")), ids=name)
def test_methods_import_only_the_standard_library_at_the_top(path):
    roots = {m.split(".")[0] for m in imports(path, top_only=True)} - {"lorasweep"}
    assert roots <= sys.stdlib_module_names


def test_the_loop_knows_no_store_and_no_method():
    found = imports(ROOT / "lorasweep" / "train.py")
    assert not {
        m
        for m in found
        if re.match(r"lorasweep\.(store|local|compose|mirror|methods|files|act|plan)", m)
    }
    text = (ROOT / "lorasweep" / "train.py").read_text()
    assert not re.search(r"['\"](lora|fullft)['\"]", text)


@pytest.mark.parametrize(
    "module",
    [
        "lorasweep.config.compose",
        "lorasweep.plan.packing",
        "lorasweep.store.run_store",
        "lorasweep.cli.actions",
        "lorasweep.launch.local",
        "lorasweep.launch.worker",
        "analysis.report.report",
    ],
)
def test_importing_does_not_import_torch(module):
    code = f"import sys, {module}; bad = {{'torch', 'transformers', 'wandb'}} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_no_circles():
    """At import time; an import inside a function is a seam, not a circle."""
    graph = {}
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = imports(path, top_only=True)
    graph = {m: {d for d in deps if d in graph and d != m} for m, deps in graph.items()}
    done = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for dep in graph[module]:
                visit(dep, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_of_one_noun_and_of_readable_size(path):
    assert path.stem not in {"utils", "util", "helpers", "common", "misc", "manager"}
    lines = len(path.read_text().splitlines())
    allowed = {"spec.py": 460, "store.py": 400}.get(path.name, 320)  # why: DECISIONS.md
    assert lines <= allowed, f"{lines} lines"
    assert ast.get_docstring(ast.parse(path.read_text())), "no module docstring"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_functions_are_short_and_public_ones_say_what_they_do(path):
    allowed = {"train": 160, "_run": 70}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno
            assert length <= allowed.get(node.name, 60), f"{node.name}: {length} lines"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_readme_tree_is_true():
    """Every path that the README's tree names exists, and every top-level package file is named."""
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"```text\n(.*?)```", text, re.DOTALL).group(1)
    for path in re.findall(
        r"^ *([\w./-]+\.(?:py|yaml|toml|md)|[\w./-]+/)(?= |$)", tree, re.MULTILINE
    ):
        assert (
            list(ROOT.glob(path)) or list(ROOT.glob(f"*/{path}")) or list(ROOT.glob(f"*/*/{path}"))
        ), path
    for path in ROOT.glob("lorasweep/*.py"):
        assert path.name in tree, path.name


@pytest.mark.parametrize(
    "document", ["README.md", "DECISIONS.md", "LOG.md", "analysis/results/README.md"]
)
def test_links_in_documents_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), target


def test_the_pages_of_answers_are_made_from_the_kept_results():
    from analysis.report import study_page as study

    text = (ROOT / "README.md").read_text()
    assert study.readme(text) == text
    assert (study.RESULTS / "README.md").read_text() == study.page(study.parts_of([study.RESULTS]))


def test_the_calibrations_pages_are_made_from_its_figures():
    import json

    from analysis.validation import calibration_page as page

    told = json.loads((page.FOLDER / "calibration.json").read_text())
    text = (ROOT / "README.md").read_text()
    assert page.with_block(text, told) == text
    assert (page.FOLDER / "README.md").read_text() == page.render(told)
    assert min(r["cases"] for r in told["coverage"]) >= 2000


def test_the_benchmarks_pages_are_made_from_its_figures():
    import json

    from analysis.validation import bench

    told = json.loads((bench.FOLDER / "bench.json").read_text())
    wanted = {
        "sweep_vs_process_per_run",
        "pack_vs_warm_peft",
        "lora_step_over_fullft_step",
        "flops_over_gemm_peak",
        "plan_10k_s",
        "status_10k_s",
        "noop_run_s",
        "machine",
    }
    assert wanted <= told.keys() and all(told[k] for k in wanted)
    text = (ROOT / "README.md").read_text()
    assert bench.with_block(text, told) == text
    assert (bench.FOLDER / "README.md").read_text() == bench.render(told)
