"""The picture of `infer.bench`: tokens/s and memory of each configuration.

Bars of one batch, points of two, lines from three on, as two say nothing of what lies between.
Needs matplotlib, of the extra `plot`.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError

SUFFIXES = (".png", ".pdf", ".svg")


def refuse(file: str) -> None:
    """Raises `UserError` for a picture that could not be written at the end."""
    path = Path(file)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot is {file}, expected a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"--plot is {file}, but {path.parent} is not a directory; make it first")
    there = path.exists()
    try:
        with open(path, "ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise UserError(
            f"--plot is {file}, which cannot be written ({error.strerror}); name another file"
        ) from None
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        raise UserError(
            "--plot needs matplotlib; install it with python -m pip install 'llama-jax[plot]'"
        ) from None


def draw(result: dict[str, Any], title: str, file: str) -> None:
    """Writes the picture of what `infer.bench.bench` returns."""
    from matplotlib.figure import Figure

    series: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(result["rows"], key=lambda row: row["batch"]):
        weights = result["dtype"] if row["quantize"] == "none" else row["quantize"]
        name = f"{weights}, {'with' if row['cache'] else 'without'} cache"
        series.setdefault(name, []).append(row)
    biggest = max(row["program_bytes"] for row in result["rows"])
    unit, scale = ("GB", 1e9) if biggest >= 1e9 else ("MB", 1e6)
    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    speed, memory = figure.subplots(1, 2)
    _panel(speed, series, "tokens_per_s", 1, "decode, tokens/s")
    _panel(memory, series, "program_bytes", scale, f"memory of the program on a device, {unit}")
    if len(next(iter(series.values()))) > 1:
        speed.legend()
    figure.suptitle(title, fontsize=11)
    figure.savefig(file)


def _panel(
    axis: Any, series: dict[str, list[dict[str, Any]]], key: str, scale: float, label: str
) -> None:
    """One value of all rows, in units of `scale`; logarithmic where they differ much."""
    batches: Sequence[int] = [row["batch"] for row in next(iter(series.values()))]
    for i, (name, rows) in enumerate(series.items()):
        values, cache = [row[key] / scale for row in rows], rows[0]["cache"]
        if len(batches) > 1:
            line = "none" if len(batches) < 3 else "-" if cache else "--"
            marker = {"marker": "o", "fillstyle": "full" if cache else "none"}
            axis.plot(batches, values, linestyle=line, color=f"C{i}", label=name, **marker)
        else:
            bars = axis.bar([name.replace(", ", "\n")], values, color=f"C{i}", width=0.6)
            axis.bar_label(bars, fmt="{:,.4g}", padding=2)
            bars[0].set_hatch("" if cache else "//")
    if len(batches) > 1:
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(n) for n in batches])
        axis.minorticks_off()
        axis.set_xlabel("batch, rows")
    every = [row[key] for rows in series.values() for row in rows]
    if max(every) > 20 * min(every):
        axis.set_yscale("log")
        label = f"{label} (logarithmic)"
    else:
        axis.margins(y=0.12)
        axis.set_ylim(bottom=0)
    axis.set_ylabel(label)
    axis.grid(axis="y", alpha=0.3)
