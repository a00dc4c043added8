"""make wheelhouse: what a machine without a network lacks, and nothing that it has."""

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.world import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.full]

LACKS = {"hydra-core", "omegaconf", "antlr4-python3-runtime", "submitit", "cloudpickle"}
FILES = ("hydra", "omegaconf", "antlr4", "submitit", "cloudpickle", "pydevd_plugins")


def packages():
    return {d.name: d.version for d in importlib.metadata.distributions() if d.name != "lorasweep"}


def wheelhouse(has, out):
    """What the script says of a machine that has these packages, or a file with this text."""
    lines = has if isinstance(has, str) else "".join(f"{n}=={v}\n" for n, v in has.items())
    out.with_suffix(".txt").write_text(lines)
    script = [sys.executable, ROOT / "constraints/wheelhouse.py", "--out", out, "--has"]
    given = {"text": True, "capture_output": True, "timeout": 500}
    return subprocess.run([*script, out.with_suffix(".txt")], **given)


def test_what_a_node_lacks_is_installed_there_without_a_network_and_trains(tmp_path):
    """The node is an environment with links to this one's packages, less some small ones."""
    has = {n: v for n, v in packages().items() if n.lower() not in LACKS}
    out = tmp_path / "wheels"
    done = wheelhouse(has, out)
    assert done.returncode == 0, done.stderr
    brought = {p.name.split("-")[0].replace("_", "-") for p in out.glob("*.whl")}
    assert brought == LACKS | {"lorasweep"}

    venv.create(tmp_path / "node", with_pip=True)
    (site,) = (tmp_path / "node/lib").glob("python3*/site-packages")
    skipped = (*FILES, "lorasweep", "_lorasweep", "__editable__", "sitecustomize")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith(skipped) and not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    python = tmp_path / "node/bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", out]
    subprocess.run([*pip, "lorasweep"], check=True, timeout=300)
    assert {p.name for p in site.iterdir() if p.is_symlink()} >= {"torch", "transformers", "pandas"}
    env = {**environment(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-P", "-m", "lorasweep", "scale=smoke", "method=lora", "method.rank=4", "lr=5e-3"],
        **{"cwd": tmp_path, "env": env, "text": True, "capture_output": True, "timeout": 300},
    )
    assert "done, " in done.stdout, done.stderr


def test_a_version_out_of_range_is_named_and_replaced_only_if_its_line_goes(tmp_path):
    has = {**packages(), "torch": "2.5.1+cu124"}
    done = wheelhouse(has, tmp_path / "wheels")
    assert done.returncode == 1
    assert "torch>=" in done.stderr and "2.5.1" in done.stderr and "delete the line" in done.stderr
    assert not list((tmp_path / "wheels").glob("torch-*"))
    done = wheelhouse("torch @ file:///opt/torch.whl\n", tmp_path / "freeze")
    assert done.returncode == 1 and "pip list --format=freeze" in done.stderr
