"""Copy what readers need of a finished run into reports/, and make the pages that people read.

    python scripts/publish.py runs/laptop reports/laptop        # figures and tables; the pages: reports/site
    python scripts/publish.py runs/laptop-mypairs reports/laptop-mypairs --tables   # no pictures of other people's data

Checkpoints and embeddings stay in the run. Each target is written beside and renamed, so it is whole or not there. The
pages are those of the run given last: nbconvert renders the cells, scripts/site/ holds the templates around them. They
load nothing from elsewhere, and what users may have written is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from bleach.css_sanitizer import CSSSanitizer
from bleach.sanitizer import Cleaner
from bs4 import BeautifulSoup, Tag
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from nbconvert import HTMLExporter

from cocoa_lib.evaluate import effects as analysis
from cocoa_lib.evaluate.tasks import published
from cocoa_lib.run.arms import read_arms
from cocoa_lib.run.profiles import profile_of

KEPT = ("results.csv", "averages.csv", "per_query.parquet", "provenance.json", "probe.csv")  # of those that are there
TEMPLATES = Path(__file__).resolve().parent / "site"
RECORDS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
# What the index says of each notebook: the figure that stands for it, and one sentence.
TOUR = {
    "00": ("scenes", "The benchmark, generated in MMEB's own layout, and the small causal model that everything starts from."),
    "01": ("reachability", "Which mask forces a picture through one token, proved on a model with random weights."),
    "02": ("stage1_pictures", "Hidden words come back, hidden cells as an average; how much of the picture EOS really carries."),
    "03": ("embedding_map", "Contrastive training turns the state at EOS into an embedding; what is retrieved with it."),
    "04": ("scores_by_task", "Scores of one model by task, with intervals, beside the published table."),
    "05": ("forest", "What each part of CoCoA is worth, with intervals, and a verdict on each claim."),
}  # fmt: skip

# What outputs may contain: anything else is shown as text. The explorers draw with SVG and inline styles.
TAGS = set(
    "a b blockquote br caption code details div em figcaption figure h1 h2 h3 h4 h5 h6 hr i image img li ol p pre rect s "
    "small span strong sub summary sup svg table tbody td text tfoot th thead title tr u ul g line path circle".split()
)
ATTRIBUTES = set(
    "alt aria-label aria-live class colspan cx cy d fill fill-opacity font-family font-size height href id opacity points "
    "pointer-events preserveAspectRatio r role rowspan scope src stroke stroke-width style text-anchor title transform "
    "viewBox width x x1 x2 y y1 y2".split()
)
STYLES = set(
    "align-items background background-color border border-bottom break-inside color columns display flex flex-wrap "
    "font-size font-weight height image-rendering margin margin-right max-width overflow overflow-wrap padding text-align "
    "vertical-align white-space width".split()
)


def _allowed(tag: str, name: str, value: str) -> bool:
    """A picture is in the page or beside it; a link may lead to a page, to the web or to a heading."""
    if name in ("src", "href") and tag != "a":
        return bool(re.match(r"data:image/(png|jpeg);base64,", value)) or ":" not in value
    return name in ATTRIBUTES and not (name == "href" and value.strip().lower().startswith("data:"))


CLEANER = Cleaner(
    tags=TAGS, attributes=_allowed, protocols={"https", "http", "mailto", "data"},
    css_sanitizer=CSSSanitizer(allowed_css_properties=STYLES),
)  # fmt: skip


def clean(html: str) -> str:
    """Markup of an output without what could act or restyle the page; other tags become text. pandas' own <style> goes."""
    return CLEANER.clean(re.sub(r"<style\b[^>]*>.*?</style>", "", html, flags=re.DOTALL | re.IGNORECASE))


def _name_figures(content: nbformat.NotebookNode, number: str, figures: Path) -> None:
    """Give each picture of a notebook the name of its figure, found by alt text, or of its cell."""
    names = {path.read_text(encoding="utf-8").strip(): path.stem for path in sorted(figures.glob("*.txt"))}
    taken: set[str] = set()
    for place, cell in enumerate(content.cells):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = output.metadata.get("image/png", {}).get("alt", "").strip()
                name = f"{number}_{names.get(alt, f'cell{place}').removeprefix(number + '_')}"
                while name in taken:
                    name += "b"
                taken.add(name)
                output.metadata["filename"] = f"{name}.png"


def render(notebook: Path, figures: Path) -> tuple[BeautifulSoup, dict[str, bytes], str]:
    """An executed notebook: (its cells as HTML, pictures by the path they are shown from, the stylesheet of code)."""
    exporter = HTMLExporter(
        template_name="notebook", extra_template_basedirs=[str(TEMPLATES)], filters={"clean": clean},
        exclude_output_prompt=True,
    )  # fmt: skip
    content = nbformat.read(notebook, as_version=4)
    _name_figures(content, notebook.name[:2], figures)
    html, resources = exporter.from_notebook_node(content, {"output_files_dir": "figures", "unique_key": notebook.stem})
    soup = BeautifulSoup(html, "html.parser")
    for mark in soup.select("a.anchor-link"):  # nbconvert gives headings an id only together with this link
        mark.decompose()
    for table in soup.find_all("table"):
        _align(table)
    _keep_together(soup)
    return soup, resources["outputs"], "\n".join(resources["inlining"]["css"])


def _align(table: Tag) -> None:
    """Columns that hold a word go to the left, the others are numbers and stay right; headings with their columns."""
    rows = [row.find_all(["td", "th"]) for row in table.find_all("tr")]
    body = [row.find_all(["td", "th"]) for row in table.select("tbody tr")]
    for place in range(max(map(len, rows), default=0)):
        if any(len(row) > place and re.search(r"[^\W\d]{2}", row[place].get_text()) for row in body):
            for row in rows:
                if len(row) > place and not row[place].has_attr("colspan"):
                    row[place]["class"] = [*row[place].get("class", []), "text"]


INTERVAL = re.compile(r"([+-]?[\d.]+ \[[+-]?[\d.]+, [+-]?[\d.]+\](?: \*)?)")


def _keep_together(soup: BeautifulSoup) -> None:
    """No line ends within a number and its interval; code is left alone."""
    for text in soup.find_all(string=INTERVAL):
        if text.find_parent(["pre", "code", "title", "text"]):
            continue
        pieces: list[Any] = INTERVAL.split(text)
        for i in range(1, len(pieces), 2):
            span = soup.new_tag("span", attrs={"class": "interval"})
            span.string, pieces[i] = pieces[i], span
        text.replace_with(*pieces)


def headings(soup: BeautifulSoup) -> list[dict[str, str]]:
    """The second-level headings: id, title and all words of the section, those of tables and of what stands for pictures
    too, for the contents and its filter. Not code, and not the numbers of tables."""
    found: list[dict[str, Any]] = []
    for each in soup.descendants:
        if isinstance(each, Tag):
            if each.name == "h2" and "words" in each.parent.get("class", []):
                found.append({"id": each["id"], "title": each.get_text(), "words": set()})
            said = each.get("alt", "") if each.name == "img" else ""
        else:
            said = "" if each.find_parent(["pre", "code"]) else str(each)
        if found and said:
            found[-1]["words"] |= {
                word for word in re.findall(r"\w+(?:[.,-]\w+)*", said.lower()) if not re.fullmatch(r"\d+\.\d+", word)
            }
    return [{**each, "words": " ".join(sorted(each["words"]))} for each in found]


def policy(html: str) -> str:
    """The content security policy of a page: nothing but its own stylesheet, pictures and exactly its inline parts."""
    soup = BeautifulSoup(html, "html.parser")

    def hashes(texts: Iterable[str]) -> str:
        each = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts}
        return " ".join(f"'sha256-{value}'" for value in sorted(each))

    scripts = hashes(tag.string or "" for tag in soup.find_all("script"))
    styles = hashes(tag["style"] for tag in soup.find_all(style=True))
    # file: beside 'self', since browsers differ in what 'self' is for a page opened from a disk.
    return (
        f"default-src 'none'; img-src 'self' file: data:; style-src 'self' file: 'unsafe-hashes' {styles}; "
        f"script-src {scripts}; base-uri 'none'; form-action 'none'"
    )


def provenance(run: Path, shown: str = "*/seed*") -> dict[str, str]:
    """Profile, machine, commit and seeds of a run's results, those of ARM/SEED, as words for the top of a page."""
    files = sorted(run.glob(f"results/{shown}/provenance.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    said = {
        key: between.join(sorted({str(each[key]) for each in records if each.get(key)}))
        for key, between in (("machine", "; "), ("commit", ", "))  # a machine's name has commas of its own
    }
    seeds = sorted({int(path.parent.name[4:]) for path in files})
    changed = " (+changes: with files not committed)" * ("+changes" in said["commit"])
    return {
        "Profile": run.name,
        "Machine": said["machine"] or "not recorded",
        "Commit of the results": said["commit"] + changed or "not recorded",
        "Seeds": ", ".join(map(str, seeds)) or "not recorded",
    }


def _facts(name: str, page: dict[str, str], run: Path) -> dict[str, str]:
    """What stands at the top of a page: of its own model, if it shows one, else of the run, whose many commits page 05 lists."""
    facts, commit = provenance(run), "Commit of the results"
    commits = facts[commit].split(", ")
    if page["seed"]:
        facts[commit] = provenance(run, f"cocoa/seed{page['seed']}")[commit]
        facts["Seeds"] = f"{page['seed']} on this page, of {facts['Seeds']}"
    elif len(commits) > 3 and not name.startswith("05"):
        changed = " (some +changes: with files not committed)" * ("+changes" in facts[commit])
        facts[commit] = f"{len(commits)} commits, listed at the top of notebook 05{changed}"
    return {**facts, "Executed": page["date"]}


def _executed(notebook: Path) -> dict[str, str]:
    """date: the day a notebook was executed, seed: the one that it shows ("" for several or none), as papermill recorded."""
    record = nbformat.read(notebook, as_version=4).metadata.get("papermill", {})
    given = record.get("parameters", {})
    named = re.search(r"seed(\d+)", str(given.get("model", "")))  # notebook 04 is given a checkpoint of it
    seed = str(given["seed"]) if "seed" in given else named[1] if named else ""
    return {"date": str(record.get("end_time") or "")[:10] or "not recorded", "seed": seed}


def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )


def _layout(**parts: Any) -> str:
    """A whole page. The policy holds hashes of the page's inline parts, so the page is made twice."""
    template = _templates().get_template("layout.html.j2")
    parts["script"] = (TEMPLATES / "site.js").read_text(encoding="utf-8")
    return template.render(policy=policy(template.render(policy="", **parts)), **parts)


def _pages(notebooks: list[Path], run: Path, aside: Path) -> tuple[list[dict[str, Any]], str]:
    """Render all notebooks, write their pictures; what each page holds, and the stylesheet of code."""
    found, css = [], ""
    for notebook in notebooks:
        body, pictures, css = render(notebook, run / "figures")
        for link in body.select('a[href$=".ipynb"]'):
            link["href"] = f"{Path(link['href']).stem}.html"
        for name, data in pictures.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(data)
        executed = _executed(notebook)
        found.append(_page(f"{notebook.stem}.html", body) | executed | {"facts": _facts(notebook.name, executed, run)})
    return found, css


def _page(file: str, body: Tag) -> dict[str, Any]:
    """What the index and the page itself need of a notebook's cells as HTML."""
    wanted, sentence = TOUR.get(file[:2], ("", ""))
    shown = [{"file": tag["src"], "alt": tag["alt"]} for tag in body.select("figure img[src^=figures]")]
    stands = [each for each in shown if Path(each["file"]).stem == f"{file[:2]}_{wanted}"] or shown
    return {
        "file": file, "title": body.h1.get_text() if body.h1 else Path(file).stem, "sentence": sentence,
        "body": body.decode_contents().strip(), "headings": headings(body),
        "picture": stands[0] if stands else None,
    }  # fmt: skip


def _kept(target: Path, run: Path, aside: Path, executed: set[str]) -> list[dict[str, Any]]:
    """Pages of the same profile whose notebooks this run has not executed again: they stay, with what stands at their top."""
    found = []
    for path in sorted(target.glob("0*.html")):
        page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        facts = {tag.dt.get_text(): tag.dd.get_text() for tag in page.select(".facts div")}
        if path.name in executed or facts.get("Profile") != run.name:
            continue
        if page.main.select_one("details.contents"):
            page.main.select_one("details.contents").decompose()
        for picture in {tag["src"] for tag in page.select("img[src^=figures]")}:
            (aside / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target / picture, aside / picture)
        found.append(_page(path.name, page.main) | {"facts": facts, "date": facts["Executed"]})
    return found


def _short(title: str) -> str:
    """The title of a page without what follows a colon, for links."""
    return title.split(":")[0]


def site(run: Path, target: Path) -> None:
    """The executed notebooks of a run as pages: index.html, a page a notebook, style.css, figures/. Pages of the same profile
    whose notebooks were not executed again stay as they are."""
    notebooks = [path for path in sorted(run.glob("notebooks/0*.ipynb")) if not path.name.endswith(".partial.ipynb")]
    aside = _aside(target)
    pages, css = _pages(notebooks, run, aside)
    pages = sorted(pages + _kept(target, run, aside, {page["file"] for page in pages}), key=lambda page: page["file"])
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    (aside / "style.css").write_text(style + css, encoding="utf-8")
    dates = [page["date"] for page in pages if page["date"][:1].isdigit()]
    for i, page in enumerate(pages):
        links = [("Contents", "index.html")]
        links += [(f"\u2190 {_short(pages[i - 1]['title'])}", pages[i - 1]["file"])] if i else []
        links += [(f"{_short(pages[i + 1]['title'])} \u2192", pages[i + 1]["file"])] if i + 1 < len(pages) else []
        html = _layout(
            title=page["title"], links=links, facts=page["facts"],
            headings=page["headings"], body=page["body"],
        )  # fmt: skip
        (aside / page["file"]).write_text(html, encoding="utf-8")
    index = (
        _templates()
        .get_template("index.html.j2")
        .render(
            pages=pages,
            arms=arms_table(run),
            answers=(found := answers(run)),
            short=in_short(found),
            claimed=claimed(),
            scale=scale(run),
            width=width(run),
            notes=committed_run(run),
            recipe=recipe(run),
            baseline="contrastive",
        )
    )
    links = [(_short(pages[0]["title"]) + " \u2192", pages[0]["file"])] if pages else []
    executed = " to ".join(sorted({min(dates), max(dates)})) if dates else "not recorded"
    facts = _facts("index.html", {"seed": "", "date": executed}, run)
    html = _layout(title="CoCoA, the notebook collection", links=links, facts=facts, headings=[], body=index)
    (aside / "index.html").write_text(html, encoding="utf-8")
    _replace(aside, target)


def arms_table(run: Path, baseline: str = "contrastive") -> list[dict[str, str]]:
    """An arm a row, in the order of arms.csv: what it is, its mean over seeds, its difference and a verdict.

    Arms on another contrastive budget are left out: less the baseline they would say what the budget does.
    """
    shown = {name: arm for name, arm in read_arms().items() if arm.kind == "arm"}
    scores, effects = _scores_and_effects(run, baseline, list(shown))
    rows = []
    for name, arm in shown.items():
        if name in scores.index:
            row = {"arm": name, "hypothesis": arm.hypothesis, "overall": f"{scores.loc[name, 'overall']:.1f}"}
            row["seeds"] = str(scores.loc[name, "seeds"])
            found, verdict = _difference(effects, name), "the baseline"
            if name in effects.index:
                verdict = analysis.verdict(effects.loc[name].to_dict())
            rows.append({**row, "difference": found, "verdict": verdict})
    return rows


# What the index answers first: a budget in words, and a sum of arms.
BUDGETS = {
    "{few} contrastive steps on both sides": {"cocoa": 1, "contrastive": -1},
    "{many} contrastive steps on both sides": {"cocoa_longer": 1, "contrastive_longer": -1},
    "CoCoA with {few}, contrastive training alone with {many}": {"cocoa": 1, "contrastive_longer": -1},
    "half the width, {few} contrastive steps on both sides": {"cocoa_half": 1, "contrastive_half": -1},
    "half the width, from another causal backbone, {few} contrastive steps on both sides": {
        "cocoa_half_other": 1,
        "contrastive_half_other": -1,
    },
    "half the width, from the other backbone, {many} contrastive steps on both sides": {
        "cocoa_half_other_longer": 1,
        "contrastive_half_other_longer": -1,
    },
    "half the width, CoCoA with {few}, contrastive training alone with {many}": {
        "cocoa_half": 1,
        "contrastive_half_longer": -1,
    },
    "half the width, {few} steps on both sides, but CoCoA's reconstruction without its bottleneck": {
        "no_truncation_half": 1,
        "contrastive_half": -1,
    },
    "no reconstruction at all, but the mean of all states as embedding against that at EOS": {
        "contrastive_mean": 1,
        "contrastive": -1,
    },
}


def answers(run: Path) -> list[dict[str, Any]]:
    """What the index answers, where the run has the arms: each sum of BUDGETS in points, both sides, by seed, how certain."""
    results = analysis.gather_results(run)
    per_query = analysis.gather_ranks(run, results)
    by_seed = analysis.arm_scores(results).pivot(index="seed", columns="arm", values="overall")
    steps = profile_of(run).get("stage3", {}).get("steps")
    few = f"{steps:,}" if steps else "the profile's"
    many = f"{read_arms()['contrastive_longer'].stage3['steps']:,}"
    there = {budget: weights for budget, weights in BUDGETS.items() if set(weights) <= set(per_query["arm"])}
    rows = [analysis.contrast(per_query, weights) for weights in there.values()]
    found = []
    for (budget, weights), row, p in zip(there.items(), rows, analysis.holm(row["p"] for row in rows), strict=True):
        certain, gain = analysis.certain({**row, "p_holm": p}), row["difference"] > 0
        said = f"a {'gain' if gain else 'loss'}, certain" if certain else "not certain"
        one, other = (by_seed[list(weights)].dropna()[arm] for arm in weights)
        found.append({
            "budget": budget.format(few=few, many=many), "number": analysis.said(row),
            "levels": f"{one.mean():.1f} against {other.mean():.1f}",
            "by_seed": ", ".join(f"{value:+.1f}" for value in one - other),
            "verdict": f"{said} after correction for these rows (Holm: p {analysis.tested(p)})",
            "gain": certain and gain, "loss": certain and not gain, "arms": set(weights),
        })  # fmt: skip
    return found


def scale(run: Path) -> str:
    """Tasks, queries and what a random guess scores, in words."""
    results = analysis.gather_results(run)
    per_query = analysis.gather_ranks(run, results)
    tasks = results.drop_duplicates("task")
    guess = f"; a random guess scores {(100 / tasks['n_candidates']).mean():.1f}" if "n_candidates" in tasks else ""
    return f"{len(tasks)} tasks, {per_query.drop_duplicates(['task', 'query']).shape[0]:,} queries in all{guess}"


def committed_run(run: Path) -> list[str]:
    """Sentences that a reader of the results of profile long needs, and that no table of a run can say; none for others."""
    if run.name != "long":
        return []
    timed = json.loads((RECORDS / "stages.json").read_text(encoding="utf-8"))["results"]
    (time,) = (row for row in timed if row["name"] == "contrastive steps that take as long as CoCoA")
    errors = pd.read_csv(RECORDS / "stage1_error.csv")
    errors = errors[errors["arm"] == "cocoa"]
    return [
        "Seeds 3 and 4 of the committed results, the half width, its second backbone, and last 1,100 steps from that, were "
        "each added after what came before had been looked at.",
        f"The three stages of CoCoA take as long as {time['ratio']:,.0f} [{time['lowest']:,.0f}, {time['highest']:,.0f}] "
        f"contrastive steps (timed as a whole, lowest and highest of {time['n']}; page 05 adds single steps up), "
        "more than the 1,100 it is held against; CoCoA with 1,100 contrastive steps of its own takes twice as long as they do.",
        f"Its stage 1 restores words here, but no cells of pictures: squared error {errors['decoder'].mean():.3f} where an "
        f"average cell has {errors['average'].mean():.3f} (seeds {errors['seed'].min()} to {errors['seed'].max()}).",
    ]


def in_short(answers: list[dict[str, Any]]) -> str:
    """One sentence over the rows of `answers`: of full width, of half the width, and whether it is the bottleneck there."""
    gained = {name: any(row["gain"] for row in answers if name in row["arms"])
              for name in ("cocoa", "cocoa_longer", "cocoa_half", "no_truncation_half")}  # fmt: skip
    words = ["no certain gain", "a certain gain"]
    text = f"{words[gained['cocoa'] or gained['cocoa_longer']]} with a model of full width"
    if any("cocoa_half" in row["arms"] for row in answers):
        text += f", {words[gained['cocoa_half']]} with one of half the width"
        if gained["cocoa_half"] and gained["no_truncation_half"]:
            text += ", where the same reconstruction without the bottleneck gains too"
    if any(row.get("loss") and row["arms"] & {"contrastive_longer", "contrastive_half_longer"} for row in answers):
        text += "; a certain loss against contrastive training alone that is simply longer"
    return text


def claimed() -> dict[str, str]:
    """The paper's figures as a yardstick: CoCoA at 3 billion parameters, and its lead over contrastive learning alone."""
    table = published()
    table = table[table["size"] == "3B"].set_index("model")["overall"]
    score = table["CoCoA (Qwen2.5-VL)"]
    leads = {mask: score - table[f"Qwen2.5-VL {mask}, contrastive only"] for mask in ("causal", "bidirectional")}
    return {
        "score": f"{score:.1f}",
        "moca": f"{table['MoCa (Qwen2.5-VL)']:.1f}",
        **{mask: f"{lead:.1f}" for mask, lead in leads.items()},
    }


def recipe(run: Path) -> str:
    """The steps of the run's profile in words; "" for a run of no profile."""
    if not (profile := profile_of(run)):
        return ""
    stages = {n: profile[f"stage{n}"] for n in (1, 2, 3)}
    steps = [f"stage {n} {each['steps']:,} steps of {each['batch_size']}" for n, each in stages.items()]
    return f"Profile {run.name}: {', '.join(steps)}"


def width(run: Path) -> str:
    """What full width is, in words; "" for a run of no profile."""
    if not (shape := profile_of(run).get("backbone")):
        return ""
    return f"small model; full width: {shape['layers']} layers with hidden states of {shape['hidden_size']} numbers"


def _scores_and_effects(run: Path, baseline: str, arms: list[str]):
    results = analysis.gather_results(run)
    results = results[results["arm"].isin(arms)]
    per_query = analysis.gather_ranks(run, results)
    every = analysis.arm_scores(results).groupby("arm")
    scores = every.mean(numeric_only=True).assign(seeds=every.size())
    return scores, analysis.paired_effects(per_query, baseline).set_index("arm")


def _difference(effects, arm: str) -> str:
    if arm not in effects.index:
        return "(baseline)"
    return analysis.said(effects.loc[arm])


def summary(run: Path, baseline: str = "contrastive") -> str:
    """`summary.md` of a run (docs/results.md): an arm a row, means over seeds, the paired difference with its interval."""
    scores, effects = _scores_and_effects(run, baseline, list(read_arms()))
    names = [
        name
        for name in ("classification", "vqa", "retrieval", "grounding", "ind", "ood", "overall")
        if scores[name].notna().any()
    ]
    lines = [
        "| arm | seeds | " + " | ".join(names) + " | difference [95 % interval] |",
        "|---" * (len(names) + 3) + "|",
    ]
    for arm in [name for name in read_arms() if name in scores.index]:
        cells = " | ".join(f"{scores.loc[arm, name]:.1f}" for name in names)
        lines.append(f"| {arm} | {scores.loc[arm, 'seeds']} | {cells} | {_difference(effects, arm)} |")
    return "\n".join(lines)


def _aside(target: Path) -> Path:
    """An empty folder beside the target."""
    aside = target.parent / f".{target.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def _replace(aside: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


def publish(run: Path, target: Path, tables_only: bool = False) -> None:
    """Figures, result tables and their summary of a run; and, where pictures may be shown, the pages beside it."""
    for folder, own in ((target, "summary.md"), (target.parent / "site", "index.html")):
        if folder.exists() and any(folder.iterdir()) and not (folder / own).is_file():
            raise SystemExit(f"{folder}: exists and was not made by this script (no {own}); choose another target")
    aside = _aside(target)
    if (run / "figures").is_dir() and not tables_only:
        shutil.copytree(run / "figures", aside / "figures")
    for results in sorted(run.glob("results/*/seed*/results.csv")):
        copy = aside / results.parent.relative_to(run)
        copy.mkdir(parents=True)
        for name in KEPT:
            if (results.parent / name).is_file():
                shutil.copy(results.parent / name, copy)
    if (run / "costs.csv").is_file():
        shutil.copy(run / "costs.csv", aside)
    (aside / "summary.md").write_text(summary(run) + "\n", encoding="utf-8")
    _replace(aside, target)
    if not tables_only:
        site(run, target.parent / "site")


if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(sys.argv[2]), "--tables" in sys.argv)
