"""The tables of docs/speed.md, from benchmarks/results: `python benchmarks/page.py` writes them.

Each stands between `<!-- NAME -->` and `<!-- /NAME -->`. A test asserts that writing leaves no diff.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable

from common import RESULTS, ROOT, Record

PAGE = ROOT / "docs" / "speed.md"
STAGES = {"stage1": "stage 1", "stage2": "stage 2", "stage3": "stage 3"}
GPU = {
    "stage1, compiled layers, 16 rows of 1024": "Share of the peak (989 TFLOP/s), stage 1, compiled",
    "stage3, compiled layers, 8 rows of 1024": "Share of the peak, stage 3, compiled",
    "stage2, plain / Flex, 16 rows of 1024": "Stage 2's step, a dense mask against FlexAttention",
}


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def spread(line: Record) -> str:
    return f"{line['ratio']:.2f} [{line['lowest']:.2f}, {line['highest']:.2f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bench() -> str:
    found = read("bench")
    rows = [[line["text"], spread(line)] for line in found["results"]]
    how = f"Made in {found['seconds']} s" if found["seconds"] else "Made a row at a time"
    where = f"{how} on {found['machine']}, at commit {found['commit']}."
    return table(["what", "ratio [lowest, highest]"], rows) + f"\n\n{where}"


def steps() -> str:
    lines = {line["name"]: line for line in read("step")["results"]}
    rows = []
    for name in dict.fromkeys(name.split(", ")[0] for name in lines):
        own = [lines.get(f"{name}, {stage}") for stage in STAGES]
        cells = [spread(line) if line else "" for line in own]
        gap = max(line["gap"] for line in own if line)
        text = next(line["text"] for line in own if line)
        rows.append([text, *cells, f"{gap:.0e}" if gap else "0"])
    return table(["way", *STAGES.values(), "largest gap of a loss"], rows)


def gpu() -> str:
    lines = {line["name"]: line for line in read("gpu")["results"]}
    rows = [[text, spread(lines[name])] for name, text in GPU.items()]
    return table(["one H200, Qwen2-VL-2B's shape, rows of 1,024 tokens", "[lowest, highest]"], rows)


def road() -> str:
    with (RESULTS / "road.csv").open(encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {"bench": bench, "step": steps, "gpu": gpu, "road": road}


def render(text: str) -> str:
    """The page with its tables made anew."""
    for name, make in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if place.search(text):
            made = make()
            text = place.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def write() -> None:
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
