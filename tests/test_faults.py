"""What no run hopes for: kill -9, full disks, damaged files, clocks that jump, graphs that give nothing.

`pytest -m faults` runs the long forms: tens of kills, every boundary of a file, hundreds of changed bytes.
"""

import contextlib
import functools
import io
import json
import random
import re
import shutil
import signal
import subprocess
import tarfile
import time
import urllib.request
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import give_nan, save_graph, write_nsynth
from faults import Apart, damaged, die_in_save, disk, jump_clock, limit_files, run, script, signal_at
from PIL import Image

import common
import export
import recompose
import train_vae_mnist

long = functools.partial(pytest.param, marks=pytest.mark.faults)
PICTURES, SOUNDS = recompose.SHIPPED["mvae-image"], recompose.SHIPPED["mvae-sound"]
DIGITS = ["--hidden", "16,8", "--D", 3, "--batch", 20, "--steps", 40, "--device", "cpu", "--eval-samples", 2]
SPRITES = ["--dataset", "sprites", "--steps", 20, "--op", "sum", "--channels", 8, "--D", 4, "--detail", 2,
           "--cells", 8, "--batch", 4, "--device", "cpu"]  # fmt: skip
WRITES = 250  # operations on files in a run of DIGITS
EXPORT = ["export", "--no-torchscript"]


def command(name, digits):
    return [name, *(["--data-root", digits, *DIGITS] if name == "train_vae_mnist" else SPRITES)]


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """Of a script: the folder of a run, and how many seconds it took; made when it is asked for."""

    @functools.cache
    def make(name):
        Apart(print).finish()  # the first begins late
        folder, start = tmp_path_factory.mktemp("undisturbed") / "run", time.monotonic()
        outcome = run(*command(name, digits), "--out", folder)
        assert outcome.code == 0, outcome
        return folder, time.monotonic() - start

    return make


@pytest.fixture(scope="module")
def exported(undisturbed):
    """A run of DIGITS and its export."""
    folder, _ = undisturbed("train_vae_mnist")
    outcome = run(*EXPORT, folder)
    assert outcome.code == 0, outcome
    return folder


def check_same_end(folder, other):
    """Bit for bit: weights, Adam's moments, step, and scores, but for the time they took."""
    one, another = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (folder, other))
    for part in (one, another):
        part["optimizer"] = part["optimizer"]["state"]
    one["elapsed"] = another["elapsed"]
    torch.testing.assert_close(one, another, rtol=0, atol=0)
    scores, others = (common.read_json(run / "metrics.json") | {"minutes": 0} for run in (folder, other))
    assert scores == others


def contents(folder):
    """{path: bytes} of all files but locks and TensorBoard's."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {path: path.read_bytes() for path in files if "tfevents" not in path.name}


def check_one_line(outcome):
    """Exit code 1 or 2, and one error."""
    assert outcome.code in (1, 2) and "Traceback" not in outcome.output, outcome
    assert outcome.output.strip().splitlines()[-1].startswith("Error: "), outcome
    assert outcome.output.count("Error: ") == 1, outcome


READERS = {
    ".json": common.read_json,
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".png": lambda path: Image.open(path).load(),
}


def check_whole(folder):
    """No partial file, and what has its final name can be read."""
    for path in contents(folder):
        assert path.suffix != ".partial", path
        READERS[path.suffix](path)


# ---------------------------------------------------------------- kill -9


def a_kill(way, generator, folder, seconds):
    """At any time, in the middle of a checkpoint, or between two operations on files."""
    if way == 0:
        return {"kill_after": generator.uniform(0, seconds)}
    if way == 1:
        return {"fault": (die_in_save, generator.randrange(10))}
    return {"fault": (signal_at, signal.SIGKILL, int(WRITES ** generator.random()), folder)}  # mostly of the first


def same_again(name, digits, folder):
    """The command that goes on with a killed run, or begins it, if it has left no config.json."""
    begun = (folder / "config.json").exists()
    return [name, "--resume", folder] if begun else [*command(name, digits), "--out", folder]


@pytest.mark.parametrize("n", [3, 5, 9, 14])
def test_a_run_that_is_killed_at_its_start_can_begin_again(n, undisturbed, digits, tmp_path):
    """Before its folder holds anything, config.json, or a checkpoint."""
    name, folder = "train_vae_mnist", tmp_path / "run"
    killed = run(*command(name, digits), "--out", folder, fault=(signal_at, signal.SIGKILL, n, folder))
    assert killed.code == -signal.SIGKILL and not (folder / "checkpoint.pt").exists()
    again = run(*same_again(name, digits, folder))
    assert again.code == 0, again
    check_same_end(folder, undisturbed(name)[0])


@pytest.mark.parametrize(
    ("name", "kills"), [("train_vae_mnist", 2), long("train_vae_mnist", 50), long("train_mvae", 15)]
)
def test_a_killed_run_goes_on_to_the_same_end(name, kills, undisturbed, digits, tmp_path):
    expected, seconds = undisturbed(name)
    for seed in range(kills):
        generator, folder = random.Random(seed), tmp_path / str(seed)
        outcome = run(*command(name, digits), "--out", folder, **a_kill(seed % 3, generator, folder, seconds))
        while outcome.code == -signal.SIGKILL:
            again = {} if generator.random() < 0.7 else a_kill(generator.randrange(3), generator, folder, seconds / 2)
            outcome = run(*same_again(name, digits, folder), **again)
        assert outcome.code == 0, (seed, outcome)
        check_same_end(folder, expected)


def test_two_runs_do_not_share_a_folder(digits, undisturbed, tmp_path):
    folder, resume = tmp_path / "run", ["train_vae_mnist", "--resume", tmp_path / "run"]
    stop = signal_at, signal.SIGSTOP, 30, folder
    first = Apart(script, *command("train_vae_mnist", digits), "--out", folder, fault=stop)
    first.wait_until_stopped()
    second = run(*resume)
    assert first.finish(kill_after=0).code == -signal.SIGKILL
    check_one_line(second)
    assert second.code == 2 and str(folder) in second.output
    assert run(*resume).code == 0, "a lock ends with the process that held it"
    check_same_end(folder, undisturbed("train_vae_mnist")[0])


def test_two_exports_do_not_share_a_folder(exported):
    first = Apart(script, *EXPORT, exported, fault=(signal_at, signal.SIGSTOP, 3, exported / "export"))
    first.wait_until_stopped()
    second = run(*EXPORT, exported)
    first.finish(kill_after=0)
    check_one_line(second)
    assert second.code == 2 and str(exported / "export") in second.output


def change_metadata(old, n, out):
    """Fault: an export that takes the graphs of `old`, and is killed before its n-th operation on files of `out`."""

    def write(stem, graph, inputs, info, forms):
        model = onnx.load(old / f"{stem.name}.onnx")
        model.metadata_props[0].value = json.dumps(info)
        onnx.save(model, stem.with_suffix(".onnx"))
        return True

    export.write_graph = write
    signal_at(signal.SIGKILL, n, out)


@pytest.mark.faults
def test_a_killed_export_leaves_none_that_is_mixed(sprites_run, tmp_path):
    """Graphs are those of before or those of now; where they are of both, they are refused."""
    copy, out, picture = tmp_path / "run", tmp_path / "run" / "export", tmp_path / "in.png"
    shutil.copytree(sprites_run, copy)
    Image.linear_gradient("L").save(picture)
    config = common.read_json(copy / "config.json")
    common.write_json(copy / "config.json", config | {"data": config["data"] | {"source": "another"}})
    for n in range(40):
        shutil.copytree(sprites_run / "export", out, dirs_exist_ok=True)
        killed = run(*EXPORT, copy, fault=(change_metadata, sprites_run / "export", n, out))
        read = [out / f"{graph}.onnx" for graph in ("encoder", "decoder", "composer")]
        texts = [onnx.load(file).metadata_props[0].value for file in read]
        sources = {json.loads(text)["data_source"] for text in texts}
        used = run("recompose", picture, "--model", out, "--out", tmp_path / "o.png")
        assert used.code == (2 if len(sources) > 1 else 0), (n, killed, used)
        if killed.code == 0:
            return
    raise AssertionError("never finished")


# ---------------------------------------------------------------- Full disks, read-only disks, clocks

SIZES = [300, 100_000, *(long(round(10 ** (k / 3))) for k in range(20))]


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_stops_a_run_in_one_line(size, undisturbed, digits, tmp_path):
    outcome = run(*command("train_vae_mnist", digits), "--out", tmp_path / "run", fault=(limit_files, size))
    if outcome.code == 0:
        return check_same_end(tmp_path / "run", undisturbed("train_vae_mnist")[0])
    check_one_line(outcome)
    check_whole(tmp_path)


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_full_disk_keeps_the_checkpoint_of_before(size, exported, tmp_path):
    before = shutil.copytree(exported, tmp_path / "run") / "checkpoint.pt"
    content = before.read_bytes()
    outcome = run("train_vae_mnist", "--resume", tmp_path / "run", "--steps", 80, fault=(limit_files, size))
    check_whole(tmp_path / "run" / "figures")
    if outcome.code:
        check_one_line(outcome)
        assert torch.load(before, weights_only=True)["step"] == 40 or size > len(content)


@pytest.mark.parametrize("size", [30_000, long(100), long(9_999), long(60_000)])
def test_a_full_disk_leaves_the_export_of_before(size, exported):
    before = contents(exported)
    check_one_line(run(*EXPORT, exported, fault=(limit_files, size)))
    assert contents(exported) == before


RESULTS = {  # arguments of recompose.py, and the files that it writes
    "picture": ([PICTURES / "a.png", "--slots", "0,1"], ("o.png", "o_figure.png")),
    "wav": ([SOUNDS / "a.flac", "--slots", "0"], ("o.wav", "o_figure.png")),
    "flac": ([SOUNDS / "a.flac", "--slots", "0"], ("o.flac", "o_figure.png")),
    "mp3": ([SOUNDS / "a.flac", "--slots", "0"], ("o.mp3", "o_figure.png")),
}


def check_recomposition(kind, folder, expected, **settings):
    """It ends in one line, or whole; each file is as it was before, or as expected."""
    (args, names), before = RESULTS[kind], contents(folder)
    outcome = run("recompose", *args, "--out", folder / names[0], **settings)
    if outcome.code:
        check_one_line(outcome)
    now = contents(folder)
    assert now.keys() == before.keys(), outcome
    for name in names:
        old = [] if outcome.code == 0 else [before[folder / name]]
        assert now[folder / name] in [expected[name], *old], (name, outcome)
    return outcome


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of a kind: {name: bytes} that recompose.py writes."""

    @functools.cache
    def make(kind):
        (args, names), folder = RESULTS[kind], tmp_path_factory.mktemp(kind)
        assert run("recompose", *args, "--out", folder / names[0]).code == 0
        return {name: (folder / name).read_bytes() for name in names}

    return make


@pytest.mark.parametrize("kind", ["picture", "wav", long("flac"), long("mp3")])
def test_a_full_disk_leaves_the_recomposition_of_before(kind, results, tmp_path):
    expected, largest = results(kind), max(map(len, results(kind).values()))
    for size in (5000, largest - 1, largest):
        for name in expected:
            (tmp_path / name).write_bytes(b"from before")
        outcome = check_recomposition(kind, tmp_path, expected, fault=(limit_files, size))
        assert outcome.code == (size < largest), outcome


@pytest.mark.parametrize("kilobytes", [400, *map(long, (8, 40, 1000, 4000))])
def test_a_disk_that_is_full_ends_a_run_in_one_line(kilobytes, undisturbed, digits, tmp_path):
    with disk(tmp_path / "disk", f"{kilobytes}k") as folder:
        outcome = run(*command("train_vae_mnist", digits), "--out", folder / "run")
        if outcome.code == 0:
            return check_same_end(folder / "run", undisturbed("train_vae_mnist")[0])
        check_one_line(outcome)
        check_whole(folder)


@pytest.mark.parametrize("option", ["rw", "ro"])
def test_a_disk_that_is_full_or_read_only_keeps_a_recomposition(option, results, tmp_path):
    with disk(tmp_path / "disk", "100k") as folder:
        for name in results("wav"):
            (folder / name).write_bytes(b"from before")
        subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)
        assert check_recomposition("wav", folder, results("wav")).code == 1


def test_a_read_only_run_folder_is_one_line(exported, digits, tmp_path):
    with disk(tmp_path / "disk", "10m") as folder:
        shutil.copytree(exported, folder / "run")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        resumed = ["train_vae_mnist", "--resume", folder / "run", "--steps", 80]
        for args in (
            resumed,
            [*command("train_vae_mnist", digits), "--out", folder / "new"],
            [*EXPORT, folder / "run"],
        ):
            check_one_line(run(*args))


def test_a_clock_that_jumps_changes_nothing(undisturbed, digits, tmp_path):
    outcome = run(*command("train_vae_mnist", digits), "--out", tmp_path / "run", fault=(jump_clock, 0))
    assert outcome.code == 0, outcome
    check_same_end(tmp_path / "run", undisturbed("train_vae_mnist")[0])


# ---------------------------------------------------------------- Damaged files


def check_nothing_wrong(function, *args):
    """Decoders of files may crash: a process of its own prints what is wrong."""
    code, output = Apart(function, *args).finish()
    assert code == 0 and "wrong: " not in output, "\n".join(re.findall("wrong: .*", output)) or output


def judge_checkpoints(folder, cuts, flips):
    path = folder / "checkpoint.pt"
    content, expected = path.read_bytes(), train_vae_mnist.load(folder)
    for what, changed in damaged(content, cuts, flips):
        path.write_bytes(changed)
        try:
            model = train_vae_mnist.load(folder)
            for one, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
                assert torch.equal(one, other)
            assert model.config["step"] == expected.config["step"]
        except click.ClickException:
            continue
        except Exception as fault:
            print("\nwrong:", what, repr(fault))


@pytest.mark.parametrize(("cuts", "flips"), [(6, 12), long(None, 500)])
def test_a_damaged_checkpoint_is_refused_or_right(cuts, flips, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "run")
    check_nothing_wrong(judge_checkpoints, tmp_path / "run", cuts, flips)


def judge_recompositions(victim, args, out, cuts, flips):
    """Each result must be that of the whole file, or an error that writes nothing; of a .wav any sound."""
    content, expected = victim.read_bytes(), None
    if victim.stem == "a":
        recompose.Model = functools.cache(recompose.Model)
    for what, changed in [("nothing", content), *damaged(content, cuts, flips)]:
        victim.write_bytes(changed)
        result = CliRunner().invoke(recompose.main, [*args, "--out", str(out)])
        written = [path.read_bytes() for path in sorted(out.parent.iterdir())]
        expected = expected or written
        # A sample of a .wav has no checksum, nor have the rate and the length in the header of a .flac.
        header = victim.suffix == ".flac" and changed[42:] == content[42:]
        right = written == expected or ((victim.suffix == ".wav" or header) and len(written) == 2)
        refused = result.exit_code in (1, 2) and "Error: " in result.output and not written
        if not (right if result.exit_code == 0 else refused and isinstance(result.exception, SystemExit)):
            print("\nwrong:", what, result, result.output)
        shutil.rmtree(out.parent)
        out.parent.mkdir()


@pytest.mark.parametrize(("cuts", "flips"), [(6, 12), long(None, 500)])
@pytest.mark.parametrize("name", ["a.png", "encoder.onnx", "composer.onnx", "SHA256SUMS", "a.flac", "a.wav"])
def test_a_damaged_file_gives_an_error_or_the_right_result(name, cuts, flips, tmp_path):
    sound = name in ("a.flac", "a.wav")
    model = shutil.copytree(SOUNDS if sound else PICTURES, tmp_path / "model")
    (tmp_path / "out").mkdir()
    if sound:
        samples, rate = soundfile.read(model / "a.flac")
        soundfile.write(model / "a.wav", samples, rate)
    source = model / (name if name[0] == "a" else "a.png")
    out = tmp_path / "out" / f"o{'.wav' if sound else '.png'}"
    check_nothing_wrong(judge_recompositions, model / name, [str(source), "--model", str(model)], out, cuts, flips)


class Response(io.BytesIO):
    """Of a server that has the files of `folder`."""

    def __init__(self, folder, request):
        super().__init__((folder / Path(request.full_url).name).read_bytes())
        self.url, self.length = request.full_url, len(self.getvalue())


def judge_archives(archive, root, cuts, flips):
    urllib.request.urlopen = functools.partial(Response, archive.parent)
    content, expected = archive.read_bytes(), None
    for what, changed in [("nothing", content), *damaged(content, cuts, flips)]:
        archive.write_bytes(changed)
        try:
            common.nsynth_notes(root, "train", ["flute"], True)
            found = contents(root)
            expected = expected or found
            assert found == expected, "other files"
        except click.ClickException:
            pass
        except Exception as fault:
            print("\nwrong:", what, repr(fault))
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def archive(tmp_path):
    """NSynth's, of one note: noise, which takes about 200 KB."""
    write_nsynth(tmp_path / "official", [("flute", 60)], samples=16)
    noise = np.random.default_rng(0).uniform(-1, 1, 100_000)
    (wav,) = (tmp_path / "official" / "nsynth-train" / "audio").iterdir()
    soundfile.write(wav, noise, 16000)
    path = tmp_path / Path(common.ARCHIVES.format(split="train")).name
    with tarfile.open(path, "w:gz") as packed:
        packed.add(tmp_path / "official" / "nsynth-train", "nsynth-train")
    return path


@pytest.mark.parametrize(("cuts", "flips"), [(6, 12), long(None, 500)])
def test_a_damaged_archive_gives_an_error_or_all_notes(cuts, flips, archive, tmp_path):
    check_nothing_wrong(judge_archives, archive, tmp_path / "root", cuts, flips)


def member(name, kind=tarfile.REGTYPE, target="", content=b"evil"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, str(target), len(content) if kind == tarfile.REGTYPE else 0
    return info, io.BytesIO(content)


def test_an_archive_writes_nothing_outside_its_folder(archive, monkeypatch, tmp_path):
    monkeypatch.setattr(urllib.request, "urlopen", functools.partial(Response, tmp_path))
    victim, good = tmp_path / "victim", archive.read_bytes()
    evils = {
        "up": [member("../victim")],
        "absolute": [member(str(victim))],
        "deep": [member("nsynth-train/audio/../../../victim")],
        "link": [member("link", tarfile.SYMTYPE, "../victim"), member("link")],
        "absolute link": [member("link", tarfile.SYMTYPE, victim), member("link")],
        "folder": [member("link", tarfile.SYMTYPE, ".."), member("link/victim")],
        "hard link": [member("link", tarfile.LNKTYPE, "../victim"), member("link")],
        "pipe": [member("nsynth-train/pipe", tarfile.FIFOTYPE)],
    }
    for what, members in evils.items():
        victim.write_text("from before")
        with tarfile.open(fileobj=io.BytesIO(good)) as whole, tarfile.open(archive, "w:gz") as packed:
            for info, content in [*((info, whole.extractfile(info)) for info in whole), *members]:
                packed.addfile(info, content)
        root = tmp_path / what
        with contextlib.suppress(click.ClickException):
            common.nsynth_notes(root, "train", ["flute"], True)
        assert victim.read_text() == "from before", what
        assert not any(path.is_symlink() and not path.resolve().is_relative_to(root) for path in root.rglob("*")), what
        assert not (root / "nsynth-train" / "pipe").exists()


# ---------------------------------------------------------------- Graphs that give nothing


def give_constant(path, value):
    """Change a graph so that its first output has one value everywhere."""
    model = onnx.load(path)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{name}_" if name == output else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["zero"], value_float=0.0))
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["constant"], value_float=value))
    model.graph.node.append(onnx.helper.make_node("Mul", [f"{output}_", "zero"], ["none"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["none", "constant"], [output]))
    save_graph(model, path)


@pytest.mark.parametrize("name", ["picture", "sound"])
@pytest.mark.parametrize("change", [give_nan, functools.partial(give_constant, value=0.0)])
def test_what_is_nan_constant_or_silent_is_not_written(name, change, tmp_path):
    folder = shutil.copytree(SOUNDS if name == "sound" else PICTURES, tmp_path / "model")
    change(folder / ("vocoder.onnx" if name == "sound" else "composer.onnx"))
    (tmp_path / "out").mkdir()
    args = [folder / "a.flac", "--vocoder"] if name == "sound" else [folder / "a.png"]
    out = tmp_path / "out" / ("o.wav" if name == "sound" else "o.png")
    result = CliRunner().invoke(recompose.main, [*map(str, args), "--model", str(folder), "--out", str(out)])
    assert result.exit_code == 1 and "nothing is written" in result.output, result.output
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("decibels", [-100, -92, -88])
def test_a_sound_too_soft_for_its_file_is_not_written(decibels, tmp_path):
    """16 bits hold no less than -96 dB of full scale."""
    args = [SOUNDS / "a.flac", "--gain", f"0:{decibels}", "--gain", f"1:{decibels}", "--out", tmp_path / "o.wav"]
    result = CliRunner().invoke(recompose.main, list(map(str, args)))
    assert result.exit_code == 1 or soundfile.read(tmp_path / "o.wav")[0].any(), result.output
    assert result.exit_code == 0 or not list(tmp_path.iterdir())
