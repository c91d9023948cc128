"""Damaged pictures, sounds and command lines, thought out by hypothesis: an exit code, never a crash, never rubbish.

`pytest -m faults` tries many times as many. Small files of huge pictures are measured in processes of their own.
"""

import functools
import io
import resource
import shutil
import struct
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import recompose
import train_mvae
import train_vae_audio
import train_vae_mnist

pytestmark = pytest.mark.usefixtures("kept_sessions", "little_memory")
PICTURE, SOUND = recompose.SHIPPED["mvae-image"] / "a.png", recompose.SHIPPED["mvae-sound"] / "a.flac"


@pytest.fixture
def little_memory():
    """4 GB more than now: an input that takes all of the machine's would end this process, or another."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (4 * 10**9 + pages * resource.getpagesize(), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def counts(short, long):
    """Decorator: so many examples in every test run, or `long` with `-m faults`."""
    return pytest.mark.parametrize("examples", [short, pytest.param(long, marks=pytest.mark.faults)])


def try_out(examples, **strategies):
    """Decorator that calls the function with so many examples: few are the same in every run."""

    def decorate(function):
        few = settings(max_examples=examples, derandomize=examples < 100, deadline=None, database=None,
                       suppress_health_check=list(HealthCheck))  # fmt: skip
        few(given(**strategies)(function))()

    return decorate


def check_end(result, folder):
    """0 and a result that says something, or 1 or 2, one error and no file."""
    raised = result.exception is not None and not isinstance(result.exception, SystemExit)
    assert not raised, "".join(traceback.format_exception(*result.exc_info))
    names = [*folder.iterdir()]
    if result.exit_code:
        assert result.exit_code in (1, 2) and "Error: " in result.output and not names, (result.output, names)
    elif names:
        assert len(names) == 2 and ".png" in [path.suffix for path in names], names
        for path in names:
            values = soundfile.read(path)[0] if path.suffix in recompose.SOUNDS else np.asarray(Image.open(path))
            assert np.isfinite(values).all() and np.ptp(values) > 0, f"{path.name} is constant: {result.output}"


# ---------------------------------------------------------------- Pictures and sounds


@functools.cache
def pictures():
    """{suffix and a number: bytes} of one picture in many formats and modes."""
    whole = Image.open(PICTURE).convert("RGB").crop((96, 24, 384, 312)).resize((96, 96))
    grey = whole.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    clear = whole.copy()
    clear.putalpha(grey)
    palette, bits = whole.quantize(16), grey.convert("1")
    modes = {".png": [whole, grey, deep, clear, palette, bits, clear.convert("LA")], ".bmp": [whole, palette, bits]}
    modes |= {".jpg": [whole, grey, whole.convert("CMYK")], ".tiff": [whole, deep, bits, clear, whole.convert("LAB")]}
    modes |= {".gif": [palette], ".webp": [clear, whole], ".ppm": [whole, bits], ".tga": [clear], ".pcx": [palette]}
    modes |= {".ico": [whole], ".jp2": [clear], ".avif": [whole], ".sgi": [whole], ".dds": [clear], ".icns": [whole]}
    made = {(".png", -1): PICTURE.read_bytes()}
    for suffix, number, picture in ((s, k, p) for s, some in modes.items() for k, p in enumerate(some)):
        picture.save(file := io.BytesIO(), Image.registered_extensions()[suffix])
        made[suffix, number] = file.getvalue()
    for suffix in (".gif", ".webp", ".png"):  # animated
        form = Image.registered_extensions()[suffix]
        whole.save(file := io.BytesIO(), form, save_all=True, append_images=[whole.rotate(90)])
        made[suffix, -2] = file.getvalue()
    return made


@functools.cache
def sounds():
    """The same of one sound."""
    samples, rate = soundfile.read(SOUND)
    stereo, made = np.stack([samples, samples[::-1]], axis=1)[:24000], {(".flac", -1): SOUND.read_bytes()}
    kinds = {".wav": ["PCM_16", "PCM_U8", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "GSM610"],
             ".flac": ["PCM_16", "PCM_24"], ".ogg": ["VORBIS", "OPUS"], ".mp3": ["MPEG_LAYER_III"],
             ".aiff": ["PCM_16", "FLOAT"]}  # fmt: skip
    for suffix, number, kind in ((s, k, one) for s, some in kinds.items() for k, one in enumerate(some)):
        values = stereo[:, 0] if kind == "GSM610" else stereo
        soundfile.write(file := io.BytesIO(), values, rate, kind, format=suffix[1:].upper())
        made[suffix, number] = file.getvalue()
    return made


ODD = (0, 1, 2, 255, 65535, 65536, 100_000, 2**31 - 1, 2**31, 2**32 - 1, 30 * 86400 * 16000)


def change(content, other, kind, a, b, value):
    """One damage; a and b are places, in 2^-16 of the length."""
    i, j = sorted((a * len(content) >> 16, b * len(content) >> 16))
    return {
        "flip": lambda: content[:i] + bytes([value % 256]) + content[i + 1 :],
        "cut": lambda: content[:i] + content[j:],
        "repeat": lambda: content[:j] + content[i:],
        "splice": lambda: content[:i] + other[b * len(other) >> 16 :],
        "header": lambda: content[: a % 64] + struct.pack(">I", value % 2**32) + content[a % 64 + 4 :],
        "little": lambda: content[: a % 64] + struct.pack("<I", value % 2**32) + content[a % 64 + 4 :],
    }[kind]()


def sealed(content):
    """A PNG with right checksums of its chunks, so that damage is not found at once."""
    at, made = 8, content[:8]
    while made[:4] == b"\x89PNG" and at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4])
        made += content[at:end] + struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return made + content[at:] if len(made) > 8 else content


def damages(files):
    """Strategy: (suffix, bytes)."""
    place, kinds = st.integers(0, 2**16), ["flip", "flip", "cut", "repeat", "splice", "header", "little"]
    value = st.sampled_from(ODD) | st.integers(0, 255)
    changes = st.lists(st.tuples(st.sampled_from(kinds), place, place, value), max_size=5)

    def damage(key, other, changes, seal):
        content = functools.reduce(lambda made, one: change(made, files[other], *one), changes, files[key])
        return key[0], sealed(content) if seal else content

    keys = st.sampled_from(sorted(files))
    return st.builds(damage, keys, keys, changes, st.booleans())


def check_file(folder, suffix, content, out, *args):
    """Recompose a file of these bytes, within 30 s."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    source = folder.with_suffix(suffix)
    source.write_bytes(content)
    start = time.monotonic()
    result = CliRunner().invoke(recompose.main, [str(source), *args, "--out", str(folder / out)])
    assert time.monotonic() - start < 30
    check_end(result, folder)
    assert result.exit_code or list(folder.iterdir())


@counts(30, 2000)
def test_a_damaged_picture_is_never_a_crash(examples, tmp_path):
    @try_out(examples, file=damages(pictures()), crop=st.sampled_from(["fit", "centre", "clevr"]))
    def check(file, crop):
        check_file(tmp_path / "out", *file, "o.png", "--crop", crop)


@counts(30, 2000)
def test_a_damaged_sound_is_never_a_crash(examples, tmp_path):
    @try_out(examples, file=damages(sounds()), slots=st.sampled_from(["0", "0,1"]))
    def check(file, slots):
        check_file(tmp_path / "out", *file, "o.wav", "--slots", slots)


@pytest.mark.faults
@pytest.mark.parametrize("key", sorted(pictures()))
def test_whole_pictures_of_all_formats_are_read_or_refused(key, tmp_path):
    check_file(tmp_path / "out", key[0], pictures()[key], "o.png", "--crop", "fit")


# ---------------------------------------------------------------- Command lines

NUMBERS = ["0", "1", "-1", "2", "3", "0.5", "-0", "1e3", "1e309", "nan", "inf", "-inf", "9" * 30, "0x10", "1_000", "٣"]
LISTS = ["0,1", "0,,1", ",", "0,0", "1,0", "0:1", "0:0.1,0.2", "0:nan,0", "1.0:1,1", "0.0:-1,1", "0:1e9", "0.0", "²"]
WORDS = ["", " ", "--", "-", "auto", "cpu", "clevr", "fit", ".", "..", "/", "none/o.png", "o.png", "o.wav", "o.PNG",
         "o.flac", "o.mp3", "o.ogg", "x" * 300, ".png", "\udcff.png", "é☃.png", "a\nb.png", "%s{}", "~"]  # fmt: skip
VALUES = st.sampled_from([*NUMBERS, *LISTS, *WORDS]) | st.text(st.characters(exclude_characters="\0/"), max_size=6)


def words(command, but=()):
    """Strategy: some of a command's options, each with a value or without."""
    flags = [flag for option in command.params for flag in option.opts if flag.startswith("--") and flag not in but]
    pair = st.tuples(st.sampled_from(flags), VALUES) | st.tuples(st.sampled_from([*flags, "--nonsense"]))
    return st.lists(pair, max_size=6).map(lambda pairs: [word for pair in pairs for word in pair])


@counts(60, 2000)
def test_any_command_line_of_recompose_ends_in_an_exit_code(examples, tmp_path, monkeypatch):
    inputs, folder = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    for name in ("a.png", "b.PNG", "a\nb.png"):
        (inputs / name).write_bytes(pictures()[".png", 0])
    (inputs / "a.flac").write_bytes(SOUND.read_bytes())
    (inputs / "empty.wav").touch()
    names = [*(str(path) for path in sorted(inputs.iterdir())), str(inputs), "none.png", ""]
    favourite = st.sampled_from([[str(inputs / "a.png")], [str(inputs / "a.flac")]])
    files = favourite | st.lists(st.sampled_from(names), max_size=4)

    @try_out(examples, files=files, options=words(recompose.main))
    def check(files, options):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        monkeypatch.chdir(folder)
        check_end(CliRunner().invoke(recompose.main, [*files, *options]), folder)


class AcceptedError(Exception):
    """Options were checked, and training would begin."""


@counts(40, 500)
@pytest.mark.parametrize("script", [train_vae_mnist, train_vae_audio, train_mvae], ids=lambda script: script.__name__)
def test_any_options_of_training_end_in_an_exit_code(script, examples, tmp_path, monkeypatch):
    def accept(*_):
        raise AcceptedError

    monkeypatch.setattr(script, "start_device", accept)
    monkeypatch.chdir(tmp_path)

    @try_out(examples, dataset=st.sampled_from(sorted(script.PRESETS)), options=words(script.main), dry=st.booleans())
    def check(dataset, options, dry):
        result = CliRunner().invoke(script.main, ["--dataset", dataset, *options, *["--dry-run"] * dry])
        if not isinstance(result.exception, AcceptedError):
            check_end(result, tmp_path)
        assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- Small files of huge pictures and sounds

MOST_MEGABYTES, MOST_SECONDS = 2000, 30
MEASURED = """
import resource, sys, recompose
resource.setrlimit(resource.RLIMIT_AS, (8 * 10**9,) * 2)  # for the machine's sake
try:
    recompose.main()
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def png(width, height, bits, kind, *chunks):
    """A PNG of zeros, written row by row."""
    packer, rows = zlib.compressobj(1), bytes(1 + -(-width * bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind] // 8))
    data = b"".join([*(packer.compress(rows) for _ in range(height)), packer.flush()])
    parts = [
        (b"IHDR", struct.pack(">2I5B", width, height, bits, kind, 0, 0, 0)),
        *chunks,
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def wav(seconds, rate=16000, channels=1):
    """A header that promises so many seconds, and one of them."""
    size = min(seconds * rate * channels * 2, 2**32 - 100)
    form = struct.pack("<4sI2H2I2H", b"fmt ", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
    noise = np.random.default_rng(0).integers(-9999, 9999, rate * channels).astype("<i2").tobytes()
    return b"RIFF" + struct.pack("<I", size + 36) + b"WAVE" + form + b"data" + struct.pack("<I", size) + noise


def noise_wav(seconds, channels):
    """A whole one."""
    values = np.random.default_rng(0).standard_normal((seconds * 48000, channels)).astype(np.float32) / 9
    soundfile.write(file := io.BytesIO(), values, 48000, format="WAV")
    return file.getvalue()


def saved(picture, form, **options):
    picture.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


PALETTE = (b"PLTE", bytes(range(6))), (b"tRNS", b"\0\x80")
BOMBS = {  # name: suffix, what makes the bytes
    "1 bit, 20,000 x 20,000": (".png", lambda: png(20_000, 20_000, 1, 0)),
    "16 bits, 8,000 x 8,000": (".png", lambda: png(8000, 8000, 16, 0)),
    "16 bits RGBA, 8,000 x 8,000": (".png", lambda: png(8000, 8000, 16, 6)),
    "RGBA, 8,000 x 8,000": (".png", lambda: png(8000, 8000, 8, 6)),
    "palette with transparency, 8,000 x 8,000": (".png", lambda: png(8000, 8000, 8, 3, *PALETTE)),
    "RGBA, 8,192 x 8,192": (".png", lambda: png(8192, 8192, 8, 6)),
    "RGB, 100,000 x 600": (".png", lambda: png(100_000, 600, 8, 2)),
    "RGB, 100,000 x 1": (".png", lambda: png(100_000, 1, 8, 2)),
    "RGB, 1 x 100,000": (".png", lambda: png(1, 100_000, 8, 2)),
    "long text": (".png", lambda: png(64, 64, 8, 2, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**9), 1)))),
    "JPEG, 8,000 x 8,000": (".jpg", lambda: saved(Image.new("RGB", (8000, 8000)), "JPEG")),
    "progressive JPEG": (".jpg", lambda: saved(Image.new("RGB", (8000, 8000)), "JPEG", progressive=True)),
    "TIFF, 8,000 x 8,000": (".tiff", lambda: saved(Image.new("RGBA", (8000, 8000)), "TIFF", compression="tiff_lzw")),
    "WebP, 8,000 x 8,000": (".webp", lambda: saved(Image.new("RGBA", (8000, 8000)), "WEBP", method=0)),
    "30 days": (".wav", lambda: wav(30 * 86400)),
    "30 days of 32,000 channels": (".wav", lambda: wav(30 * 86400, 8000, 32_000)),
    "32,767 channels": (".wav", lambda: wav(1, 8000, 32_767)),
    "10 minutes of stereo": (".wav", lambda: noise_wav(600, 2)),
    "23 s of 60 channels": (".wav", lambda: noise_wav(23, 60)),
}
QUICK = ("1 bit, 20,000 x 20,000", "RGBA, 8,000 x 8,000", "30 days")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.faults]) for name in BOMBS]
)
@pytest.mark.parametrize("crop", ["centre", pytest.param("fit", marks=pytest.mark.faults)])
def test_huge_inputs_take_neither_memory_nor_time(name, crop, tmp_path, record_property):
    suffix, make = BOMBS[name]
    source, sound = tmp_path / f"in{suffix}", suffix == ".wav"
    source.write_bytes(make())
    args = [source, "--out", tmp_path / ("o.wav" if sound else "o.png"), *([] if sound else ["--crop", crop])]
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", MEASURED, *args], capture_output=True, text=True)
    seconds, megabytes = time.monotonic() - start, int(ended.stderr.rsplit("VmHWM:", 1)[1].split()[0]) // 1000
    record_property("measured", f"{name}, {crop}: {megabytes} MB, {seconds:.1f} s, exit code {ended.returncode}")
    assert ended.returncode in (0, 1, 2) and "Traceback" not in ended.stderr, ended.stderr
    assert megabytes < MOST_MEGABYTES and seconds < MOST_SECONDS, (megabytes, seconds)
