"""Programs in processes of their own, which can be killed, run out of disk, or be told a wrong time; damaged files.

The processes are forked from one that has imported what they need, and so begin at once.
"""

import contextlib
import importlib
import itertools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["faults", "train_vae_mnist", "train_mvae", "export"])


# ---------------------------------------------------------------- Processes


class Outcome(NamedTuple):
    code: int  # of the exit, or minus the number of the signal
    output: str  # stdout and stderr


class Apart:
    """function(*args) in a process of its own, in which fault[0](*fault[1:]) is called first."""

    def __init__(self, function, *args, fault=None):
        with pytest.MonkeyPatch.context() as patch:  # its server finds modules where this process does
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
        self.reader, writer = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=begin, args=(function, args, writer, fault), daemon=True)
        self.process.start()
        writer.close()

    def finish(self, kill_after=None):
        """Wait until it ends, or kill it after so many seconds; returns its Outcome."""
        timer = threading.Timer(kill_after or 0, self.process.kill)
        if kill_after is not None:
            timer.start()
        with os.fdopen(os.dup(self.reader.fileno()), errors="replace") as said:
            output = said.read()
        self.process.join()
        timer.cancel()
        return Outcome(self.process.exitcode, output)

    def wait_until_stopped(self):
        """By SIGSTOP, within 30 s."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        for _ in range(600):
            if stat.read_text().rsplit(") ", 1)[1][0] == "T":
                return
            time.sleep(0.05)
        raise TimeoutError(self.finish(0).output)


def begin(function, args, writer, fault):
    for number in (1, 2):
        os.dup2(writer.fileno(), number)
    writer.close()  # the copies alone tell the reader when all has ended
    torch.set_num_threads(1)
    importlib.import_module("train_mvae").SCENES = 8  # as in conftest.py
    importlib.import_module("train_vae_mnist").draw_figures = draw_little
    if fault:
        fault[0](*fault[1:])
    function(*args)


def draw_little(run, *_):
    """Figures take nine tenths of a short run."""
    run.figure("small", Image.new("RGB", (64, 64)))


def script(name, *args):
    """Run the main of a script as its command line would."""
    importlib.import_module(name).main([str(arg) for arg in args])


def run(name, *args, fault=None, kill_after=None):
    """The Outcome of a script."""
    return Apart(script, name, *args, fault=fault).finish(kill_after)


# ---------------------------------------------------------------- Faults


def signal_at(number, n, folder):
    """Get a signal before the n-th time that a file of `folder` is opened to be written, renamed or deleted."""
    count, events = itertools.count(), {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}

    def watch(event, about):
        if event not in events or not str(about[0]).startswith(str(folder)):
            return
        reads = event == "open" and not about[2] & (os.O_WRONLY | os.O_RDWR)
        if not reads and next(count) == n:
            os.kill(os.getpid(), number)

    sys.addaudithook(watch)


def die_in_save(n):
    """Be killed in the middle of writing the n-th checkpoint."""
    save, count = torch.save, itertools.count()

    def half(state, path):
        save(state, path)
        if next(count) == n:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def limit_files(size):
    """No file can be longer, as on a full disk; Python ignores SIGXFSZ, so that write fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def jump_clock(seed):
    """The time of day jumps by days."""
    generator, now = random.Random(seed), time.time
    time.time = lambda: now() + generator.choice((-1, 1)) * generator.uniform(0, 3e5)


@contextlib.contextmanager
def disk(folder, size):
    """A disk of `size` bytes mounted on `folder`; skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder])
    if mounted.returncode:
        pytest.skip("no file system can be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def damaged(content, cuts, flips):
    """(what, bytes): cut off at so many 4 KB boundaries, or at all if None, then with a few bytes changed."""
    boundaries = range(0, len(content), 4096)
    for end in boundaries if cuts is None else sorted({boundaries[i * len(boundaries) // cuts] for i in range(cuts)}):
        yield f"cut off at {end}", content[:end]
    for seed in range(flips):
        generator, changed = random.Random(seed), bytearray(content)
        places = generator.sample(
            range(min(len(content), 10 ** generator.randrange(2, 9))), generator.choice((1, 1, 4))
        )
        for place in places:
            changed[place] ^= generator.randrange(1, 256)
        yield f"seed {seed}, bytes {places}", bytes(changed)
