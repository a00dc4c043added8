"""Versions: pyproject.toml, the lowest and the tested ones agree."""

import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.world import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(r) for lines in PROJECT["optional-dependencies"].values() for r in lines]


def versions(name):
    """Name -> version of a file of constraints; each line is one and nothing else."""
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    for _, version in pairs:
        assert Version(version).local is None
    found = {canonicalize_name(package): version for package, version in pairs}
    assert len(found) == len(pairs)
    return found


def test_the_lowest_versions_are_the_lower_bounds():
    bounds = {
        canonicalize_name(r.name): Version(s.version)
        for r in DIRECT
        for s in r.specifier
        if s.operator == ">="
    }
    assert {n: Version(v) for n, v in versions("lowest.txt").items()} == bounds
    assert bounds.keys() == {canonicalize_name(r.name) for r in DIRECT}


def test_the_tested_versions_are_within_the_ranges_of_all_packages():
    tested = versions("tested.txt")
    for r in [*DIRECT, *EXTRAS]:
        if r.name != "lorasweep":
            assert r.specifier.contains(tested[canonicalize_name(r.name)]), r
    assert "lorasweep" not in tested
