"""Gather the wheels that a machine without a network lacks, with lorasweep's own.

`make wheelhouse HAS=FILE PYTHON_VERSION=3.12` calls this. FILE has the packages of that machine, as
`pip list --format=freeze` prints them. They keep their versions: pip resolves as if they were
installed, and only the missing packages are downloaded. Needs pip and PyPI, not lorasweep.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ONLY = "antlr4-python3-runtime==4.9.*"
"""A dependency of hydra-core that has no wheel on PyPI."""


def main() -> int:
    """Fill the folder and return the exit status: 0, or 1 if no set of packages fits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--has", type=Path, help="packages of the machine: lines NAME==VERSION")
    parser.add_argument("--python-version", help="its Python; default: this one")
    parser.add_argument("--arch", default=platform.machine(), help="its processor; default: ours")
    parser.add_argument("--out", type=Path, default=ROOT / "wheelhouse")
    args = parser.parse_args()
    has = read(args.has) if args.has else {}
    where = ["--only-binary=:all:"]
    if args.python_version:  # wheels for glibc 2.28 or older
        where += ["--python-version", args.python_version]
        tags = [f"manylinux_2_{minor}_{args.arch}" for minor in range(28, 4, -1)]
        where += [f"--platform={tag}" for tag in [*tags, f"manylinux2014_{args.arch}"]]
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        venv.create(work / "venv", with_pip=True)
        for name, version in has.items():  # pip reads this: the package is installed
            info = work / "has" / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            (info / "INSTALLER").write_text("pip\n")
        pins = work / "pins.txt"
        pins.write_text("".join(f"{name}=={version}\n" for name, version in has.items()))
        pip = [str(work / "venv/bin/python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True)
        build = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", args.out]
        subprocess.run([*build, ROOT], check=True)
        (own,) = args.out.glob("lorasweep-*.whl")
        if canonical(SOURCE_ONLY.split("==")[0]) not in has:
            subprocess.run([*build, SOURCE_ONLY], check=True)
        find = [*where, "--find-links", args.out]
        resolve = ["install", "--dry-run", "--report", work / "report.json"]
        environment = {**os.environ, "PYTHONPATH": str(work / "has")}
        done = subprocess.run(
            [*pip, *resolve, *find, "--constraint", pins, own],
            **{"env": environment, "text": True, "capture_output": True},
        )
        if done.returncode:
            _, _, conflict = done.stdout.partition("The conflict is caused by:")
            print(
                f"{conflict.split('Additionally')[0].strip(chr(10)) or done.stderr.strip()}\n"
                "The packages of the machine do not fit lorasweep: above, a 'constraint' is a "
                f"version of {args.has}. Install another version on the machine, or delete the "
                "line of a package that may be replaced.",
                file=sys.stderr,
            )
            return 1
        report = json.loads((work / "report.json").read_text())
        lacks = {p["metadata"]["name"]: p["metadata"]["version"] for p in report["install"]}
        del lacks["lorasweep"]
        wanted = [f"{name}=={version}" for name, version in lacks.items()]
        fetch = [*pip, "download", "--quiet", "--no-deps", "--dest", args.out]
        if wanted:
            subprocess.run([*fetch, *find, *wanted], check=True)
    size = sum(p.stat().st_size for p in args.out.glob("*.whl")) / 1e6
    print(f"{args.out}: lorasweep and {len(lacks)} packages that are missing, {size:,.0f} MB")
    print("\n".join(sorted(wanted)))
    print(f"on the machine: pip install --no-index --find-links {args.out.name} lorasweep")
    return 0


def canonical(name: str) -> str:
    """Return a package's name as pip compares names."""
    return name.lower().replace("_", "-").replace(".", "-")


def read(path: Path) -> dict[str, str]:
    """Return name -> version; exit with a message for a package without a version."""
    found, unknown = {}, []
    for line in map(str.strip, path.read_text().splitlines()):
        name, is_pinned, version = line.partition("==")
        if is_pinned:
            found[canonical(name)] = version
        elif line and not line.startswith(("#", "-")):
            unknown.append(line)
    if unknown:
        sys.exit(
            f"{path}: no version in {unknown[0]!r}. Expected lines NAME==VERSION, as "
            "`pip list --format=freeze` prints them."
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
