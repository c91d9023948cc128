"""Wall time and peak memory of the README's recomposition, from process start to file, beside `import torch`.

    python -m tests.benchmarks.recompose
When warm, beside PyTorch: tests/benchmarks/warm.py.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recompose import SHIPPED

ROOT = Path(__file__).parents[2]
WARM_UP, ROUNDS = 1, 7


def measure(command):
    """Median seconds and largest MB of ROUNDS runs of a command, after WARM_UP to warm the disk cache."""
    seconds, peaks = [], []
    for _ in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds.append(time.perf_counter() - start)
        peaks.append(usage.ru_maxrss / 1024)
        if status:
            raise SystemExit(f"{command} failed")
    return statistics.median(seconds[WARM_UP:]), max(peaks)


def main():
    """Print what commands take, beside `import torch`."""
    pictures = [str(SHIPPED["mvae-image"] / name) for name in ("a.png", "b.png")]
    sounds = [str(SHIPPED["mvae-sound"] / name) for name in ("a.flac", "b.flac")]
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "two pictures": ["recompose.py", *pictures, "--slots", "0,2", "--out", f"{folder}/out.png"],
            "two sounds": ["recompose.py", *sounds, "--slots", "0", "--out", f"{folder}/out.wav"],
            "two sounds, --vocoder": ["recompose.py", *sounds, "--vocoder", "--out", f"{folder}/out.wav"],
            "import torch": ["-c", "import torch"],
        }
        measured = {name: measure([sys.executable, *command]) for name, command in commands.items()}
    seconds_torch, memory_torch = measured["import torch"]
    for name, (seconds, memory) in measured.items():
        share = f"{seconds / seconds_torch:.2f} of the time, {memory / memory_torch:.2f} of the memory of import torch"
        print(f"{name:22} {seconds:.2f} s, {memory:.0f} MB: {share}")


if __name__ == "__main__":
    main()
