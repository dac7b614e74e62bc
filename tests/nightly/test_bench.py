"""The committed measurements are well formed, the ratios on the pages are theirs, and the cheap ones run."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
CONTENTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
RECORDS = {line["name"]: line for name, kept in CONTENTS.items() if "gpu" not in name for line in kept["results"]}
GPU = {line["name"]: line for name in ("gpu_earlier", "gpu", "attention_gpu") for line in CONTENTS[name]["results"]}
ONE_ROW = {line["name"]: line["ratio"] for line in CONTENTS["attention_gpu_one_row"]["results"]}
KEYS = {"name", "compared", "ratio", "n", "lowest", "highest", "machine", "commit"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_says_what_was_compared_where_and_how_often(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["name"] == path.stem and content["results"]
    for line in content["results"]:
        assert set(line) >= KEYS, KEYS - set(line)
        assert line["lowest"] <= line["ratio"] <= line["highest"] and line["n"] >= 1


def test_every_script_is_run_by_make_bench_and_left_its_result():
    import bench

    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"bench", "common", "gpu"}
    assert re.search(r"^bench:.*\n.* benchmarks/bench.py$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    # What `make bench` does not write.
    aside = {"gpu", "gpu_earlier", "attention_gpu", "attention_gpu_one_row"}
    aside |= {"attention_long", "gradcache_large", "stages_compiled"}
    assert {*bench.ALONE, *bench.BESIDE} == scripts == {path.stem for path in FILES} - aside
    assert len(bench.ALONE) + len(bench.BESIDE) == len(scripts)


def test_make_bench_runs_each_script_clean_and_names_one_that_fails(tmp_path):
    """Nothing that one leaves is there in the next; the others are measured all the same."""
    # One write a line, even unbuffered, so that lines of two processes do not mix.
    body = "import multiprocessing, os, sys\n\n\ndef main():\n    seen = sys.argv, os.environ.pop('LEFT', None), "
    body += "multiprocessing.get_start_method()\n    print('{0} %s %s %s\\n' % seen, end='', flush=True)\n    {1}\n"
    for name, then in {"a": "os.environ['LEFT'] = 'a'", "b": "raise ValueError('b broke')", "c": "pass"}.items():
        (tmp_path / f"script_{name}.py").write_text(body.format(name, then))
    code = "import bench; bench.ALONE, bench.BESIDE, bench.PRELOAD = ['script_a'], ['script_b', 'script_c'], []; bench.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "benchmarks")])},
    )  # fmt: skip
    usual = multiprocessing.get_all_start_methods()[0]  # as in a fresh interpreter
    lines = [re.sub(r"\d+ s$", "1 s", line) for line in done.stdout.splitlines()]
    assert lines[:2] == [f"a ['script_a'] None {usual}", "script_a took 1 s"] and lines[-1] == "all took 1 s"
    beside = [line for name in "bc" for line in (f"{name} ['script_{name}'] None {usual}", f"script_{name} took 1 s")]
    assert sorted(lines[2:-1]) == sorted(beside)
    assert done.returncode == 1 and "ValueError: b broke" in done.stderr
    assert done.stderr.splitlines()[-1] == "failed, see above why: benchmarks/script_b.py; the others are measured"


def test_the_goals_are_said_as_the_records_have_them():
    page = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    said = page.split("What it was to reach")[1]
    chunks = RECORDS["padding, GradCache chunks, MMEB-like"]["compared"]
    assert "In GradCache's chunks 58.4 % and 8.1 %" in said and "padding 58.4 % -> 8.1 %" in chunks
    for stage, before, after in (("stage2", 58, 15), ("stage1", 24, 19)):
        assert f"{before} % and {after} % ({stage[:5]} {stage[5]})" in said
        assert f"padding {before} % -> {after} %" in RECORDS[f"packing, {stage}, MMEB-like"]["compared"]
    assert all(RECORDS[f"GradCache, time, batch {n}"]["ratio"] <= 1.35 for n in (64, 256))
    assert all(RECORDS[f"GradCache, memory, batch {n}"]["highest"] <= 1.1 for n in (256, 1024))
    waits = {
        name: line["highest"] for name, line in RECORDS.items() if name.startswith("waiting") and "2 workers" in name
    }
    assert len(waits) == 3 and max(waits.values()) < 0.05
    flex = {name: line for name, line in RECORDS.items() if name.startswith("attention, forward")}
    ahead = flex.pop("attention, forward, L 4096, A:B 1:1, 12 heads of 128, one layer")
    text = f"perhaps at L 4096 with A:B 1:1 ({ahead['ratio']:.2f} [{ahead['lowest']:.2f}, {ahead['highest']:.2f}];"
    assert text in page and max(line["ratio"] for line in flex.values()) < 1.05
    compiled = {line["name"]: line["ratio"] for name, line in RECORDS.items() if name.startswith("compiled layers")}
    text = "a step gains a tenth at most in the median, which stage gains was another in an earlier run, and compiling takes "
    text += "as long as some thirty steps"
    assert text in page and 25 < compiled.pop("compiled layers, first step") < 35
    assert len(compiled) == 3 and 1 < max(compiled.values()) < 1.105
    assert "all 36 tasks in 3 s" in RECORDS["ranking, time"]["compared"] and "36 tasks of 1000 x 1000 took 3 s" in said


def test_what_a_gpu_gave_is_said_as_the_records_have_it():
    """Each of one kind of machine; what the pages say of them beside the table."""
    assert {line["machine"] for line in GPU.values()} == {
        "x86_64 AVX512, 16 cores, 1 thread(s), torch 2.11.0+cu130, NVIDIA H200"
    }
    speed, scaling, readme, cluster = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split())
        for name in ("docs/speed.md", "docs/scaling.md", "README.md", "docs/cluster.md")
    )
    share = {name: line["ratio"] for name, line in GPU.items()}
    one, three = (f"{stage}, {{}}, {rows} rows of 1024" for stage, rows in (("stage1", 16), ("stage3", 8)))
    compiled = [GPU[name.format("compiled layers")] for name in (one, three)]
    plain = [GPU[name.format("plain")]["ratio"] for name in (one, three)]
    first, third = (
        f"{100 * line['ratio']:.1f} [{100 * line['lowest']:.1f}, {100 * line['highest']:.1f}]" for line in compiled
    )
    rates = [f"{line['tokens_per_second']:,.0f}" for line in compiled]
    said = f"{first} % in stage 1 and {third} % in stage 3 with compiled layers ({rates[0]} and {rates[1]} tokens a second), "
    assert said + f"{100 * plain[0]:.1f} and {100 * plain[1]:.1f} % without" in speed
    assert compiled[0]["ratio"] > 0.45 > compiled[1]["ratio"], "the goal is 45 %"
    both = sorted(
        (int(name.split("L ")[1].split(",")[0]), value) for name, value in share.items() if "forward + backward" in name
    )
    wins = [value for length, value in both if length >= 1024]
    assert {length for length, _ in both} == {512, 1024, 2048} and 0.95 < min(
        value for length, value in both if length < 1024
    ) < 1
    assert (
        f"is {min(wins):.2f} to {max(wins):.2f} times as fast from 1,024 tokens on (level at 512)" in speed
        and min(wins) > 1
    )
    step = GPU["stage2, plain / Flex, 16 rows of 1024"]
    assert f"a whole step at 1,024 tokens gains {100 * (step['ratio'] - 1):.1f} %" in speed and step["lowest"] > 1
    alone = [
        ONE_ROW[f"attention, forward + backward, L 8192, A:B {ratio}:1, 12 heads of 128, one layer"] for ratio in (4, 1)
    ]
    assert f"One row of 8,192 tokens, one layer: {alone[0]:.2f} and {alone[1]:.2f}" in speed
    small, large = (GPU[f"encode, {side} x {side} pixels"] for side in (448, 1344))
    for line, text in (
        (small, "for pictures of 448 x 448 ({:.0f} a second)"),
        (large, "for 1344 x 1344 ({:.1f} a second)"),
    ):
        assert f"{100 * line['ratio']:.1f} % {text.format(line['images_per_second'])}" in scaling
    assert "keeps two to three cores busy" in scaling and 2 < small["images_per_second"] * 0.021 < 3
    saved = [GPU[f"{name}, gradient checkpointing / plain, 12 rows of 1024"]["peak_memory_gb"]
             for name in ("stage1", "stage1 with adapter")]  # fmt: skip
    said = "Gradient checkpointing brings 12 rows from {1:.0f} to {0:.0f} GB".format(*saved[0])
    assert said + ", with the adapter from {1:.0f} to {0:.0f}".format(*saved[1]) in speed
    singly = share["stage1, pictures singly / plain, 16 rows of 1024"]
    assert f"a step of stage 1 takes {singly:.2f} times as long without" in cluster
    assert f"{100 * compiled[0]['ratio']:.0f} % of the peak instead of {100 * plain[0]:.0f}" in cluster
    missing = {name: list(CONTENTS[name]["not_measured"]) for name in ("gpu", "attention_gpu", "gpu_earlier")}
    assert (
        len(missing["gpu"]) == 3
        and len(missing["attention_gpu"]) == 4
        and missing["gpu_earlier"] == ["encode, 1344 pixels"]
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_a_peak_is_of_its_step_alone_and_there_are_five(monkeypatch):
    """Not of what was in use before: the mark is set back."""
    import common

    np.ones(120 * 10**6, np.uint8).sum()
    sent: list[float] = []  # MB; above 32 glibc gives every block back, whatever the process has done before
    common._peak(type("", (), {"send": sent.append}), False, lambda mb: lambda: np.ones(mb * 10**6, np.uint8), (64,))
    assert sent[0] / 1e6 == pytest.approx(64, abs=4)
    monkeypatch.setattr(common, "peak", lambda make, size, *, in_use: float(size))
    assert common.peaks(print, [(2,), (1,)]) == {(2,): [2.0] * 5, (1,): [1.0] * 5}


def growth_sentence() -> str:
    """Speed's sentence on growth, its numbers from the records, which are first checked to be as it says."""
    slopes = {
        tuple(name.split(", ")[1:]): np.array(line["slopes"]) for name, line in RECORDS.items() if "slopes" in line
    }
    length = slopes["tokens a sequence (batch 2)", "time"]
    few, *texts = slopes.pop(("texts to encode", "peak memory"))  # 16 and 64 texts are a batch or two
    linear = np.concatenate([length[:-1], [few], *(x for key, x in slopes.items() if x is not length)])
    assert len(slopes) == 5 and 0.7 < linear.min() and linear.max() < 1.35 < 1.5 < length[-1] and max(texts) < 0.7
    return (
        "From size to size, time and peak memory grow about linearly with batch and length, as with the texts to encode time "
        f"does and, up to 64, memory (log-log slopes {linear.min():.2f} to {linear.max():.2f}); it stops being linear in time "
        f"beyond 1,024 tokens a sequence ({length[-1]:.2f} from there to 4,096: attention compares all pairs), and the memory "
        f"of `encode`, beyond 64 texts, less than linearly ({min(texts):.2f} to {max(texts):.2f})."
    )


def test_the_page_says_where_growth_stops_being_linear():
    sentence = growth_sentence()
    page = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    assert sentence in page, f"docs/speed.md should say: {sentence}"


@pytest.mark.parametrize("page, at_least", [("docs/speed.md", 40)])
def test_the_ratios_on_the_pages_are_the_measured_ones(page, at_least):
    text = (ROOT / page).read_text(encoding="utf-8")
    section = text.split("\n## Speed\n")[1].split("\n## ")[0] if page == "README.md" else text
    rows = re.findall(r"^\| .*? \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \| `(.+?)` \|$", section, re.M)
    assert len(rows) >= at_least and len(rows) == section.count("\n| ") - section.count(
        "\n| what | ratio "
    )  # every row
    for *numbers, name in rows:
        line = (RECORDS | GPU)[name]
        assert numbers == [f"{line[key]:.2f}" for key in ("ratio", "lowest", "highest")], name


def test_the_docs_say_what_smaller_vectors_cost():
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "precision.csv")
    docs = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    first, others = table.iloc[0], table.iloc[1:]
    assert first["form"] == "float32" and f"| float32 | {first['bytes']:.0f} | {first['p@1']:.1f} | |" in docs
    for row in others.to_dict("records"):
        cells = "{form} | {bytes:.0f} | {p@1:.1f} | {difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**row)
        assert f"| {cells} |" in docs, cells
        assert row["n_seeds"] == 3 and row["n_queries"] == 6000 and row["arm"] in docs
    assert list(others.loc[others["p_holm"] < 0.05, "form"]) == ["1 bit"]  # "the only form whose loss is certain"
    assert (others.set_index("form").loc[["float16", "int8"], "low"] < 0).all()
    assert (others.set_index("form").loc[["float16", "int8"], "high"] > 0).all()


def test_the_docs_storage_is_dimensions_times_bytes():
    docs = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    heads, _, *rows = re.search(r"^\| stored as \| 1536.*?\n\n", docs, re.M | re.S)[0].strip().splitlines()
    dims = [int(n) for n in re.findall(r"\| (\d+) ", heads)]
    shapes = [json.loads((ROOT / f"data/configs/{name}/config.json").read_text(encoding="utf-8"))
              for name in ("qwen2_vl_2b", "qwen2_5_vl_3b", "qwen2_5_vl_7b")]  # fmt: skip
    assert dims == [shape.get("text_config", shape)["hidden_size"] for shape in shapes] + [256]
    size = {"float32": lambda n: 4 * n, "float16": lambda n: 2 * n, "int8": lambda n: n, "1 bit": lambda n: n / 8,
            "PQ, 64 bytes": lambda n: 64}  # fmt: skip
    assert len(rows) == len(size)
    for form, *cells in ([cell.strip() for cell in row.strip("|").split("|")] for row in rows):
        told = [float(number) * {"TB": 1000, "GB": 1}[unit] for number, unit in map(str.split, cells)]
        assert told == pytest.approx([size[form](n) for n in dims], rel=0.03), form  # GB of 10^9 vectors


def test_a_ratio_is_taken_within_each_round():
    from common import record

    line = record("x", "a / b", [2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    assert (line["ratio"], line["lowest"], line["highest"], line["n"]) == (2.0, 1.0, 3.0, 3)


def test_two_sides_run_in_turn_after_a_round_that_is_not_counted():
    from common import in_turn

    order: list[str] = []
    seconds = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, n=2)
    assert "".join(order) == "ababab" and [len(values) for values in seconds.values()] == [2, 2]
    in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, n=2, warm=True)
    assert "".join(order[6:]) == "abab"


def test_head_on_masked_positions_changes_no_loss(monkeypatch):
    import logits

    monkeypatch.setattr(logits, "VOCABULARY", 500)
    for stage in logits.STAGES:
        full, masked = (logits.setup(stage, full, batch=2, length=24)() for full in (True, False))
        assert full == pytest.approx(masked, abs=1e-5)


def test_sorted_chunks_of_gradcache_are_counted_without_most_of_the_padding():
    from input_side import gradcache_chunks

    line = gradcache_chunks(n=1024)
    before, after = map(float, re.search(r"padding ([\d.]+) % -> ([\d.]+) %", line["compared"]).groups())
    assert line["n"] == 8 and line["lowest"] > 1.5 and after < 0.2 * before


TINY = ["--device", "cpu", "--tiny", "--batch", "2", "--length", "16"]


def test_the_gpu_script_runs_and_keeps_nothing_from_a_cpu(monkeypatch, capsys):
    import common
    import gpu

    def refuse(*args, **kwargs):
        raise AssertionError("a CPU's numbers were kept")

    monkeypatch.setattr(common, "keep", refuse)
    kept = gpu.main(TINY)
    lines = {line["name"].removesuffix(" rows of 16"): line for line in kept}
    assert len(lines) == len(kept), "a way's rate is kept once, whichever parts take steps in it"
    shares = {name: line for name, line in lines.items() if "/" not in name}
    assert list(shares) == [
        "encode, 448 x 448 pixels", "encode, 1344 x 1344 pixels", "stage1, pictures singly, 2", "stage1, plain, 2",
        "stage1, compiled layers, 2", "stage3, GradCache, 2", "stage3, plain, 2", "stage3, compiled layers, 2",
        "stage1, gradient checkpointing, 2", "stage1 with adapter, gradient checkpointing, 2",
        "stage1 with adapter, plain, 2", "stage3, GradCache, 4",
    ]  # fmt: skip
    assert all(0 < line["ratio"] < 1 and line.get("tokens_per_second", line.get("images_per_second", 0)) > 0
               for line in shares.values())  # fmt: skip
    ratios = [
        "stage1, pictures singly / plain, 2",
        "stage1, plain / compiled layers, 2",
        "stage3, GradCache / plain, 2",
        "stage3, plain / compiled layers, 2",
        "stage1, gradient checkpointing / plain, 2",
        "stage1 with adapter, gradient checkpointing / plain, 2",
    ]
    assert [name for name in lines if "/" in name] == ratios
    assert "not measured" not in capsys.readouterr().out


def test_a_part_that_fails_is_told_and_costs_no_other(monkeypatch, tmp_path, capsys):
    import gpu

    def train(stage, ways, **settings):
        if "compiled layers" in ways and stage == "stage3":
            assert len(json.loads((tmp_path / "gpu.json").read_text())["results"]) >= 5, "kept as soon as it was there"
            raise NotImplementedError("no kernel for this")
        return [gpu.record(f"{stage}, {' / '.join(ways)}", "a / b", [1.0], [2.0])]

    monkeypatch.setattr(gpu, "train", train)
    with pytest.raises(SystemExit, match="not measured: stage3, plain / compiled layers"):
        gpu.main([*TINY, "--out", str(tmp_path)])
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["not_measured"] == {"stage3, plain / compiled layers": "NotImplementedError: no kernel for this"}
    others = len(gpu.PARTS) - 2  # one fails, another, Flex, needs a GPU
    assert len(content["results"]) == others + 2 and content["results"][1]["name"].startswith("encode, 1344")
    assert "stage3, plain / compiled layers: not measured, NotImplementedError: no kernel" in capsys.readouterr().out


def test_a_gpu_is_named_where_it_measured(monkeypatch, tmp_path):
    from common import keep, record

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    for device in ("cpu", "cuda"):
        keep("x", [record("x", "a / b", [1.0], [1.0])], "", tmp_path, device)
        machine = json.loads((tmp_path / "x.json").read_text())["results"][0]["machine"]
        assert machine.endswith(", a GPU") == (device == "cuda")


def test_stage_2_is_counted_by_the_pairs_that_its_layout_allows():
    import gpu

    from cocoa_lib.recipes import make_recipe
    from cocoa_lib.reconstruction import Reconstruction

    model, inputs = gpu.model_of(True, "cpu", 40)
    recipe, open_recipe = make_recipe("stage2"), make_recipe("stage2", {"layout": "bidirectional"})
    module = Reconstruction(model, layout=recipe.layout)
    columns = gpu.batches("stage2", recipe, inputs, 2, 32)
    count_a, count_b = ((columns[0]["segment_ids"] == segment).sum() for segment in (1, 3))
    assert columns[0]["input_ids"].shape == (2, 40) and count_a + count_b == 2 * 39
    barred = 2 * 2 * int(count_a / 2) * int(count_b / 2)  # A to B and back, two rows
    less = gpu.flops_of(module, "stage2", open_recipe, columns) - gpu.flops_of(module, "stage2", recipe, columns)
    assert less == pytest.approx(3 * 4 * barred * 64 * 2)  # backward twice forward; width 64, two layers


def test_the_gpu_scripts_real_shape_takes_its_batches(monkeypatch, tmp_path):
    """Qwen2-VL-2B's own configuration, narrowed: the small tokenizer's ids fit it, and a picture of 448 pixels a row."""
    import gpu
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(gpu.SHAPE)
    text, vision = config.text_config, config.vision_config
    for key, value in {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
                       "num_key_value_heads": 1, "layer_types": ["full_attention"]}.items():  # fmt: skip
        setattr(text, key, value)
    text.rope_parameters["mrope_section"] = [4, 6, 6]
    vision.depth, vision.num_heads, vision.embed_dim, vision.hidden_size = 1, 1, 32, 32
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(gpu, "SHAPE", tmp_path)
    for stage in ("stage1", "stage3"):
        lines = gpu.train(stage, ("plain",), tiny=False, device="cpu", rows=2, chunk=1, length=300, peak=1, n=1)
        assert [line["name"] for line in lines] == [f"{stage}, plain, 2 rows of 300"]


def test_what_is_measured_as_compiled_is_compiled():
    """After eight shapes of one function dynamo would go on uncompiled."""
    from common import truly_compiled

    def twice(x):
        return x + x

    def go(shapes):
        for n in shapes:
            torch.compile(twice, dynamic=False, backend="eager")(torch.zeros(n))

    limit = torch._dynamo.config.recompile_limit
    for first in (2, 100):  # the count starts anew
        truly_compiled()(go)(range(first, first + limit))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        truly_compiled()(go)(range(2, 3 + limit))


def test_attention_is_measured_so(monkeypatch):
    import attention

    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    seen = []
    monkeypatch.setattr(
        attention, "check", lambda *a, **how: seen.append(torch._dynamo.config.fail_on_recompile_limit_hit)
    )
    attention.measure(32, 0.5, "cpu", n=1)
    assert seen == [True]


def forms(length: int):
    """One shape on a CPU: q, k, v that want gradients, the mask, and SDPA with it."""
    import attention

    qkv, ids = attention.tensors(length, 0.5, "cpu", torch.float32)
    mask = attention.dense_mask(attention.LAYOUT, ids)
    return [x.requires_grad_() for x in qkv], mask, lambda q, k, v, **how: F.scaled_dot_product_attention(q, k, v, mask)


def test_attention_is_compared_with_float64_there_and_back():
    import attention

    qkv, mask, dense = forms(40)
    attention.check({"dense": lambda: dense(*qkv)}, qkv, mask, 1e-5, gradients=True)
    seen = {"output": lambda out: 1.001 * out}  # wrong forth; below, right forth and wrong back
    for name, x in zip("qkv", qkv, strict=True):
        seen[f"gradient of {name}"] = lambda out, x=x: out + 1e-3 * (x - x.detach())
    for what, spoil in seen.items():
        side = {"dense": lambda spoil=spoil: spoil(dense(*qkv))}
        with pytest.raises(AssertionError, match=f"dense, {what}: off by"):
            attention.check(side, qkv, mask, 1e-5, gradients=True)
        if what != "output":
            attention.check(side, qkv, mask, 1e-5)


def test_what_a_gpu_would_run_of_the_attention_script(monkeypatch):
    """Its whole branch, in bf16, on a CPU by another name; for Flex, which has no backward pass there, SDPA stands in."""
    import attention

    asked, check = [], attention.check
    monkeypatch.setattr(attention, "check", lambda *a, **how: (asked.append(how), check(*a, **how)))
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(attention, "flex_attention", lambda *qkv, block_mask: forms(40)[2](*qkv))
    names = [line["name"].split(", L 40")[0] for line in attention.measure(40, 0.5, "cpu:0", n=1)]
    assert names == [f"attention, {what}" for what in ("forward", "block mask / forward", "forward + backward")]
    assert asked == [{}, {"gradients": True}]


def test_long_attention_is_kept_by_itself(monkeypatch, tmp_path):
    import attention

    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    attention.main(["--long", "--lengths", "48", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    names = [line["name"] for line in json.loads(path.read_text())["results"]]
    assert path.stem == "attention_long" and len(names) == 4
    assert all(name.endswith("12 heads of 128, one layer") for name in names)
    seen = []
    monkeypatch.setattr(attention, "measure", lambda length, share, device: seen.append(length) or [])
    attention.main(["--long", "--out", str(tmp_path)])
    assert seen == [1024, 1024, 4096, 4096, 8192, 8192]


def test_an_attention_shape_that_fails_is_told(monkeypatch, tmp_path):
    import attention

    def measure(length, share, device):
        if length == 32:
            raise RuntimeError("flex is off")
        return [attention.record(f"{length}", "a / b", [1.0], [2.0])]

    monkeypatch.setattr(attention, "measure", measure)
    with pytest.raises(SystemExit, match="not measured: L 32, A:B 4:1; L 32, A:B 1:1"):
        attention.main(["--lengths", "32", "64", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "attention.json").read_text())
    assert set(content["not_measured"].values()) == {"RuntimeError: flex is off"} and len(content["results"]) == 2


def test_the_suites_of_the_cpu_see_no_gpu():
    """Else `make bench` would mix both, and two processes of a test would share one GPU, which NCCL refuses."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^TESTENV = .*CUDA_VISIBLE_DEVICES=$", text, re.M)
    assert re.search(r"^bench:.*\n.* CUDA_VISIBLE_DEVICES= .*benchmarks/", text, re.M)
