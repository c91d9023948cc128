"""Wall time and peak memory of the README's recomposition, from process start to file, beside `import torch`.

python -m tests.benchmarks.recompose
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROUNDS = 7


def measure(command):
    """Median seconds and largest MB of ROUNDS runs of a command, after one to warm the disk cache."""
    seconds, peaks = [], []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds.append(time.perf_counter() - start)
        peaks.append(usage.ru_maxrss / 1024)
        if status:
            raise SystemExit(f"{command} failed")
    return statistics.median(seconds[1:]), max(peaks)


def main():
    with tempfile.TemporaryDirectory() as folder:
        pictures = [str(ROOT / "models" / "clevr" / name) for name in ("a.png", "b.png")]
        ours = [sys.executable, "recompose.py", *pictures, "--slots", "0,2", "--out", f"{folder}/out.png"]
        time_ours, memory_ours = measure(ours)
    time_torch, memory_torch = measure([sys.executable, "-c", "import torch"])
    print(f"recompose.py:  {time_ours:.2f} s, {memory_ours:.0f} MB")
    print(f"import torch:  {time_torch:.2f} s, {memory_torch:.0f} MB")
    print(f"ratio:         {time_ours / time_torch:.2f} of the time, {memory_ours / memory_torch:.2f} of the memory")


if __name__ == "__main__":
    main()
