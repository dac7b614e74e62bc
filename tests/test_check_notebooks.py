"""The notebook check finds each fault that it promises to find, and nothing in a sound notebook."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import check_notebooks  # noqa: E402


def sound():
    """A small notebook that passes: a title, its parameters, one result."""
    result = v4.new_output("execute_result", {"text/plain": "3"}, execution_count=2)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [
        v4.new_markdown_cell("# A claim"),
        v4.new_code_cell("seed = 0", execution_count=1, metadata={"tags": ["parameters"]}),
        v4.new_code_cell("1 + 2", execution_count=2, outputs=[result], metadata={"tags": []}),
        *(v4.new_markdown_cell(text) for text in ("Its text", "More")),
    ]
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture
def faults(tmp_path):
    def of(notebook, **options):
        path = tmp_path / "notebook.ipynb"
        nbformat.write(notebook, path)
        return check_notebooks.check(path, **options)

    return of


def test_a_sound_notebook_passes_and_a_large_one_does_not(faults):
    assert faults(sound()) == []
    (fault,) = faults(sound(), max_bytes=100)
    assert "limit" in fault


def set_kernel(notebook):
    notebook.metadata.kernelspec.name = "my-env"


def set_tags(first, second):
    def change(notebook):
        notebook.cells[1].metadata.tags, notebook.cells[2].metadata.tags = first, second

    return change


def set_counts(first, second):
    def change(notebook):
        notebook.cells[1].execution_count, notebook.cells[2].execution_count = first, second

    return change


def set_source(source):
    return lambda notebook: notebook.cells[2].update(source=source)


def add_cells(*sources):
    cells = [v4.new_code_cell(text, execution_count=3 + i) for i, text in enumerate(sources)]
    return lambda notebook: notebook.cells.extend(cells)


def show(kind, *data, **values):
    return lambda notebook: notebook.cells[2].outputs.append(v4.new_output(kind, *data, **values))


ERROR = show("error", ename="ValueError", evalue="no", traceback=["no"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_kernel, "names the kernel 'my-env', not 'python3'"),
        (set_tags([], []), "tagged 'parameters'"),
        (set_tags(["parameters"], ["parameters"]), "tagged 'parameters'"),
        (set_tags(["parameters"], ["injected-parameters"]), "papermill"),
        *((set_counts(*n), "execution count") for n in ((1, None), (1, 3), (2, 1), (None, None))),
        (ERROR, "cell 2: has an error among its outputs"),
        (set_source("\n".join(["x = 1"] * 13)), "a cell of 13 lines"),
        (set_source(f"x = {'1' * 97}"), "a line of 101 columns"),
        (set_source("class A:\n    pass"), "defines a class"),
        (add_cells(*["1"] * 13), "has 15 code cells"),
        (add_cells(*["1"] * 13), "3 Markdown cells for 15 code cells"),
    ],
)
def test_a_fault_is_named(faults, change, said):
    notebook = sound()
    change(notebook)
    assert said in "; ".join(faults(notebook))


@pytest.mark.parametrize(
    "changes",
    [
        [set_source("x = 1\nclassic = 2")],
        [ERROR, set_tags(["parameters"], ["raises-exception"])],
        [add_cells("  \n"), lambda notebook: notebook.cells[-1].update(execution_count=None)],
        [show("display_data", {"image/png": " /root/abc"})],  # bytes are not searched
    ],
)
def test_what_is_fine(faults, changes):
    notebook = sound()
    for change in changes:
        change(notebook)
    assert faults(notebook) == []


OF_ONE_MACHINE = ["/home/ada/cocoa/data", "'/root/x'", "in /Users/ada", r"C:\Users\ada"]
OF_ONE_MACHINE += ["/var/folders/zz/T/ipykernel_12/3.py", "/tmp/tmpa1b2/x", "file:///home/ada/x"]
OF_ONE_MACHINE += [str(ROOT / "data"), str(Path.home())]
OF_ALL = ["https://example.org/home/ada", "runs/laptop/tmp/x", "data/root/x", "a/b", "/rooted"]


@pytest.mark.parametrize("text", [*OF_ONE_MACHINE, *OF_ALL])
def test_a_path_of_one_machine_is_found_in_source_stream_and_html(faults, text):
    for change in (
        lambda notebook: notebook.cells[0].update(source=f"see {text}"),
        show("stream", name="stderr", text=f"warning: {text}"),
        show("display_data", {"text/html": f"<b>{text}</b>"}),
    ):
        notebook = sound()
        change(notebook)
        found = faults(notebook)
        assert ["path of one machine" in fault for fault in found] == [True] * (text not in OF_ALL)


@pytest.mark.parametrize("content", ["{", '{"nbformat": 4, "cells": [{"cell_type": "code"}]}'])
def test_what_is_no_notebook(tmp_path, content):
    path = tmp_path / "broken.ipynb"
    path.write_text(content, encoding="utf-8")
    (fault,) = check_notebooks.check(path)
    assert "not a valid notebook" in fault


def test_main_reports_and_fails(tmp_path, capsys):
    nbformat.write(sound(), tmp_path / "good.ipynb")
    assert check_notebooks.main([str(tmp_path)]) == 0
    bad = sound()
    set_kernel(bad)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for folder in (tmp_path, tmp_path / ".ipynb_checkpoints"):
        nbformat.write(bad, folder / "bad.ipynb")
    assert check_notebooks.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "bad.ipynb: names the kernel 'my-env'" in out
    assert out.endswith("2 notebooks checked; faults: 1\n")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_notebooks.main([str(tmp_path / "nowhere")])
