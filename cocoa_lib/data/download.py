"""`python -m cocoa_lib.data.download --out DATA`: MMEB from the hub, as `Run(data=DATA)` takes it.

On the hub, as of 2025:

    TIGER-Lab/MMEB-train   <Subset>/original-*.parquet, images_zip/<Subset>.zip
    TIGER-Lab/MMEB-eval    <Task>/test-*.parquet, images.zip

Here: DATA/train/<Subset>/original-*.parquet, DATA/eval/<Task>/test-*.parquet, DATA/images/...
Only pictures that a row names are unpacked. The same command goes on from where it was stopped.
"""

from __future__ import annotations

import argparse
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from tqdm.auto import tqdm

from ..items import InputError
from ..store.files import file_hash, files_hash, write_json, write_whole
from .tables import resolve_below, resolve_image

REPOS = {"train": "TIGER-Lab/MMEB-train", "eval": "TIGER-Lab/MMEB-eval"}
SPLITS = {"train": "original", "eval": "test"}
ARCHIVES = ".archives"  # below DATA: files as the hub has them
GB = 1e9


@dataclass(frozen=True)
class Piece:
    """An archive of pictures and the tables whose rows name them; files are the hub's `RepoFile`."""

    part: str  # "train" or "eval"
    commit: str
    archive: Any
    tables: dict[str, list[Any]]  # subset or task -> its parquet files

    @property
    def size(self) -> int:
        """Bytes to download."""
        files = [self.archive, *(file for files in self.tables.values() for file in files)]
        return sum(file.size for file in files)


def list_pieces(api: HfApi, part: str) -> list[Piece]:
    """List what the hub has of a part now: a piece a training subset, one for all of evaluation.

    Raises InputError where the repository has another layout than is described above.
    """
    repo = REPOS[part]
    commit = api.dataset_info(repo).sha
    tree = api.list_repo_tree(repo, recursive=True, repo_type="dataset", revision=commit)
    files = {file.path: file for file in tree if hasattr(file, "size")}
    tables: dict[str, list[Any]] = {}
    for path, file in sorted(files.items()):
        folder, _, name = path.partition("/")
        if name.startswith(f"{SPLITS[part]}-") and name.endswith(".parquet"):
            tables.setdefault(folder, []).append(file)
    if part == "eval":
        pieces = [Piece(part, commit, files.get("images.zip"), tables)] if tables else []
    else:
        archives = {name: files.get(f"images_zip/{name}.zip") for name in tables}
        pieces = [
            Piece(part, commit, archive, {name: tables[name]})
            for name, archive in archives.items()
            if archive
        ]
    if not pieces or not pieces[0].archive:
        raise InputError(f"{repo} at {commit}: no tables with pictures; its layout has changed")
    return pieces


def choose_pieces(pieces: Iterable[Piece], names: Sequence[str]) -> list[Piece]:
    """Keep the named subsets and tasks, all if none is named. Raises InputError for unknown ones."""
    pieces = list(pieces)
    known = sorted({name for piece in pieces for name in piece.tables})
    if unknown := sorted(set(names) - set(known)):
        raise InputError(f"no subset {', '.join(unknown)}; there are {', '.join(known)}")
    kept = [
        (piece, {name: files for name, files in piece.tables.items() if not names or name in names})
        for piece in pieces
    ]
    return [Piece(p.part, p.commit, p.archive, tables) for p, tables in kept if tables]


def download(
    out: str | Path,
    *,
    subsets: Sequence[str] = (),
    rows: int | None = None,
    parts: Sequence[str] = ("train", "eval"),
    dry_run: bool = False,
    api: HfApi | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Fetch MMEB into the data folder `out`; return it.

    subsets: names of training subsets and tasks, all if empty; rows: the first ones of each
    training subset. What is downloaded is compared with the hub's sizes and hashes. `say` is told
    the size beforehand; with `dry_run` that is all. Raises InputError for unknown names, too little
    disk, a damaged download and an archive that is not as expected.
    """
    out, api = Path(out), api or HfApi()
    pieces = choose_pieces([one for part in parts for one in list_pieces(api, part)], subsets)
    total = sum(piece.size for piece in pieces) / GB
    largest = max(piece.archive.size for piece in pieces) / GB
    say(f"{total:.1f} GB to download; {out} needs up to {total + largest:.1f} GB of disk")
    if dry_run:
        return out
    out.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out).free / GB) < largest:
        raise InputError(f"{out}: {free:.1f} GB free, but one archive alone has {largest:.1f} GB")
    for piece in pieces:
        absent = fetch_piece(api, piece, out, rows if piece.part == "train" else None)
        if absent:
            say(f"{len(absent)} pictures are not in {piece.archive.path}, first {absent[0]}")
    tables = sorted(path for part in REPOS for path in (out / part).rglob("*.parquet"))
    commits = {REPOS[piece.part]: piece.commit for piece in pieces}
    facts = {"generator": "MMEB", "commits": commits, "content_hash": files_hash(tables)}
    write_json(out / "manifest.json", facts)
    return out


def fetch_piece(api: HfApi, piece: Piece, out: Path, rows: int | None) -> list[str]:
    """Fetch tables and pictures of a piece; tables are written last. Return pictures not found."""
    tables = {
        name: pa.concat_tables(pq.read_table(fetch(api, piece, file, out)) for file in files)
        for name, files in piece.tables.items()
    }
    tables = {name: table.slice(0, rows) for name, table in tables.items()}
    wanted = sorted(set().union(*map(list_pictures, tables.values())))
    wanted = [name for name in wanted if not resolve_image(out / "images", name).is_file()]
    absent: list[str] = []
    if wanted:
        archive = fetch(api, piece, piece.archive, out)
        absent = unpack(archive, wanted, out / "images")
        if not absent:
            archive.unlink()
    for name, table in tables.items():
        path = out / piece.part / name / f"{SPLITS[piece.part]}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda aside, table=table: pq.write_table(table, aside))
    return absent


def fetch(api: HfApi, piece: Piece, file: Any, out: Path) -> Path:
    """Download a file unless it is there, and compare it with the hub's size and hash."""
    folder = out / ARCHIVES / piece.part
    path = Path(
        api.hf_hub_download(
            REPOS[piece.part],
            file.path,
            repo_type="dataset",
            revision=piece.commit,
            local_dir=folder,
        )
    )
    right = path.stat().st_size == file.size
    if not right or (file.lfs and file_hash(path) != file.lfs.sha256):
        path.unlink()
        raise InputError(f"{path}: not what the hub has, so it was deleted; run the command again")
    return path


def list_pictures(table: pa.Table) -> set[str]:
    """List the image paths that rows name, below the image folder."""
    names: set[str] = set()
    for column in table.column_names:
        if column.endswith(("_image_path", "_img_path")):
            values = table[column]
            if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                values = values.combine_chunks().flatten()
            names.update(values.unique().to_pylist())
    return {name.removeprefix("images/") for name in names if name}


def unpack(archive: Path, wanted: Sequence[str], images: Path) -> list[str]:
    """Unpack the wanted members, each whole or not at all; return those that are not there.

    Raises InputError for an archive that is damaged, a member that is a link, and ValueError for a
    name that leads out of `images`.
    """
    absent = []
    try:
        with ZipFile(archive) as file:
            members = {info.filename.removeprefix("images/"): info for info in file.infolist()}
            for name in tqdm(wanted, desc=archive.name, unit="picture"):
                target = resolve_below(images, name)
                if (info := members.get(name)) is None:
                    absent.append(name)
                    continue
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise InputError(f"{archive}: member {name} is a link; not unpacked")
                target.parent.mkdir(parents=True, exist_ok=True)
                aside = target.with_name(f".{target.name}.partial")
                aside.write_bytes(file.read(info))
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
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_const", dest="parts", const=("train",))
    only.add_argument("--eval-only", action="store_const", dest="parts", const=("eval",))
    parser.add_argument("--dry-run", action="store_true", help="say how many GB, and stop")
    args = vars(parser.parse_args(argv))
    args["parts"] = args["parts"] or tuple(REPOS)
    try:
        download(args.pop("out"), say=print, **args)
    except (ValueError, OSError, HTTPError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
