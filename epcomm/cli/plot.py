"""The demo's picture: loss curve, traffic between ranks, load of the experts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from epcomm.cli.report import Report
from epcomm.errors import InvalidArgument

LOSS_WINDOW = 20


def check_plot(path: Path) -> None:
    """Say before the training what would keep `write_plot` from working after it.

    Raises:
        InvalidArgument: matplotlib is missing, or it cannot write this file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgument(
            f"--plot {path}: matplotlib is not installed, and the picture is drawn with it. "
            "Install it with: pip install 'epcomm[demo]'"
        )
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise InvalidArgument(
            f"--plot {path}: got the ending {path.suffix!r}, but it must be one that matplotlib "
            f"writes: {', '.join(sorted(formats))}. Try --plot demo.png."
        )
    if not path.parent.is_dir():
        raise InvalidArgument(
            f"--plot {path}: the folder {path.parent} does not exist, and the picture goes there. "
            "Make it first, or name another."
        )


def write_plot(path: Path, report: Report) -> None:
    """Write the picture; its format follows the file's ending."""
    # NOTE: Figure by itself, not pyplot, which needs a display on some machines and is not safe
    # where ranks are threads.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss_axes, traffic_axes, load_axes = figure.subplots(1, 3)
    steps = np.arange(1, len(report.losses) + 1)
    loss_axes.plot(steps, report.losses, linewidth=0.6, alpha=0.5, label="a step")
    window = min(LOSS_WINDOW, len(report.losses))
    mean = np.convolve(report.losses, np.full(window, 1 / window), "valid")
    loss_axes.plot(steps[window - 1 :], mean, label=f"mean of {window} steps")
    loss_axes.set(title="Training loss", xlabel="step", ylabel="nats a byte")
    loss_axes.legend()

    megabytes = report.megabytes
    image = traffic_axes.imshow(megabytes, cmap="Blues", vmin=0)
    traffic_axes.set(title="MB dispatched", xlabel="to rank", ylabel="from rank")
    ranks = range(len(megabytes))
    traffic_axes.set_xticks(ranks)
    traffic_axes.set_yticks(ranks)
    if len(megabytes) <= 8:
        for source in ranks:
            for target in ranks:
                value = megabytes[source, target]
                color = "white" if value > megabytes.max() / 2 else "black"
                traffic_axes.text(target, source, f"{value:.1f}", ha="center", va="center", c=color)
    figure.colorbar(image, ax=traffic_axes, shrink=0.8)

    num_layers, num_experts = report.expert_load.shape
    width = 0.8 / num_layers
    for layer, load in enumerate(report.load_shares):
        places = np.arange(num_experts) + (layer - (num_layers - 1) / 2) * width
        load_axes.bar(places, 100 * load, width, label=f"layer {layer}")
    load_axes.axhline(100 / num_experts, color="gray", linewidth=0.8, linestyle="--")
    load_axes.set(title="Load of the experts", xlabel="expert", ylabel="% of a layer's choices")
    load_axes.locator_params(axis="x", integer=True)
    load_axes.legend()
    figure.savefig(path)
