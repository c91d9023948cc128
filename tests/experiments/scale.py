"""What the full data sets cost: listing, reading and keeping them, and the messages of several processes.

    OMP_NUM_THREADS=1 python -m tests.experiments.scale
    OMP_NUM_THREADS=1 python -m tests.experiments.scale --only clevr --share 0.01    # a hundredth of the files

Makes folders with as many files as the full data sets have, in the layouts of CLEVR, NSynth, MNIST and of one's own
pictures and sounds, and measures the real code on them, all in processes of their own. A few hundred files are
different; all others are hard links to them, so disks are not measured: files come from memory. Times are processor
times of all threads of a process, which is the clock's on an idle machine with one thread; of all_reduce both are
given. Memory is Linux's VmRSS and VmHWM. Results: docs/scale.md.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest import mock

import click
import numpy as np
import soundfile
import torch
import torch.distributed as dist
from PIL import Image

import common
from common import FOLDER, RATE, SPLITS, TIMBRES, Note, Reader, random_generator, synthesise

ORIGINALS = 300  # different files of a kind; the others are links to them
STEPS = 3  # of the real commands
MARKS = 200, 2000  # batches after which memory is read, by default
REPEATS, PROCESSES = 100, 2  # of an all_reduce
CROWD = 64  # processes, of which one's batch is timed
MB = 1e6
COUNTS = {"clevr": (70_000, 15_000), "nsynth": (289_205, 12_678, 4_096), "mnist": (60_000, 10_000),
          "pictures": (100_000,), "sounds": (100_000,)}  # fmt: skip  # files
INSTRUMENTS = 1_006  # of NSynth, and notes of its families (Engel et al. 2017, table 1)
FAMILIES = {"bass": 68_955, "brass": 13_830, "flute": 9_423, "guitar": 35_423, "keyboard": 54_991, "mallet": 35_066,
            "organ": 36_577, "reed": 14_866, "string": 20_594, "synth_lead": 5_501, "vocal": 10_753}  # fmt: skip
DATA = {
    "CLEVR": ("train_mvae", "clevr", "--dataset clevr --objects 3 10"),  # all of its scenes
    "two notes": ("train_mvae", "nsynth", "--dataset nsynth-duo"),
    "notes": ("train_vae_audio", "nsynth", ""),
    "digits": ("train_vae_mnist", "mnist", "--eval-samples 1"),
    "own pictures": ("train_mvae", "pictures", "--dataset pictures"),
    "own sounds": ("train_mvae", "sounds", "--dataset sounds")
}  # fmt: skip

# ---------------------------------------------------------------- Folders


def link_all(originals, paths):
    """Give the originals, in turn, all these names."""
    for i, path in enumerate(paths):
        os.link(originals[i % len(originals)], path)


def write_picture(path, size, mode, generator):
    """Discs on a grained ground: a PNG takes as much room as CLEVR's, 190 KB."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    image = 90 + 40 * (y / height)[..., None] + generator.normal(0, 1.0, (height, width, 3))
    for _ in range(6):
        centre, radius = generator.uniform(0, size), generator.uniform(15, 60)
        image[np.hypot(x - centre[0], y - centre[1]) < radius] += generator.uniform(-80, 120, 3)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).convert(mode).save(path)


def make_pictures(folder, size, mode, suffix):
    """Paths of ORIGINALS pictures."""
    folder.mkdir()
    paths = [folder / f"{i}{suffix}" for i in range(ORIGINALS)]
    for i, path in enumerate(paths):
        write_picture(path, size, mode, np.random.default_rng(i))
    return paths


def make_sounds(folder):
    """Paths of ORIGINALS built-in notes, four seconds of 16 bits at 16 kHz."""
    folder.mkdir()
    paths = [folder / f"{i}.wav" for i in range(ORIGINALS)]
    for i, path in enumerate(paths):
        family = list(TIMBRES)[i % len(TIMBRES)]
        low, high = TIMBRES[family].pitches
        note = Note(path.stem, family, low + i % (high - low), f"{family}_{i % 7}", 100)
        soundfile.write(path, synthesise(note).numpy(), RATE, subtype="PCM_16")
    return paths


def scene(n, generator):
    """CLEVR's annotation of one scene of n objects, without its number and file."""

    def numbers(count):
        return generator.uniform(-3, 3, count).tolist()

    kinds = {"shape": "cylinder", "size": "large", "material": "rubber", "color": "yellow"}
    places = [{"3d_coords": numbers(3), "rotation": numbers(1)[0], "pixel_coords": numbers(3)} for _ in range(n)]
    order = generator.permutation(n).tolist()
    behind, front = [order[:k] for k in range(n)], [order[k + 1 :] for k in range(n)]
    relations = {"behind": behind, "front": front, "left": front, "right": behind}
    directions = {name: numbers(3) for name in (*relations, "above", "below")}
    return {"objects": [place | kinds for place in places], "relationships": relations, "directions": directions}


def write_clevr(root, counts):
    """CLEVR's layout: images/train, images/val, scenes/*.json of 3 to 10 objects; 480 x 320 RGBA as the official."""
    pictures = make_pictures(root / "originals", (480, 320), "RGBA", ".png")
    generator = np.random.default_rng(0)
    scenes = [json.dumps(scene(3 + i % 8, generator))[1:] for i in range(ORIGINALS)]
    (root / "scenes").mkdir()
    for split, count in zip(("train", "val"), counts, strict=True):
        (folder := root / "images" / split).mkdir(parents=True)
        names = [f"CLEVR_{split}_{i:06}.png" for i in range(count)]
        link_all(pictures, (folder / name for name in names))
        with (root / "scenes" / f"CLEVR_{split}_scenes.json").open("w") as file:
            file.write(f'{{"info": {{"split": "{split}"}}, "scenes": [')
            for i, name in enumerate(names):
                about = f'"split": "{split}", "image_index": {i}, "image_filename": "{name}", '
                file.write(f"{', ' * (i > 0)}{{{about}{scenes[i % ORIGINALS]}")
            file.write("]}")


def write_nsynth(root, counts):
    """NSynth's layout: audio/*.wav and examples.json, with its families' shares, fields and, about, its size."""
    sounds, generator = make_sounds(root / "originals"), np.random.default_rng(0)
    shares = np.cumsum(list(FAMILIES.values())) / sum(FAMILIES.values())
    for split, count in zip(SPLITS, counts, strict=True):
        (folder := root / f"nsynth-{split}" / "audio").mkdir(parents=True)
        instruments, listing = max(12, INSTRUMENTS * count // sum(COUNTS["nsynth"])), {}
        each = -(-count // instruments)
        for i in range(count):
            k, j = divmod(i, each)
            number = int(np.searchsorted(shares, (k + 0.5) / instruments))
            family, pitch, velocity = list(FAMILIES)[number], 21 + (j // 5 + 7 * k) % 88, (25, 50, 75, 100, 127)[j % 5]
            name = f"{(instrument := f'{family}_acoustic_{k:03}')}-{pitch:03}-{velocity:03}"
            bits = (generator.random(10) < 0.1).astype(int).tolist()
            listing[name] = {
                "note_str": name, "sample_rate": RATE, "qualities_str": ["bright"] * sum(bits), "instrument_source": 0,
                "note": i, "instrument_family_str": family, "instrument_str": instrument, "pitch": pitch,
                "instrument_source_str": "acoustic", "velocity": velocity, "instrument_family": number,
                "instrument": k, "qualities": bits,
            }  # fmt: skip
        link_all(sounds, (folder / f"{name}.wav" for name in listing))
        (folder.parent / "examples.json").write_text(json.dumps(listing, indent=4))


def write_mnist(root, counts):
    """The unpacked files of MNIST, of noise in the middle of black pictures."""
    (raw := root / "MNIST" / "raw").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 6:22, 8:20] = generator.integers(0, 256, (count, 16, 12))
        header = [np.array([kind, count, *shape], ">i4").tobytes() for kind, shape in ((2051, (28, 28)), (2049, ()))]
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header[0] + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header[1] + labels.tobytes())


def write_own(root, counts, originals, suffix):
    """A hundred folders of files with pitches in their names."""
    for k in range(100):
        (root / f"folder {k:02}").mkdir()
    numbers = (divmod(i, 100) for i in range(counts[0]))
    link_all(originals, (root / f"folder {k:02}" / f"a {i:05}-{30 + i % 60:03}-100{suffix}" for i, k in numbers))


def write_pictures(root, counts):
    write_own(root, counts, make_pictures(root / ".originals", (640, 480), "RGB", ".jpg"), ".jpg")


def write_sounds(root, counts):
    write_own(root, counts, make_sounds(root / ".originals"), ".wav")


WRITERS = {"clevr": write_clevr, "nsynth": write_nsynth, "mnist": write_mnist, "pictures": write_pictures,
           "sounds": write_sounds}  # fmt: skip


def make_folder(parent, kind, share):
    """The folder of a kind below `parent`, with a share of the files, made unless it is there."""
    root = parent / f"{kind}-{share:g}"
    if not (root / "made.json").exists():
        root.mkdir()
        WRITERS[kind](root, counts := [max(20, round(share * count)) for count in COUNTS[kind]])
        (root / "made.json").write_text(json.dumps(counts))
    return root, sum(json.loads((root / "made.json").read_text()))


# ---------------------------------------------------------------- Data


def memory(name="VmRSS"):
    """MB of this process: VmRSS, or VmHWM, the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / MB


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def apart(function, *arguments):
    """What a function returns in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def open_data(script, words):
    """The data of a script's options: a function (step, processes) -> the first's batch, and the readers."""
    module, device = importlib.import_module(script), torch.device("cpu")
    options = module.main.make_context("", words).params
    batch = options["batch"]
    if script != "train_vae_audio":
        data = module.load_data(options, device) if script == "train_mvae" else module.Digits(options, device)
        readers = getattr(data, "readers", None) or getattr(data, "notes", {})
        return lambda step, processes: data.batch(step, slice(0, batch), processes * batch), readers
    splits, _ = module.load_splits(options)
    train = splits["train"]

    def draw(step, processes):
        index = torch.randint(len(train.notes), (processes * batch,), generator=random_generator("batch", 0, step))
        index = index[:batch]
        return train.waveform(torch.tensor(train.usable(index.tolist()))), train.pitch[index], train.family[index]

    return draw, splits


def reading(script, words, marks):
    """Costs of a script's data: {column: number}, of so many batches."""
    torch.set_num_threads(1)
    importlib.import_module(script)
    before, spent = memory(), []
    load_or_report = Reader.load_or_report

    def timed(reader, file):
        start = time.thread_time()
        content = load_or_report(reader, file)
        spent.append(time.thread_time() - start)
        return content

    forget_peak()
    start = time.process_time()
    draw, readers = open_data(script, words)
    found = {"list_s": time.process_time() - start, "list_peak": memory("VmHWM") - before, "listed": memory() - before}
    with mock.patch.object(Reader, "load_or_report", timed):
        start = time.process_time()
        for step in range(marks[-1]):
            draw(step, 1)
            if step + 1 in marks:
                found[f"after_{step + 1}"] = memory() - before
        found["batch_ms"] = 1000 * (time.process_time() - start) / marks[-1]
    for name, processes in (("warm_ms", 1), ("crowd_ms", CROWD)):
        draw(0, processes)  # reads what is not in memory
        start = time.process_time()
        draw(0, processes)
        found[name] = 1000 * (time.process_time() - start)
    found["kept"] = sum(len(reader.kept) for reader in readers.values())
    found["read"] = len(spent)
    found["rate"] = len(spent) / sum(spent) if spent else 0.0
    return found


# ---------------------------------------------------------------- Steps, messages


def training(script, words):
    """The real command, STEPS steps: seconds to the first, of one, most memory, numbers that travel and are drawn."""
    torch.set_num_threads(1)
    module, clock, begins, takes, sizes = importlib.import_module(script), time.process_time, [], [], {}

    class Timed(common.Run):
        def steps(self):
            for step in super().steps():
                begins.append(clock())
                yield step

        def log(self, values):
            takes.append(clock() - begins[-1])
            sizes["numbers"] = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            sizes["noise"] = sum(getattr(self.model, "noise_sizes", ())) or self.model.d
            sizes["batch"] = self.options["batch"]
            super().log(values)

    forget_peak()
    start = clock()
    with tempfile.TemporaryDirectory() as out, mock.patch.object(module, "Run", Timed):
        arguments = [*words, "--steps", str(STEPS), "--eval", "quick", "--device", "cpu", "--out", f"{out}/run"]
        with contextlib.redirect_stdout(io.StringIO()):
            module.main([*arguments], standalone_mode=False)
    found = {"first_s": begins[0] - start, "step_ms": 1000 * statistics.median(takes), "peak": memory("VmHWM")}
    return found | sizes


def exchange(rank, folder, sizes):
    """One of PROCESSES: ms of an all_reduce of so many numbers, by the clock and of the processor, for each."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(minutes=10))
    found = []
    for size in sizes:
        numbers, walls = torch.zeros(size), []
        dist.all_reduce(numbers)
        start = time.process_time()
        for _ in range(REPEATS):
            began = time.perf_counter()
            dist.all_reduce(numbers)
            walls.append(1000 * (time.perf_counter() - began))
        found.append((statistics.median(walls), 1000 * (time.process_time() - start) / REPEATS))
    dist.destroy_process_group()
    return found


def exchanges(sizes):
    """[(ms by the clock, ms of the processor)] of process 0, for every size."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
            found = [pool.submit(exchange, rank, folder, sizes) for rank in range(PROCESSES)]
            return found[0].result()


# ---------------------------------------------------------------- Tables


def data_column(name, files, data, run, marks):
    """{row: cell} of a data set; MB of listing and batches without the imports'."""
    after = {f"MB after {mark:,} batches": f"{data[f'after_{mark}']:.0f}" for mark in marks}
    return {
        "data": name, "files": f"{files:,}", "s to list": f"{data['list_s']:.1f}",
        "MB at most, listing": f"{data['list_peak']:.0f}", "MB listed": f"{data['listed']:.0f}", **after,
        "files kept": f"{data['kept']:,}", "files read a second": f"{data['rate']:.0f}" if data["rate"] else "-",
        "ms a batch, read": f"{data['batch_ms']:.0f}", "ms a batch, in memory": f"{data['warm_ms']:.0f}",
        f"ms a batch, one of {CROWD} processes": f"{data['crowd_ms']:.0f}",
        "s to the first step": f"{run['first_s']:.1f}", "ms a step": f"{run['step_ms']:.0f}",
        "MB at most, the command": f"{run['peak']:.0f}"
    }  # fmt: skip


def message_column(name, run, clock, processor):
    """Of a step, and what a process draws for the examples of a hundred."""
    start = time.process_time()
    torch.randn(run["noise"] * run["batch"] * 100, generator=random_generator("noise"))
    drawing = 1000 * (time.process_time() - start)
    share = 100 * processor / (processor + run["step_ms"])
    return {
        "model": name, "parameters": f"{run['numbers']:,}", "MB a step": f"{4 * run['numbers'] / MB:.2f}",
        "ms of an all_reduce, clock": f"{clock:.1f}", "ms of it, processor": f"{processor:.1f}",
        "ms a step": f"{run['step_ms']:.0f}", "share": f"{share:.1f} %",
        "ms to draw for 100 processes": f"{drawing:.1f}"
    }  # fmt: skip


def print_table(columns):
    """Columns {row: cell}, all with the same rows, the first of which is the head."""
    for k, row in enumerate(columns[0] if columns else ()):
        click.echo(f"| {' | '.join([row, *(column[row] for column in columns)])} |")
        if k == 0:
            click.echo(f"|{'-|' * (1 + len(columns))}")
    click.echo()


@click.command(context_settings={"show_default": True})
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Of the full number of files.")
@click.option("--only", default="", help="Data whose name contains it.")
@click.option("--batches", type=click.IntRange(1), nargs=2, default=MARKS, help="After which memory is read.")
@click.option("--folder", type=FOLDER, help="Where the folders are made, or were; by default they are temporary.")
def main(share, only, batches, folder):
    """Print what data sets cost, and what processes send one another."""
    columns, runs = [], {}
    with contextlib.ExitStack() as stack:
        parent = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parent.mkdir(parents=True, exist_ok=True)
        for name, (script, kind, words) in DATA.items():
            if only in name:
                root, files = make_folder(parent, kind, share)
                words = [*words.split(), "--data-root", str(root)]
                data, runs[name] = apart(reading, script, words, batches), apart(training, script, words)
                columns.append(data_column(name, files, data, runs[name], batches))
                click.echo(", ".join(f"{row} {cell}" for row, cell in columns[-1].items()), err=True)
    print_table(columns)
    torch.set_num_threads(1)
    found = exchanges([run["numbers"] for run in runs.values()])
    print_table([message_column(name, run, *times) for (name, run), times in zip(runs.items(), found, strict=True)])


if __name__ == "__main__":
    main()
