"""The README and docs/results.md say what the committed tables say, and show pictures that are there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from cocoa_lib.run.arms import read_arms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPEED = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
REPORTS = sorted(path.parent for path in (ROOT / "reports").glob("*/results"))


def ranks_of(run: str) -> pd.DataFrame:
    from cocoa_lib.evaluate import effects as analysis

    return analysis.gather_ranks(ROOT / "reports" / run, analysis.gather_results(ROOT / "reports" / run))


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.name)
def test_the_readmes_table_is_the_reports(report):
    from publish import summary

    table = summary(report)
    assert (report / "summary.md").read_text(encoding="utf-8").strip() == table
    if report.name in ("laptop", "long"):
        shown = {name for name, arm in read_arms().items() if arm.kind == "arm"}  # most others: summary.md alone
        shown |= {"contrastive_longer", "cocoa_longer"}
        lines = [line for line in table.splitlines() if line.split("|")[1].strip() in {"arm", *shown}]
        assert len(lines) > 3 and [line for line in lines if line not in RESULTS] == []


def test_the_readme_itself_shows_rows_of_the_table_and_intervals_of_the_results():
    from cocoa_lib.evaluate import effects as analysis

    section = README.split("\n## What was measured\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    summary = (ROOT / "reports" / "long" / "summary.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 8 and set(rows) <= set(summary)
    assert {row.split("|")[2].strip() for row in rows} == {"seeds", "5"}, "five seeds, as the text says"
    introduction = " ".join(README.split("\n## Two commands\n")[0].split())
    hits = ranks_of("long")
    for words, more, less in (
        ("CoCoA is {} points lower", "contrastive", "cocoa"), ("is {} points", "contrastive_longer", "cocoa"),
        ("gains {} points", "cocoa_half", "contrastive_half"), ("shows: +{}", "cocoa_longer", "contrastive_longer"),
    ):  # fmt: skip
        found, sign = analysis.contrast(hits, {more: 1, less: -1}), "+" if words.startswith("shows") else ""
        ends = "[{low:{sign}.1f}, {high:{sign}.1f}]".format(**found, sign=sign)
        assert f"{words.format(format(found['difference'], '.1f'))} {ends}" in introduction, words


def test_the_readmes_sentences_are_the_tables():
    from cocoa_lib.evaluate import effects as analysis

    results = analysis.gather_results(ROOT / "reports" / "long")
    per_query = analysis.gather_ranks(ROOT / "reports" / "long", results)
    few = {"cocoa_few": 1, "contrastive_few": -1}
    said = re.sub(r"([\d.]+)\s+points \[", r"\1 [", re.sub(r"\s+", " ", RESULTS))
    for weights, signed, *group in (
        ({"cocoa": 1, "contrastive": -1}, True),
        ({"contrastive_longer": 1, "cocoa": -1}, False),  # said as "points behind"
        ({"cocoa": 1, "cocoa_mean": -1}, True),
        ({"no_truncation": 1, "contrastive": -1}, True),
        ({"no_truncation": 1, "contrastive": -1}, True, "grounding"),
        ({"cocoa": 1, "no_truncation": -1}, True),
        ({"cocoa": 1, "stage1_only": -1}, True),
        ({"cocoa": 1, "stage2_only": -1}, True),
        ({"cocoa": 1, "cocoa_causal": -1}, True),
        ({"cocoa": 1, "mntp_only": -1}, True),
        ({"cocoa": 1, "cocoa_strict": -1}, True),
        ({"cocoa": 1, "mae_only": -1}, True),
        ({"cocoa": 1, "mlm": -1}, True),
        ({"cocoa": 1, "image_from_eos": -1}, True),
        ({"stage1_longer": 1, "stage1_only": -1}, True),
        ({"stage1_longer": 1, "longer_mntp_only": -1}, True),
        ({"stage1_longer": 1, "longer_mae_only": -1}, True),
        ({"longer_words_40": 1, "stage1_longer": -1}, True),
        ({"longer_words_60": 1, "stage1_longer": -1}, True),
        ({"longer_patches_70": 1, "stage1_longer": -1}, True),
        ({"longer_mae_weight_2": 1, "stage1_longer": -1}, True),
        *(({f"temperature_{value}": 1, "cocoa": -1}, True) for value in ("0_02", "0_1")),
        *(({f"contrastive_{value}": 1, "contrastive": -1}, True) for value in ("0_02", "0_1")),
        *(({f"temperature_{value}": 1, f"contrastive_{value}": -1}, True) for value in ("0_02", "0_1")),
        *(({f"mask_{rate}": 1, "cocoa": -1}, True) for rate in (10, 30, 50, 90)),
        (few, True),
        ({"contrastive_417": 1, "stage1_only": -1}, False),  # said as "by 5.5"
        (few | {"cocoa": -1, "contrastive": 1}, True),
        ({"cocoa_longer": 1, "contrastive_longer": -1}, True),
        ({"contrastive": 1, "contrastive_causal": -1}, True),
        ({"contrastive_mean": 1, "contrastive": -1}, True),
        ({"cocoa_half": 1, "contrastive_half": -1}, True),
        ({"cocoa_half": 1, "no_truncation_half": -1}, True),
        ({"cocoa_half_other": 1, "contrastive_half_other": -1}, True),
        ({"cocoa_half_other_longer": 1, "contrastive_half_other_longer": -1}, True),
        ({"contrastive_half_other_longer": 1, "cocoa_half_other": -1}, False),  # said as "points behind them"
        ({"cocoa_half": 1, "contrastive_half": -1, "cocoa": -1, "contrastive": 1}, True),
        ({"cocoa_width_96": 1, "contrastive_width_96": -1}, True),
        ({"contrastive_half_longer": 1, "cocoa_half": -1}, False),  # said as "points behind"
        ({"cocoa_mean": 1, "cocoa": -1}, True),
        ({"cocoa_mean": 1, "contrastive_mean": -1}, True),
        ({"cocoa_longer": 1, "contrastive_longer": -1}, True, "vqa"),
        ({"cocoa": 1, "contrastive": -1}, True, "classification"),
    ):
        found = analysis.contrast(per_query, weights, group=group[0] if group else "overall")
        value, low, high = (format(found[name], "+.1f" if signed else ".1f") for name in ("difference", "low", "high"))
        assert re.search(rf"(?<![\d.]){re.escape(f'{value} [{low}, {high}]')}", said), weights
    overall = analysis.arm_scores(results).groupby("arm")["overall"].mean()
    three_quarters = [f"{overall[arm]:.1f}" for arm in ("cocoa_width_96", "contrastive_width_96")]
    assert "seeds 0 to 2): CoCoA {}, contrastive alone {}, ".format(*three_quarters) in said
    for end, before in (("", "had gained: "), ("_longer", "the second: ")):
        others = [f"{overall[f'{arm}_half_other{end}']:.1f}" for arm in ("cocoa", "contrastive")]
        assert "{}CoCoA {}, contrastive alone {}, ".format(before, *others) in said
    alone, first = overall["contrastive_half_other"], overall["contrastive_half"]
    assert alone - first > overall["cocoa_half_other"] - alone, "more apart than reconstruction then adds"
    notebook = (ROOT / "notebooks" / "05_ablations.ipynb").read_text(encoding="utf-8")
    assert f"scores more, {alone:.1f} for {first:.1f}, more apart" in notebook
    longer = {"cocoa_half_other_longer": 1, "contrastive_half_other_longer": -1}
    by_seed = analysis.arm_scores(results).pivot(index="seed", columns="arm", values="overall")[list(longer)].dropna()
    by_seed = by_seed.iloc[:, 0] - by_seed.iloc[:, 1]
    assert f"by seed {', '.join(f'{value:+.1f}' for value in by_seed)}; undecided" in said and len(by_seed) == 5
    of_three = analysis.said(analysis.contrast(per_query[per_query["seed"] < 3], longer))
    assert f"three seeds, which left it open ({of_three})" in said
    gains = [overall[f"cocoa{width}"] - overall[f"contrastive{width}"] for width in ("_half", "_width_96", "")]
    assert gains == sorted(gains, reverse=True), "in means the gain falls with the width"
    of_three = analysis.said(analysis.contrast(per_query[per_query["seed"] < 3], {"cocoa": 1, "contrastive": -1}))
    assert f"on the first three {of_three}" in said and f"on the same three seeds: {of_three}" in said


def test_the_readmes_numbers_of_pairs_are_the_tables():
    from cocoa_lib.evaluate import effects as analysis

    per_query = ranks_of("long")
    many = ranks_of("many")
    both = pd.concat([per_query, many.assign(arm="many " + many["arm"])])
    said, first = " ".join(RESULTS.split()), per_query[per_query["seed"] < 3]

    def gain(full, alone):
        return {full: 1, alone: -1}

    def told(hits, weights):
        return analysis.said(analysis.contrast(hits, weights))

    ends = [("cocoa_few", "contrastive_few"), ("cocoa_2k", "contrastive_2k"), ("cocoa_4k", "contrastive_4k")]
    few = [told(first, gain(*pair)) for pair in [*ends, ("cocoa", "contrastive")]]
    assert f"alone {', '.join(few[:3])} and {few[3]} with 1,000, 2,000, 4,000 and 8,000 pairs" in said
    assert f"on five seeds {told(per_query, gain(*ends[0]))} with 1,000, not certain" in said
    least, most = gain("many cocoa_few", "many contrastive_few"), gain("many cocoa", "many contrastive")
    middle = gain("many cocoa_8k", "contrastive_longer")  # whose 8,000 pairs are the first of the 64,000
    assert f"{told(both, least)} with 1,000, {told(both, middle)} with 8,000 and {told(both, most)} with 64,000" in said
    apart = told(both, least | {arm: -factor for arm, factor in most.items()})
    assert f"the first less the last {apart}. There the gain falls" in said
    read = told(both, gain("many cocoa_8k", "cocoa_longer"))
    assert f"changes CoCoA with 8,000 pairs by {read}." in said


def test_at_equal_time_every_arm_with_few_contrastive_steps_is_behind():
    from cocoa_lib.evaluate import effects as analysis

    per_query = ranks_of("long")
    there = set(per_query["arm"])
    longer = [
        name for name, arm in read_arms().items() if arm.kind == "arm" and (arm.stage1, arm.stage2) != (None, None)
    ]
    less = {
        name: "contrastive_417" if name == "stage1_only" else "contrastive_longer" for name in longer if name in there
    }
    rows = [analysis.contrast(per_query, {name: 1, other: -1}) for name, other in less.items()]
    rows.append(analysis.contrast(per_query, {"cocoa_longer": 1, "contrastive_longer": -1}))  # a row of that table, too
    p = analysis.holm(row["p"] for row in rows)
    assert len(less) == 12 and all(row["high"] < 0 for row in rows[:-1]) and max(p[:-1]) < 0.05 < p[-1]
    assert "At equal time every arm with 250 contrastive steps is behind, certainly so once corrected" in " ".join(
        RESULTS.split()
    )


def test_the_readme_says_what_a_longer_stage_1_is_worth_within_the_method():
    from cocoa_lib.evaluate import effects as analysis

    per_query = ranks_of("long")
    less = [
        analysis.contrast(per_query, {"cocoa_stage1_longer": 1, arm: -1})
        for arm in ("cocoa", "stage1_longer", "contrastive")
    ]
    said = "less CoCoA {}, less the same without stage 2 {}, less contrastive learning alone {}, none certain"
    assert said.format(*map(analysis.said, less)) in " ".join(RESULTS.split())
    assert min(analysis.holm(row["p"] for row in less)) > 0.05


def test_no_part_is_certain_and_every_stage_2_trades_grounding_for_classification():
    """What docs/results.md and notebook 05 say in words."""
    from cocoa_lib.evaluate import effects as analysis

    results = analysis.gather_results(ROOT / "reports" / "long")
    per_query = analysis.gather_ranks(ROOT / "reports" / "long", results)
    without = "stage2_only stage1_only cocoa_causal mae_only mntp_only mlm no_truncation cocoa_strict cocoa_mean image_from_eos"
    parts = {arm: analysis.contrast(per_query, {"cocoa": 1, arm: -1}) for arm in without.split()}
    p = analysis.holm(row["p"] for row in parts.values())
    assert "All differences but its own lie below zero" in re.sub(r"\s+", " ", RESULTS)
    assert [arm for arm, row in parts.items() if row["difference"] > 0] == ["mlm"]
    scores = analysis.arm_scores(results)
    of_mlm = [f"{value:.1f}" for value in scores[scores["arm"] == "mlm"].sort_values("seed")["overall"]]
    assert f"`mlm` is the least even: it scores {', '.join(of_mlm[:-1])} and {of_mlm[-1]} on its seeds" in RESULTS
    assert (
        "Corrected for the ten rows of notebook 05's table, none is certain" in " ".join(RESULTS.split())
        and min(p) > 0.05
    )
    masks = [f"mask_{rate}" for rate in (10, 30, 50, 90)]
    assert "corrected for these rows none is certain" in re.sub(r"\s+", " ", RESULTS)
    assert min(analysis.holm(analysis.contrast(per_query, {arm: 1, "cocoa": -1})["p"] for arm in masks)) > 0.05
    settings = [(arm, "cocoa") for arm in (*masks, "mntp_only", "temperature_0_02", "temperature_0_1")]
    longer = "longer_mntp_only longer_words_40 longer_words_60 longer_patches_70 longer_mae_weight_2".split()
    settings += [(arm, "stage1_longer") for arm in longer]
    settings += [(arm, "contrastive") for arm in ("contrastive_0_02", "contrastive_0_1")]
    count = "fourteen" if len(settings) == 14 else "?"
    assert f"Corrected for the {count} rows of notebook 05's table of settings" in " ".join(RESULTS.split())
    assert min(analysis.holm(analysis.contrast(per_query, {arm: 1, base: -1})["p"] for arm, base in settings)) > 0.05
    scores = analysis.arm_scores(results)
    rates = scores[scores["seed"] < 3].groupby("arm")["overall"].mean()[[*masks, "cocoa"]]
    assert (rates.idxmax(), rates.idxmin()) == ("mask_50", "mask_90")
    told = [f"{rates[arm]:.1f}" for arm in ["mask_10", "mask_30", "mask_50", "cocoa", "mask_90"]]
    assert f"give {', '.join(told[:-1])} and {told[-1]} (seeds 0 to 2)" in re.sub(r"\s+", " ", RESULTS)
    means = scores.groupby("arm")[["classification", "grounding"]].mean()
    alone = means.loc["contrastive"]
    same = [name for name, arm in read_arms().items() if arm.kind == "arm"]
    assert scores[scores["arm"].isin(same)].groupby("arm")["overall"].mean().idxmin() == "mlm"
    for arm in (name for name, arm in read_arms().items() if arm.kind == "arm" and arm.stage2 is not None):
        if arm in means.index and arm != "mlm":
            assert means.loc[arm, "classification"] > alone["classification"], arm
            assert means.loc[arm, "grounding"] < alone["grounding"], arm


def test_the_readmes_times_and_its_count_are_the_measured_ones():
    from cocoa_lib.evaluate import effects as analysis

    timed = json.loads((ROOT / "benchmarks" / "results" / "stages.json").read_text(encoding="utf-8"))["results"][-1]
    steps = "{ratio:,.0f} [{lowest:,.0f}, {highest:,.0f}]".format(**timed)
    assert f"The three stages take as long as {steps}" in RESULTS
    ratio = {
        row["name"]: row["ratio"]
        for row in json.loads((ROOT / "benchmarks/results/stages.json").read_text())["results"]
    }
    added = 150 * ratio["step, stage1 / stage 3"] + 1000 * ratio["step, stage2 / stage 3"] + 250
    assert f"added up from single steps, as in notebook 05: {added:,.0f})" in RESULTS
    per_query = ranks_of("long")
    ends = [("cocoa", "contrastive")] + [
        (f"cocoa_{end}", f"contrastive_{end}") for end in ("longer", "4k", "2k", "few", "mean", "causal")
    ]
    ends += [(f"temperature_{value}", f"contrastive_{value}") for value in ("0_02", "0_1")]
    vqa = [analysis.contrast(per_query, {full: 1, alone: -1}, group="vqa") for full, alone in ends]
    assert "VQA is lower on each of the nine budgets, and in five of them its interval excludes zero" in RESULTS
    assert all(row["difference"] < 0 for row in vqa) and sum(row["high"] < 0 for row in vqa) == 5 and len(vqa) == 9
    for group, sign in (("classification", 1), ("grounding", -1)):
        assert all(
            sign * analysis.contrast(per_query, {full: 1, alone: -1}, group=group, n_boot=20)["difference"] > 0
            for full, alone in ends
        )
    budgets = dict(
        [*ends, *((f"cocoa_{end}", f"contrastive_{end}") for end in ("half", "half_other", "half_other_longer"))]
    )
    p = [analysis.contrast(per_query, {full: 1, alone: -1})["p"] for full, alone in budgets.items()]
    corrected = dict(zip(budgets, analysis.holm(p), strict=True))
    assert f"supported: {corrected['cocoa_half']:.3f} corrected for the twelve budgets of notebook 05" in RESULTS
    assert f"+5.6 [+3.6, +7.9], supported, too: {corrected['cocoa_half_other']:.3f}" in RESULTS
    assert f"undecided, {corrected['cocoa_half_other_longer']:.2f} corrected for the budgets" in RESULTS
    assert (
        f"+7.2 [+5.2, +9.7],\n  supported: {corrected['cocoa_half']:.3f}" in RESULTS and corrected["cocoa_half"] < 0.05
    )
    assert f"-3.3 [-6.0, -1.0],\n  {corrected['cocoa_mean']:.2f} corrected" in RESULTS
    groups = ("classification", "vqa", "retrieval", "grounding", "ind", "ood", "overall")
    cells = {
        (full, group): analysis.contrast(per_query, {full: 1, alone: -1}, group=group)
        for full, alone in budgets.items()
        for group in groups
    }
    corrected = dict(zip(cells, analysis.holm(cell["p"] for cell in cells.values()), strict=True))
    certain = [cell for cell, p in corrected.items() if p < 0.05]
    assert certain == [("cocoa_half", "ind"), ("cocoa_half", "overall")] and len(cells) == 84
    assert "two cells are, the gain at half the width overall and in distribution" in RESULTS
    page = BeautifulSoup((ROOT / "reports" / "site" / "05_ablations.html").read_text(encoding="utf-8"), "html.parser")
    rows = [" ".join(row.get_text(" ").split()) for row in page.select("tr")]
    (pooled,) = [row for row in rows if row.startswith("5b. ")]
    p = float(re.search(r"\] ([\d.]+) 5 contrastive less contrastive_mean", pooled)[1])
    assert f"certain after correction for\n  notebook 05's claims ({p:.2f})" in RESULTS and p < 0.05


def test_the_readme_says_what_the_probes_found():
    from cocoa_lib.evaluate import effects as analysis

    def values(arm):
        files = sorted((ROOT / "reports" / "long" / "results" / arm).glob("seed*/probe.csv"))
        return pd.DataFrame({file.parent.name: pd.read_csv(file).set_index("measure")["value"] for file in files})

    for measure, other in (("position", "contrastive"), ("count", "no_truncation"), ("size", "no_truncation")):
        apart = (values("cocoa") - values(other)).loc[measure].dropna()
        assert analysis.said(analysis.seed_interval(apart)) in RESULTS and len(apart) == 5, measure
    five = (values("contrastive_causal") - values("cocoa")).loc[["count", "kind", "color", "size", "position"]]
    assert (
        f"in the mean of the five properties: {analysis.said(analysis.seed_interval(five.mean()))} over CoCoA's"
        in RESULTS
    )


def test_the_readme_says_what_notebook_02_found():
    page = BeautifulSoup((ROOT / "reports" / "site" / "02_reconstruction_pretraining.html").read_text(), "html.parser")
    words, readme = re.sub(r"\s+", " ", page.get_text(" ")), re.sub(r"\s+", " ", RESULTS)
    gain, low, high = re.search(r"After stage 2, \+([\d.]+) \[\+([\d.]+), \+([\d.]+)\] points", words).groups()
    assert f"What differs, {gain} points [{low}, {high}] over captions, has passed through EOS" in readme
    errors = re.search(r"held-out scenes: ([\d.]+) by the decoder, ([\d.]+) by the average patch", words).groups()
    assert "squared error {} against {}, notebook 02".format(*errors) in readme


def test_what_passes_through_eos_is_the_committed_table():
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "bridge.csv")
    (short, after_150), (long, after_1000) = table.groupby("steps")["through_eos"]
    assert (short, len(after_150), long, len(after_1000)) == (150, 3, 1000, 5)
    ends = [f"{values.min():.1f} to {values.max():.1f}" for values in (after_1000, after_150)]
    said = "On seeds 0 to 4 that is {} points, {:.1f} in the mean: seed 0 is the highest. After a stage 2 of 150 steps "
    said += "(profile `laptop`, seeds 0 to 2) {}"
    assert after_1000.idxmax() == table.index[(table["steps"] == 1000) & (table["seed"] == 0)][0]
    assert said.format(ends[0], after_1000.mean(), ends[1]) in " ".join(RESULTS.split())
    assert f"tokens, {ends[0]} in a hundred more come back" in " ".join(README.split())
    assert f"(five seeds; {ends[1]} after a stage 2 of 150 steps instead of 1,000)" in " ".join(README.split())
    first = table[(table["steps"] == 1000) & (table["seed"] == 0)].iloc[0]
    assert (
        f"{first['own']:.1f} % come back with\n  the right picture and {first['other']:.1f} % with a wrong one"
        in RESULTS
    )


def test_what_another_cpu_gives_is_the_committed_table():
    from cocoa_lib.evaluate import effects as analysis

    def overall(run):
        results = analysis.gather_results(ROOT / "reports" / run)
        return analysis.arm_scores(results).query("seed == 0").set_index("arm")["overall"].map("{:.1f}".format)

    here, there = overall("long"), overall("other-cpu")
    said = "seed 0 of `cocoa` (profile `long`) scores {} instead of {}, and of `contrastive`, which trains for a fifth of the "
    said += "time, {}"
    assert said.format(there["cocoa"], here["cocoa"], here["contrastive"]) + " both times" in " ".join(RESULTS.split())
    assert here["contrastive"] == there["contrastive"]
    files = (ROOT / "reports" / "other-cpu").glob("results/*/seed0/provenance.json")
    assert {json.loads(file.read_text())["versions"]["torch"] for file in files} == {"2.13.0+cpu"}


def test_the_notebooks_name_what_other_seeds_say():
    from cocoa_lib.evaluate import effects as analysis

    def text(name):
        cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        return "".join(cells[0]["source"])

    table = pd.read_csv(ROOT / "benchmarks" / "results" / "bridge.csv")
    (few, short), (many, long) = table.groupby("steps")["through_eos"]
    spans = [f"{values.min():.1f} to {values.max():.1f}" for values in (long, short)]
    assert "{} points of the hidden tokens on seeds 0 to 4, of which seed 0 is the highest; {}".format(*spans) in text(
        "02_reconstruction_pretraining"
    )
    assert long.idxmax() == table.index[(table["steps"] == many) & (table["seed"] == 0)][0] and few == 150
    results = analysis.gather_results(ROOT / "reports" / "long")
    overall = analysis.arm_scores(results[results["arm"] == "cocoa"]).sort_values("seed")["overall"].tolist()
    said = (
        ", ".join(f"{value:.1f}" for value in overall[:-1])
        + f" and {overall[-1]:.1f} overall, {pd.Series(overall).mean():.1f}"
    )
    assert f"seeds 0 to 4 score {said} in the mean" in text("04_mmeb_evaluation")


def test_what_we_learnt_is_what_the_page_shows():
    cells = json.loads((ROOT / "notebooks" / "05_ablations.ipynb").read_text(encoding="utf-8"))["cells"]
    (lessons,) = ["".join(cell["source"]) for cell in cells if "## What we learnt" in "".join(cell["source"])]
    page = BeautifulSoup((ROOT / "reports" / "site" / "05_ablations.html").read_text(encoding="utf-8"), "html.parser")
    shown = " ".join(page.get_text(" ").split("Of the committed run, profile")[0].split())
    said = re.findall(r"[+-]\d+\.\d \[[^\]]+\]", lessons)
    assert len(said) > 30 and [each for each in said if each not in shown] == []
    without = [line for line in lessons.splitlines() if line.startswith("- ") and not re.search(r"\d", line)]
    assert without == []


def test_how_long_the_first_picture_takes_is_the_committed_table():
    seconds = pd.read_csv(ROOT / "benchmarks" / "results" / "first_figure.csv")["seconds"]
    assert f"it takes {seconds.min():.1f} to {seconds.max():.1f} s\n" in SPEED and len(seconds) == 6


def test_what_stage_1_restores_is_the_committed_table():
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "stage1_error.csv").set_index("arm").round(3)
    short, longer = table.loc["cocoa"].iloc[0], table.loc["stage1_longer"]
    assert f"(squared error {short['decoder']:.3f} against {short['average']:.3f}," in RESULTS
    assert f"{longer['decoder'].min():.3f} to {longer['decoder'].max():.3f} on three seeds" in RESULTS
    assert (table.loc["cocoa", "decoder"] > table.loc["cocoa", "average"]).all(), "no better than an average patch"
    assert (longer["decoder"] < longer["average"]).all()


def test_the_readmes_emoji_table_is_the_reports():
    from cocoa_lib.evaluate import effects as analysis

    results = analysis.gather_results(ROOT / "reports" / "laptop-emoji_pairs")
    per_query = analysis.gather_ranks(ROOT / "reports" / "laptop-emoji_pairs", results)
    for task in results["task"].unique():
        row = analysis.contrast(per_query[per_query["task"] == task], {"cocoa": 1, "contrastive": -1})
        assert row["low"] < 0 < row["high"] and row["n_seeds"] == 2, task
    assert "none of the six differences can be told from zero (2 seeds)" in README
    longer = analysis.gather_results(ROOT / "reports" / "pairs-emoji_pairs")
    means = [
        table[table["metric"] == "p@1"].pivot_table(index="task", columns="arm", values="value")
        for table in (results, longer)
    ]
    for label, task in (
        ("text to image", "TextToImage"),
        ("image to text", "ImageToText"),
        ("group (10 classes)", "Class"),
    ):
        for part in ("Seen", "Unseen"):
            cells = [
                f"{each.loc[task + part, 'cocoa']:.1f} / {each.loc[task + part, 'contrastive']:.1f}" for each in means
            ]
            assert f"| {label} | {part.lower()} | {cells[0]} | {cells[1]} |" in README, task + part


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
