"""Recomposition by the graphs of a run of pictures, beside its model in PyTorch.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.warm runs/mvae-clevr-alpha-N6-seed0    # once it is exported

Two pictures are taken apart, four of their slots put together, all slots drawn alone, in onnxruntime and in PyTorch
(eager, as training uses it), turn about, with as many threads.
"""

import statistics
import time

import click
import onnxruntime
import torch

import train_mvae
from common import FOLDER
from recompose import SHIPPED, load_picture

WARM_UP, ROUNDS = 1, 35
KEPT = [0, 2]  # slots


def in_onnxruntime(folder, images):
    """A function that recomposes, and draws slots alone, by the graphs of an exported folder."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    encoder, decoder, composer = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=providers)
        for name in ("encoder", "decoder", "composer")
    )

    def recompose():
        layers, backgrounds = [], []
        for image in images.split(1):
            mu, cell, background = encoder.run(["mu", "cell", "background"], {"image": image.numpy()})
            (layer,) = decoder.run(None, {"z": mu, "cell": cell})
            backgrounds.append(torch.from_numpy(background))
            layers.append(torch.from_numpy(layer))
            alone = {"layer": layer[0][:, None], "background": background.repeat(layer.shape[1], 0)}
            composer.run(None, alone)
        parts = torch.cat([layer[:, KEPT] for layer in layers], dim=1)
        return torch.from_numpy(composer.run(None, {"layer": parts.numpy(), "background": backgrounds[0].numpy()})[0])

    return recompose


def in_pytorch(model, images):
    """The same by the trained model."""

    def recompose():
        layers, backgrounds = [], []
        for image in images.split(1):
            encoding, layer, _ = train_mvae.reconstruct(model, image)
            layers.append(layer)
            backgrounds.append(encoding.background)
            model.compose(layer[0][:, None], encoding.background.expand(layer.shape[1], -1, -1, -1))
        return model.compose(torch.cat([layer[:, KEPT] for layer in layers], dim=1), backgrounds[0])

    return recompose


@click.command()
@click.argument("run", type=FOLDER)
@torch.inference_mode()
def main(run):
    """Time the graphs of RUN/export and the model of RUN."""
    model = train_mvae.load(run)
    crop = model.config["data"]["crop"]
    pictures = [load_picture(SHIPPED["mvae-image"] / name, model.size, crop) for name in ("a.png", "b.png")]
    images = torch.stack([torch.from_numpy(picture.copy()) for picture in pictures]).permute(0, 3, 1, 2).float() / 255
    ways = {"onnxruntime": in_onnxruntime(run / "export", images), "PyTorch": in_pytorch(model, images)}
    seconds = {name: [] for name in ways}
    for _ in range(WARM_UP + ROUNDS):
        for name, recompose in ways.items():
            start = time.perf_counter()
            recompose()
            seconds[name].append(time.perf_counter() - start)
    took = {name: statistics.median(some[WARM_UP:]) for name, some in seconds.items()}
    found, expected = (recompose() for recompose in ways.values())
    click.echo(f"largest difference of a pixel: {(found - expected).abs().max():.1e}")
    for name, some in took.items():
        click.echo(f"{name:12} {1000 * some:.1f} ms: {some / took['PyTorch']:.2f} of PyTorch's time")


if __name__ == "__main__":
    main()
