"""`make verify` finds what was altered, added or lost, and a summary or figure that its table does not give."""

from __future__ import annotations

import ast
import copy
import functools
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import verify  # noqa: E402


@pytest.fixture
def tree(tmp_path):
    """reports/ with one report and data/, as `--write` leaves them."""
    report = tmp_path / "reports" / "long"
    shutil.copytree(ROOT / "reports" / "long" / "results", report / "results")
    shutil.copy(ROOT / "reports" / "long" / "summary.md", report)
    (report / "figures").mkdir()
    for suffix in (".png", ".svg", ".txt"):
        shutil.copy(ROOT / "reports" / "long" / "figures" / f"forest{suffix}", report / "figures")
    (tmp_path / "data" / "größe x").mkdir(parents=True)
    (tmp_path / "data" / "größe x" / "a.csv").write_text("1\n")
    (tmp_path / "data" / ".partial").write_text("half")
    assert verify.main(["--root", str(tmp_path), "--write", "--without-run"]) == 0
    return tmp_path


def check(tree) -> list[str]:
    return [line.removeprefix(f"{tree}/") for line in verify.verify(tree, run=False)]


def test_what_is_as_written_passes(tree, capsys):
    assert check(tree) == [] and verify.main(["--root", str(tree), "--without-run"]) == 0
    assert "reports/ and data/ are as committed" in capsys.readouterr().out
    assert len((tree / "data" / "MANIFEST.sha256").read_text(encoding="utf-8").splitlines()) == 1, (
        "hidden files are not listed"
    )


def test_altered_lost_and_added_files_are_named(tree, capsys):
    (tree / "data" / "größe x" / "a.csv").write_text("2\n")
    (tree / "reports" / "long" / "figures" / "forest.svg").unlink()
    (tree / "reports" / "new.txt").write_text("")
    found = check(tree)
    assert found[:3] == ["reports/long/figures/forest.svg: missing", "reports/new.txt: not in the manifest",
                         "data/größe x/a.csv: altered"]  # fmt: skip
    assert "figures/forest.png: no .svg beside it" in found[3]
    assert verify.main(["--root", str(tree), "--without-run"]) == 1 and "altered" in capsys.readouterr().out


@pytest.mark.parametrize(("old", "new"), [("cocoa -", "cocoa +")])
def test_a_figure_that_does_not_match_its_table_fails(tree, old, new):
    words = tree / "reports" / "long" / "figures" / "forest.txt"
    assert old in words.read_text()
    words.write_text(words.read_text().replace(old, new))
    verify.write_manifest(tree / "reports")
    (found,) = check(tree)
    assert "forest.png: its numbers are not those of the tables" in found


def test_a_table_that_changed_under_its_summary_fails(tree):
    table = tree / "reports" / "long" / "results" / "cocoa" / "seed0" / "results.csv"
    lines = table.read_text().splitlines()
    cells = lines[1].split(",")
    cells[lines[0].split(",").index("value")] = "99.0"
    table.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    verify.write_manifest(tree / "reports")
    assert any("summary.md: not what the tables" in line for line in check(tree))


def test_a_lost_table_or_manifest_is_said(tree):
    (tree / "reports" / "long" / "results" / "cocoa" / "seed0" / "per_query.parquet").unlink()
    (tree / "data" / "MANIFEST.sha256").write_text("nonsense\n")
    found = "\n".join(check(tree))
    assert "per_query.parquet: missing" in found and "MANIFEST.sha256: not lines of hash and name" in found
    (tree / "data" / "MANIFEST.sha256").unlink()
    assert "MANIFEST.sha256: no such file" in "\n".join(check(tree))
    assert "smoke_arm.json: no such file" in "\n".join(verify.verify(tree))


RUN = {"arm": "contrastive", "data": "d", "loss": [3.0, 2.0], "hits": 3, "queries": 9, "weights_sha256": "w",
       "where": {"machine": "m"}}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"data": "e"}, "data is e, was d"),
        ({"loss": [3.0, 2.1]}, "losses"),
        ({"loss": [3.0]}, "losses"),
        ({"loss": [3.0, float("nan")]}, "losses"),
        ({"weights_sha256": "v"}, "other weights than recorded"),
        ({"weights_sha256": "v", "where": {"machine": "n"}}, None),
        ({"loss": [3.0, 2.01], "where": {"machine": "n"}}, None),
        ({"weights_sha256": "x", "where": {"machine": "o"}}, None),
        ({"weights_sha256": "w", "where": {"machine": "o"}}, "other weights than recorded"),
    ],
)
def test_a_smoke_run_is_compared_by_bits_at_home_and_by_loss_elsewhere(change, words):
    other = RUN | {"weights_sha256": "x", "where": {"machine": "o"}}
    found = verify.compare_runs(copy.deepcopy(RUN) | change, [RUN, other])
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


def test_writing_keeps_the_records_of_other_machines(tree, monkeypatch):
    other, path = RUN | {"where": {"machine": "o"}}, tree / "reports" / verify.SMOKE
    for found in (RUN, other, RUN | {"weights_sha256": "new"}):
        monkeypatch.setattr(verify, "smoke_run", lambda folder, found=found: found)
        assert verify.main(["--root", str(tree), "--write"]) == 0
    assert json.loads(path.read_text(encoding="utf-8")) == [other, RUN | {"weights_sha256": "new"}]


# --- docs/troubleshooting.md -------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [
    (words, heading)
    for heading in re.findall(r"^### (.*)", PAGE, re.MULTILINE)
    for words in re.findall(r'"(.*?)"', heading)
]
LIBRARIES = {  # where a library's own words are looked up; a message of a driver or a server has no place
    "No such kernel named python3": ("jupyter_client", "No such kernel named "),
    "Torch not compiled with CUDA enabled": ("torch", "Torch not compiled with CUDA enabled"),
    "We couldn't connect to 'https://huggingface.co'": ("transformers", "We couldn't connect to '"),
    "Cannot access gated repo": ("huggingface_hub", "gated repo"),
    "CUDA out of memory": ("torch", None),
}


@functools.cache
def literals() -> str:
    """All fixed text of the library, scripts and Makefile, as it reads when neighbouring strings are joined."""
    texts = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for path in (*ROOT.glob("cocoa_lib/*.py"), *ROOT.glob("scripts/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                texts.append("".join(parts).replace("\0 ", "\0").replace("\0", " ... "))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return re.sub(r"\s+", " ", "\n".join(texts).replace("{META}", "cocoa.json"))


@pytest.mark.parametrize(("words", "heading"), QUOTED, ids=lambda value: value[:40])
def test_every_quoted_message_still_exists(words, heading):
    if words in LIBRARIES:
        module, part = LIBRARIES[words]
        assert f"({module})" in heading
        folder = Path(importlib.util.find_spec(module).origin).parent
        assert part is None or any(
            part in path.read_text(encoding="utf-8", errors="ignore") for path in folder.rglob("*.py")
        )
        return
    for part in words.replace("cocoa.json", "...").split("..."):
        assert re.sub(r"\s+", " ", part).strip(" ();:") in literals(), f"no message of ours says {part!r}"


def test_the_page_covers_the_common_ones():
    assert len(QUOTED) > 30
    for topic in ("out of memory", "No such kernel", "CUDA enabled", "gated", "no such image file", "collapsed", "disk is full",
                  "weights do not match", "another configuration", "allow_parent", "at work in this folder"):  # fmt: skip
        assert any(topic in words for words, _ in QUOTED), topic
