"""The tests on the lowest and on the newest versions that pyproject.toml admits, each in a new virtual environment.

    python scripts/nightly/environments.py lowest [--python python3.11] [--folder /tmp/envs] [--torch 2.13.0+cpu] [--dry-run]
    python scripts/nightly/environments.py newest --python python3.12 --with torchvision --tests tests/test_inputs.py

"lowest" takes the last patch of the lowest minor version of each range (torch>=2.11 becomes torch==2.11.*), "newest" the
ranges as they stand; what these depend on is pip's choice. `--torch` names one build for both, such as a CPU one that a
machine without room for CUDA has. `--dry-run` prints the resolved versions and installs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


def ranges() -> list[Requirement]:
    """What the library and its tests need, as pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["test"])]


def lowest(requirement: Requirement) -> Requirement:
    """A range -> its lowest minor version. Raises ValueError for one without a lower bound."""
    bounds = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==", "~=")]
    if not bounds:
        raise ValueError(f"{requirement} has no lower bound: pyproject.toml must say from which version on")
    return Requirement(f"{requirement.name}=={bounds[0].major}.{bounds[0].minor}.*")


def pins(which: str, torch: str | None = None) -> list[str]:
    chosen = [lowest(requirement) if which == "lowest" else requirement for requirement in ranges()]
    return [f"torch=={torch}" if torch and line.name == "torch" else str(line) for line in chosen]


def resolve(python: str, wanted: list[str]) -> list[str]:
    """name==version of all that pip would install; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--prefer-binary",
                   "--report", str(report), *wanted]  # fmt: skip
        subprocess.run(command, check=True)  # noqa: S603 - names and versions out of pyproject.toml
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return sorted(f"{entry['metadata']['name']}=={entry['metadata']['version']}" for entry in found)


def run_tests(python: str, folder: Path, wanted: list[str], tests: list[str]) -> int:
    """A new environment below `folder`, and the tests in it: their exit status."""
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)  # noqa: S603
    inside = str(folder / "bin" / "python")
    install = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary", *wanted]
    subprocess.run(install, check=True)  # noqa: S603
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MPLBACKEND": "Agg",
                                "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    command = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode  # noqa: S603


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("lowest", "newest"))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--folder", type=Path, help="where the environment is made (default: a temporary folder)")
    parser.add_argument("--torch", help="exact version of torch, instead of the range's")
    parser.add_argument(
        "--with", nargs="+", default=[], dest="extra", help="packages to install beside them, e.g. torchvision"
    )
    parser.add_argument("--tests", nargs="+", default=["tests"])
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    wanted = pins(args.which, args.torch) + args.extra
    if args.dry_run:
        print("\n".join(resolve(args.python, wanted)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        return run_tests(args.python, (args.folder or Path(temporary)) / args.which, wanted, args.tests)


if __name__ == "__main__":
    sys.exit(main())
