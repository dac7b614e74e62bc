"""`python -m cocoa_lib.data.download --out DATA`: MMEB from the hub, as `Run(data=DATA)` takes it.

On the hub, as of 2025:

    TIGER-Lab/MMEB-train   <Subset>/original-*.parquet, images_zip/<Subset>.zip
    TIGER-Lab/MMEB-eval    <Task>/test-*.parquet, images.zip

Here: DATA/train/<Subset>/original-*.parquet, DATA/eval/<Task>/test-*.parquet, DATA/images/...
Only pictures that a row names are unpacked. The same command goes on from where it was stopped.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from tqdm.auto import tqdm

from ..items import InputError
from ..store.files import files_hash, write_json, write_whole
from .tables import resolve_below, resolve_image

REPOS = {"train": "TIGER-Lab/MMEB-train", "eval": "TIGER-Lab/MMEB-eval"}
SPLITS = {"train": "original", "eval": "test"}
ARCHIVES = ".archives"  # below DATA: files as the hub has them


def fetch(out: Path, part: str, patterns: Sequence[str], *, dry_run: bool = False) -> Any:
    """Fetch files of a part to OUT/.archives/PART, which is returned; whole ones are kept.

    dry_run: list huggingface_hub's `DryRunFileInfo` of each file instead.
    """
    return snapshot_download(
        REPOS[part],
        repo_type="dataset",
        local_dir=out / ARCHIVES / part,
        allow_patterns=list(patterns),
        dry_run=dry_run,
    )


def find_archive(part: str, name: str) -> str:
    """Name the archive of a subset's pictures; all tasks share one."""
    return f"images_zip/{name}.zip" if part == "train" else "images.zip"


def download(
    out: str | Path,
    *,
    subsets: Sequence[str] = (),
    rows: int | None = None,
    parts: Sequence[str] = tuple(REPOS),
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Fetch MMEB into the data folder `out`; return it.

    subsets: names of training subsets and tasks, all if empty; rows: the first ones of each
    training subset. `say` is told the size beforehand. Raises InputError for unknown names and a
    damaged archive, and what huggingface_hub raises.
    """
    out, size, commits = Path(out), 0, {}
    chosen: dict[tuple[str, str], list[str]] = defaultdict(list)  # (part, archive) -> tables
    for part in parts:
        patterns = [f"{name}/{SPLITS[part]}-*.parquet" for name in subsets or ["*"]]
        for file in fetch(out, part, patterns, dry_run=True):
            archive = find_archive(part, Path(file.filename).parent.name)
            chosen[part, archive].append(file.filename)
            size, commits[REPOS[part]] = size + file.file_size, file.commit_hash
    found = {Path(table).parent.name for tables in chosen.values() for table in tables}
    if not found or (unknown := set(subsets) - found):
        said = ", ".join(sorted(unknown)) if found else "rows"
        raise InputError(f"no {said} in {' and '.join(REPOS[part] for part in parts)}")
    for part, archive in chosen:
        size += sum(file.file_size for file in fetch(out, part, [archive], dry_run=True))
    say(f"{size / 1e9:.1f} GB to download into {out}; an archive is deleted once it is unpacked")
    for (part, archive), tables in chosen.items():
        n = rows if part == "train" else None
        if absent := fetch_pictures(out, part, archive, tables, n):
            say(f"{len(absent)} pictures are not in {archive}, first {absent[0]}")
    made = sorted(path for part in REPOS for path in (out / part).rglob("*.parquet"))
    facts = {"generator": "MMEB", "commits": commits, "content_hash": files_hash(made)}
    write_json(out / "manifest.json", facts)
    return out


def fetch_pictures(
    out: Path, part: str, archive: str, tables: Sequence[str], rows: int | None
) -> list[str]:
    """Fetch tables and the pictures they name; tables are written last. Return pictures not found."""
    folder, by_name = Path(fetch(out, part, tables)), defaultdict(list)
    for table in sorted(tables):
        by_name[Path(table).parent.name].append(pq.read_table(folder / table))
    whole = {name: pa.concat_tables(each).slice(0, rows) for name, each in by_name.items()}
    wanted = sorted(set().union(*map(list_pictures, whole.values())))
    wanted = [name for name in wanted if not resolve_image(out / "images", name).is_file()]
    absent: list[str] = []
    if wanted:
        fetch(out, part, [archive])
        absent = unpack(folder / archive, wanted, out / "images")
        if not absent:
            (folder / archive).unlink()
    for name, table in whole.items():
        path = out / part / name / f"{SPLITS[part]}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda aside, table=table: pq.write_table(table, aside))
    return absent


def list_pictures(table: pa.Table) -> set[str]:
    """List the image paths that rows name, below the image folder."""
    columns = [name for name in table.column_names if name.endswith(("_image_path", "_img_path"))]
    names = [table[column].to_pandas().explode().dropna().unique() for column in columns]
    return {name.removeprefix("images/") for name in np.concatenate(names) if name}


def unpack(archive: Path, wanted: Sequence[str], images: Path) -> list[str]:
    """Unpack the wanted members, each whole or not at all; return those that are not there.

    Raises InputError for an archive that is damaged, and ValueError for a name that leads out of
    `images`. A member that is a link becomes a file of its text, so no link comes in.
    """
    absent = []
    try:
        with ZipFile(archive) as file:
            members = {info.filename.removeprefix("images/"): info for info in file.infolist()}
            for name in tqdm(wanted, desc=archive.name, unit="picture"):
                target = resolve_below(images, name)
                if name not in members:
                    absent.append(name)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                aside = target.with_name(f".{target.name}.partial")
                aside.write_bytes(file.read(members[name]))
                aside.replace(target)
    except BadZipFile as error:
        archive.unlink()
        raise InputError(f"{archive}: damaged ({error}), so it was deleted; run again") from error
    return absent


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cocoa_lib.data.download", description="Download MMEB from the hub."
    )
    parser.add_argument("--out", type=Path, required=True, help="data folder")
    parser.add_argument("--subsets", nargs="+", default=[], help="training subsets and tasks (all)")
    parser.add_argument("--rows", type=int, help="first rows of each training subset (all)")
    parser.add_argument("--parts", nargs="+", choices=REPOS, default=list(REPOS))
    args = vars(parser.parse_args(argv))
    try:
        download(args.pop("out"), say=print, **args)
    except (ValueError, OSError, HTTPError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
