"""action=check_gpu on this machine: cut off, asked again, and its hardware file used by a plan."""

import json
import signal
import subprocess
import sys

import torch

from tests.world import cli, environment

CHECK = ("action=check_gpu", "exec.threads=1")


def test_a_check_that_was_cut_off_goes_on_and_ends_with_a_page(tmp_path):
    command = [sys.executable, "-m", "lorasweep", *CHECK]
    pipes = {"stderr": subprocess.PIPE, "text": True, "env": environment(tmp_path), "cwd": tmp_path}
    with subprocess.Popen(command, **pipes) as first:
        for line in first.stderr:
            if line.startswith("speed"):  # in its third part
                first.send_signal(signal.SIGKILL)
    (folder,) = (tmp_path / "reports" / "check_gpu").iterdir()
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "cases").iterdir()}
    assert len(before) >= 8 and "checks passed" in (folder / "page.md").read_text()
    predicted = (folder / "predicted.json").read_bytes()

    done = cli(*CHECK, "format=json", cwd=tmp_path)
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "cases").iterdir()}
    assert after.items() >= before.items()  # nothing is measured twice
    assert (folder / "predicted.json").read_bytes() == predicted
    cases = json.loads(done.stdout)["cases"]
    assert len(cases) == len(after) and not [c for c in cases.values() if "failed" in c]
    text = (folder / "page.md").read_text()
    assert "6 of 6 checks passed" in text and "## Not measured" not in text
    assert ("This machine has no GPU" in text) != torch.cuda.is_available()
    for title in ("The card", "Correctness", "Speed", "Packs"):
        assert f"## {title}\n" in text

    (file,) = (folder / "conf" / "hardware").iterdir()
    plan = ("+sweep=lr_ratio", "scale=small", "action=plan", f"hardware={file.stem}")
    planned = cli("--config-dir", folder / "conf", *plan, "format=json", cwd=tmp_path)
    assert json.loads(planned.stdout)["hardware"]["name"] == file.stem
