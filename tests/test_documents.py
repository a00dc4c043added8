"""Pages made from measurements are those of their figures: the calibration's and the benchmark's."""

import json
from pathlib import Path

from analysis.validation import bench, calibration_page

ROOT = Path(__file__).resolve().parent.parent


def test_the_calibrations_pages_are_made_from_its_figures():
    folder = ROOT / "analysis/results/calibration"
    figures = json.loads((folder / "calibration.json").read_text())
    text = (ROOT / "docs" / "answers.md").read_text()
    assert calibration_page.with_summary(text, figures) == text
    assert (folder / "README.md").read_text() == calibration_page.render(figures)
    assert min(r["cases"] for r in figures["coverage"]) >= 2000


def test_the_benchmarks_pages_are_made_from_its_figures():
    folder = ROOT / "analysis/results/bench"
    figures = json.loads((folder / "bench.json").read_text())
    wanted = {
        "sweep_vs_process_per_run",
        "answer_vs_plain_grid",
        "pack_vs_warm_peft",
        "lora_step_over_fullft_step",
        "flops_over_gemm_peak",
        "plan_10k_s",
        "status_10k_s",
        "noop_run_s",
        "machine",
    }
    assert wanted <= figures.keys() and all(figures[k] for k in wanted)
    text = (ROOT / "docs" / "usage.md").read_text()
    assert bench.with_summary(text, figures) == text
    assert (folder / "README.md").read_text() == bench.render(figures)
