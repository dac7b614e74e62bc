"""What must not get in: code out of files, markup out of a user's words, a server for all."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from cocoa_lib.evaluate.restore import reconstruct
from cocoa_lib.items import InputError, load_image
from cocoa_lib.show.arms import arms_html
from cocoa_lib.show.eos_attention import attention_html, measure_attention
from cocoa_lib.show.restored import restored_html
from cocoa_lib.show.retrieval import candidates_html, pairs_html, ranked_html
from cocoa_lib.show.samples import answers_html
from cocoa_lib.store import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    [*ROOT.glob("cocoa_lib/**/*.py"), *ROOT.glob("scripts/**/*.py"), *ROOT.glob("benchmarks/*.py")]
)
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))

# --- code ------------------------------------------------------------

# What ruff's S rules (bandit's) do not know; `make lint` runs those over every file.
DANGERS = re.compile(
    r"(?:import|from) +(?:c?[Pp]ickle|_pickle|dill|cloudpickle|joblib|marshal|shelve)\b"
    r"|read_pickle|weights_only=(?!True)|torch\.load\((?!.*weights_only=True)"
    r"|(?:shell|trust_remote_code|allow_pickle)=(?!False)|(?<![\w.])(?:eval|exec)\(|os\.(?:system|popen)"
)


def find_dangers(source: str) -> list[str]:
    """Places in code, not in comments or docstrings, that run code which a file or a parameter holds."""
    return DANGERS.findall(ast.unparse(_Bare().visit(ast.parse(source))))


class _Bare(ast.NodeTransformer):
    """Code without the texts in it."""

    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node):
        return ast.Constant("")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_source_runs_what_a_file_holds(path):
    assert find_dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_notebook_does(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
            assert find_dangers("\n".join(lines)) == [] and "\n!" not in "\n" + cell.source


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "eval(x)", "exec(x)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "run(x, shell=True)", "f(trust_remote_code=flag)",
        "os.system(x)", "np.load(x, allow_pickle=True)", "pd.read_pickle(x)",
    ],
)  # fmt: skip
def test_the_scan_finds(source):
    assert find_dangers(f"if x:\n    {source}"), source
    fine = "model.eval(); torch.load(p, weights_only=True); f(trust_remote_code=False); 'eval(x)'"
    assert find_dangers(fine) == [] and len(SOURCES) > 20 and len(NOTEBOOKS) == 6


def test_bandits_rules_are_on_and_jupyterlab_listens_on_this_machine_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lint = project["tool"]["ruff"]["lint"]
    assert "S" in lint["select"] and set(lint["ignore"]) == {"S105", "S106"}
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlab:")[1].split("\n\n")[0]
    assert "--ip=127.0.0.1" in recipe
    assert not re.search(r"token|password|allow_origin|disable_check", recipe)


def test_no_picture_runs_a_program_and_of_many_frames_one_is_decoded(tmp_path, monkeypatch):
    """EPS would be handed to Ghostscript; a file named .png may be one."""
    refuse = lambda *args, **kwargs: pytest.fail("a program was started, or a frame sought")  # noqa: E731
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    path = tmp_path / "picture.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(InputError, match="not a readable image"):
        load_image(path)
    frames = [Image.new("P", (9, 9), i % 200) for i in range(300)]
    frames[0].save(tmp_path / "many.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.seek", refuse)
    assert load_image(tmp_path / "many.gif").size == (9, 9)


HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><b onclick=alert(1)>& </title></svg>"
)


def assert_harmless(html: str, shown: str = HOSTILE) -> None:
    page = BeautifulSoup(html, "html.parser")
    assert not page.select("script, iframe, object, link, style")
    for name, value in (pair for tag in page.find_all() for pair in tag.attrs.items()):
        assert not name.startswith("on"), name
        assert name not in ("src", "href") or value.startswith("data:image/"), value
    said = re.sub(r"\s+", " ", page.get_text())
    assert shown in said, "what the user wrote is shown as it was written"


def test_cards_and_tables_show_words_as_words():
    item = {"text": HOSTILE, "image": None}
    assert_harmless(ranked_html(item, [item, item], [0.5, 0.4], right=0))
    assert_harmless(candidates_html(item, [item]))
    assert_harmless(pairs_html([(item, item)]))
    assert_harmless(answers_html([item | {"target": HOSTILE}], [HOSTILE]), HOSTILE[:20])
    row = {"arm": HOSTILE, "score": 50.0, "difference": 1.0, "low": 0.5, "high": 1.5, "n_seeds": 3}
    assert_harmless(arms_html(pd.DataFrame([row]), "base<b onclick=x>"))


def test_reconstruction_shows_words_as_words(small, picture):
    model, inputs = small
    row = {"text": "", "image": picture(), "target": HOSTILE}
    found = reconstruct(model, inputs, row, text_rate=0.0, patch_rate=0.5)
    assert_harmless(restored_html(*found, inputs), HOSTILE.split("&")[0].strip())


def test_attention_shows_tokens_as_words(small, picture, monkeypatch):
    model, inputs = small
    found = measure_attention(model, inputs, {"text": "a b", "image": picture()})
    monkeypatch.setattr(type(inputs.tokenizer), "decode", lambda *args, **kwargs: HOSTILE)
    assert_harmless(attention_html(found, inputs, layer=1, head=0, direction="from_eos"))


def test_a_results_commit_is_this_packages_own_and_not_that_of_a_repository_around_it(tmp_path):
    shutil.copytree(ROOT / "cocoa_lib", tmp_path / ".venv/lib/cocoa_lib")
    (tmp_path / ".gitignore").write_text(".venv\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    code = "from cocoa_lib.store.checkpoint import provenance; print(provenance()['commit'])"
    how = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path / ".venv/lib")}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **how)
    assert done.stdout.strip() == "unknown" and checkpoint.provenance()["commit"] != "unknown"
