"""pyproject.toml (ranges), requirements.lock (exact versions) and environment.yml (conda) say the same."""

import re
import shutil
import subprocess
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
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
TEST = [Requirement(line) for line in EXTRAS["test"]]
PINNED = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[0-9][\w.!]*)(?:\s*;.*)?")


def read_lock(text: str) -> dict[str, str]:
    """{canonical name: exact version}; ValueError on a line that is not `name==version`, or a name given twice."""
    lock: dict[str, str] = {}
    for line in text.splitlines():
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        match = PINNED.fullmatch(line)
        if match is None:
            raise ValueError(f"not an exact version from an index: {line!r}")
        name = canonicalize_name(match["name"])
        if name in lock:
            raise ValueError(f"named twice: {name}")
        lock[name] = match["version"]
    return lock


def conda_disagreements(environment: dict, lock: dict[str, str], requires_python: str) -> list[str]:
    """What an environment.yml says beside, or against, the lock. Empty when the lock alone decides."""
    faults, pip_lines = [], []
    for entry in environment["dependencies"]:
        if isinstance(entry, dict):
            pip_lines += entry["pip"]
            continue
        name, _, version = entry.partition("=")
        version = version.lstrip("=")
        name = canonicalize_name(name.split("::")[-1].strip())
        if name == "python":
            if not version or f"{version}.0" not in SpecifierSet(requires_python):
                faults.append(f"python {version or 'of any version'} is not within {requires_python}")
        elif name in lock and version != lock[name]:
            faults.append(f"conda installs {entry}, the lock has {lock[name]}")
        elif name not in lock and name != "pip":
            faults.append(f"conda installs {entry}, which the lock lacks")
    for line in ("-r requirements.lock", "-e ."):
        if line not in pip_lines:
            faults.append(f"pip section lacks {line}")
    for line in set(pip_lines) - {"-r requirements.lock", "-e ."}:
        requirement = Requirement(line)
        locked = lock.get(canonicalize_name(requirement.name))
        if locked is None or not requirement.specifier.contains(locked, prereleases=True):
            faults.append(f"pip installs {line}, the lock has {locked}")
    return faults


@pytest.fixture(scope="module")
def lock():
    return read_lock((ROOT / "requirements.lock").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def environment():
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "torch",
        "torch>=2",
        "torch==2.13.0+cpu",
        "torch @ file:///w/torch.whl",
        "--extra-index-url x",
        "-e .",
        "torch==2.13.*",
        "torch==1\nTorch==2",
    ],
)
def test_lock_takes_exact_versions_only(line):
    with pytest.raises(ValueError):
        read_lock(line)


def test_lock_has_the_pinned_torch(lock):
    assert lock["torch"] == "2.13.0"


@pytest.mark.parametrize("requirement", CORE + TEST, ids=str)
def test_range_admits_locked_version(requirement, lock):
    name = canonicalize_name(requirement.name)
    assert name in lock, f"{name} is in pyproject.toml but not in requirements.lock"
    assert requirement.specifier.contains(lock[name]), f"{requirement} does not admit {lock[name]}"


@pytest.mark.parametrize("name, version", [("torch", "2.11.0"), ("transformers", "5.17.0")])
def test_ranges_admit_the_older_pair(name, version):
    (requirement,) = [r for r in CORE if r.name == name]
    assert requirement.specifier.contains(version)


@pytest.mark.parametrize("version", ["3.11.0", "3.12.1", "3.13.0"])
def test_python_versions_admitted(version):
    assert version in SpecifierSet(PROJECT["requires-python"])


def test_python_3_10_is_refused():
    assert "3.10.14" not in SpecifierSet(PROJECT["requires-python"])


def test_lock_holds_no_optional_extra(lock):
    optional = {canonicalize_name(Requirement(line).name) for extra in ("mteb", "search") for line in EXTRAS[extra]}
    assert not optional & lock.keys()


def test_conda_environment_agrees(environment, lock):
    assert conda_disagreements(environment, lock, PROJECT["requires-python"]) == []


@pytest.mark.parametrize(
    "dependency, word",
    [
        ("numpy=1.26", "numpy"),
        ("numpy", "numpy"),
        ("ffmpeg", "lacks"),
        ("python=3.9", "not within"),
        ({"pip": ["numpy==1.26.0"]}, "numpy"),
        ({"pip": ["left-pad"]}, "left-pad"),
    ],
)
def test_a_disagreeing_conda_environment_is_found(environment, lock, dependency, word):
    changed = {**environment, "dependencies": [*environment["dependencies"], dependency]}
    faults = conda_disagreements(changed, lock, PROJECT["requires-python"])
    assert faults and word in faults[0]


def test_a_conda_environment_without_the_lock_is_found(lock):
    faults = conda_disagreements({"dependencies": ["python=3.11", "pip"]}, lock, PROJECT["requires-python"])
    assert len(faults) == 2


def test_a_linked_venv_is_not_emptied(tmp_path):
    """`venv --clear` would go through the link and empty somebody else's environment."""
    other, project = tmp_path / "other", tmp_path / "project"
    (other / "bin").mkdir(parents=True)
    (other / "precious").write_text("x")
    project.mkdir()
    (project / ".venv").symlink_to(other)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, project)
    python = tmp_path / "python"  # says it is new enough, clears as venv does, installs nothing
    python.write_text('#!/bin/sh\n[ "$2" = venv ] && rm -rf .venv/*\nexit 0\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "install", f"PYTHON={python}"], cwd=project, capture_output=True, text=True)
    assert done.returncode, "there is no pip to install with"
    assert (other / "precious").exists() and not (project / ".venv").is_symlink()


@pytest.mark.parametrize("profile, word", [("papre", "Unknown PROFILE papre"), ("paper", "python -m cocoa_lib.run")])
def test_make_refuses_a_profile_that_it_cannot_run(profile, word):
    command = ["make", "-o", ".venv/.installed", "check-arguments", f"PROFILE={profile}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and word in done.stderr
