"""A small sweep that is trained once, for all tests that only read it or ask for more."""

import shutil

import pytest

from tests.world import cli

SMOKE = ("+sweep=lr_ratio", "scale=smoke")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Run the sweep by its command; give its folder, with runs and reports, and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, cli(*SMOKE, cwd=folder)


@pytest.fixture
def smoke_copy(smoke, tmp_path):
    folder, done = smoke
    for name in ("runs", "reports"):
        shutil.copytree(folder / name, tmp_path / name, copy_function=shutil.copy2)
    return done
