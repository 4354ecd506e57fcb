"""The picture of a run: loss and validation loss by step, the learning rate below."""

import json
import math
from typing import Any

from etils import epath

SMOOTH = 0.95  # of the line that is drawn through the losses of single steps
MANY = 100  # steps from which single ones are drawn faint


def draw(metrics: epath.Path, file: str) -> None:
    """Writes the picture of a `metrics.jsonl`; a loss that is no finite number is left out."""
    from matplotlib.figure import Figure

    lines: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if _is_finite(line.get("loss"))]
    validations = [line for line in lines if _is_finite(line.get("validation_loss"))]
    of_tokens = any("perplexity" in line for line in validations)
    at, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    figure = Figure(figsize=(8, 6), dpi=130, layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    if len(at) < MANY:
        loss.plot(at, losses, color="C0", label="training")
    else:
        loss.plot(at, losses, color="C0", alpha=0.25, linewidth=0.8)
        loss.plot(at, _smoothed(losses), color="C0", label="training, smoothed")
    if validations:
        loss.plot(
            [line["step"] for line in validations],
            [line["validation_loss"] for line in validations],
            color="C1",
            marker="o",
            markersize=4,
            label="validation",
        )
    loss.legend()
    loss.set_ylabel("loss, nats a token" if of_tokens else "loss")
    loss.grid(axis="y", alpha=0.3)
    rate.plot(at, [line["learning_rate"] for line in steps], color="C2")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.grid(axis="y", alpha=0.3)
    rate.set_xlabel("step")
    figure.savefig(file)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _smoothed(values: list[float]) -> list[float]:
    """The exponential mean, without the bias of its beginning (as Adam's)."""
    mean, result = 0.0, []
    for n, value in enumerate(values, 1):
        mean = SMOOTH * mean + (1 - SMOOTH) * value
        result.append(mean / (1 - SMOOTH**n))
    return result
