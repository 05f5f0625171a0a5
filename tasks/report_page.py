"""report.html: one self-contained page. The geometry of its charts is computed here; the template only places it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

LABELS = {"unpruned": "Unpruned", "pruned": "Pruned", "sft": "SFT", "sdd": "SDD (self-data distilled)"}
SHORT = {**LABELS, "sdd": "SDD"}
CHARTED = ("pruned", "sft", "sdd")
TASKS = {
    "arc_challenge": "ARC-C", "hellaswag": "HellaSwag", "truthfulqa_mc2": "TruthfulQA", "mmlu": "MMLU",
    "winogrande": "WinoGrande", "gsm8k": "GSM8K",
}  # fmt: skip
OUTCOMES = {"accepted": "accepted", "kept_original": "kept original", "failed": "failed"}
NONE = "–"
ABSENT: dict[str, Any] = {
    "note": "", "distances": {}, "losses": {}, "examples": [], "settings": "",
    "shots": {}, "machine": "", "links": {}, "warnings": [],
}  # fmt: skip
# Anchors of cividis, which reads alike with and without a colour vision deficiency.
CIVIDIS = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))


def render(report: dict[str, Any], details: dict[str, Any]) -> str:
    """The page as HTML. Every text in it is escaped by the template."""
    details = {**ABSENT, **{key: value for key, value in details.items() if value is not None}}
    columns = task_columns(report["models"], details["shots"])
    span, distances = report["span"], details["distances"]
    page = _environment().get_template("report.html.j2").render(
        report=report, details=details, labels=LABELS, short=SHORT, charted=CHARTED, none=NONE,
        figures=figures(report), columns=columns, rows=model_rows(report["models"], columns),
        bars=recovery_bars(report["models"], columns), heat=heatmap(distances, span),
        nearest=nearest_spans(distances, span), losses=loss_chart(details["losses"]),
        arms=arm_rows(report.get("training", {}), details["losses"]),
        outcomes=outcome_segments(report["dataset"]), reasons=reason_rows(report["dataset"]),
        outcome_labels=OUTCOMES, beyond=beyond_the_average(report),
    )  # fmt: skip
    return page.encode("utf-8", "replace").decode("utf-8")  # lone surrogates in a model's text can't be written


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(score=score, percent=percent, fixed=fixed, whole=whole, interval=interval)
    return environment


# Numbers


def number(value: Any) -> float | None:
    """The value as a finite float, else None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def fixed(value: Any, digits: int = 1) -> str:
    known = number(value)
    return NONE if known is None else f"{known:,.{digits}f}"


def score(value: Any) -> str:
    return fixed(value, 3)


def percent(value: Any) -> str:
    return NONE if number(value) is None else f"{fixed(value, 1)} %"


def whole(value: Any) -> str:
    return fixed(value, 0)


def interval(bounds: Any) -> str:
    """[low, high] with one decimal; empty without two numbers, or if both are the same."""
    known = [number(bound) for bound in bounds or ()]
    low, high = known if len(known) == 2 else (None, None)
    if low is None or high is None or math.isclose(low, high):
        return ""
    return f"[{fixed(low)}, {fixed(high)}]"


def short_count(value: Any) -> str:
    """134515008 -> 134.5 M."""
    known = number(value)
    if known is None:
        return NONE
    size, unit = next(((s, u) for s, u in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if known >= s), (1.0, ""))
    return f"{known / size:.1f} {unit}" if unit else whole(known)


def shrunk(before: Any, after: Any) -> str:
    """Both counts, with the unit once if they share it."""
    first, last = short_count(before), short_count(after)
    return f"{first.split()[0] if first.split()[1:] == last.split()[1:] else first} → {last}"


def share(part: Any, all_of: Any) -> float | None:
    """part as percent of all_of; None where that is 0 or unknown."""
    known, base = number(part), number(all_of)
    return 100 * known / base if known is not None and base else None


def place(value: float, low: float, high: float, start: float, end: float) -> float:
    """value of low..high on the pixels start..end."""
    return round(start + (value - low) / ((high - low) or 1) * (end - start), 1)


def tick_values(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low..high."""
    rough = ((high - low) or 1) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(step * i, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


# Head and table


@dataclass(frozen=True)
class Figure:
    label: str
    value: str
    note: str
    role: str = ""


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """The row of headline figures."""
    models = {model["role"]: model for model in report["models"]}
    recovered = [
        Figure(f"{SHORT[role]} recovered", percent(model.get("recovered_percent")), _certainty(model), role)
        for role in ("sdd", "sft", "pruned")
        for model in [models.get(role, {})]
    ]
    before, after = report["model"]["parameters"], report["pruned"]["parameters"]
    smaller = share(before - after, before)
    return [
        *recovered,
        Figure("Parameters", shrunk(before, after), f"{percent(smaller)} fewer"),
        Figure("FLOPs saved", percent(report["pruned"]["flops_saved_percent"]), "of the matrix FLOPs a token"),
    ]


def _certainty(model: Mapping[str, Any]) -> str:
    bounds = interval(model.get("interval"))
    return f"95 % interval {bounds}" if bounds else model.get("recovery_note") or ""


@dataclass(frozen=True)
class Column:
    """A task: how it was measured, said below its name."""

    task: str
    name: str
    metric: str
    shots: str
    leaderboard: str
    items: str


def task_columns(models: Sequence[Mapping[str, Any]], shots: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """Every task that any model was scored on, in the order of its first mention."""
    scores: dict[str, Mapping[str, Any]] = {}
    for model in models:
        for task, value in model["scores"].items():
            scores.setdefault(task, value)
    columns = []
    for task, value in scores.items():
        used, usual = (shots.get(task, {}).get(key) for key in ("shots", "leaderboard_shots"))
        columns.append(
            Column(
                task, TASKS.get(task, task), str(value.get("metric", "")),
                "" if used is None else f"{used}-shot",
                f"leaderboard: {usual}" if usual is not None and usual != used else "",
                f"{whole(value.get('items'))} items",
            )
        )  # fmt: skip
    return columns


@dataclass(frozen=True)
class ModelRow:
    role: str
    label: str
    artifact: str
    cells: list[tuple[str, str]]  # value, standard error
    average: str
    recovered: str
    interval: str


def model_rows(models: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[ModelRow]:
    rows = []
    for model in models:
        scores = [model["scores"].get(column.task, {}) for column in columns]
        rows.append(
            ModelRow(
                model["role"], LABELS.get(model["role"], model["role"]), model.get("artifact") or "",
                [(score(cell.get("value")), score(cell.get("stderr"))) for cell in scores],
                score(model.get("average")), percent(model.get("recovered_percent")), interval(model.get("interval")),
            )
        )  # fmt: skip
    return rows


# Measures beside the average

BEYOND = (  # field, heading, unit, digits, field of an interval
    ("chance_corrected_percent", "Recovered above chance", "% [95 % interval]", 1, "chance_corrected_interval"),
    ("lambada", "LAMBADA", "accuracy", 3, ""),
    ("perplexity", "Perplexity", "held-out text", 2, ""),
    ("kl_to_unpruned", "KL to unpruned", "nats a token", 3, ""),
    ("own_logprob", "Own log-probability", "nats a token, under the unpruned", 3, ""),
)  # fmt: skip


@dataclass(frozen=True)
class Beyond:
    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[tuple[str, str]]]]  # role, (value, interval) of each column
    left_out: list[str]
    notes: list[str]  # what is not known of a measure, and why


def beyond_the_average(report: Mapping[str, Any]) -> Beyond:
    """Those of the further measures that any model has."""
    models = report["models"]
    taken = [measure for measure in BEYOND if any(model.get(measure[0]) is not None for model in models)]

    def cells(model: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [(fixed(model.get(name), digits), interval(model.get(bounds))) for name, _, _, digits, bounds in taken]

    left_out = [TASKS.get(task, task) for task in report.get("chance", {}).get("left_out", [])]
    columns = [(heading, unit) for _, heading, unit, _, _ in taken]
    notes = {note: None for model in models if (note := model.get("chance_corrected_note"))}  # in order, each once
    return Beyond(columns, [(model["role"], cells(model)) for model in models], left_out, [*notes])


# Recovery of each task

BARS_WIDTH, BARS_TOP, BARS_BASE, BARS_LEFT = 1060, 16, 230, 44


@dataclass(frozen=True)
class Bar:
    role: str
    x: float
    y: float
    width: float
    height: float
    label: str
    title: str


@dataclass(frozen=True)
class Group:
    middle: float
    name: str
    unpruned: str
    bars: list[Bar]
    problem: str = ""  # why there is no ratio


@dataclass(frozen=True)
class Bars:
    groups: list[Group]
    ticks: list[Tick]
    hundred: float
    width: float = BARS_WIDTH
    left: float = BARS_LEFT
    base: float = BARS_BASE


def recovery_bars(models: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Bars:
    """Bars of every charted model for every task and for the average, as percent of the unpruned score."""
    values = {model["role"]: model for model in models}
    entries = [(column.name, {r: m["scores"].get(column.task, {}).get("value") for r, m in values.items()})
               for column in columns]  # fmt: skip
    entries.append(("Average", {role: model.get("average") for role, model in values.items()}))
    shares = [share(scores.get(role), scores.get("unpruned")) for _, scores in entries for role in CHARTED]
    top = max([110.0, *(known * 1.05 for known in shares if known is not None)])
    step = (BARS_WIDTH - BARS_LEFT) / len(entries)
    groups = [
        _group(name, scores, BARS_LEFT + step * (index + 0.5), step, top)
        for index, (name, scores) in enumerate(entries)
    ]
    ticks = [Tick(_bar_y(value, top), f"{value:.0f}") for value in tick_values(0, top)]
    return Bars(groups, ticks, _bar_y(100, top))


def _bar_y(value: float, top: float) -> float:
    return place(value, 0, top, BARS_BASE, BARS_TOP)


def _group(name: str, scores: Mapping[str, Any], middle: float, step: float, top: float) -> Group:
    unpruned, width = number(scores.get("unpruned")), min(36.0, step * 0.27)
    if not unpruned:
        problem = "unpruned scores 0" if unpruned == 0 else "no unpruned score"
        return Group(round(middle, 1), name, score(unpruned), [], problem)
    bars = []
    for index, role in enumerate(CHARTED):
        if (ratio := share(scores.get(role), unpruned)) is None:
            continue
        x, y = round(middle + (index - len(CHARTED) / 2) * (width + 3), 1), _bar_y(ratio, top)
        title = f"{SHORT[role]}, {name}: {score(scores[role])} of {score(unpruned)} = {percent(ratio)}"
        bars.append(Bar(role, x, y, round(width, 1), round(BARS_BASE - y, 1), fixed(ratio), title))
    return Group(round(middle, 1), name, score(unpruned), bars)


# Distances

HEAT_LEFT, HEAT_TOP, HEAT_WIDTH, HEAT_HEIGHT = 48, 10, 620, 380


@dataclass(frozen=True)
class Cell:
    start: int
    count: int
    x: float
    y: float
    fill: str
    title: str
    chosen: bool
    best: bool  # the smallest distance of its count


@dataclass(frozen=True)
class Heatmap:
    cells: list[Cell]
    chosen: tuple[float, float]
    across: float  # a cell's size
    down: float
    starts: list[Tick]
    counts: list[Tick]
    legend: list[tuple[float, str]]  # x, colour
    low: str
    high: str


def heatmap(distances: Mapping[str, Any], span: Mapping[str, Any]) -> Heatmap | None:
    """One cell for every span; counts grow upwards, which leaves the upper right free for the legend."""
    mean, std = distances.get("mean") or [], distances.get("std") or []
    known = dict(_spans(mean))
    if not known:
        return None
    layers, low, high = len(mean), min(known.values()), max(known.values())
    across, down = HEAT_WIDTH / layers, HEAT_HEIGHT / layers
    best: dict[int, float] = {}
    for (count, _), value in known.items():
        best[count] = min(value, best.get(count, value))
    cells = [
        Cell(
            start, count, round(HEAT_LEFT + start * across, 1), round(HEAT_TOP + (layers - count) * down, 1),
            cividis(place(value, low, high, 0, 100) / 100), _span_title(start, count, value, _at(std, count, start)),
            (start, count) == (span["start"], span["count"]), value == best[count],
        )
        for (count, start), value in known.items()
    ]  # fmt: skip
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if layers / step <= 16)
    return Heatmap(
        cells, (round(HEAT_LEFT + span["start"] * across, 1), round(HEAT_TOP + (layers - span["count"]) * down, 1)),
        round(across, 2), round(down, 2),
        [Tick(round(HEAT_LEFT + (at + 0.5) * across, 1), str(at)) for at in range(0, layers, every)],
        [Tick(round(HEAT_TOP + (layers - at + 0.5) * down, 1), str(at)) for at in range(every, layers + 1, every)],
        [(i * 5.0, cividis(i / 35)) for i in range(36)], score(low), score(high),
    )  # fmt: skip


def cividis(level: float) -> str:
    """The colour for 0..1, dark to bright."""
    at = min(max(level, 0.0), 1.0) * (len(CIVIDIS) - 1)
    index = min(int(at), len(CIVIDIS) - 2)
    mixed = (round(a + (b - a) * (at - index)) for a, b in zip(CIVIDIS[index], CIVIDIS[index + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


@dataclass(frozen=True)
class Near:
    rank: int
    blocks: str
    distance: str
    error: str
    chosen: bool


def nearest_spans(distances: Mapping[str, Any], span: Mapping[str, Any], shown: int = 5) -> list[Near]:
    """The starts with the smallest distances for the chosen count, and the chosen one wherever it ranks."""
    count, std = span["count"], distances.get("std") or []
    ranked = sorted((value, start) for (n, start), value in _spans(distances.get("mean") or []) if n == count)
    return [
        Near(rank, blocks(start, count), score(value), score(_at(std, count, start)), start == span["start"])
        for rank, (value, start) in enumerate(ranked, 1)
        if rank <= shown or start == span["start"]
    ]


def blocks(start: int, count: int) -> str:
    return str(start) if count == 1 else f"{start}-{start + count - 1}"


def _spans(mean: Sequence[Sequence[Any]]) -> Iterable[tuple[tuple[int, int], float]]:
    """((count, start), distance) of every span that was measured."""
    for count, row in enumerate(mean, 1):
        for start, value in enumerate(row):
            if (known := number(value)) is not None:
                yield (count, start), known


def _at(table: Sequence[Sequence[Any]], count: int, start: int) -> float | None:
    row = table[count - 1] if count <= len(table) else []
    return number(row[start]) if start < len(row) else None


def _span_title(start: int, count: int, value: float, error: float | None) -> str:
    spread = "" if error is None else f" ± {score(error)}"
    return f"n = {count}, blocks {blocks(start, count)}: {score(value)}{spread}"


# Training

LOSS_WIDTH, LOSS_LEFT, LOSS_TOP, LOSS_BASE = 700, 44, 12, 250


@dataclass(frozen=True)
class Curve:
    arm: str
    line: str  # points of the smoothed polyline
    dots: str  # path of the raw points; one element, however many steps


@dataclass(frozen=True)
class LossChart:
    curves: list[Curve]
    steps: list[Tick]
    losses: list[Tick]
    width: float = LOSS_WIDTH
    left: float = LOSS_LEFT
    base: float = LOSS_BASE


def loss_chart(losses: Mapping[str, Sequence[Mapping[str, Any]]]) -> LossChart | None:
    arms = {arm: points for arm in ("sft", "sdd") if (points := _points(losses.get(arm) or []))}
    if not arms:
        return None
    steps, values = zip(*(point for points in arms.values() for point in points), strict=True)
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    room = (high - low) * 0.05 or 0.5
    low, high = max(0.0, low - room), high + room

    def across(step: float) -> float:
        return place(step, left, right, LOSS_LEFT + 6, LOSS_WIDTH - 18)

    def down(loss: float) -> float:
        return place(loss, low, high, LOSS_BASE, LOSS_TOP)

    curves = [
        Curve(
            arm,
            " ".join(f"{across(step)},{down(loss)}" for step, loss in smooth(points)),
            "".join(f"M{across(step)} {down(loss)}h0" for step, loss in points),
        )
        for arm, points in arms.items()
    ]
    ticks = [value for value in tick_values(left, right, 8) if value == int(value)]
    shown = tick_values(low, high)
    digits = max(1, -math.floor(math.log10(shown[1] - shown[0]))) if len(shown) > 1 else 2
    return LossChart(
        curves, [Tick(across(at), f"{at:.0f}") for at in ticks], [Tick(down(at), fixed(at, digits)) for at in shown]
    )


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a centred window of about an eighth of the points; narrower at the start, where the loss falls fast."""
    reach = max(1, len(points) // 16)
    result = []
    for index, (step, _) in enumerate(points):
        near = min(reach, index)
        window = [loss for _, loss in points[index - near : index + near + 1]]
        result.append((step, sum(window) / len(window)))
    return result


def _points(log: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    pairs = ((number(entry.get("step")), number(entry.get("loss"))) for entry in log)
    return [(step, loss) for step, loss in pairs if step is not None and loss is not None]


def arm_rows(
    training: Mapping[str, Mapping[str, Any]], losses: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[tuple[str, str, str]]:
    """label, SFT's value, SDD's value."""
    fields = {
        "rows": "Rows", "validation_rows": "Validation rows", "trained_tokens": "Trained tokens (answers)",
        "tokens": "All tokens", "steps": "Steps", "too_long": "Rows left out, too long",
    }  # fmt: skip
    rows = [
        (label, *(whole(training.get(arm, {}).get(key)) for arm in ("sft", "sdd"))) for key, label in fields.items()
    ]
    if any("validation_loss" in counts for counts in training.values()):
        rows.append(
            ("Validation loss", *(score(training.get(arm, {}).get("validation_loss")) for arm in ("sft", "sdd")))
        )
    curves = [_points(losses.get(arm) or []) for arm in ("sft", "sdd")]
    ends = [
        (f"Mean loss, {words} tenth", *(score(_tenth_mean(points, words == "last")) for points in curves))
        for words in ("first", "last")
    ]
    return [(label, sft, sdd) for label, sft, sdd in (*rows, *ends)]


def _tenth_mean(points: Sequence[tuple[float, float]], last: bool) -> float | None:
    size = max(1, len(points) // 10)
    window = [loss for _, loss in (points[-size:] if last else points[:size])]
    return sum(window) / len(window) if window else None


# Dataset

OUTCOMES_WIDTH = 1060


@dataclass(frozen=True)
class Segment:
    outcome: str
    label: str
    rows: str
    share: str
    x: float
    width: float


def outcome_segments(dataset: Mapping[str, Any]) -> list[Segment]:
    """The parts of the stacked bar; empty without rows."""
    total, segments, x = dataset.get("rows") or 0, [], 0.0
    for outcome, label in OUTCOMES.items() if total else ():
        part = dataset.get(outcome) or 0
        width = part / total * OUTCOMES_WIDTH
        segments.append(Segment(outcome, label, whole(part), percent(share(part, total)), round(x, 1), round(width, 1)))
        x += width
    return segments


def reason_rows(dataset: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """reason, rows, share of all rows; the most frequent first."""
    reasons = sorted((dataset.get("reasons") or {}).items(), key=lambda entry: -entry[1])
    return [(reason, whole(rows), percent(share(rows, dataset.get("rows")))) for reason, rows in reasons]
