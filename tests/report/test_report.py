"""Reports from made-up numbers: statements follow the numbers, and the files are self-contained."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fastnull.experiments.settings import RECIPES
from fastnull.finetune.config import AUGMENTS, FinetuneConfig
from fastnull.report import compose, page, write_report
from fastnull.report.claims import Claim, Comparison, compare, make_claims, sentences
from fastnull.report.document import Bullets, Details, Figure, Heading, Paragraph, Table, to_html, to_markdown
from fastnull.report.illustrations import Illustrations
from fastnull.report.page import _noise_settings
from fastnull.report.plots import styles
from fastnull.report.runs import load_runs
from tests.damage import damaged

pytest.importorskip("matplotlib")

CORRUPTIONS = ("gaussian_noise", "contrast")
METHODS = {
    # folder → (settings, clean, under attack, corrupted)
    "clean": ({"augment": "none"}, 97.0, 50.0, 45.0),
    "random": ({"augment": "random"}, 96.0, 65.0, 60.0),
    "boundary": ({"augment": "boundary", "site": "patch"}, 95.0, 75.0, 62.0),
    "pixels": ({"augment": "boundary", "site": "pixels"}, 96.9, 82.0, 60.0),
}


def record(clean: float, attacked: float, corrupted: float, **protocol: object) -> dict:
    table = {"1": corrupted + 5, "5": corrupted - 5}
    return {
        "protocol": {
            "n": 500, "subset": "all", "data": "abc", "norm": "linf", "steps": 10, "step_size": "eps / 4",
            "restarts": 1, "seed": 0, "corruption_source": "in memory", "severities": [1, 5], "dtype": "float32",
            "provenance": {"fastnull": "0", "torch": "2", "device_name": "a processor"}, **protocol,
        },
        "results": {
            "clean": clean,
            "fgsm": {"2/255": attacked + 10, "8/255": attacked},
            "pgd": {"2/255": attacked, "8/255": attacked - 10},
            "corruptions": dict.fromkeys(CORRUPTIONS, table),
        },
        "summary": {"clean": clean, "adversarial_mean": attacked, "corruption_mean": corrupted, "mce": None},
    }  # fmt: skip


def write_run(folder: Path, settings: dict, seed: int, values: dict) -> None:
    config = FinetuneConfig(**settings, seed=seed)
    synthesis = config.synthesis()
    folder.mkdir(parents=True)
    about = {
        "config": config.to_dict(),
        "plan": {"step_cost": 6, "epochs": 3, "batch_size": 64},
        "synthesis": None if synthesis is None else {"limit": synthesis.limit, "eps": synthesis.eps, "steps": 3},
        "data": {"train": 100},
    }
    steps = [{"kind": "step", "step": step, "influence": value} for step, value in ((10, 9.0), (20, 0.2), (30, 0.4))]
    epoch = {"kind": "epoch", "step": 30, "cost": 26000, "seconds": {"total": 12.0, "synthesis_fraction": 0.25}}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*steps, epoch)))
    (folder / "results.json").write_text(json.dumps(values))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Four methods over three seeds that scatter by a point."""
    for name, (settings, clean, attacked, corrupted) in METHODS.items():
        for seed in range(3):
            # not the same shift for all methods, or the paired differences would not scatter
            shift = (seed - 1) * (0.5 if name == "clean" else 1.0)
            values = record(clean, attacked + shift, corrupted + shift)
            write_run(tmp_path / "runs" / f"{name}-{seed}", settings, seed, values)
    return tmp_path / "runs"


def section(text: str, title: str) -> str:
    """The text below a heading of the Markdown, up to the next heading."""
    return re.split(rf"^#+ {re.escape(title)}$", text, flags=re.MULTILINE)[1].split("\n#")[0]


class Links(HTMLParser):
    """Collects what a page would load, and checks that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag("img", attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def markdown_of(sources: list[Path], folder: Path) -> str:
    return write_report(sources, folder).with_name("report.md").read_text(encoding="utf-8")


def test_page_stands_alone_and_text_has_its_pictures(runs: Path, tmp_path: Path) -> None:
    page = write_report([runs], tmp_path / "report")
    html = page.read_text(encoding="utf-8")
    links = Links()
    links.feed(html)
    assert links.open == []
    assert all(link.startswith(("#", "data:")) for link in links.loads), links.loads
    assert "@import" not in html
    assert not re.search(r"url\((?!['\"]?(#|data:))", html)
    assert "prefers-color-scheme: dark" in html
    assert html.count('role="img"') == 3
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids)), "figures share ids, so one would borrow another's clip paths"
    text = page.with_name("report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[(.+?)\]\((.+?)\)", text)
    assert len(pictures) == 3
    for alt, path in pictures:
        assert "%" in alt
        assert (page.parent / path).read_bytes().startswith(b"\x89PNG")


def test_sections_and_headline(runs: Path, tmp_path: Path) -> None:
    text = markdown_of([runs], tmp_path / "report")
    for title in ("Result", "What holds", "What does not hold", "Accuracy under attack", "Accuracy under corruption",
                  "All numbers", "How it was obtained", "Settings of the methods"):  # fmt: skip
        assert section(text, title).strip() or title == "All numbers"
    headline = section(text, "Result")
    # mean and standard deviation over 74, 75, 76; 26000 passes over 100 images; a quarter of the time
    assert "| boundary, tokens | 95.0 ± 0.0 | 75.0 ± 1.0 | 62.0 ± 1.0 | 260 | 30 | 12 ± 0 | 25 % |" in headline
    assert headline.index("none") < headline.index("random") < headline.index("boundary, tokens")
    settings = section(text, "Settings of the methods")
    assert "start ±8/255" in settings
    # the mean of the second half, 0.2 and 0.4
    assert "| boundary, tokens | start ±0.5, ε 0.1, 3 steps | 0.3 |" in settings
    assert "averaged" not in settings
    file = runs / "clean-0" / "config.json"
    before = file.read_text()
    about = json.loads(before)
    about["config"] |= {"start_fraction": 0.25, "label": "averaged"}
    file.write_text(json.dumps(about))
    text = markdown_of([runs], tmp_path / "averaged")
    file.write_text(before)
    assert "| averaged | none; weights averaged with 0.25 of the start |" in section(text, "Settings of the methods")


def test_claims_follow_the_numbers(runs: Path, tmp_path: Path) -> None:
    def holds_and_fails(folder: str) -> tuple[str, str]:
        text = markdown_of([runs], tmp_path / folder)
        return section(text, "What holds"), section(text, "What does not hold")

    holds, fails = holds_and_fails("as it is")
    assert (
        "Boundary noise in tokens is more accurate under attack than finetuning on clean images (**+25.0 ± 0.3**)"
        in holds
    )
    assert "Boundary noise in pixels loses less than 1 point on clean images" in holds
    assert "Boundary noise in tokens loses more than 1 point on clean images" in fails

    for seed in range(3):  # the two trade their results
        a, b = (runs / f"{name}-{seed}" / "results.json" for name in ("boundary", "clean"))
        first, second = a.read_text(), b.read_text()
        a.write_text(second)
        b.write_text(first)
    holds, fails = holds_and_fails("flipped")
    assert "Boundary noise in tokens is more accurate under attack" not in holds
    assert (
        "Boundary noise in tokens is less accurate under attack than finetuning on clean images (**−25.0 ± 0.3**)"
        in fails
    )
    assert "Boundary noise in tokens loses less than 1 point on clean images" in holds


def test_no_claim_without_three_seeds_or_without_effect() -> None:
    claim = Claim(Comparison("a", "b", "clean", (5.0, 5.0)), "a", "b")
    assert claim.outcome == "untested"
    assert claim.interval() == "–"
    assert sentences([claim], "untested") == ["A on clean images, against b (**+5.0**)"]
    scattered = Claim(Comparison("a", "b", "adversarial_mean", (9.0, -7.0, 2.0)), "a", "b")
    assert scattered.outcome == "open"
    assert Claim(Comparison("a", "b", "clean", (0.0, 0.0, 0.0)), "a", "b").outcome == "open"


def test_interval_is_student_t() -> None:
    # differences 1, 2, 3: standard error 1/sqrt(3), t(2 degrees, 97.5 %) = 4.303
    found = Comparison("a", "b", "clean", (1.0, 2.0, 3.0))
    assert found.standard_error == pytest.approx(3**-0.5)
    assert found.margin == pytest.approx(4.30265 * 3**-0.5, rel=1e-4)
    assert Claim(found, "a", "b").outcome == "open"
    # the margin of one point turns a loss of less than that into a claim that holds
    slight = Comparison("a", "b", "clean", (-0.1, -0.2, -0.15))
    assert Claim(slight, "a", "b").outcome == "fails"
    assert Claim(slight, "a", "b", threshold=-1.0).outcome == "holds"


def test_pairs_by_seed() -> None:
    scores = {"a": {0: {"clean": 3.0}, 1: {"clean": 5.0}}, "b": {1: {"clean": 1.0}, 2: {"clean": 9.0}}}
    found = compare(scores, "a", "b", "clean")
    assert found is not None
    assert found.differences == (4.0,)
    assert compare(scores, "a", "nobody", "clean") is None
    assert compare(scores, "a", "b", "corruption_mean") is None
    assert make_claims(scores, {}, {"b": "b"}, "b") == []


def test_settings_that_differ_are_not_averaged(tmp_path: Path) -> None:
    for eps in (0.1, 0.6):
        write_run(
            tmp_path / f"eps{eps}",
            {"augment": "boundary", "site": "patch", "noise": {"eps": eps}},
            0,
            record(90, 50, 50),
        )
    write_run(tmp_path / "other", {"augment": "none"}, 0, record(90, 50, 50))
    write_run(tmp_path / "again", {"augment": "none"}, 0, record(80, 50, 50))
    labels = sorted(run.method for run in load_runs([tmp_path]))
    assert labels == ["boundary, tokens, noise.eps 0.1", "boundary, tokens, noise.eps 0.6", "none", "none (2)"]


@pytest.mark.parametrize("augment", AUGMENTS)
def test_every_way_of_finetuning_has_a_report(augment: str, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / "runs" / f"{augment}-{seed}", {"augment": augment}, seed, record(90.0, 50.0, 40.0))
    assert f"| {load_runs([tmp_path / 'runs'])[0].method}" in markdown_of([tmp_path / "runs"], tmp_path / "report")


def test_a_view_that_is_not_recorded_is_no_other_protocol(tmp_path: Path) -> None:
    """Earlier files do not say how the images of a folder were resized."""
    shown = {"mine": "none: the images as given, pixels in [0, 1]", "theirs": "resized", "others": "resized"}
    for name, transform in shown.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record(90, 50, 50, transform=transform)))
    text = markdown_of([tmp_path / f"{name}.json" for name in shown], tmp_path / "same")
    assert "Not comparable" not in text
    (tmp_path / "mine.json").write_text(json.dumps(record(90, 50, 50, transform="cropped")))
    text = markdown_of([tmp_path / f"{name}.json" for name in shown], tmp_path / "other")
    assert "under different protocols (transform)" in text


def test_results_alone_and_partial_ones(tmp_path: Path) -> None:
    alone = record(90, 50, 50)
    del alone["results"]["corruptions"], alone["results"]["pgd"]
    alone["summary"]["corruption_mean"] = None
    (tmp_path / "mine.json").write_text(json.dumps(alone))
    other = record(90, 50, 50, steps=20)
    (tmp_path / "theirs.json").write_text(json.dumps(other))
    text = markdown_of([tmp_path / "mine.json", tmp_path / "theirs.json"], tmp_path / "r")
    assert "| mine | 90.0 | 50.0 | – |" in text
    assert "Not comparable" in text
    assert "(steps)" in text
    assert "Nothing to compare" in text
    only_clean = {**alone, "results": {"clean": 90.0}}
    (tmp_path / "mine.json").write_text(json.dumps(only_clean))
    assert "No attack was run" in to_markdown(compose(load_runs([tmp_path / "mine.json"])))


def test_overview_shows_the_means_of_the_headline(runs: Path, tmp_path: Path) -> None:
    def overview() -> list[Figure]:
        return [block for block in compose(load_runs([runs])) if isinstance(block, Figure) and block.name == "overview"]

    (figure,) = overview()
    for text in ("Accuracy over the radius of PGD, 10 steps; clean, under attack, corrupted: none 97, 50, 45 %", "; "):
        assert text in figure.alt
    assert "boundary, pixels 97, 82, 60 %" in figure.alt
    results = runs / "random-1" / "results.json"
    values = json.loads(results.read_text())
    values["summary"]["corruption_mean"] = None
    results.write_text(json.dumps(values))
    assert "; clean, under attack: none 97, 50 %; random" in overview()[0].alt, "measured for every run"
    del values["results"]["pgd"]
    results.write_text(json.dumps(values))
    assert overview() == []


def test_methods_have_their_own_colours() -> None:
    # as many as a comparison has by default
    assert len({style["color"] for style in styles(len(RECIPES))}) == len(RECIPES)


def test_errors(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "r")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no results\.json"):
        write_report([tmp_path / "empty"], tmp_path / "r")
    for content, message in (("{", "cannot be read as JSON"), ("[]", "holds a list"), ("{}", "lacks protocol")):
        (tmp_path / "broken.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            write_report([tmp_path / "broken.json"], tmp_path / "r")
    write_report([runs / "clean-0"], tmp_path / "r")
    with pytest.raises(ValueError, match="contains a report already"):
        write_report([runs / "clean-0"], tmp_path / "r")
    write_report([runs / "clean-0"], tmp_path / "r", overwrite=True)


def test_missing_matplotlib_says_what_to_install(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install fastnull\[demo\]"):
        write_report([runs], tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_document_escapes_and_aligns() -> None:
    figure = Figure("f", '<svg xmlns="http://www.w3.org/2000/svg"></svg>', b"", 'a "quoted" [alt]', "x < y")
    blocks = [
        Heading("A & B", 1),
        Paragraph("`a<b>` and **bold** <script>"),
        Bullets(["one"], "good"),
        Table(["m", "t", "v"], [["a|b", "c", "1"]], text_columns=2),
        Details("more", [figure]),
    ]
    html = to_html(blocks)
    assert "<title>A &amp; B</title>" in html
    assert "<code>a&lt;b&gt;</code> and <strong>bold</strong> &lt;script&gt;" in html
    assert 'aria-label="a &quot;quoted&quot; [alt]"' in html
    assert html.count('style="text-align:right"') == 2
    assert "<td>a|b</td>" in html
    text = to_markdown(blocks)
    assert "| --- | --- | ---: |" in text
    assert r"a\|b" in text
    assert '![a "quoted" (alt)](figures/f.png)' in text


def test_svg_is_well_formed_and_follows_the_page(runs: Path) -> None:
    figures = [block for block in compose(load_runs([runs])) if isinstance(block, Figure)]
    assert {figure.name for figure in figures} == {"overview", "accuracy_over_eps", "corruptions"}
    for figure in figures:
        root = ET.fromstring(figure.svg)
        assert root.get("fill") == "currentColor"
        assert "#010203" not in figure.svg
        assert "<metadata" not in figure.svg
        assert figure.png.startswith(b"\x89PNG")


def test_settings_of_boundary_noise_are_shown() -> None:
    noise = {"limit": 64 / 255, "eps": 0.6, "steps": 1, "step_size": 16 / 255, "step_range": 1.0, "limit_range": 1.0}
    found = _noise_settings({**noise, "smooth_limit": 32 / 255}, "boundary", "pixels")
    assert found == "start up to ±64/255, smooth field up to ±32/255, ε 0.6, 1 step of up to 16/255"
    assert _noise_settings(noise, "random", "pixels") == "start up to ±64/255"
    assert _noise_settings({**noise, "contrast": 0.2}, "random", "pixels") == "start up to ±64/255 at contrast 0.2"
    plain = {"limit": 0.25, "eps": 0.6, "steps": 3, "step_size": None, "step_range": 0.0, "limit_range": 0.0}
    assert _noise_settings(plain, "boundary", "patch") == "start ±0.25, ε 0.6, 3 steps"
    relative = _noise_settings({**plain, "contrast": 1.0}, "boundary", "patch")
    assert relative == "start ±0.25 (unit: spread of the tokens), ε 0.6, 3 steps"
    free = {**noise, "steps": None, "eps": 0.2}
    assert _noise_settings(free, "free", "pixels") == "start up to ±64/255, ε 0.2, 1 step of up to 16/255"


@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.jsonl", "demo.json"])
def test_errors_name_damaged_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any entry of a file removed or of a wrong type there is a report or one error."""
    monkeypatch.setattr(page, "accuracy_over_eps", lambda *given: Paragraph(str(given)))  # pictures take their time
    monkeypatch.setattr(page, "corruption_bars", lambda *given: Paragraph(str(given)))
    write_run(tmp_path / "boundary", {"augment": "boundary"}, 0, record(90.0, 50.0, 40.0))
    demo = {"quick": True, "parameters": 5, "command": "fastnull demo", "settings": {"budget": 65}}
    (tmp_path / "demo.json").write_text(json.dumps(demo))
    (path,) = tmp_path.rglob(name)
    lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
    errors = []
    for number, line in enumerate(lines):
        for what, wrong in damaged(json.loads(line)):
            path.write_text("\n".join([*lines[:number], json.dumps(wrong), *lines[number + 1 :]]))
            try:
                to_html(compose(load_runs([tmp_path]), demo=page._demo_of([tmp_path])))
            except ValueError as error:
                errors.append((what, str(error)))
    assert len(errors) > 20
    assert [entry for entry in errors if str(path) not in entry[1] or "\n" in entry[1]] == []


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "null", "[" * 100_000, "\xff"])
@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.jsonl", "demo.json"])
def test_errors_name_files_without_a_record(name: str, text: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"augment": "none"}, 0, record(90.0, 50.0, 40.0))
    (tmp_path / "demo.json").write_text("{}")
    (path,) = tmp_path.rglob(name)
    path.write_bytes(text.encode("latin-1"))
    if name == "metrics.jsonl" and not text:
        assert load_runs([tmp_path])[0].spent == {}
        return
    with pytest.raises(ValueError, match=re.escape(str(path))):
        compose(load_runs([tmp_path]), demo=page._demo_of([tmp_path]))


def test_damaged_illustrations_are_an_error(tmp_path: Path, runs: Path) -> None:
    for facts in ({}, [], {"learned": 3}):
        Illustrations({"tokens": torch.zeros(2, 2)}, facts).save(runs / "noise.safetensors")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"noise\.safetensors holds no illustrations"):
            write_report([runs], tmp_path / "report")
