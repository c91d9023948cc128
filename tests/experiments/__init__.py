"""What makes the tables and judges of docs/; `python -m tests.experiments.NAME --help` tells of each."""

import io

from PIL import Image


def plotted(figure):
    """A matplotlib figure as a PIL picture."""
    figure.savefig(content := io.BytesIO())
    return Image.open(content).convert("RGB")
