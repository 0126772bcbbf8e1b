"""The picture of a run, from its metrics file: losses by tokens seen, and the learning rate below."""

from pathlib import Path
from typing import Any

import numpy as np

from falcon_jax.train.metrics import read_records

# Two hues that stay apart for colour-blind readers and in grey.
TRAIN_COLOUR, VALID_COLOUR = "#3b75af", "#c8553d"
UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
SMOOTHED_SHARE = 1 / 50  # of all points, around each


def plot_run(metrics: Path, picture: Path, title: str) -> None:
    """Draws the "train" and "valid" records of `metrics` as a PNG at `picture`, in place of an older one.

    Raises: ImportError where matplotlib is missing.
    """
    from matplotlib.figure import Figure  # an extra, and slow to import; without pyplot, which keeps global state

    records = read_records(metrics)
    train, valid = ([r for r in records if r["kind"] == kind and "tokens" in r] for kind in ("train", "valid"))
    most = max((record["tokens"] for record in train + valid), default=0)
    scale, unit = next(((scale, unit) for scale, unit in UNITS if most >= scale), (1.0, ""))

    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    if train:
        tokens, loss = _column(train, "tokens") / scale, _column(train, "loss")
        last = loss[-_num_smoothed(loss) :].mean()
        losses.plot(tokens, loss, color=TRAIN_COLOUR, alpha=0.25, linewidth=0.8)
        losses.plot(tokens, _smoothed(loss), color=TRAIN_COLOUR, linewidth=1.5, label=f"train, {last:.3f} at the end")
        rates.plot(tokens, _column(train, "learning_rate"), color="0.3", linewidth=1.2)
    if valid:
        tokens, loss = _column(valid, "tokens") / scale, _column(valid, "nats_per_token")
        best = int(np.argmin(loss))
        label = f"validation, best {loss[best]:.3f}"
        losses.plot(tokens, loss, color=VALID_COLOUR, linewidth=1.2, marker="o", markersize=3.5, label=label)
        losses.plot(tokens[best], loss[best], "o", color=VALID_COLOUR, markersize=7, fillstyle="none")
    if train or valid:
        losses.legend(frameon=False)
        losses.set_ylim(*_limits(train, valid))
    losses.set_title(title, loc="left", fontsize=11)
    losses.set_ylabel("loss (nats a token)")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", scilimits=(-2, 2), useMathText=True)
    rates.set_xlabel(f"tokens seen ({unit})" if unit else "tokens seen")
    rates.set_xlim(left=0)
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)

    incoming = picture.with_name(f"{picture.stem}.incoming.png")
    figure.savefig(incoming)
    incoming.replace(picture)


def _column(records: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.asarray([record[name] for record in records], float)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means over the points around each, as many before it as after, so that a steep line is not moved: towards the
    ends ever fewer."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, places[::-1]), _num_smoothed(values) // 2)
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def _num_smoothed(values: np.ndarray) -> int:
    return max(1, int(len(values) * SMOOTHED_SHARE))


def _limits(train: list[dict[str, Any]], valid: list[dict[str, Any]]) -> tuple[float, float]:
    """From the lowest to the highest loss, less the first steps' plunge, which would leave the rest a flat line."""
    losses = np.concatenate([_column(train, "loss"), _column(valid, "nats_per_token")])
    lowest, highest = losses.min(), losses.max()
    if len(train) >= 100:
        highest = max(np.quantile(_column(train, "loss"), 0.98), *_column(valid, "nats_per_token"), lowest)
    margin = 0.05 * (highest - lowest) or 0.1
    return float(lowest - margin), float(highest + margin)
