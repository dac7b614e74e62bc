"""Many training rows need little memory: a process holds those that it looks at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from cocoa_lib.data.tables import write_tables

CODE = """if True:
    import sys
    from pathlib import Path
    from cocoa_lib.data import corpus
    def held():
        status = open("/proc/self/status")
        return next(int(l.split()[1]) for l in status if l.startswith("RssAnon")) / 1024
    for name in ("captions", "text_pairs", "pairs"):
        before = held()
        rows = getattr(corpus, name)(Path(sys.argv[1]))
        print(name, held() - before)"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_many_rows_need_little_memory(tmp_path):
    """60 MB of text a column, of which each reader may hold 20 at most."""
    n, text, none = 40_000, "word " * 300, {"qry_image_path": "", "pos_image_path": ""}
    texts = [f"{i} {text}" for i in range(n)]
    tables = {
        "corpus/train": {"image_path": "", "kind": "caption", "question": "", "answer": texts},
        "train/T/original-0": {"qry": texts, "pos_text": texts, **none},
    }
    write_tables(tmp_path, {name: pd.DataFrame(columns) for name, columns in tables.items()})
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    for _ in range(2):  # the first time `datasets` makes the files that are mapped
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}
    assert set(grown) == {"captions", "text_pairs", "pairs"} and max(grown.values()) < 20, grown
