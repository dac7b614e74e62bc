"""The notebook check finds each fault that it promises to find, and nothing in a sound notebook."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("check_notebooks", ROOT / "scripts" / "check_notebooks.py")
check_notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_notebooks)


def sound():
    """A small notebook that passes: a title, its parameters, one result."""
    result = v4.new_output("execute_result", {"text/plain": "3"}, execution_count=2)
    return v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# A claim"),
            v4.new_code_cell("seed = 0", execution_count=1, metadata={"tags": ["parameters"]}),
            v4.new_code_cell("1 + 2", execution_count=2, outputs=[result]),
            *(v4.new_markdown_cell(text) for text in ("Its text", "More")),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )


@pytest.fixture
def faults(tmp_path):
    def of(notebook, **options):
        path = tmp_path / "notebook.ipynb"
        nbformat.write(notebook, path)
        return check_notebooks.check(path, **options)

    return of


def test_sound_notebook_passes(faults):
    assert faults(sound()) == []


def test_size_limit(faults):
    (fault,) = faults(sound(), max_bytes=100)
    assert "limit" in fault


def test_wrong_kernel(faults):
    notebook = sound()
    notebook.metadata.kernelspec.name = "my-env"
    assert faults(notebook) == ["names the kernel 'my-env', not 'python3'"]


@pytest.mark.parametrize("tags", [[[], []], [["parameters"], ["parameters"]]])
def test_exactly_one_parameters_cell(faults, tags):
    notebook = sound()
    notebook.cells[1].metadata.tags, notebook.cells[2].metadata["tags"] = tags
    (fault,) = faults(notebook)
    assert "tagged 'parameters'" in fault


def test_papermill_output_is_refused(faults):
    notebook = sound()
    notebook.cells[2].metadata["tags"] = ["injected-parameters"]
    (fault,) = faults(notebook)
    assert "papermill" in fault


@pytest.mark.parametrize("counts", [(1, None), (1, 3), (2, 1), (None, None)])
def test_not_run_top_to_bottom(faults, counts):
    notebook = sound()
    notebook.cells[1].execution_count, notebook.cells[2].execution_count = counts
    assert any("execution count" in fault for fault in faults(notebook))


def test_empty_code_cell_needs_no_count(faults):
    notebook = sound()
    notebook.cells.append(v4.new_code_cell("  \n"))
    assert faults(notebook) == []


def test_error_output(faults):
    notebook = sound()
    notebook.cells[2].outputs = [v4.new_output("error", ename="ValueError", evalue="no", traceback=["no"])]
    assert faults(notebook) == ["cell 2: has an error among its outputs"]
    notebook.cells[2].metadata["tags"] = ["raises-exception"]
    assert faults(notebook) == []


@pytest.mark.parametrize(
    "text",
    [
        "/home/ada/cocoa/data",
        "'/root/x'",
        "in /Users/ada",
        "/var/folders/zz/T/ipykernel_12/3.py",
        r"C:\Users\ada",
        "/tmp/tmpa1b2/x",
        "file:///home/ada/x",
        str(ROOT / "data"),
        str(Path.home()),
    ],
)
@pytest.mark.parametrize("where", ["source", "stream", "html"])
def test_path_of_one_machine(faults, text, where):
    notebook = sound()
    if where == "source":
        notebook.cells[0].source = f"see {text}"
    elif where == "stream":
        notebook.cells[2].outputs = [v4.new_output("stream", name="stderr", text=f"warning: {text}")]
    else:
        notebook.cells[2].outputs = [v4.new_output("display_data", {"text/html": f"<b>{text}</b>"})]
    (fault,) = faults(notebook)
    assert "path of one machine" in fault


@pytest.mark.parametrize(
    "text", ["https://example.org/home/ada", "runs/laptop/tmp/x", "data/root/x", "a/b", "../tmp/x", "/rooted"]
)
def test_other_paths_are_fine(faults, text):
    notebook = sound()
    notebook.cells[0].source = f"see {text}"
    assert faults(notebook) == []


def test_image_bytes_are_not_searched(faults):
    notebook = sound()
    notebook.cells[2].outputs = [v4.new_output("display_data", {"image/png": " /root/abc"})]
    assert faults(notebook) == []


def test_not_a_notebook(tmp_path):
    path = tmp_path / "broken.ipynb"
    path.write_text("{", encoding="utf-8")
    (fault,) = check_notebooks.check(path)
    assert "not a valid notebook" in fault


def test_invalid_notebook(tmp_path):
    path = tmp_path / "invalid.ipynb"
    path.write_text('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}')
    (fault,) = check_notebooks.check(path)
    assert "not a valid notebook" in fault


def test_main_reports_and_fails(tmp_path, capsys):
    nbformat.write(sound(), tmp_path / "good.ipynb")
    assert check_notebooks.main([str(tmp_path)]) == 0
    bad = sound()
    bad.metadata.kernelspec.name = "other"
    nbformat.write(bad, tmp_path / "bad.ipynb")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    nbformat.write(bad, tmp_path / ".ipynb_checkpoints" / "bad.ipynb")
    assert check_notebooks.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "bad.ipynb: names the kernel 'other'" in out
    assert out.endswith("2 notebooks checked; faults: 1\n")


def test_missing_path_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_notebooks.main([str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("source", "fault"),
    [("\n".join(["x = 1"] * 13), "a cell of 13 lines"), (f"x = {'1' * 97}", "a line of 101 columns"),
     ("class A:\n    pass", "defines a class"), ("x = 1\nclassic = 2", None)],
)  # fmt: skip
def test_what_makes_a_notebook_hard_to_read(faults, source, fault):
    notebook = sound()
    notebook.cells[2].source = source
    found = faults(notebook)
    assert [each for each in found if fault in each] if fault else not found


def test_code_without_text_and_too_many_cells(faults):
    notebook = sound()
    notebook.cells += [v4.new_code_cell("1", execution_count=3 + i) for i in range(13)]
    found = "; ".join(faults(notebook))
    assert "has 15 code cells" in found and "3 Markdown cells for 15 code cells" in found
