"""The recomposition tool: the same pictures as PyTorch makes, every kind of picture file, every kind of mistake.

After a new export of the shipped model, `python -m tests.test_recompose` prints its GOLDEN numbers.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import give_nan, save_graph
from packaging.requirements import Requirement
from PIL import Image

import recompose
import train_mvae

pytestmark = pytest.mark.usefixtures("kept_sessions")
ROOT = Path(recompose.__file__).parent
SHIPPED = recompose.SHIPPED["mvae-image"]
ABOUT = json.loads((SHIPPED / "model.json").read_text())
# Nats of the slots that hold objects, first of a.png; mean colours (0 to 255) of slots 0 and 2 of both together.
GOLDEN = {"nats": [30.48, 26.35, 23.37, 22.56, 28.51, 27.76, 23.81, 20.42], "colours": [120.92, 116.48, 109.18]}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Two of the shipped pictures: a.png at 480x320 and b.png, a square of 64x64."""
    folder = tmp_path_factory.mktemp("pictures")
    shutil.copy(SHIPPED / "a.png", folder)
    Image.fromarray(recompose.load_picture(SHIPPED / "b.png", 64, "clevr")).save(folder / "b.png")
    return folder


def run(*args):
    return CliRunner().invoke(recompose.main, [str(a) for a in args])


def refused(result, message, code=2):
    assert result.exit_code == code, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()[-1]) > 0 and "Traceback" not in result.output


# ---------------------------------------------------------------- What it makes


@torch.no_grad()
def test_recomposition_is_what_pytorch_makes(clevr_run, inputs, tmp_path):
    """One golden output, two runtimes."""
    out = tmp_path / "mixed.png"
    args = ["--slots", "0,2", "--slots", "1", "--model", clevr_run / "export", "--out", out]
    result = run(inputs / "a.png", inputs / "b.png", *args)
    assert result.exit_code == 0, result.output
    model = train_mvae.load(clevr_run)
    pictures = np.stack([recompose.load_picture(inputs / n, 64, "clevr") for n in ("a.png", "b.png")])
    encoding = model.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
    layer = model.decode(encoding.mu, encoding.cell)
    taken = torch.cat([layer[0, [0, 2]], layer[1, [1]]])[None]
    expected = recompose.to_uint8(model.compose(taken, encoding.background[:1])[0].numpy())
    written = np.asarray(Image.open(out))
    assert np.abs(written.astype(int) - expected.astype(int)).max() <= 1  # a value on the edge may round either way


def golden_numbers():
    """The shipped model's answers on the shipped pictures, as the README's command gives them."""
    names = [SHIPPED / "a.png", SHIPPED / "b.png"]
    model = recompose.Model(SHIPPED, "mvae-image")
    pictures = np.stack([recompose.load_picture(path, ABOUT["size"], "clevr") for path in names])
    kl = model.run("encoder", image=pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255)["kl"]
    result, _ = recompose.recompose_pictures(model, names, [{0: {}, 2: {}}, {0: {}, 2: {}}])
    numbers = {"nats": kl[:, :4].flatten(), "colours": np.asarray(result).mean((0, 1))}
    return {name: [round(float(value), 2) for value in values] for name, values in numbers.items()}


def test_the_shipped_model_gives_its_golden_numbers():
    found = golden_numbers()
    for name, values in GOLDEN.items():
        np.testing.assert_allclose(found[name], values, rtol=0.01, err_msg=f"now {found}")


def test_all_slots_of_one_picture_are_its_reconstruction(inputs, tmp_path):
    every, named = tmp_path / "every.png", tmp_path / "named.png"
    first = run(inputs / "a.png", "--out", every)
    assert first.exit_code == 0 and f"every.png: {ABOUT['N']} of {ABOUT['N']} slots; " in first.output
    one = run(inputs / "a.png", "--slots", ",".join(map(str, reversed(range(ABOUT["N"])))), "--out", named)
    assert one.exit_code == 0
    difference = np.asarray(Image.open(every)).astype(int) - np.asarray(Image.open(named)).astype(int)
    assert np.abs(difference).max() <= 1


@pytest.fixture
def sheets(monkeypatch):
    """What the figures of a test are drawn of: rows, title, labels."""
    sheets, draw = [], recompose.contact_sheet
    monkeypatch.setattr(recompose, "contact_sheet", lambda *args: sheets.append(args) or draw(*args))
    return sheets


def test_the_figure_stands_beside_and_frames_the_chosen_slots(inputs, tmp_path, sheets):
    result = run(inputs / "a.png", inputs / "b.png", "--slots", "1", "--out", tmp_path / "mixed.png")
    assert f"2 of {2 * ABOUT['N']} slots; " in result.output
    ((rows, title, labels),) = sheets
    for row, name in zip(rows, ("a.png", "b.png"), strict=False):
        held = [not tile.pale for tile in row[2:]]
        assert [tile.caption.split(": ")[1] != "empty" for tile in row[2:]] == held == sorted(held, reverse=True)
        assert all(
            float(tile.caption.split()[2]) >= recompose.EMPTY["mvae-image"] - 0.5 for tile in row[2:] if not tile.pale
        )
        assert f"{name}: {sum(held)} objects, {len(held) - sum(held)} empty slots\n" in result.output
    assert [[tile.caption.split(":")[0] for tile in row if tile.framed] for row in rows] == [
        ["slot 1"], ["slot 1"], ["of the framed slots"]
    ]  # fmt: skip
    assert title and labels == ["a.png", "b.png", "recomposition"]
    assert {f.name for f in tmp_path.iterdir()} == {"mixed.png", "mixed_figure.png"}


def test_models_without_a_background_work_too(sprites_run, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "s.png")
    out = tmp_path / "out.png"
    result = run(tmp_path / "s.png", "--slots", "0", "--model", sprites_run / "export", "--out", out)
    assert result.exit_code == 0 and "1 of 4 slots;" in result.output, result.output
    assert Image.open(out).size == (64, 64)
    Image.new("RGB", (40, 32)).save(tmp_path / "wide.png")
    refused(
        run(tmp_path / "wide.png", "--model", sprites_run / "export", "--out", out), "40x32 pixels; expected a square"
    )


@pytest.mark.parametrize("broken", ["encoder", "decoder", "composer"])
def test_what_is_not_finite_is_not_written(inputs, tmp_path, broken):
    shutil.copytree(SHIPPED, tmp_path / "m")
    give_nan(tmp_path / "m" / f"{broken}.onnx")
    (tmp_path / "out").mkdir()
    result = run(inputs / "a.png", "--model", tmp_path / "m", "--out", tmp_path / "out" / "o.png")
    refused(result, f"{broken}.onnx gives values that are not finite; nothing is written", 1)
    assert not list((tmp_path / "out").iterdir())


def test_inputs_unlike_what_a_model_has_learnt_are_told(clevr_run, inputs, capsys):
    model = recompose.Model(clevr_run / "export", "mvae-image")
    for usual, told in (({"unlike": 1.0}, False), ({"unlike": 0.0}, True), ({}, False)):
        model.about.pop("unlike", None)
        model.about |= usual
        recompose.recompose_pictures(model, [inputs / "a.png"], [{0: {}}])
        assert ("a.png: unlike the objects that this model has learnt" in capsys.readouterr().err) == told


def test_a_graph_that_fails_ends_in_one_clear_line():
    model = recompose.Model(SHIPPED, "mvae-image")
    with pytest.raises(click.ClickException, match=r"^encoder\.onnx fails: .+$"):
        model.run("encoder", image=np.zeros((1, 3, 8, 8), np.float32))


# ---------------------------------------------------------------- Slots at run time, and edits


def test_a_model_takes_pictures_apart_into_as_many_slots_as_it_is_asked_for(clevr_run, inputs, tmp_path, sheets):
    """Its 3 or others; what fewer slots show is among what more show."""
    image = recompose.load_picture(inputs / "a.png", 64, "clevr").transpose(2, 0, 1)[None].astype(np.float32) / 255
    cells = {}
    for n in (1, 3, 12):
        model = recompose.Model(clevr_run / "export", "mvae-image", n)
        cells[n] = set(map(tuple, model.run("encoder", image=image, **model.slots)["cell"][0].tolist()))
        assert len(cells[n]) == n
    assert cells[1] < cells[3] < cells[12]
    args, out = [inputs / "a.png", "--model", clevr_run / "export"], ["--out", tmp_path / "o.png"]
    for n in (2, 5):
        result = run(*args, "--n-slots", n, "--slots", f"{n - 1},0", *out)
        assert result.exit_code == 0 and f"2 of {n} slots; " in result.output, result.output
        assert [tile.framed for tile in sheets[-1][0][0][2:]] == [True, *[False] * (n - 2), True]
    refused(run(*args, "--slots", "3", *out), "from 0 to 2 (--n-slots asks for more)")
    refused(run(*args, "--n-slots", 2, "--slots", "2", *out), "from 0 to 1")
    refused(run(*args, "--n-slots", 13, *out), "not in the range 1<=x<=12")


@pytest.fixture(scope="module")
def shipped():
    return recompose.Model(SHIPPED, "mvae-image")


@pytest.fixture(scope="module")
def places(shipped):
    """Where the slots of a.png stand: (N, 2) as (y, x) in [-1, 1]; the first three hold objects, the last none."""
    picture = recompose.load_picture(SHIPPED / "a.png", ABOUT["size"], ABOUT["crop"])
    said = shipped.run("encoder", image=picture.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    assert said["kl"][0, -1] < recompose.EMPTY["mvae-image"] < said["kl"][0, 2]
    return said["cell"][0]


def recomposed(model, kept):
    """The picture that slots of a.png with their edits make: float (H, W, 3)."""
    return np.asarray(recompose.recompose_pictures(model, [SHIPPED / "a.png"], [kept])[0]).astype(float)


def test_a_moved_object_stands_as_much_further_as_was_asked_for(shipped, places, sheets):
    right, down = -0.12 * np.sign(places[0, 1]), -0.09 * np.sign(places[0, 0])  # towards the middle
    behind, centres = recomposed(shipped, {len(places) - 1: {}}), []
    for edits in ({}, {"move": (right, down)}):
        change = np.abs(recomposed(shipped, {0: edits}) - behind).sum(2)
        change *= change > change.max() / 4  # the object, without its shade
        centres.append([(change * place).sum() / change.sum() for place in np.indices(change.shape)])
    moved = np.subtract(centres[1], centres[0]) / ABOUT["size"]
    np.testing.assert_allclose(moved, [down, right], atol=0.01)
    assert sheets[-1][0][-1][0].caption == f"of the framed slots; slot 0 moved by {right:+g} {down:+g}"


def test_front_brings_an_object_before_the_others(shipped, places, sheets):
    """Slot 0 is moved to where slot 2 stands: what is in front is seen there."""
    down, right = (places[2] - places[0]) / 2
    move = {"move": (right, down)}
    alone = {0: recomposed(shipped, {0: move}), 2: recomposed(shipped, {2: {}})}
    y, x = ((places[2] + 1) / 2 * ABOUT["size"]).round().astype(int)
    there = np.s_[y - 2 : y + 3, x - 2 : x + 3]
    assert np.abs(alone[0] - alone[2])[there].mean() > 20
    for kept, front, other in (({0: move | {"front": ()}, 2: {}}, 0, 2), ({0: move, 2: {"front": ()}}, 2, 0)):
        both = recomposed(shipped, kept)
        assert np.abs(both - alone[front])[there].mean() < 0.3 * np.abs(both - alone[other])[there].mean()
        assert f"slot {front} in front" in sheets[-1][0][-1][0].caption


def test_edits_belong_to_the_input_they_name(inputs, tmp_path, sheets):
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    args = [inputs / "a.png", inputs / "b.png", "--slots", "0,1"]
    assert run(*args, "--move", "1:0.1,0", "--out", one).exit_code == 0
    assert run(*args, "--move", "1.1:-.1,+0.05", "--front", "0.0", "--out", other).exit_code == 0
    assert [sheet[0][-1][0].caption for sheet in sheets] == [
        "of the framed slots; slot 0.1 moved by +0.1 +0",
        "of the framed slots; slot 0.0 in front; slot 1.1 moved by -0.1 +0.05",
    ]
    assert (np.asarray(Image.open(one)) != np.asarray(Image.open(other))).any()


def test_order_means_nothing_to_layers_that_are_added_up(sprites_run, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "s.png")
    args = [tmp_path / "s.png", "--model", sprites_run / "export", "--out", tmp_path / "o.png"]
    refused(run(*args, "--front", "0"), "--front: layers of this model, combined by sum, have no order")


@pytest.mark.parametrize(
    "edit",
    [
        ["--move", "0"], ["--move", "0:0.1"], ["--move", "0:0.1,0.2,0.3"], ["--move", "0:a,b"], ["--move", "0:nan,0"],
        ["--move", "0:1e3,0"], ["--move", "0:101,0"], ["--move", "3:0.1,0"], ["--move", "1.0:0.1,0"],
        ["--move", "x.0:0,0"], ["--front", "0:1"], ["--front", ""], ["--front", "2.0"], ["--front", "-1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_edits_end_in_one_clear_line(inputs, tmp_path, edit):
    result = run(inputs / "a.png", "--slots", "0,2", *edit, "--out", tmp_path / "o.png")
    refused(result, f"{edit[0]} {edit[1]}: expected [I.]K")
    assert not list(tmp_path.iterdir())


def test_edits_of_pictures_are_not_for_sounds_and_the_reverse(inputs, tmp_path):
    (tmp_path / "s.wav").touch()
    for edit in (["--move", "0:0,0"], ["--front", "0"]):
        refused(run(tmp_path / "s.wav", *edit, "--out", tmp_path / "o.wav"), f"{edit[0]} is for pictures")
    for edit in (["--transpose", "0:1"], ["--gain", "0:1"], ["--vocoder"]):
        refused(run(inputs / "a.png", *edit, "--out", tmp_path / "o.png"), f"{edit[0]} is for sounds")


# ---------------------------------------------------------------- Without PyTorch


def script_metadata():
    """The PEP 723 block of recompose.py, read as uv reads it."""
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", (ROOT / "recompose.py").read_text())
    return tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))


def with_their_needs(requirements):
    """Names of the distributions that these requirements bring, theirs included."""
    names, left = set(), [Requirement(text) for text in requirements]
    while left:
        requirement = left.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        distribution = importlib.metadata.distribution(requirement.name)
        assert requirement.specifier.contains(distribution.version), requirement
        if distribution.name not in names:
            names.add(distribution.name)
            left += map(Requirement, distribution.requires or ())
    return names


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The interpreter of a virtual environment that holds what the script's own metadata names, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for name in with_their_needs(script_metadata()["dependencies"]):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


def test_the_readmes_command_needs_what_the_script_names_and_no_torch(bare_python, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for name in ("torch", "matplotlib", "onnx"):
        result = subprocess.run([bare_python, "-c", f"import {name}"], capture_output=True, text=True, env=environment)
        assert f"No module named '{name}'" in result.stderr
    command = [bare_python, "-X", "importtime", ROOT / "recompose.py"]
    pictures, sound = ["models/clevr/a.png", "models/clevr/b.png", "--slots", "0,2"], ["models/nsynth-duo/a.flac"]
    for args, out, without in (
        (pictures, tmp_path / "out.png", ("scipy", "soundfile", "soxr")),
        (sound, tmp_path / "out.wav", ("scipy",)),  # it takes a second, and only long sounds need it
    ):
        done = subprocess.run(
            [*command, *args, "--out", out], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        assert done.returncode == 0 and out.is_file(), done.stderr
        imported = set(re.findall(r"\| +(\w+)", done.stderr))
        assert "numpy" in imported and not imported & set(without)
    assert Image.open(tmp_path / "out.png").size == (ABOUT["size"],) * 2


def test_the_scripts_own_dependencies_are_those_of_requirements_txt():
    metadata, listed = script_metadata(), (ROOT / "requirements.txt").read_text().splitlines()
    assert metadata["requires-python"] == ">=3.11"
    assert set(metadata["dependencies"]) <= set(listed)
    assert ABOUT["kind"] == "mvae-image" and ABOUT["N"] >= 3


# ---------------------------------------------------------------- Drawing


def test_tiles_keep_their_proportions_and_stand_in_columns():
    tile = recompose.TILE
    strip = np.asarray(recompose.contact_sheet([[recompose.Tile(np.zeros((28, 4 * 28, 3), np.uint8))]]))
    y, x = np.nonzero((strip == 0).all(2))
    assert (np.ptp(y) + 1, np.ptp(x) + 1) == (tile, 4 * tile) and len(x) == tile * 4 * tile
    square, wide = np.full((8, 8, 3), 7, np.uint8), Image.new("RGB", (200, 90), (1, 2, 3))
    rows = [[recompose.Tile(wide), recompose.Tile(square)], [recompose.Tile(square, "a"), recompose.Tile(square)]]
    sheet = np.asarray(recompose.contact_sheet(rows))
    x = recompose.GAP + 200 + recompose.GAP  # of the second column, in both rows
    assert (sheet[recompose.GAP + recompose.LINE, [recompose.GAP, x]] == [(1, 2, 3), (7, 7, 7)]).all()
    assert (sheet[-recompose.GAP - 1, [recompose.GAP, x, x + tile - 1]] == 7).all()
    assert (sheet[-recompose.GAP - 1, [x - 1, x + tile]] == 255).all()
    long = recompose.contact_sheet(
        rows, "A title that is much longer than its rows are wide, so that it needs room " * 2
    )
    labelled = recompose.contact_sheet(rows, labels=["first", "second"])
    assert labelled.width > sheet.shape[1] and labelled.height == len(sheet) < long.height and long.width > 800


def test_tiles_are_framed_pale_and_as_wide_as_their_captions():
    square, gap, line = np.full((8, 8, 3), 7, np.uint8), recompose.GAP, recompose.LINE
    sheets = [
        np.asarray(recompose.contact_sheet([[recompose.Tile(square, *options), recompose.Tile(square)]]))
        for options in (("",), ("", True), ("", False, True), ("a caption that is much longer than its tile",))
    ]
    plain, framed, pale, wide = (sheet[gap + line + 9].tolist() for sheet in sheets)  # a line through both tiles
    assert recompose.ACCENT not in map(tuple, plain) and plain[gap] == pale[-gap - 1] == [7] * 3
    assert framed[gap - 2] == framed[gap + recompose.TILE + 2] == list(recompose.ACCENT)
    assert [x for x, (a, b) in enumerate(zip(plain, framed, strict=True)) if a != b] == [
        *range(gap - 4, gap - 1), *range(gap + recompose.TILE + 1, gap + recompose.TILE + 4)
    ]  # fmt: skip
    np.testing.assert_allclose(pale[gap], 0.3 * 7 + 0.7 * 255, atol=1)
    assert len(wide) > len(plain) + 50 and wide.count([7] * 3) == 2 * recompose.TILE


def test_heat_runs_from_zero_to_the_top_and_row_0_is_on_top():
    values = np.array([[0.0, 1.0], [2.0, 4.0]])
    plain = np.asarray(recompose.with_scales(recompose.heat_map(values), 4, "nats"))
    tile = recompose.TILE
    corners = plain[[5, 5, tile - 5, tile - 5], [5, tile - 5, 5, tile - 5]]
    np.testing.assert_array_equal(corners, recompose.heat_map(values).reshape(4, 3))
    assert plain.shape[0] == tile
    labelled = recompose.with_scales(recompose.heat_map(values, 8), 8, "nats", x=("0", "4 s"), y=("33 Hz", "8 kHz"))
    assert labelled.width > plain.shape[1] + 20 and labelled.height > tile
    nothing, cell = np.zeros((3, 3)), np.zeros((1, 2))
    assert not recompose.heat_map(nothing)[..., :2].any()  # nothing to show is no error
    assert recompose.kl_tile(np.zeros((9, 9, 3), np.uint8), nothing, cell).size[1] == tile


def test_the_spectrums_rows_are_at_equal_steps_of_pitch():
    magnitude = np.zeros((2049, 3))
    magnitude[128] = 1.0  # 500 Hz of a sound at 16 kHz
    level = recompose.spectrum_levels(magnitude, 1.0, 16000)
    row = round((1 - np.log2(500 / 32.7) / np.log2(8000 / 32.7)) * (recompose.TILE - 1))
    assert level.shape == (recompose.TILE, 3) and level.max() == 60 and abs(level[:, 0].argmax() - row) <= 1


def test_rings_do_not_hide_the_peak_of_the_kl_map():
    kl_map = np.zeros((16, 16))
    kl_map[4, 10] = 80.0
    cell = np.array([[-1 + 9 / 16, -1 + 21 / 16], [0.9, 0.99]])  # (y, x) of that cell, and one at the edge
    tile = np.asarray(recompose.kl_tile(np.full((64, 64, 3), 200, np.uint8), kl_map, cell, [0]))
    y, x = (round((c + 1) / 2 * recompose.TILE) for c in cell[0])
    np.testing.assert_allclose(tile[y, x], recompose.HEAT[-1], atol=3)
    ring = tile[y, x - 7 : x - 4].astype(int)
    assert (np.abs(ring - recompose.ACCENT).sum(1) < 120).any()
    far = tile[recompose.TILE // 2, 10].astype(int)
    assert far[0] == far[1] == far[2] > 60  # elsewhere the picture shows, in grey


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f.txt"
    recompose.write_atomically(path, lambda p: p.write_text("whole"))

    def fail(partial):
        partial.write_text("half")
        assert str(os.getpid()) in partial.name
        raise OSError(28, "No space left")

    with pytest.raises(OSError, match="No space left"):
        recompose.write_atomically(path, fail)
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- Picture files


def converted(inputs, tmp_path, name, convert):
    picture = Image.open(inputs / "a.png")
    convert(picture).save(tmp_path / name)
    return recompose.load_picture(tmp_path / name, 64, "clevr").astype(int)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp"])
def test_lossless_formats_read_the_same(inputs, tmp_path, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    Image.open(inputs / "a.png").save(tmp_path / name, **options)
    expected = recompose.load_picture(inputs / "a.png", 64, "clevr")
    np.testing.assert_array_equal(recompose.load_picture(tmp_path / name, 64, "clevr"), expected)


def test_rgba_palette_and_greyscale_pictures_are_converted(inputs, tmp_path):
    plain = converted(inputs, tmp_path, "rgb.png", lambda p: p)
    np.testing.assert_array_equal(converted(inputs, tmp_path, "rgba.png", lambda p: p.convert("RGBA")), plain)
    palette = converted(inputs, tmp_path, "palette.png", lambda p: p.quantize(256))
    assert np.abs(palette - plain).mean() < 4
    grey = converted(inputs, tmp_path, "grey.png", lambda p: p.convert("L"))
    assert (grey[..., 0] == grey[..., 2]).all()
    assert np.abs(grey.mean() - plain.mean()) < 10


def test_sixteen_bits_keep_their_brightness(inputs, tmp_path):
    grey = Image.open(inputs / "a.png").convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    sixteen = converted(inputs, tmp_path, "deep.png", lambda _: deep)
    eight = converted(inputs, tmp_path, "grey.png", lambda _: grey)
    np.testing.assert_array_equal(sixteen, eight)


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (recompose.load_picture(tmp_path / "clear.png", 8, "none") == 255).all()


@pytest.mark.parametrize(("size", "box"), [((320, 240), (64, 29, 256, 221)), ((480, 320), (96, 24, 384, 312))])
def test_the_crop_is_clevrs(size, box):
    assert recompose.square(Image.new("RGB", size), "clevr", "x").size == (box[2] - box[0], box[3] - box[1])
    marked = np.zeros((size[1], size[0], 3), np.uint8)
    marked[box[1] : box[3], box[0] : box[2]] = 255
    assert (np.asarray(recompose.square(Image.fromarray(marked), "clevr", "x")) == 255).all()


def test_a_centred_square_and_a_whole_picture_between_bars():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8)
    for turned in (False, True):
        picture = Image.fromarray(pixels.transpose(1, 0, 2) if turned else pixels)
        centre, fit = (np.asarray(recompose.square(picture, crop, "x")) for crop in ("centre", "fit"))
        centre, fit = (one.transpose(1, 0, 2) if turned else one for one in (centre, fit))
        np.testing.assert_array_equal(centre, pixels[:, 30:70])
        np.testing.assert_array_equal(fit[30:70], pixels)
        np.testing.assert_allclose(fit[0, 0], pixels.mean((0, 1)), atol=1)
        assert (fit[:30] == fit[0, 0]).all() and (fit[70:] == fit[0, 0]).all()


def test_pictures_are_turned_as_their_camera_says(inputs, tmp_path):
    picture = Image.open(inputs / "a.png")
    upright = converted(inputs, tmp_path, "upright.png", lambda p: p.transpose(Image.Transpose.ROTATE_90))
    exif = Image.Exif()
    exif[0x0112] = 8  # orientation: to be turned by 90 degrees against the clock
    picture.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(recompose.load_picture(tmp_path / "turned.png", 64, "clevr"), upright)


def test_a_wide_picture_is_taken_with_a_crop_that_suits_it(inputs, tmp_path):
    Image.new("RGB", (300, 100), "grey").save(tmp_path / "wide.png")
    for crop in ("centre", "fit"):
        assert run(tmp_path / "wide.png", "--crop", crop, "--out", tmp_path / f"{crop}.png").exit_code == 0
    refused(
        run(tmp_path / "wide.png", "--crop", "clevr", "--out", tmp_path / "c.png"), "recompose.py --crop takes others"
    )
    (tmp_path / "x.wav").touch()
    refused(run(tmp_path / "x.wav", "--crop", "fit", "--out", tmp_path / "c.wav"), "--crop is for pictures")


# ---------------------------------------------------------------- Mistakes


def test_of_a_cameras_picture_with_previews_in_its_file_the_picture_is_read(tmp_path):
    picture, preview = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (16, 16), "blue")
    picture.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[preview])
    assert Image.open(tmp_path / "photo.jpg").n_frames == 2
    red, _, blue = recompose.load_picture(tmp_path / "photo.jpg", 32, "none").reshape(-1, 3).mean(0)
    assert red > 250 and blue < 5


def test_files_that_are_no_still_pictures_are_refused(inputs, tmp_path):
    good = (inputs / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("F", (64, 64)).save(tmp_path / "float.tiff")
    Image.new("I", (64, 64), 70000).save(tmp_path / "deep.tiff")
    Image.new("RGB", (300, 100)).save(tmp_path / "wide.png")
    out = tmp_path / "out.png"
    out.write_text("from before")
    for name, message in (
        ("cut.png", "damaged"),
        ("empty.png", "no picture"),
        ("text.png", "no picture"),
        ("moving.gif", "animated"),
        ("float.tiff", "32 bits"),
        ("deep.tiff", "32 bits"),
        ("wide.png", "expected a square, or for CLEVR's crop a height of"),
        ("missing.png", "does not exist"),
        ("photo.heic", "damaged, or no picture that is read; try magick photo.heic a.png"),
        (".", "is a directory"),
    ):
        refused(run(tmp_path / name, "--out", out), message)
    assert out.read_text() == "from before"
    assert not (tmp_path / "out_figure.png").exists()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (["zero"], "--slots zero: expected different slots, from 0 to"),
        ([""], "--slots : expected different slots"),
        (["0,,1"], "--slots 0,,1: expected different slots"),
        (["-1"], "--slots -1: expected different slots"),
        (["1,1"], "--slots 1,1: expected different slots"),
        (["0, 1"], "--slots 0, 1: expected different slots"),
        ([str(ABOUT["N"])], f"expected different slots, from 0 to {ABOUT['N'] - 1} (--n-slots asks for more)"),
        (["0", "1", "2"], "given 3 times for 2 inputs"),
    ],
)
def test_wrong_slots_are_refused(inputs, tmp_path, slots, message):
    args = [part for s in slots for part in ("--slots", s)]
    args += ["--out", tmp_path / "o.png"]
    refused(run(inputs / "a.png", inputs / "b.png", *args), message)


def test_wrong_model_folders_are_refused(inputs, tmp_path):
    def attempt():
        return run(inputs / "a.png", "--model", tmp_path / "m", "--out", tmp_path / "o.png")

    refused(attempt(), "encoder.onnx: missing")
    shutil.copytree(SHIPPED, tmp_path / "m")
    (tmp_path / "m" / "decoder.onnx").write_bytes(b"\x00half a graph")
    refused(attempt(), "decoder.onnx: missing, damaged")
    (tmp_path / "m" / "decoder.onnx").unlink()
    refused(attempt(), "decoder.onnx: missing")
    shutil.copy(SHIPPED / "decoder.onnx", tmp_path / "m")
    foreign = torch.nn.Linear(2, 2).eval()
    torch.onnx.export(foreign, (torch.zeros(1, 2),), tmp_path / "m" / "encoder.onnx", verbose=False)
    refused(attempt(), "encoder.onnx: missing, damaged, or no graph")
    save_graph(onnx.load(tmp_path / "m" / "encoder.onnx"), tmp_path / "m" / "encoder.onnx")  # with the right checksum
    refused(attempt(), "expected graphs of kind 'mvae-image', written together by export.py")


def test_a_flipped_bit_in_a_graph_is_found(inputs, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "m")
    content = bytearray((tmp_path / "m" / "decoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1  # in a weight: the graph would load, and draw something else
    (tmp_path / "m" / "decoder.onnx").write_bytes(content)
    refused(run(inputs / "a.png", "--model", tmp_path / "m", "--out", tmp_path / "o.png"), "decoder.onnx: missing")


def test_outputs_that_cannot_be_written_are_refused_first(inputs, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "q_figure.png").mkdir()
    shutil.copy(inputs / "b.png", tmp_path / "b.png")
    before = (tmp_path / "b.png").read_bytes()
    for out, message in (
        (tmp_path / "folder.png", "is a folder"),
        (tmp_path / "none" / "out.png", "does not exist"),
        (tmp_path / "out.jpg", "ends in .png"),
        (tmp_path / "b.png", "would overwrite an input"),
        (tmp_path / "q.png", "is a folder"),  # where its figure would stand
    ):
        refused(run(tmp_path / "b.png", "--out", out), message)
    assert (tmp_path / "b.png").read_bytes() == before
    shutil.copy(inputs / "b.png", tmp_path / "c_figure.png")
    result = run(tmp_path / "c_figure.png", "--out", tmp_path / "c.png")
    refused(result, "would overwrite an input")
    assert (tmp_path / "c_figure.png").read_bytes() == before


if __name__ == "__main__":
    print(f"GOLDEN = {golden_numbers()}")
