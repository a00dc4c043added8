"""Documents say what is true: the README's tree, links, and the blocks made from kept results."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
    from analysis.report import front_page, study, study_page

    text = (ROOT / "README.md").read_text()
    kept = ROOT / "analysis" / "results"
    assert front_page.readme(text, kept) == text
    assert (kept / "README.md").read_text() == study_page.page(study.parts_of([kept]))


def test_the_calibrations_pages_are_made_from_its_figures():
    import json

    from analysis.validation import calibration_page as page

    folder = ROOT / "analysis/results/calibration"
    told = json.loads((folder / "calibration.json").read_text())
    text = (ROOT / "README.md").read_text()
    assert page.readme(text, told) == text
    assert (folder / "README.md").read_text() == page.render(told)
    assert min(r["cases"] for r in told["coverage"]) >= 2000


def test_the_benchmarks_pages_are_made_from_its_figures():
    import json

    from analysis.validation import bench

    folder = ROOT / "analysis/results/bench"
    told = json.loads((folder / "bench.json").read_text())
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
    assert bench.readme(text, told) == text
    assert (folder / "README.md").read_text() == bench.render(told)
