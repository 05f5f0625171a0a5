"""report.html: what stands in it, that nothing is loaded from elsewhere, and that missing pieces are said."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from tasks.report_page import heatmap, render, smooth, tick_values

VOID = {"meta", "link", "br", "hr", "img", "input", "source", "col"}
NAMES = ["arc_challenge", "hellaswag", "truthfulqa_mc2", "mmlu", "winogrande", "gsm8k"]
VALUES = {
    "unpruned": [0.28, 0.43, 0.42, 0.26, 0.53, 0.02],
    "pruned": [0.23, 0.31, 0.45, 0.25, 0.51, 0.0],
    "sft": [0.25, 0.36, 0.43, 0.25, 0.52, 0.01],
    "sdd": [0.257, 0.37, 0.42, 0.26, 0.52, 0.03],
}
RECOVERED = {
    "unpruned": (100.0, [100.0, 100.0]), "pruned": (90.2, [86.1, 94.4]), "sft": (93.8, [90.2, 97.5]),
    "sdd": (95.72, [92.04, 99.31]),
}  # fmt: skip


class Balance(HTMLParser):
    """Collects the tags and fails on one that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> at {self.getpos()} inside {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def having(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]


def parsed(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def text_of(page: str, section: str = "") -> str:
    """The visible text, runs of white space made one, of the page or of the section with this id."""
    if section:
        page = page[page.index(f'<section id="{section}">') :]
        page = page[: page.index("</section>") + len("</section>")]
    return re.sub(r"\s+", " ", " ".join(parsed(page).text))


def distances(layers: int) -> dict[str, Any]:
    mean = [
        [
            None if start + count > layers else 0.02 * count + 0.3 * ((start + count / 2) / layers - 0.53) ** 2
            for start in range(layers)
        ]
        for count in range(1, layers + 1)
    ]
    return {"mean": mean, "std": [[None if value is None else value / 10 for value in row] for row in mean]}


def losses(steps: int, base: float) -> list[dict[str, float]]:
    return [
        {"step": step, "loss": base + math.exp(-step / 8) + 0.12 * math.sin(step * 2.7)} for step in range(1, steps + 1)
    ]


def model(role: str) -> dict[str, Any]:
    scores = {
        name: {
            "metric": "exact_match" if name == "gsm8k" else "acc_norm", "value": value,
            "stderr": 0.0213, "items": 200 if name == "mmlu" else 100,
        }
        for name, value in zip(NAMES, VALUES[role], strict=True)
    }  # fmt: skip
    recovered, interval = RECOVERED[role]
    return {
        "role": role, "artifact": f"s3://artifacts/{role}/{'ab' * 32}", "scores": scores,
        "average": sum(VALUES[role]) / 6, "recovered_percent": recovered, "interval": interval,
    }  # fmt: skip


def stage(name: str, cache: str, seconds: float) -> dict[str, Any]:
    kind, key = name.split()[0], "0123456789abcdef" * 4
    return {
        "stage": kind, "key": key, "uri": f"s3://artifacts/{kind}/{key}", "cache": cache,
        "seconds": seconds, "name": name,
    }  # fmt: skip


def sample_report() -> dict[str, Any]:
    fitted = {"rows": 295, "trained_tokens": 20480, "tokens": 30111, "steps": 38, "too_long": 0}
    return {
        "schema": 1,
        "run": {
            "preset": "demo-cpu", "flow_run_id": "3f0c9a44-2d1e-4a52-9f31-0b6f5f8f7c10",
            "started": "2026-11-24T12:00:00+00:00", "seconds": 812.3, "code_commit": "1a2b3c4d5e6f",
        },
        "model": {"id": "SmolLM2-135M-Instruct", "revision": "7e27bd9f", "layers": 30, "parameters": 134515008},
        "span": {
            "start": 13, "count": 6, "removed": [13, 14, 15, 16, 17, 18], "distance": 0.1234, "metric": "angular",
            "words": "removes blocks 13-18 of 0-29",
        },
        "pruned": {"layers": 24, "parameters": 113276736, "flops_saved_percent": 15.84, "bytes": 226553472},
        "dataset": {
            "rows": 300, "accepted": 220, "kept_original": 75, "failed": 5,
            "reasons": {"unfinished": 20, "other final answer": 40, "copied": 15, "empty": 5},
        },
        "models": [model(role) for role in VALUES],
        "difference": {
            "value": 0.004, "interval": [-0.01, 0.02],
            "statement": "SDD and SFT cannot be told apart at 95 % (SDD - SFT: +0.0040).",
        },
        "training": {"sft": fitted, "sdd": {**fitted, "trained_tokens": 24576, "too_long": 3}},
        "stages": [
            stage("model", "hit", 0.0), stage("score", "miss", 31.26), stage("distil", "miss", 402.11),
            stage("finetune sdd", "miss", 120.5), stage("evaluate sdd gsm8k", "miss", 1042.0),
        ],
    }  # fmt: skip


def sample_details() -> dict[str, Any]:
    example = {
        "id": "math-000003", "prompt": "Natalia sold 48 clips in April and half as many in May. How many in all?",
        "reference": "48/2 = 24 clips in May.\n48 + 24 = 72.\n#### 72",
        "rewrite": "In May she sold 48 / 2 = 24 clips.\nTogether that is 48 + 24 = 72 clips.\n\n#### 72",
        "outcome": "accepted", "reason": "",
    }  # fmt: skip
    kept = {**example, "id": "math-000009", "outcome": "kept_original", "reason": "other final answer"}
    failed = {**example, "id": "open-000001", "rewrite": None, "outcome": "failed", "reason": "empty"}
    return {
        "note": "A demonstration on two cores: the scores compare the four models with each other only.",
        "distances": distances(30),
        "losses": {"sft": losses(38, 1.4), "sdd": losses(37, 0.7)},
        "examples": [example, {**example, "id": "math-000004"}, kept, failed],
        "settings": "name: demo-cpu\nprune:\n  blocks: 6\n",
        "shots": {name: {"shots": 5, "limit": 100, "leaderboard_shots": 25 if name[0] == "a" else 5} for name in NAMES},
        "machine": "Linux x86_64, 2 cores, torch 2.13.0",
        "links": {"sdd": "/srv/artifacts/merge/sdd", "sft": "/srv/artifacts/merge/sft"},
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    return sample_report()


@pytest.fixture
def details() -> dict[str, Any]:
    return sample_details()


def test_the_page_has_the_runs_numbers(report: dict[str, Any], details: dict[str, Any]) -> None:
    text = text_of(render(report, details))
    for expected in (
        "SmolLM2-135M-Instruct: 6 of 30 blocks removed", "preset demo-cpu · 2026-11-24 · 13.5 minutes",
        "134.5 → 113.3 M", "15.8 % fewer", "95.7 %", "95 % interval [92.0, 99.3]", details["note"],
        report["difference"]["statement"], "1a2b3c4d5e6f", "Linux x86_64, 2 cores",
        "3f0c9a44-2d1e-4a52-9f31-0b6f5f8f7c10",
    ):  # fmt: skip
        assert expected in text
    assert render(report, details).index(details["note"]) < render(report, details).index('id="recovery"')


def test_the_recovery_table(report: dict[str, Any], details: dict[str, Any]) -> None:
    text = text_of(render(report, details), "recovery")
    assert "ARC-C acc_norm 5-shot leaderboard: 25 100 items HellaSwag acc_norm 5-shot 100 items" in text
    assert "SDD (self-data distilled) 0.257 ± 0.021 0.370 ± 0.021" in text
    assert "0.309 95.7 % [92.0, 99.3]" in text  # average, recovered
    assert "100.0 % [" not in text  # the unpruned model's interval is no information
    assert "/srv/artifacts/merge/sdd" in text


def test_bars_are_percent_of_the_unpruned_score(report: dict[str, Any], details: dict[str, Any]) -> None:
    page = render(report, details)
    bars = parsed(page).having("bar")
    assert len(bars) == 3 * 7  # three models, six tasks and the average
    assert "SDD, ARC-C: 0.257 of 0.280 = 91.8 %" in page
    assert "SDD, GSM8K: 0.030 of 0.020 = 150.0 %" in page
    tallest = min(float(bar["y"] or 0) for bar in bars)
    assert tallest > 16  # the highest bar and its label stay inside the drawing
    assert all(float(bar["y"] or 0) + float(bar["height"] or 0) == pytest.approx(230) for bar in bars)


def test_a_task_that_the_unpruned_model_cannot_do_has_no_ratio(report: dict[str, Any], details: dict[str, Any]) -> None:
    report["models"][0]["scores"]["gsm8k"]["value"] = 0.0
    page = render(report, details)
    assert "no ratio: unpruned scores 0" in text_of(page, "tasks")
    assert len(parsed(page).having("bar")) == 3 * 6


def test_the_chosen_span_is_marked(report: dict[str, Any], details: dict[str, Any]) -> None:
    page = render(report, details)
    document = parsed(page)
    assert len(document.having("cell")) == 30 * 31 // 2
    [chosen] = document.having("chosen")[:1]
    assert (chosen["data-start"], chosen["data-count"]) == ("13", "6")
    outlines = [o for o in document.having("outline") if (o["x"], o["y"]) == (chosen["x"], chosen["y"])]
    assert [o["width"] for o in outlines] == ["20.67", "20.67"]
    assert float(chosen["x"] or 0) == pytest.approx(48 + 13 * 620 / 30, abs=0.06)
    mean = details["distances"]["mean"][5][13]
    assert f"<title>n = 6, blocks 13-18: {mean:.3f} ± {mean / 10:.3f}</title>" in page
    assert "· removed 13-18" in text_of(page, "distances")


def test_one_cell_of_every_count_is_its_smallest(details: dict[str, Any], report: dict[str, Any]) -> None:
    heat = heatmap(details["distances"], report["span"])
    assert heat is not None
    best = {cell.count: cell.start for cell in heat.cells if cell.best}
    row = details["distances"]["mean"][5]
    assert best[6] == min(range(25), key=lambda start: row[start]) and len(best) == 30


def test_a_heatmap_of_80_blocks_stays_small(report: dict[str, Any], details: dict[str, Any]) -> None:
    page = render(report, {**details, "distances": distances(80)})
    assert page.count('class="cell') == 80 * 81 // 2
    assert len(page.encode()) < 1_000_000


def test_training_curves_and_what_was_trained_on(report: dict[str, Any], details: dict[str, Any]) -> None:
    page = render(report, details)
    document = parsed(page)
    lines = {line["class"]: str(line["points"]).split() for line in document.having("curve")}
    assert {name: len(points) for name, points in lines.items()} == {"curve sft": 38, "curve sdd": 37}
    assert [str(dots["d"]).count("M") for dots in document.having("dots")] == [38, 37]
    text = text_of(page, "training")
    assert "Trained tokens (answers) 20,480 24,576" in text and "Rows left out, too long 0 3" in text
    assert "Steps 38 38" in text


def test_the_datasets_rows(report: dict[str, Any], details: dict[str, Any]) -> None:
    page = render(report, details)
    text = text_of(page, "dataset")
    assert "accepted 220 (73.3 %)" in text and "kept original 75 (25.0 %)" in text and "failed 5 (1.7 %)" in text
    assert text.index("other final answer 40 13.3 %") < text.index("unfinished 20 6.7 %")
    widths = [float(part["width"] or 0) for part in parsed(page).having("part")]
    assert sum(widths) == pytest.approx(1060, abs=0.2) and widths[0] == pytest.approx(777.3)
    rows = re.findall(r"<details( open)?><summary><span class=\"pill (\w+)\"", page)
    assert rows == [(" open", "accepted"), (" open", "accepted"), ("", "kept_original"), ("", "failed")]
    assert "no rewriting" in text


def test_stages(report: dict[str, Any], details: dict[str, Any]) -> None:
    text = text_of(render(report, details), "stages")
    assert "score miss 31.3 0123456789ab s3://artifacts/score/0123" in text
    assert "evaluate sdd gsm8k miss 1,042.0" in text and "model hit 0.0" in text


def test_nothing_is_loaded_from_elsewhere(report: dict[str, Any], details: dict[str, Any]) -> None:
    page = render(report, details)
    document = parsed(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in document.tags}
    assert "url(" not in page and "@import" not in page
    links = [attributes.get("href") for tag, attributes in document.tags if tag == "a"]
    assert links == ["https://arxiv.org/abs/2410.09982"]
    assert len(re.findall(r"https?://", page)) == 1


@pytest.mark.parametrize("field", ["id", "prompt", "reference", "rewrite", "outcome", "reason"])
def test_text_of_a_row_is_escaped(report: dict[str, Any], details: dict[str, Any], field: str) -> None:
    details["examples"][0][field] = "<script>alert(1)</script>\"' onclick=x"
    page = render(report, details)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39; onclick=x" in page
    assert "script" not in {tag for tag, _ in parsed(page).tags}


def test_other_text_is_escaped(report: dict[str, Any], details: dict[str, Any]) -> None:
    evil = "</svg></pre><script>alert(1)</script>"
    report["dataset"]["reasons"] = {evil: 1}
    report["models"][0]["scores"][evil] = {"metric": evil, "value": 0.5, "stderr": 0.1, "items": 3}
    page = render(report, {**details, "settings": evil, "note": evil, "machine": evil})
    assert "<script" not in page
    parsed(page)
    assert page.count("&lt;script&gt;alert(1)") >= 6


def test_a_lone_surrogate_can_be_written(report: dict[str, Any], details: dict[str, Any]) -> None:
    details["examples"][0]["rewrite"] = "half a pair: \ud83d."
    assert "half a pair: ?." in render(report, details)


def test_no_losses(report: dict[str, Any], details: dict[str, Any]) -> None:
    page = render(report, {**details, "losses": {"sft": [], "sdd": []}})
    assert "No training losses were recorded." in text_of(page, "training")
    assert "Trained tokens (answers) 20,480 24,576" in text_of(page, "training")
    assert parsed(page).having("curve") == []


def test_one_step_in_one_arm(report: dict[str, Any], details: dict[str, Any]) -> None:
    page = render(report, {**details, "losses": {"sdd": [{"step": 1, "loss": 2.1}]}})
    [curve] = parsed(page).having("curve")
    assert curve["class"] == "curve sdd" and len(str(curve["points"]).split()) == 1
    assert "Mean loss, last tenth – 2.100" in text_of(page, "training")


def test_one_task(report: dict[str, Any], details: dict[str, Any]) -> None:
    for entry in report["models"]:
        entry["scores"] = {"winogrande": entry["scores"]["winogrande"]}
    page = render(report, details)
    assert len(parsed(page).having("bar")) == 3 * 2
    assert "SDD, WinoGrande: 0.520 of 0.530 = 98.1 %" in page and "ARC-C" not in text_of(page, "recovery")


def test_a_task_that_one_model_was_not_scored_on(report: dict[str, Any], details: dict[str, Any]) -> None:
    del report["models"][3]["scores"]["arc_challenge"]
    page = render(report, details)
    assert "SDD (self-data distilled) – ± – 0.370 ± 0.021" in text_of(page, "recovery")
    assert len(parsed(page).having("bar")) == 20


def test_no_rows(report: dict[str, Any], details: dict[str, Any]) -> None:
    report["dataset"] = {"rows": 0, "accepted": 0, "kept_original": 0, "failed": 0, "reasons": {}}
    page = render(report, {**details, "examples": []})
    text = text_of(page, "dataset")
    assert "The dataset has no rows." in text and "dataset's 0 rows" in text
    assert parsed(page).having("part") == []


@pytest.mark.parametrize("bounds", [(92.04, 99.31), [92.04, 99.31]])
def test_an_interval_is_any_pair(report: dict[str, Any], details: dict[str, Any], bounds: Any) -> None:
    report["models"][3]["interval"] = bounds
    assert render(report, details).count("[92.0, 99.3]") == 2  # headline and table


@pytest.mark.parametrize("bounds", [None, [], [92.04], [92.04, float("nan")]])
def test_no_interval(report: dict[str, Any], details: dict[str, Any], bounds: Any) -> None:
    report["models"][3]["interval"] = bounds
    page = render(report, details)
    assert "92.0" not in text_of(page, "recovery") and "nan" not in text_of(page)
    assert page.count("[90.2, 97.5]") == 2  # SFT's is still there


def test_almost_nothing_is_known(report: dict[str, Any]) -> None:
    report = {**copy.deepcopy(report), "models": [], "stages": []}
    page = render(report, {})
    assert "No distances were recorded." in text_of(page, "distances")
    assert parsed(page).having("bar") == [] and "95.7" not in page


def test_smoothing_keeps_the_steps_and_averages() -> None:
    points = [(float(step), float(step % 2)) for step in range(48)]
    smoothed = smooth(points)
    assert [step for step, _ in smoothed] == [step for step, _ in points]
    assert smoothed[0] == (0.0, 0.0) and smoothed[10][1] == pytest.approx(4 / 7)
    assert smoothed[-1][1] == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 110, [0, 50, 100]), (0.62, 1.31, [0.8, 1.0, 1.2]), (1, 1, [1]), (0, 10, [0, 2, 4, 6, 8, 10])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert tick_values(low, high) == pytest.approx(expected)


def test_measures_beside_the_average_and_the_tasks_left_out(report: dict[str, Any], details: dict[str, Any]) -> None:
    assert "Beyond the average" not in render(report, details), "nothing was measured"
    for number, model in enumerate(report["models"]):
        model |= {"chance_corrected_percent": 100.0 - 10 * number, "chance_corrected_interval": [70.0, 110.5],
                  "perplexity": 20.0 + number, "lambada": None, "kl_to_unpruned": 0.1 * number}  # fmt: skip
    report["chance"] = {"levels": {}, "left_out": ["gsm8k", "mmlu"]}
    text = text_of(render(report, details), "recovery")
    assert "Left out of it, since the unpruned model itself does not beat guessing: GSM8K, MMLU." in text
    assert "90.0 [70.0, 110.5] 21.00 0.100" in text
    assert "LAMBADA" not in text


def test_warnings_about_the_calibration_are_shown(report: dict[str, Any], details: dict[str, Any]) -> None:
    page = render(report, {**details, "warnings": ["20 of 20 samples end in <the same> token"]})
    assert "20 of 20 samples end in <the same> token" in text_of(page, "distances")
