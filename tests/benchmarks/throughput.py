"""Time and memory of one training step: the MVAE, a plain version of it that decodes whole pictures, Slot Attention.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.throughput
    python -m tests.benchmarks.throughput --data-root CLEVR_v1.0 --threads 2

A step is forward, backward, clipping and Adam on pictures that are in memory, as in the scripts. Models take turns, a
round each, so that what else the machine does meets all of them; given are the median and the range of rounds. Of one
thread the time is the processor's, which is the clock's unless others use the machine too; of more it is the clock's.
"Saved" is what the forward pass keeps for the backward pass, every storage once, parameters left out, by
torch.autograd.graph.saved_tensors_hooks; "peak" is how much the resident memory of a process of its own grows in its
first step (Linux: /proc/self, glibc). The plain version has the same encoder, selection and losses, but a spatial-
broadcast decoder (Watters et al. 2019) over the whole picture for every slot, as wide, in the default memory format.
"""

import contextlib
import ctypes
import io
import multiprocessing
import re
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import click
import torch
from torch import nn

import train_mvae
from common import FOLDER, Run, optimizer_step, random_generator
from tests.benchmarks.slot_attention import LR, SLOT, SlotAttention

WARM_UP = 2  # steps
LEAST = 0.5  # seconds of a round, at least one step
CALLS = 100  # of what is no arithmetic, which takes too little time for rounds
MB = 1e6


class FullCanvas(nn.Module):
    """Spatial-broadcast decoder (Watters et al. 2019) in CanvasDecoder's place: z (M, D), place (M, 2) -> layer."""

    def __init__(self, d, d_cell, channels, side):
        super().__init__()
        self.d_cell, self.extent = d_cell, nn.Linear(d_cell, 1)
        self.register_buffer("grid", train_mvae.position_grid(side, side), persistent=False)
        layers = [
            layer for c in (d + 2, *[channels] * 3) for layer in (nn.Conv2d(c, channels, 3, padding=1), nn.SiLU())
        ]
        self.body = nn.Sequential(*layers, nn.Conv2d(channels, 5, 1))  # shade, colours, a mask's logit

    def half(self, z):
        """Half the side of the closer look, in half picture widths: z (..., D) -> (...)."""
        share = self.extent(z[..., : self.d_cell])[..., 0].sigmoid()
        return train_mvae.SMALLEST_CANVAS * (train_mvae.LARGEST_CANVAS / train_mvae.SMALLEST_CANVAS) ** share

    def forward(self, z, place):
        offset = self.grid - place[..., None, None]  # (M, 2, side, side)
        cells = z[..., None, None].expand(-1, -1, *offset.shape[2:])
        shade, drawn = self.body(torch.cat([cells, offset], dim=1)).split([1, 4], dim=1)
        near = (place[:, 0] + self.half(z))[:, None, None, None].expand_as(shade)
        return torch.cat([near, -train_mvae.DARKEST * shade.sigmoid(), drawn], dim=1)


# ---------------------------------------------------------------- Models, and one step of each


def mvae(options, n_slots, plain=False):
    """The MVAE with so many slots -> model, loss(image)."""
    model = train_mvae.build(options | {"n_slots": n_slots})
    if plain:
        model.slot_decoder = FullCanvas(model.d, model.d - model.detail, options["channels"], options["size"])
    else:
        model = model.to(memory_format=torch.channels_last)
    noise = torch.randn(options["batch"], sum(model.noise_sizes))

    def loss(image):
        encoding, mean, haze = model(image, noise, True)
        return train_mvae.objective(image, mean, encoding, haze, options["beta"], options["sigma"])

    return model, loss


def slot_attention(options, channels):
    """Slot Attention, as tests/experiments/race.py trains it -> model, loss(image)."""
    model = SlotAttention(options["size"], channels=channels).to(memory_format=torch.channels_last)
    noise = torch.randn(options["batch"], model.n_slots, SLOT)

    def loss(image):
        error = (model(image, noise)[0] - image).square().mean()
        return error, {"loss/mse": error}

    return model, loss


OURS = "MVAE, N = 6"
MODELS = {
    OURS: partial(mvae, n_slots=6),
    "plain: whole pictures, N = 6": partial(mvae, n_slots=6, plain=True),
    "Slot Attention": partial(slot_attention, channels=64),
    "Slot Attention, 32 channels": partial(slot_attention, channels=32),
    "MVAE, N = 2": partial(mvae, n_slots=2),
    "MVAE, N = 12": partial(mvae, n_slots=12)
}  # fmt: skip


def training_step(name, options):
    """A model of MODELS, and a function without arguments that trains it a step, on one batch in memory."""
    torch.manual_seed(0)
    model, loss = MODELS[name](options)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.99))
    image = torch.rand(options["batch"], 3, options["size"], options["size"])
    return model, lambda: optimizer_step(*loss(image), optimizer, LR, train_mvae.CLIP)


# ---------------------------------------------------------------- Time


def now():
    """Seconds: of the processor where one thread computes, else of the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds_a_call(work, least):
    """Mean over as many calls as take so many seconds."""
    start, calls = now(), 0
    while not calls or now() - start < least:
        work()
        calls += 1
    return (now() - start) / calls


def take_turns(works, rounds):
    """{name: function} -> {name: seconds a call in every round, sorted}."""
    for work in works.values():
        for _ in range(WARM_UP):
            work()
    seconds = [{name: seconds_a_call(work, LEAST) for name, work in works.items()} for _ in range(rounds)]
    return {name: sorted(one[name] for one in seconds) for name in works}


def share_of_selection(options, rounds):
    """Share of the time of our step that MVAE.select takes."""
    model, step = training_step(OURS, options)
    select, spent = model.select, []

    def timed(*args):
        start = now()
        index = select(*args)
        spent.append(now() - start)
        return index

    model.select = timed
    step()
    spent.clear()
    start = now()
    for _ in range(rounds):
        step()
    return sum(spent) / (now() - start)


def seconds_of_housekeeping(options):
    """Seconds a step of what `main` does beside arithmetic: {name: median, of logging the mean}."""
    data, batch = train_mvae.load_data(options, torch.device("cpu")), options["batch"]
    model, _ = MODELS[OURS](options)
    optimizer, size = torch.optim.Adam(model.parameters()), sum(model.noise_sizes)
    works = {
        "pictures": lambda: data.batch(0, slice(0, batch), batch),  # they are in memory after the first call
        "their order": lambda: torch.randperm(data.length, generator=random_generator("order", 0, 1)),
        "noise": lambda: torch.randn(batch, size, generator=random_generator("noise", 0, 0))
    }  # fmt: skip
    median = {name: statistics.median(seconds_a_call(work, 0) for _ in range(CALLS)) for name, work in works.items()}
    terms = {f"loss/{k}": torch.ones(()) for k in range(6)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = options | {"out": Path(folder) / "run", "steps": 100 * CALLS, "minutes": None}
        with Run(options, train_mvae.SCRIPT, "run", {"source": data.source}, model, optimizer, data.device) as run:
            steps = run.steps()
            next(steps)
            start = now()
            for _ in range(CALLS):
                run.log({name: term.item() for name, term in terms.items()})
            median["logging"] = (now() - start) / CALLS
    return median


# ---------------------------------------------------------------- Memory


def saved_bytes(name, options):
    """Bytes that the forward pass of a step keeps for the backward pass, every storage once, parameters left out."""
    model, step = training_step(name, options)
    weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(saved.values())


def resident(field):
    """VmRSS, what this process holds now, or VmHWM, the most since it was reset, in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_growth(name, options, threads):
    """Bytes by which this process grows at most in a model's first step; meant for a process of its own."""
    torch.set_num_threads(threads)
    _, step = training_step(name, options)
    ctypes.CDLL(None).malloc_trim(0)  # what imports left unused counts neither as before nor as grown
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def peak_growth_apart(*args):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_growth, *args).result()


@click.command(context_settings={"show_default": True})
@click.option("--data-root", type=FOLDER, help="CLEVR's folder, for the time that pictures take; else built-in scenes.")
@click.option("--rounds", type=click.IntRange(1), default=7, help="That models take turns in.")
@click.option("--batch", type=click.IntRange(1), default=16)
@click.option("--size", type=click.IntRange(16), default=64, help="Height and width of pictures.")
@click.option("--only", default="", help="Models whose name contains it, beside ours.")
@click.option("--threads", type=click.IntRange(1), default=1)
def main(data_root, rounds, batch, size, only, threads):
    """Measure one training step of every model."""
    torch.set_num_threads(threads)
    options = train_mvae.main.make_context("", ["--dataset", "clevr", "--size", str(size)]).params
    options |= {"data_root": data_root, "batch": batch}
    names = [name for name in MODELS if name == OURS or only in name]
    times = take_turns({name: training_step(name, options)[1] for name in names}, rounds)
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    click.echo(f"{size} x {size} pixels, batch {batch}, fp32, {threads} CPU thread(s), {rounds} rounds\n")
    click.echo("| one step | ms | pictures/s | range | of ours | saved, MB | peak, MB |\n|-|-|-|-|-|-|-|")
    for name, seconds in times.items():
        cells = [f"{1000 * middle[name]:.0f}", f"{batch / middle[name]:.1f}"]
        cells += [f"{batch / seconds[-1]:.1f}-{batch / seconds[0]:.1f}", f"{middle[name] / middle[OURS]:.2f}"]
        cells += [f"{saved_bytes(name, options) / MB:.0f}", f"{peak_growth_apart(name, options, threads) / MB:.0f}"]
        click.echo(f"| {name} | " + " | ".join(cells) + " |")
    click.echo(f"\nselection of slots: {share_of_selection(options, rounds):.1%} of our step")
    spent = seconds_of_housekeeping(options)
    parts = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in spent.items())
    click.echo(f"no arithmetic: {sum(spent.values()) / (middle[OURS] + sum(spent.values())):.2%} of a step: {parts}")


if __name__ == "__main__":
    main()
