"""A report from results: accuracies of the methods, statements about them, and the settings.

    from fastnull.report import write_report
    write_report(["runs/demo"], "report")

It reads the results of `evaluate` (results.json) and, inside the folder of a finetuning run, that run's settings and
costs. Runs that differ only in their seed are one method: mean ± standard deviation.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastnull.checks import as_type
from fastnull.finetune.config import ATTACKS
from fastnull.record import read_json
from fastnull.report.claims import MEASURES, Claim, make_claims, sentences
from fastnull.report.comparison import describe
from fastnull.report.document import Block, Bullets, Code, Details, Figure, Heading, Paragraph, Table, write_document
from fastnull.report.plots import Series, accuracy_over_eps, corruption_bars, overview
from fastnull.report.runs import Run, load_runs, phrase
from fastnull.robustness.protocol import AS_GIVEN
from fastnull.robustness.settings import BALL_ATTACKS
from fastnull.robustness.suites import FOLDER_SUITES

DEMO, COMPARISON = "demo.json", "comparison.json"

_BASELINES = ("none", "random", "universal", "adversarial", "trades")
_CLAIMANTS = ("universal", "per_image", "boundary", "free")

_MEANS = {"clean": "clean", "adversarial_mean": "under attack, mean", "corruption_mean": "corrupted, mean"}
"""Values of a summary in the headline → title."""
_OUTCOMES = (
    ("holds", "What holds", "good"),
    ("fails", "What does not hold", "bad"),
    ("open", "What these runs leave open", "open"),
    ("untested", "Differences without a test (fewer than three seeds)", "open"),
)


def write_report(
    sources: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write report.html, report.md and figures/ from the folders and files of results in `sources`.

    Args:
        sources: results of `evaluate` (.json), folders of finetuning runs with a results.json, or folders of such
            folders, such as a demo's.
        out: folder of the report.
        overwrite: replace an existing report.

    Returns:
        The path of report.html.

    Raises:
        FileNotFoundError: a source that does not exist, or a folder without results.
        ValueError: a file that is not a result of `evaluate`, or an existing report.
        ImportError: matplotlib, markdown-it-py or scipy is missing.
    """
    folder = Path(out)
    if (folder / "report.html").exists() and not overwrite:
        raise ValueError(f"{folder} contains a report already: overwrite=True replaces it")
    runs = load_runs(sources)
    about = _about_comparison(sources)
    blocks = compose(runs, demo=_demo_of(sources), figures=_illustrations_of(sources), about=about)
    return write_document(blocks, folder)[0]


def compose(
    runs: Sequence[Run],
    *,
    demo: Mapping[str, Any] | None = None,
    figures: Sequence[Figure] = (),
    about: Sequence[str] = (),
) -> list[Block]:
    """The report as blocks, from at least one run, the content of demo.json, figures of the noise, and paragraphs on a
    comparison."""
    methods = list(dict.fromkeys(run.method for run in runs))
    grouped = {method: [run for run in runs if run.method == method] for method in methods}
    title = "fastnull demo: finetuning with nullspace noise" if demo else "fastnull: robustness report"
    blocks: list[Block] = [Heading(title, 1), *_introduction(runs, grouped, demo)]
    blocks += [Paragraph(text) for text in about]
    blocks += [Heading("Result"), _headline(grouped), *_overview(grouped)]
    blocks += [Heading("What holds on this data and what does not"), *_claims_section(grouped)]
    blocks += [Heading("Accuracy under attack"), *_attack_figure(grouped)]
    blocks += [Heading("Accuracy under corruption"), *_corruption_figure(grouped)]
    if figures:
        blocks += [Heading("The noise"), *figures]
    blocks += [Heading("All numbers"), Details("Accuracy in %, every attack and corruption", [_full_table(grouped)])]
    blocks += [Heading("How it was obtained"), *_provenance(runs, grouped, demo)]
    return blocks


def scores(grouped: Mapping[str, Sequence[Run]]) -> dict[str, dict[int, Mapping[str, float | None]]]:
    """Method → seed → summary of the results."""
    return {method: {run.seed: run.record["summary"] for run in runs} for method, runs in grouped.items()}


def _introduction(
    runs: Sequence[Run], grouped: Mapping[str, Sequence[Run]], demo: Mapping[str, Any] | None
) -> Iterator[Block]:
    seeds = sorted({run.seed for run in runs})
    if demo:
        yield Paragraph(
            f"A small Vision Transformer (`vit_digits`, {demo['parameters']:,} parameters) is trained on handwritten "
            f"digits, then finetuned in {len(grouped)} ways, each within a budget of {demo['settings']['budget']:g} "
            f"forward passes per training image. All are evaluated under the same attacks and corruptions on "
            f"{_images(runs)} test images. {_count(len(seeds), 'seed')}; all methods of a seed start from the same "
            "pretrained model."
        )
        if demo["quick"]:
            yield Paragraph(
                "**Quick run:** shorter training and fewer attacks. It only shows that everything works: its numbers "
                "do not rank the methods. The experiment is `fastnull demo` without `--quick`."
            )
    else:
        yield Paragraph(f"{_count(len(grouped), 'model')} on {_images(runs)} images. {_count(len(seeds), 'seed')}.")
    differing = _differing_protocols(runs)
    if differing:
        yield Paragraph(f"**Not comparable:** the results were measured under different protocols ({differing}).")


def _images(runs: Sequence[Run]) -> str:
    return " or ".join(sorted({_image_counts(run.record["protocol"]) for run in runs}))


def _image_counts(protocol: Mapping[str, Any]) -> str:
    """How many images were measured, by suites where they differ."""
    counts: Mapping[str, Any] = protocol.get("suite_images") or {}
    if len(set(counts.values())) < 2:
        return str(protocol.get("n"))
    each = {count: [suite for suite in counts if counts[suite] == count] for count in counts.values()}
    return ", ".join(f"{count} ({', '.join(suites)})" for count, suites in each.items())


def _differing_protocols(runs: Sequence[Run]) -> str:
    protocols = [run.record["protocol"] for run in runs]
    keys = {key for protocol in protocols for key in protocol} - {"weights", "provenance"}
    if any(protocol.get("transform") == AS_GIVEN for protocol in protocols):
        keys.discard("transform")
    return ", ".join(sorted(key for key in keys if any(p.get(key) != protocols[0].get(key) for p in protocols)))


def _headline(grouped: Mapping[str, Sequence[Run]]) -> Table:
    header = ["finetuned with", *(f"{title} [%]" for title in _MEANS.values())]
    with_cost = any(run.spent for runs in grouped.values() for run in runs)
    if with_cost:
        header += ["cost [forward passes per image]", "steps", "time [s]", "of which synthesis"]
    rows = []
    for method, runs in grouped.items():
        row = [method, *(_mean_std([run.record["summary"].get(key) for run in runs]) for key in _MEANS)]
        if with_cost:
            row += [
                _mean_std([run.spent.get("forward_passes") for run in runs], digits=0, deviation=False),
                _mean_std([run.spent.get("steps") for run in runs], digits=0, deviation=False),
                _mean_std([run.spent.get("seconds") for run in runs], digits=0),
                _mean_std([run.spent.get("synthesis_percent") for run in runs], digits=0, deviation=False, unit=" %"),
            ]
        rows.append(row)
    caption = (
        "Mean ± standard deviation over seeds. Under attack: mean over FGSM and PGD at every radius. Corrupted: mean "
        "over corruptions and their severities."
    )
    if with_cost:
        caption += (
            " Cost: a forward pass counts 1, a backward pass 1 for the inputs and 1 for the weights. Synthesis: time "
            "spent on making noise or attacking."
        )
    return Table(header, rows, caption)


def _overview(grouped: Mapping[str, Sequence[Run]]) -> Iterator[Block]:
    """The figure for the first page of a project: PGD over the radius, and the means of the headline."""
    protocol = next(iter(grouped.values()))[0].record["protocol"]
    series = _over_radius(grouped, "pgd")
    summaries = {method: [run.record["summary"] for run in runs] for method, runs in grouped.items()}
    every = [summary for of_method in summaries.values() for summary in of_method]
    means = {key: title for key, title in _MEANS.items() if all(summary.get(key) is not None for summary in every)}
    if len(series) < max(2, len(grouped)) or not means:
        return
    yield overview(
        f"PGD, {protocol['steps']} steps",
        series,
        protocol["norm"],
        [title.removesuffix(", mean") for title in means.values()],
        {method: [_moments([s[key] for s in of_method]) for key in means] for method, of_method in summaries.items()},
        "Left: accuracy over the radius of the attack (0: clean). Right: the first columns of the table. Whiskers: "
        "standard deviation over seeds.",
    )


def _claims_section(grouped: Mapping[str, Sequence[Run]]) -> Iterator[Block]:
    claims = _claims(grouped)
    if not claims:
        yield Paragraph(
            "Nothing to compare: claims need finetuning runs with a nullspace augmentation and with a baseline (clean "
            "only, random noise, adversarial training) of the same seed."
        )
        return
    yield Paragraph(
        "Differences in points of accuracy, paired by seed: mean, and with three or more seeds its standard error. A "
        "statement holds, or does not, if the 95 % confidence interval (Student's t) is on one side."
    )
    for outcome, title, kind in _OUTCOMES:
        found = sentences(claims, outcome)
        if found:
            yield Heading(title, 3)
            yield Bullets(found, kind)
    tested = sum(claim.outcome != "untested" for claim in claims)
    if tested:
        yield Paragraph(
            "Seeds vary the pretrained weights, the order of the images and the noise; the test images stay the same, "
            "so the intervals do not cover other images, models or data. "
            f"With {tested} statements tested at 95 %, about {max(1, round(tested / 20))} may be wrong by chance."
        )
    yield Details("Every difference with its interval", [_differences(claims)])


def _differences(claims: Sequence[Claim]) -> Table:
    rows = []
    for claim in claims:
        found = claim.comparison
        above = sum(difference > 0 for difference in found.differences)
        seeds = f"{above} of {len(found.differences)}"
        rows.append([found.method, found.other, MEASURES[found.measure], claim.numbers(), claim.interval(), seeds])
    header = ["method", "against", "accuracy", "difference [points]", "95 % interval", "seeds above 0"]
    return Table(header, rows, text_columns=3)


def _claims(grouped: Mapping[str, Sequence[Run]]) -> list[Claim]:
    first = {method: runs[0] for method, runs in grouped.items()}
    kinds = {method: run.config.get("augment") for method, run in first.items()}
    names = {method: phrase(run) for method, run in first.items()}
    clean = next((method for method, kind in kinds.items() if kind == "none"), None)
    return make_claims(
        scores(grouped),
        {method: names[method] for method, kind in kinds.items() if kind in _CLAIMANTS},
        {method: names[method] for method, kind in kinds.items() if kind in _BASELINES},
        clean,
    )


def _attack_figure(grouped: Mapping[str, Sequence[Run]]) -> Iterator[Block]:
    panels: dict[str, Series] = {}
    protocol = next(iter(grouped.values()))[0].record["protocol"]
    for suite in ("fgsm", "pgd", "apgd"):
        series = _over_radius(grouped, suite)
        if series:
            panels[suite.upper() if suite == "fgsm" else f"{suite.upper()}, {protocol['steps']} steps"] = series
    if not panels:
        yield Paragraph("No attack was run.")
        return
    yield accuracy_over_eps(
        panels,
        protocol["norm"],
        "Accuracy over the radius of the attack (0: clean). Whiskers: standard deviation over seeds.",
    )


def _over_radius(grouped: Mapping[str, Sequence[Run]], suite: str) -> Series:
    """Accuracy of the methods over the radii that all runs of a method have."""
    series = {}
    for method, runs in grouped.items():
        tables = [_radii(run.record, suite) for run in runs]
        shared = [radius for radius in tables[0] if all(radius in table for table in tables)]
        points = [(radius, *_moments([table[radius] for table in tables])) for radius in shared]
        if points:
            series[method] = points
    return series


def _corruption_figure(grouped: Mapping[str, Sequence[Run]]) -> Iterator[Block]:
    tables = {
        method: [run.record["results"].get("corruptions", {}) for run in runs] for method, runs in grouped.items()
    }
    every = [table for of_method in tables.values() for table in of_method]
    names = [name for name in every[0] if all(name in table for table in every)]
    if not names:
        yield Paragraph("No corruption was measured for every model.")
        return
    yield corruption_bars(
        names,
        {
            method: [_moments([statistics.fmean(table[name].values()) for table in of_method]) for name in names]
            for method, of_method in tables.items()
        },
        "Accuracy under each corruption, mean over its severities. Whiskers: standard deviation over seeds.",
    )


def _full_table(grouped: Mapping[str, Sequence[Run]]) -> Table:
    flat = {method: [dict(_flat(run.record["results"])) for run in runs] for method, runs in grouped.items()}
    labels = list(dict.fromkeys(label for tables in flat.values() for table in tables for label in table))
    rows = [
        [label, *(_mean_std([table.get(label) for table in tables]) for tables in flat.values())] for label in labels
    ]
    return Table(["", *grouped], rows, "Mean ± standard deviation over seeds.")


def _flat(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if "clean" in results:
        yield "clean", results["clean"]
    for suite in BALL_ATTACKS:
        for key, value in results.get(suite, {}).items():
            yield f"{suite.upper().replace('_', '-')} {key}", value
    for suite in ("cw", "patch", *FOLDER_SUITES):
        if isinstance(results.get(suite), float):
            yield suite, results[suite]
    for which, value in results.get("noise", {}).items():
        yield f"with noise, {which}", value
    for suite, title in (("corruptions", ""), ("imagenet-c", "imagenet-c "), ("cifar10-c", "cifar10-c ")):
        for name, table in results.get(suite, {}).items():
            for severity, value in table.items():
                yield f"{title}{name}, severity {severity}", value


def _provenance(
    runs: Sequence[Run], grouped: Mapping[str, Sequence[Run]], demo: Mapping[str, Any] | None
) -> Iterator[Block]:
    protocol = runs[0].record["protocol"]
    origin = protocol.get("provenance", {})
    ball = "L∞" if protocol["norm"] == "linf" else "L2"
    yield Bullets(
        [
            f"Evaluation: {_image_counts(protocol)} images ({protocol['subset']}, `{protocol['data']}`), attacks in "
            f"the {ball} norm, PGD with {protocol['steps']} steps of {protocol['step_size']}, "
            f"{_count(protocol['restarts'], 'restart')}, random start; seed {protocol['seed']}.",
            f"Attacked: {protocol.get('attacked', 'all images, to the last step')}.",
            f"Corruptions: {protocol['corruption_source']}{_size(protocol.get('corruption_size'))}; severities "
            f"{', '.join(map(str, protocol['severities']))}.",
            f"Weights evaluated in {protocol['dtype']} on {origin.get('device_name', 'an unknown device')}.",
            f"fastnull {origin.get('fastnull')} (commit {origin.get('commit') or 'unknown'}), "
            f"torch {origin.get('torch')}, timm {origin.get('timm')}, Python {origin.get('python')}; "
            f"{origin.get('date')}.",
        ]
    )
    trained = {method: group[0] for method, group in grouped.items() if group[0].config}
    if trained:
        yield Heading("Settings of the methods", 3)
        yield _settings_table(trained)
    if demo:
        yield Paragraph(
            "The last weights are evaluated. Neither test images nor held-out images select epochs or settings in this "
            "run. How the settings were chosen is described in docs/recipe.md."
        )
        yield Heading("Reproduce it", 3)
        yield Code(demo["command"])


def _size(pixels: int | None) -> str:
    return "" if pixels is None else f", at {pixels}x{pixels} pixels before resizing"


def _settings_table(trained: Mapping[str, Run]) -> Table:
    rows = []
    for method, run in trained.items():
        config, noise, plan = run.config, run.settings.get("synthesis") or {}, run.settings.get("plan", {})
        if config["augment"] in ATTACKS:
            how = f"β {config['trades_beta']:g}, " if config["augment"] == "trades" else ""
            how += (
                f"PGD-{config['attack_steps']}, radius {_in_255(config['attack_eps'])}, "
                f"step {_in_255(config['attack_step_size'])}"
            )
        elif config["augment"] == "none":
            how = "none"
        else:
            how = _noise_settings(noise, config["augment"], config["site"])
        if config.get("start_fraction"):
            how += f"; weights averaged with {config['start_fraction']:g} of the start"
        influence = f"{run.spent['influence']:.2g}" if "influence" in run.spent else "–"
        cost, epochs = str(plan.get("step_cost", "–")), str(plan.get("epochs", config["epochs"]))
        rate = "–" if config["lr"] is None else f"{config['lr']:g}"
        optimiser = f"{config['opt']}, {rate}, batch {plan.get('batch_size', config['batch_size'])}"
        rows.append([method, how, influence, cost, epochs, optimiser])
    return Table(
        ["finetuned with", "noise", "influence", "cost of a step", "epochs", "optimiser, rate, batch"],
        rows,
        "Influence: of the noise in the second half of the training (first seed); its target is ε. Cost of a step: "
        "forward passes per image, without the synthesis of universal noise once per epoch.",
        text_columns=2,
    )


def _noise_settings(noise: Mapping[str, Any], augment: str, site: str) -> str:
    def length(name: str) -> str:
        return _in_255(noise[name]) if site == "pixels" else f"{noise[name]:g}"

    # runs of earlier versions have no ranges, or call them spreads, and no smooth field
    limit_range = noise.get("limit_range") or noise.get("limit_spread")
    step_range = noise.get("step_range") or noise.get("step_spread")
    how = f"start {'up to ' if limit_range else ''}±{length('limit')}"
    if noise.get("smooth_limit"):
        how += f", smooth field up to ±{length('smooth_limit')}"
    if noise.get("contrast"):
        how += f" at contrast {noise['contrast']:g}" if site == "pixels" else " (unit: spread of the tokens)"
    if augment == "random":
        return how
    how += f", ε {noise['eps']:g}"
    steps = 1 if augment == "free" else noise.get("steps")
    if steps:
        how += f", {steps} step{'s' if steps > 1 else ''}"
        if noise.get("step_size"):
            how += f" of {'up to ' if step_range else ''}{length('step_size')}"
    return how


def _demo_of(sources: Sequence[str | os.PathLike[str]]) -> dict[str, Any] | None:
    path = Path(sources[0]) / DEMO
    if len(sources) != 1 or not path.is_file():
        return None
    demo = read_json(path)
    try:
        for name, kind in {"quick": bool, "parameters": int, "command": str, "settings": Mapping[str, Any]}.items():
            as_type(name, demo.get(name), kind)
        as_type("settings['budget']", demo["settings"].get("budget"), float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a record of a demo: {error}") from error
    return demo


def _about_comparison(sources: Sequence[str | os.PathLike[str]]) -> list[str]:
    path = Path(sources[0]) / COMPARISON
    if len(sources) != 1 or not path.is_file():
        return []
    try:
        return describe(read_json(path))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no record of a comparison: {error!r}") from error


def _illustrations_of(sources: Sequence[str | os.PathLike[str]]) -> list[Figure]:
    from fastnull.report.illustrations import FILE, Illustrations

    path = Path(sources[0]) / FILE
    if len(sources) != 1 or not path.is_file():
        return []
    try:
        return Illustrations.load(path).figures()
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} holds no illustrations of a report: {error!r}") from error


def _radii(record: Mapping[str, Any], suite: str) -> dict[float, float]:
    """Radius on the axis (8 for "8/255", 0.5 for an l2 radius of 0.5) → accuracy; 0 is the clean one."""
    results, in_255 = record["results"], record["protocol"]["norm"] == "linf"
    table = {}
    for key, value in results.get(suite, {}).items():
        number, slash, _ = key.partition("/")
        table[float(number) * (255 if in_255 and not slash else 1)] = value
    return {0.0: results["clean"], **table} if table and "clean" in results else table


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _mean_std(values: Sequence[float | None], *, digits: int = 1, deviation: bool = True, unit: str = "") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean, std = _moments(known)
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if len(known) > 1 and deviation else "") + unit


def _in_255(value: float) -> str:
    return f"{value * 255:.3g}/255"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
