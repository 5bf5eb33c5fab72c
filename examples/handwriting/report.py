"""The report of a training: a picture, a table, and sample pictures for the reader."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import SubFigure
from PIL import Image
from rich.console import Console
from rich.table import Table

from handwriting.engines import Engine
from handwriting.rows import Rows
from handwriting.strings import Example

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS = ("#1f6f8b", "#3a9d6e", "#6a5fb0")  # a colour for each engine
NAIVE = ("#c0392b", "#e08a3c", "#b0527f")
WIDTHS = (4.5, 2.5, 1.2)  # points; the widths keep overlapping lines distinct
INK = "#222222"
SHOWN = 12  # pictures in the report
SAMPLES = 6


def announce(engine: Engine, data: Rows, options: argparse.Namespace, strings: int) -> None:
    """Print the replicas, the batch size and the data set before training."""
    replicas = f"{engine.replicas} replica{'s' * (engine.replicas > 1)}"
    batch = f"{options.max_columns} columns" if options.max_columns else str(options.batch)
    Console().print(
        f"[bold]{replicas}[/] ({engine.name}), global batch {batch}, {len(data)} training strings, "
        f"{strings} held-out strings",
        soft_wrap=True,
    )


def write_samples(test: Sequence[Example], folder: Path) -> None:
    """Write the first held-out pictures, dark on light, and their labels.csv. The folder is an example for --data."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines)
        table.writerow(["file", "text"])
        for number, example in enumerate(test[:SAMPLES], start=1):
            picture = Image.fromarray(np.uint8(255 * (1 - np.clip(example.image.T, 0, 1))))
            picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.BICUBIC).save(
                folder / f"{number}.png"
            )
            table.writerow([f"{number}.png", example.text])


def finish(
    summary: dict,
    stats: str,
    drifts: Sequence[dict],
    test: Sequence[Example],
    texts: Sequence[str],
    out: Path,
) -> None:
    """Draw report.png and print the tables."""
    draw(summary, drifts, test, texts, out / "report.png")
    console = Console()
    if drifts:
        table = Table(
            title=f"Relative distance of the weights from those of one device after {len(drifts[0]['distpad'])} steps",
            min_width=70,
        )
        for heading in ("engine", "replicas", "with distpad", "mean of means"):
            table.add_column(heading, justify="left" if heading == "engine" else "right")
        for drift in drifts:
            ours, naive = f"{drift['distpad'][-1]:.1e}", f"{drift['naive'][-1]:.1e}"
            table.add_row(drift["backend"], str(drift["replicas"]), f"[green]{ours}[/]", f"[red]{naive}[/]")
        console.print(table)
    console.print(f"\n[italic]Padding stats of worker 0[/]\n{stats}\n", highlight=False)
    console.print(
        f"character error rate [bold]{summary['character_error_rate']:.2%}[/] "
        f"on {summary['held_out_strings']} held-out strings, after {summary['seconds']:.0f} s"
    )
    console.print(
        f"report: {out / 'report.png'}\nto read the sample pictures: read.py --model {out} {out / 'samples'}/*.png",
        highlight=False,
        soft_wrap=True,
    )


def draw(summary: dict, drifts: Sequence[dict], test: Sequence[Example], texts: Sequence[str], path: Path) -> None:
    """Draw the drift at the top, if measured, and some pictures with their texts below."""
    mpl.rcParams.update({"font.size": 10, "axes.edgecolor": "#999999", "text.color": INK, "axes.labelcolor": INK})
    rows = (min(SHOWN, len(test)) + 1) // 2
    heights = [4.2 if drifts else 0.05, 0.55 + 0.5 * rows]  # inches
    figure = plt.figure(figsize=(9.6, sum(heights)), dpi=150)
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    if drifts:
        _draw_drift(upper, drifts)
    title = f"Held-out strings, {summary['character_error_rate']:.1%} character errors (red: read ≠ written)"
    _draw_read(lower, test[:SHOWN], texts, rows, title)
    figure.savefig(path)
    plt.close(figure)


def _draw_drift(figure: SubFigure, drifts: Sequence[dict]) -> None:
    """Draw a line for each engine and each of the two means, with its name at its end."""
    axis = figure.subplots(gridspec_kw={"left": 0.09, "right": 0.78, "top": 0.9, "bottom": 0.13})
    axis.set_title(
        "Distance of the weights on several replicas from those on one", fontsize=11, fontweight="bold", loc="left"
    )
    ends = []
    for place, drift in enumerate(drifts):
        steps = np.arange(1, len(drift["distpad"]) + 1)
        for key, name, colours in (("naive", "mean of means", NAIVE), ("distpad", "with distpad", OURS)):
            colour = colours[place % len(colours)]
            distances = np.maximum(drift[key], 1e-12)  # a logarithmic axis has no zero
            axis.plot(steps, distances, color=colour, linewidth=WIDTHS[place % len(WIDTHS)] if len(drifts) > 1 else 2)
            ends.append((steps[-1], distances[-1], f"{name}, {drift['replicas']} × {drift['backend']}", colour))
    axis.set_yscale("log")
    axis.set_xlabel("step, on the same global batches")
    axis.set_ylabel("relative distance of the weights  |w − w₁| / |w₁|")
    axis.grid(axis="y", color="#e8e8e8")
    axis.spines[["top", "right"]].set_visible(False)
    _name_lines(axis, ends)


def _name_lines(axis: plt.Axes, ends: Sequence[tuple[int, float, str, str]], gap: float = 14.0) -> None:
    """Write each line's name at its end (step, distance, name, colour), at least ``gap`` points below the one above."""
    to_points = 72 / axis.figure.dpi
    free = np.inf
    for step, distance, name, colour in sorted(ends, key=lambda end: -end[1]):
        height = axis.transData.transform((step, distance))[1] * to_points
        place = min(height, free)
        free = place - gap
        axis.annotate(
            name,
            (step, distance),
            (8, place - height),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
        )


def _draw_read(figure: SubFigure, test: Sequence[Example], texts: Sequence[str], rows: int, title: str) -> None:
    """Draw pictures on one scale, each beside its text. Wrong texts are red, with the correct text below."""
    inches = figure.bbox.height / figure.figure.dpi
    top, bottom = 1 - 0.45 / inches, 0.1 / inches
    grid = {"left": 0.03, "right": 0.99, "top": top, "bottom": bottom, "hspace": 0.35, "wspace": 0.04}
    axes = figure.subplots(rows, 4, squeeze=False, width_ratios=[2.3, 1.6, 2.3, 1.6], gridspec_kw=grid)
    figure.text(0.03, 1 - 0.22 / inches, title, fontsize=11, fontweight="bold", va="center")
    for axis in axes.flat:
        axis.axis("off")
    widest = max(len(example.image) for example in test)
    for place, (example, text) in enumerate(zip(test, texts)):
        picture, beside = axes.reshape(-1, 2)[place]
        picture.imshow(1 - example.image.T, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
        picture.set_xlim(0, widest)
        picture.set_anchor("W")
        right = text == example.text
        shown = text if right else f"{text}\n≠ {example.text}"
        beside.text(0, 0.5, shown, va="center", family="monospace", fontsize=9, color=INK if right else NAIVE[0])
