"""MMEB from a stand-in of the hub's layout: what it has is fetched, compared, unpacked safely."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image

from cocoa_lib.data import corpus, download
from cocoa_lib.data.tables import EVAL, TRAIN, fingerprint, list_items, load_eval, write_tables
from cocoa_lib.evaluate.tasks import choose_tasks
from cocoa_lib.items import InputError


class Hub:
    """A stand-in of `snapshot_download`, on folders FOLDER/<repository>."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder, []

    def __call__(self, repo, *, repo_type, local_dir, allow_patterns, dry_run):
        root, found = self.folder / repo, []
        for path in sorted(file for file in root.rglob("*") if file.is_file()):
            name = path.relative_to(root).as_posix()
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                facts = {"filename": name, "file_size": path.stat().st_size}
                found.append(SimpleNamespace(**facts, commit_hash="c0ffee"))
                if not dry_run and not (target := local_dir / name).is_file():
                    self.fetched.append(name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target)
        return found if dry_run else str(local_dir)


def write_zip(path: Path, names: list[str], picture: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.write(picture, name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Two training subsets, one without original rows; two tasks; pictures as on the hub."""
    folder, picture = tmp_path / "hub", tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    train, evaluation = folder / "TIGER-Lab" / "MMEB-train", folder / "TIGER-Lab" / "MMEB-eval"
    for name in ("OK-VQA", "ImageNet_1K"):
        paths = [f"{name}/Train/{i}.png" for i in range(4)]
        rows = [("<|image_1|> ?", f"images/{p}", f"{i}", "", "no", "") for i, p in enumerate(paths)]
        for split in ("original", "diverse_instruction"):
            write_tables(train / name, {f"{split}-0": pd.DataFrame(rows, columns=TRAIN)})
        members = [*paths, f"{name}/Train/unused.png"]
        write_zip(train / "images_zip" / f"{name}.zip", members, picture)
    write_tables(train / "CIFAR_100", {"train-0": pd.DataFrame([], columns=TRAIN)})
    for name in ("OK-VQA", "GQA"):
        rows = [("q", f"{name}/{i}.png", ["a", "b"], ["", ""]) for i in range(3)]
        rows += [("find", "", ["", ""], [f"{name}/0.png", f"{name}/9.png"])]
        write_tables(evaluation / name, {"test-0": pd.DataFrame(rows, columns=EVAL)})
    names = [f"{name}/{i}.png" for name in ("OK-VQA", "GQA") for i in (0, 1, 2, 9)]
    write_zip(evaluation / "images.zip", names, picture)
    hub = Hub(folder)
    monkeypatch.setattr(download, "snapshot_download", hub)
    return hub


def test_what_is_fetched_is_a_data_folder(hub, tmp_path):
    said: list[str] = []
    out = download.download(tmp_path / "data", say=said.append)
    assert len(said) == 1 and said[0].startswith(f"0.0 GB to download into {out}")
    assert corpus.subsets(out) == ["ImageNet_1K", "OK-VQA"]
    rows, sizes = corpus.pairs(out)
    assert sizes == [4, 4]
    corpus.check_items((item for column in rows.column_names for item in rows[column]), out)
    assert len(corpus.captions(out)) == 8 and corpus.captions(out)[0]["image"].endswith("/0.png")
    assert [task.name for task in choose_tasks(["all"], out)] == ["OK-VQA", "GQA"]
    found = list_items(load_eval(out, "GQA"), range(4), "GQA", out / "images")
    assert sum(item["image"] is not None for item in found.items) == 5
    assert not list(out.rglob("unused.png")) and not list(out.rglob("*.zip"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["commits"] == {repo: "c0ffee" for repo in download.REPOS.values()}
    assert fingerprint(out) == manifest["content_hash"]


def test_a_second_call_fetches_nothing_and_a_stopped_one_goes_on(hub, tmp_path, monkeypatch):
    out, whole = tmp_path / "data", zipfile.ZipFile.read
    calls = iter([None, None, KeyboardInterrupt])

    def read(self, info):
        if (stop := next(calls, None)) is not None:
            raise stop
        return whole(self, info)

    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    with pytest.raises(KeyboardInterrupt):
        download.download(out, parts=("train",))
    assert len(list((out / "images").rglob("*.png"))) == 2 and not (out / "train").exists()
    first = len(hub.fetched)
    for _ in range(2):
        download.download(out, parts=("train",))
        assert len(hub.fetched) == first + 2, "the other subset's rows and archive"


def test_subsets_and_rows_are_chosen(hub, tmp_path):
    out = download.download(tmp_path / "data", subsets=["OK-VQA"], rows=2)
    assert corpus.subsets(out) == ["OK-VQA"] and len(corpus.pairs(out)[0]) == 2
    names = sorted(path.name for path in (out / "images" / "OK-VQA" / "Train").iterdir())
    assert names == ["0.png", "1.png"]
    assert [path.name for path in (out / "eval").iterdir()] == ["OK-VQA"]
    with pytest.raises(InputError, match="no XYZ in TIGER-Lab/MMEB-train and TIGER-Lab/MMEB-eval"):
        download.download(out, subsets=["XYZ", "GQA"])


def test_a_damaged_archive_is_removed_and_a_lost_picture_said(hub, tmp_path):
    out, archive = tmp_path / "data", hub.folder / "TIGER-Lab/MMEB-train/images_zip/OK-VQA.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(InputError, match="OK-VQA.zip: damaged .* so it was deleted"):
        download.download(out, subsets=["OK-VQA"])
    write_zip(archive, ["OK-VQA/Train/0.png"], tmp_path / "a.png")
    said: list[str] = []
    download.download(out, parts=("train",), say=said.append)
    assert said[1] == "3 pictures are not in images_zip/OK-VQA.zip, first OK-VQA/Train/1.png"


def test_no_path_leaves_the_folder_and_no_link_comes_in(tmp_path):
    images, path = tmp_path / "images", tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("../out.png", "in.png"):
            file.writestr(name, "x")
        info = zipfile.ZipInfo("link.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    assert download.unpack(path, ["in.png", "link.png", "not.png"], images) == ["not.png"]
    assert {file.name for file in images.iterdir()} == {"in.png", "link.png"}
    assert not (images / "link.png").is_symlink()
    with pytest.raises(ValueError, match="'../out.png' is not a plain path"):
        download.unpack(path, ["../out.png"], images)
    assert not (tmp_path / "out.png").exists()


def test_the_command_says_the_size_and_what_went_wrong(hub, tmp_path, capsys):
    out = ["--out", str(tmp_path / "data")]
    download.main([*out, "--parts", "eval"])
    assert "GB to download" in capsys.readouterr().out and not (tmp_path / "data/train").exists()
    with pytest.raises(SystemExit) as stopped:
        download.main([*out, "--subsets", "XYZ"])
    assert stopped.value.code == 1 and "no rows in TIGER-Lab" in capsys.readouterr().err
