"""The recomposition tool: the same pictures as PyTorch makes, every kind of picture file, every kind of mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import export
import recompose
from common import random_generator
from train_mvae import ClevrRenderer


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Two pictures of scenes, a.png at 480x320 and b.png at 64x64."""
    folder = tmp_path_factory.mktemp("pictures")
    renderer = ClevrRenderer(192, (4, 4), torch.device("cpu"))
    image, _ = renderer.render(renderer.draw(2, random_generator("inputs")))
    a, b = (Image.fromarray(recompose.to_uint8(i.numpy())) for i in image)
    canvas = Image.new("RGB", (480, 320))
    canvas.paste(a.resize((288, 288)), (96, 24))
    canvas.save(folder / "a.png")
    b.resize((64, 64)).save(folder / "b.png")
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
    model, _, _ = export.load_model(clevr_run)
    pictures = np.stack([recompose.load_picture(inputs / n, 64, "clevr") for n in ("a.png", "b.png")])
    encoding = model.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
    layer = model.decode(encoding.mu, encoding.cell)
    taken = torch.cat([layer[0, [0, 2]], layer[1, [1]]])[None]
    expected = recompose.to_uint8(model.compose(taken, encoding.background[:1])[0].numpy())
    written = np.asarray(Image.open(out))
    assert np.abs(written.astype(int) - expected.astype(int)).max() <= 1  # a value on the edge may round either way


def test_all_slots_of_one_picture_are_its_reconstruction(clevr_run, inputs, tmp_path):
    every, named = tmp_path / "every.png", tmp_path / "named.png"
    assert run(inputs / "a.png", "--model", clevr_run / "export", "--out", every).exit_code == 0
    assert run(inputs / "a.png", "--slots", "2,0,1", "--model", clevr_run / "export", "--out", named).exit_code == 0
    difference = np.asarray(Image.open(every)).astype(int) - np.asarray(Image.open(named)).astype(int)
    assert np.abs(difference).max() <= 1


def test_the_figure_stands_beside_and_frames_the_chosen_slots(clevr_run, inputs, tmp_path):
    out = tmp_path / "mixed.png"
    run(inputs / "a.png", inputs / "b.png", "--slots", "1", "--model", clevr_run / "export", "--out", out)
    figure = np.asarray(Image.open(tmp_path / "mixed_figure.png"))
    step, line = recompose.TILE + recompose.GAP, recompose.TILE + recompose.LINE + recompose.GAP
    assert figure.shape == (
        3 * line + recompose.GAP,
        5 * step + recompose.GAP,
        3,
    )  # 2 inputs and the result; 2 + 3 tiles
    frame = [tuple(figure[recompose.GAP + recompose.LINE - 2, recompose.GAP + c * step + 60]) for c in range(5)]
    assert [f == recompose.ACCENT for f in frame] == [False, False, False, True, False]
    assert {f.name for f in tmp_path.iterdir()} == {"mixed.png", "mixed_figure.png"}


def test_models_without_a_background_work_too(sprites_run, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "s.png")
    out = tmp_path / "out.png"
    result = run(tmp_path / "s.png", "--slots", "0", "--model", sprites_run / "export", "--out", out)
    assert result.exit_code == 0, result.output
    assert Image.open(out).size == (64, 64)
    Image.new("RGB", (40, 32)).save(tmp_path / "wide.png")
    refused(run(tmp_path / "wide.png", "--model", sprites_run / "export", "--out", out), "takes square pictures")


def test_neither_torch_nor_common_is_imported(clevr_run, inputs, tmp_path):
    code = "import sys, recompose; recompose.main(sys.argv[1:], standalone_mode=False); "
    code += "print([m for m in ('torch', 'common', 'torchvision', 'scipy') if m in sys.modules])"
    args = [inputs / "a.png", "--model", clevr_run / "export", "--out", tmp_path / "out.png"]
    command = [sys.executable, "-c", code, *map(str, args)]
    folder = Path(recompose.__file__).parent
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    assert result.stdout.strip().endswith("[]")


def test_the_shipped_model_runs_on_the_shipped_pictures(tmp_path):
    """The README's command, as it stands there, but for the place of its output."""
    folder = recompose.SHIPPED["mvae-image"]
    out = tmp_path / "out.png"
    result = run(folder / "a.png", folder / "b.png", "--slots", "0,2", "--out", out)
    assert result.exit_code == 0, result.output
    assert Image.open(out).size == (64, 64)
    info = json.loads((folder / "model.json").read_text())
    assert info["kind"] == "mvae-image" and info["N"] >= 3


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


# ---------------------------------------------------------------- Mistakes


def test_files_that_are_no_still_pictures_are_refused(clevr_run, inputs, tmp_path):
    good = (inputs / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("F", (64, 64)).save(tmp_path / "float.tiff")
    Image.new("I", (64, 64), 70000).save(tmp_path / "deep.tiff")
    Image.new("RGB", (300, 100)).save(tmp_path / "wide.png")
    out = tmp_path / "out.png"
    out.write_text("from before")
    for name, message in (
        ("cut.png", "damaged"),
        ("empty.png", "not a picture"),
        ("text.png", "not a picture"),
        ("moving.gif", "animated"),
        ("float.tiff", "floating-point"),
        ("deep.tiff", "32 bits"),
        ("wide.png", "crop needs a height"),
        ("missing.png", "no such file"),
        (".", "damaged or unreadable"),
    ):
        refused(run(tmp_path / name, "--model", clevr_run / "export", "--out", out), message)
    assert out.read_text() == "from before"
    assert not (tmp_path / "out_figure.png").exists()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (["zero"], "no list of slot numbers"),
        ([""], "no list of slot numbers"),
        (["0,,1"], "no list of slot numbers"),
        (["-1"], "start at 0"),
        (["1,1"], "named once"),
        (["3"], "slots 0 to 2"),
        (["0", "1", "2"], "given 3 times for 2 inputs"),
    ],
)
def test_wrong_slots_are_refused(clevr_run, inputs, tmp_path, slots, message):
    args = [part for s in slots for part in ("--slots", s)]
    args += ["--model", clevr_run / "export", "--out", tmp_path / "o.png"]
    refused(run(inputs / "a.png", inputs / "b.png", *args), message)


def test_wrong_model_folders_are_refused(clevr_run, inputs, tmp_path):
    def attempt():
        return run(inputs / "a.png", "--model", tmp_path / "m", "--out", tmp_path / "o.png")

    refused(attempt(), "no encoder.onnx")
    shutil.copytree(clevr_run / "export", tmp_path / "m")
    (tmp_path / "m" / "decoder.onnx").write_bytes(b"\x00half a graph")
    refused(attempt(), "not a readable ONNX graph")
    (tmp_path / "m" / "decoder.onnx").unlink()
    refused(attempt(), "no decoder.onnx")
    shutil.copy(clevr_run / "export" / "decoder.onnx", tmp_path / "m")
    foreign = torch.nn.Linear(2, 2).eval()
    torch.onnx.export(foreign, (torch.zeros(1, 2),), tmp_path / "m" / "encoder.onnx", verbose=False)
    refused(attempt(), "not written together")
    for name in recompose.GRAPHS:
        graph = onnx.load(clevr_run / "export" / f"{name}.onnx")
        graph.metadata_props[0].value = "[1]"
        onnx.save(graph, tmp_path / "m" / f"{name}.onnx")
    refused(attempt(), "not written by export.py")


def test_outputs_that_cannot_be_written_are_refused_first(clevr_run, inputs, tmp_path):
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
        refused(run(tmp_path / "b.png", "--model", clevr_run / "export", "--out", out), message)
    assert (tmp_path / "b.png").read_bytes() == before
    shutil.copy(inputs / "b.png", tmp_path / "c_figure.png")
    result = run(tmp_path / "c_figure.png", "--model", clevr_run / "export", "--out", tmp_path / "c.png")
    refused(result, "would overwrite an input")
    assert (tmp_path / "c_figure.png").read_bytes() == before
