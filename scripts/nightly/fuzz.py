"""Feed readers bytes that coverage guides, for a bounded time each: rows, profiles, arms, notes of checkpoints and data.

    pip install atheris && python scripts/nightly/fuzz.py --seconds 60

Every outcome must be a value or the project's own error; anything else is a crash, which atheris prints with its input. A
supplement to tests/test_fuzz.py, which needs no compiled fuzzer and runs with the tests. Needs Linux and atheris (not installed
with the rest). Seeds: the committed profiles, arms and notes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"


def readers() -> dict[str, tuple[str, Callable[[Path], object], tuple[type[Exception], ...], list[Path]]]:
    """Target -> file name, reader of a path, errors it may raise, seed files."""
    from cocoa_lib.data.pairs import read_table
    from cocoa_lib.data.tables import fingerprint
    from cocoa_lib.items import InputError
    from cocoa_lib.recipes import RecipeError
    from cocoa_lib.run.profiles import load_profile, read_arms
    from cocoa_lib.store.checkpoint import CheckpointError, read_meta

    profiles = sorted((NOTEBOOKS / "profiles").glob("*.yaml"))
    return {
        "profile": ("p.yaml", lambda path: load_profile("p", path.parent), (RecipeError,), profiles),
        "arms": ("arms.yaml", read_arms, (RecipeError,), [NOTEBOOKS / "arms.yaml"]),
        "rows.jsonl": ("rows.jsonl", read_table, (InputError,), []),
        "rows.csv": ("rows.csv", read_table, (InputError,), [ROOT / "data" / "published_mmeb.csv"]),
        "manifest": ("manifest.json", lambda path: fingerprint(path.parent), (ValueError,), []),
        "checkpoint": ("cocoa.json", lambda path: read_meta(path.parent, check=False), (CheckpointError,),
                       [ROOT / "data" / "backbone" / "cocoa.json"]),
    }  # fmt: skip


def fuzz(target: str, seconds: int, corpus: str) -> None:
    """This process becomes the fuzzer of one target; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["cocoa_lib", "yaml", "csv", "json"]):
        name, read, expected, _ = readers()[target]
    folder = Path(tempfile.mkdtemp())

    def one(data: bytes) -> None:
        (folder / name).write_bytes(data)
        try:
            read(folder / name)
        except expected as error:
            if not str(error):
                raise AssertionError("an error that says nothing") from error

    atheris.Setup([sys.argv[0], corpus, f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096", "-verbosity=0",
                   "-print_final_stats=1", "-max_len=4096"], one)  # fmt: skip
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--target")
    parser.add_argument("--corpus", default="")
    args = parser.parse_args()
    if args.target:
        fuzz(args.target, args.seconds, args.corpus)
    try:
        import atheris  # noqa: F401
    except ImportError:
        raise SystemExit("atheris is not installed: pip install atheris (Linux)") from None
    failed = []
    for target, (_, _, _, seeds) in readers().items():
        with tempfile.TemporaryDirectory() as corpus:
            for number, seed in enumerate(seeds):
                shutil.copy(seed, Path(corpus) / f"seed{number}")
            command = [sys.executable, __file__, "--target", target, "--seconds", str(args.seconds), "--corpus", corpus]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=corpus, check=False)  # noqa: S603
        runs = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(
            f"{target:12s} {runs[0] if runs else '?':>9s} inputs  {'fine' if done.returncode == 0 else 'CRASHED'}",
            flush=True,
        )
        if done.returncode:
            failed.append(target)
            print(done.stdout[-3000:] + done.stderr[-3000:], file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
