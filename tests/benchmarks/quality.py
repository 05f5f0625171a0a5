"""Curves of quality against the number of rows, from the comparison.csv of one or more sweeps.

    python -m tests.benchmarks.quality COMPARISON.csv ... --out quality.png

Each measure in a field of its own: a dot for every seed, a line through their means.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

MEASURES = {
    "average": "average of the tasks", "chance_corrected_percent": "left above chance, %", "lambada": "LAMBADA",
    "perplexity": "perplexity", "kl_to_unpruned": "KL to the unpruned model", "own_logprob": "own log-probability",
}  # fmt: skip
ARMS = {"sft": "#b8651b", "sdd": "#1f5fa8"}
Curves = dict[tuple[str, int, str], dict[int, list[float]]]  # of measure, blocks, model: values by rows


def curves(files: list[Path]) -> Curves:
    found: Curves = defaultdict(lambda: defaultdict(list))
    for file in files:
        with file.open(encoding="utf-8", newline="") as lines:
            for line in csv.DictReader(lines):
                for measure in MEASURES:
                    found[measure, int(line["blocks"]), line["model"]][int(line["rows"])].append(float(line[measure]))
    return found


def draw(found: Curves, out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cuts = sorted({blocks for _, blocks, _ in found})
    counts = sorted({rows for values in found.values() for rows in values})
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axis, (measure, title) in zip(axes.flat, MEASURES.items(), strict=True):
        for blocks, style in zip(cuts, ("-", "--", ":"), strict=False):
            for arm, colour in ARMS.items():
                points = sorted(found[measure, blocks, arm].items())
                axis.plot([rows for rows, _ in points], [mean(values) for _, values in points],
                          ls=style, color=colour, label=f"{arm.upper()}, {blocks} blocks")  # fmt: skip
                each = [(rows, value) for rows, values in points for value in values]
                axis.scatter(*zip(*each, strict=True), s=9, color=colour)
        axis.set_xscale("log")
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.minorticks_off()
        axis.set(title=title, xlabel="rows")
        axis.grid(visible=True, alpha=0.25)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("comparisons", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    draw(curves(chosen.comparisons), chosen.out)


if __name__ == "__main__":
    main()
