"""MMEB from a stand-in of the hub's layout: what it has is fetched, compared, unpacked safely."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image

from cocoa_lib.data import corpus, download
from cocoa_lib.data.tables import EVAL, TRAIN, fingerprint, list_items, load_eval
from cocoa_lib.evaluate.tasks import choose_tasks
from cocoa_lib.items import InputError


class Hub:
    """The calls that `download` makes of HfApi, on folders FOLDER/<repository>."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder, []

    def dataset_info(self, repo):
        return SimpleNamespace(sha="c0ffee")

    def list_repo_tree(self, repo, *, recursive, repo_type, revision):
        assert (recursive, repo_type, revision) == (True, "dataset", "c0ffee")
        root = self.folder / repo
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_dir():
                yield SimpleNamespace(path=name)
            else:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                lfs = SimpleNamespace(sha256=digest)
                yield SimpleNamespace(path=name, size=path.stat().st_size, lfs=lfs)

    def hf_hub_download(self, repo, name, *, repo_type, revision, local_dir):
        target = Path(local_dir) / name
        if not target.is_file():
            self.fetched.append(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / repo / name, target)
        return str(target)


def write_parquet(path: Path, rows: list, columns: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=columns).to_parquet(path, index=False)


def write_zip(path: Path, names: list[str], picture: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.write(picture, name)


@pytest.fixture
def hub(tmp_path):
    """Two training subsets, one without original rows; two tasks; pictures as on the hub."""
    folder, picture = tmp_path / "hub", tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    train, evaluation = folder / "TIGER-Lab" / "MMEB-train", folder / "TIGER-Lab" / "MMEB-eval"
    for name in ("OK-VQA", "ImageNet_1K"):
        paths = [f"{name}/Train/{i}.png" for i in range(4)]
        rows = [
            (f"<|image_1|> {i}?", f"images/{p}", f"{i}", "", "no", "") for i, p in enumerate(paths)
        ]
        for split in ("original", "diverse_instruction"):
            write_parquet(train / name / f"{split}-00000-of-00001.parquet", rows, TRAIN)
        write_zip(
            train / "images_zip" / f"{name}.zip", [*paths, f"{name}/Train/unused.png"], picture
        )
    write_parquet(train / "CIFAR_100" / "train-00000-of-00001.parquet", [], TRAIN)
    for name in ("OK-VQA", "GQA"):
        rows = [("q", f"{name}/{i}.png", ["a", "b"], ["", ""]) for i in range(3)]
        rows += [("find", "", ["", ""], [f"{name}/0.png", f"{name}/9.png"])]
        write_parquet(evaluation / name / "test-00000-of-00001.parquet", rows, EVAL)
    names = [f"{name}/{i}.png" for name in ("OK-VQA", "GQA") for i in (0, 1, 2, 9)]
    write_zip(evaluation / "images.zip", names, picture)
    return Hub(folder)


def test_what_is_fetched_is_a_data_folder(hub, tmp_path):
    said: list[str] = []
    out = download.download(tmp_path / "data", api=hub, say=said.append)
    assert said == [f"0.0 GB to download; {out} needs up to 0.0 GB of disk"]
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
        download.download(out, api=hub, parts=("train",))
    assert len(list((out / "images").rglob("*.png"))) == 2 and not (out / "train").exists()
    first = len(hub.fetched)
    download.download(out, api=hub, parts=("train",))
    assert len(hub.fetched) == first + 2, "the other subset's rows and archive"
    download.download(out, api=hub, parts=("train",))
    assert len(hub.fetched) == first + 2


def test_subsets_and_rows_are_chosen(hub, tmp_path):
    out = download.download(tmp_path / "data", api=hub, subsets=["OK-VQA"], rows=2)
    assert corpus.subsets(out) == ["OK-VQA"] and len(corpus.pairs(out)[0]) == 2
    names = sorted(path.name for path in (out / "images" / "OK-VQA" / "Train").iterdir())
    assert names == ["0.png", "1.png"]
    assert [path.name for path in (out / "eval").iterdir()] == ["OK-VQA"]
    with pytest.raises(InputError, match="no subset XYZ; there are GQA, ImageNet_1K, OK-VQA"):
        download.download(out, api=hub, subsets=["XYZ"])
    shutil.rmtree(hub.folder / "TIGER-Lab" / "MMEB-train" / "images_zip")
    with pytest.raises(InputError, match="its layout has changed"):
        download.download(out, api=hub)


def test_damage_is_found_and_removed(hub, tmp_path, monkeypatch):
    out = tmp_path / "data"
    path = out / download.ARCHIVES / "train" / "images_zip" / "OK-VQA.zip"
    path.parent.mkdir(parents=True)
    size = (hub.folder / "TIGER-Lab/MMEB-train/images_zip/OK-VQA.zip").stat().st_size
    path.write_bytes(bytes(size))  # of the right size: the hash tells
    with pytest.raises(InputError, match="OK-VQA.zip: not what the hub has, so it was deleted"):
        download.download(out, api=hub, subsets=["OK-VQA"])
    assert not path.exists()
    broken = hub.folder / "TIGER-Lab/MMEB-train/images_zip/OK-VQA.zip"
    broken.write_bytes(broken.read_bytes()[:-30])
    with pytest.raises(InputError, match="OK-VQA.zip: damaged"):
        download.download(out, api=hub, subsets=["OK-VQA"])
    usage = shutil._ntuple_diskusage(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="0.0 GB free"):
        download.download(out, api=hub)


def test_no_path_leaves_the_folder_and_no_link_comes_in(hub, tmp_path):
    images, picture, path = tmp_path / "images", tmp_path / "a.png", tmp_path / "a.zip"
    write_zip(path, ["../out.png", "in.png"], picture)
    assert download.unpack(path, ["in.png", "not.png"], images) == ["not.png"]
    assert [file.name for file in images.iterdir()] == ["in.png"]
    with pytest.raises(ValueError, match="'../out.png' is not a plain path"):
        download.unpack(path, ["../out.png"], images)
    assert not (tmp_path / "out.png").exists()
    with zipfile.ZipFile(path, "w") as file:
        info = zipfile.ZipInfo("link.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(InputError, match="link.png is a link"):
        download.unpack(path, ["link.png"], images)


def test_pictures_that_the_archive_lacks_are_said(hub, tmp_path):
    archive = hub.folder / "TIGER-Lab" / "MMEB-train" / "images_zip" / "OK-VQA.zip"
    write_zip(archive, ["OK-VQA/Train/0.png"], tmp_path / "a.png")
    said: list[str] = []
    download.download(tmp_path / "data", api=hub, parts=("train",), say=said.append)
    assert said[1] == "3 pictures are not in images_zip/OK-VQA.zip, first OK-VQA/Train/1.png"


def test_the_command_says_the_size_and_what_went_wrong(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "HfApi", lambda: hub)
    out = tmp_path / "data"
    download.main(["--out", str(out), "--dry-run", "--eval-only"])
    assert "GB to download" in capsys.readouterr().out and not out.exists() and not hub.fetched
    with pytest.raises(SystemExit) as stopped:
        download.main(["--out", str(out), "--subsets", "XYZ"])
    assert stopped.value.code == 1 and "no subset XYZ" in capsys.readouterr().err
