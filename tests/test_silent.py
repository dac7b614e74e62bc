"""A result names the commit of this package, and not that of another repository around it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cocoa_lib.store import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def test_the_commit_is_this_packages_own(tmp_path):
    shutil.copytree(ROOT / "cocoa_lib", tmp_path / ".venv/lib/cocoa_lib")
    (tmp_path / ".gitignore").write_text(".venv\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    code = "from cocoa_lib.store.checkpoint import provenance; print(provenance()['commit'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / ".venv/lib")},
    )
    assert done.stdout.strip() == "unknown" and checkpoint.provenance()["commit"] != "unknown"
