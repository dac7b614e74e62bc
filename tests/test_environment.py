"""pyproject.toml (ranges), requirements.lock (exact versions) and environment.yml (conda) say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDED = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["test"])]
PINNED = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[0-9][\w.!]*)(?:\s*;.*)?")


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in filter(None, (line.split("#", 1)[0].strip() for line in lines)):
        match = PINNED.fullmatch(line)
        assert match, f"not an exact version from an index: {line!r}"
        name = canonicalize_name(match["name"])
        assert name not in found, f"named twice: {name}"
        found[name] = match["version"]
    return found


@pytest.mark.parametrize("requirement", NEEDED, ids=str)
def test_range_admits_the_locked_version(requirement, lock):
    version = lock[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version, prereleases=True)


def test_lock_holds_no_optional_extra(lock):
    needed = {canonicalize_name(requirement.name) for requirement in NEEDED}
    for name in ("mteb", "search", "browser", "smollm2"):
        extra = {canonicalize_name(Requirement(line).name) for line in EXTRAS[name]}
        assert not (extra - needed) & set(lock), name


def test_conda_gives_python_and_the_lock_gives_the_rest():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = (line["pip"] for line in environment["dependencies"] if isinstance(line, dict))
    assert [line.split("=")[0] for line in plain] == ["python", "pip"]
    assert plain[0].split("=")[1] + ".0" in SpecifierSet(PROJECT["requires-python"])
    assert pip == ["-r requirements.lock", "-e ."]
