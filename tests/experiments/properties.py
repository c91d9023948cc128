"""What slots know of their objects: shape, colour, size and material, read from latents and from what slots draw.

    python -m tests.experiments.properties runs/mvae-clevr-alpha-N6-seed0 --data-root CLEVR_v1.0

Slots of train and test scenes are matched to objects. One classifier learns from `mu` of train slots and reads test
slots. Another learns from crops of train pictures, and reads the same crops of test slots decoded alone; how it reads
the test pictures themselves stands beside, and the share of the commonest answer.
"""

import json
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import FOLDER, random_generator, read_json
from tests.experiments.slots import load_run, load_start, match
from train_mvae import CHUNK, COLOURS, RADII, resample

PROPERTIES = ("shape", "color", "size", "material")
VISIBLE_SHARE = 60 / 64**2  # of the picture, that an object must show
CROP = 32  # pixels
MARGIN = 1.2  # of a crop about an object
TESTED = 320  # scenes


def described_scenes(data, split, n):
    """The first n scenes of a split: images, labels, {property: answers (n, K) as integers}."""
    if hasattr(data, "render"):
        scene = data.sample(n, random_generator("properties", split, device=data.device))
        images, labels = (torch.cat(part) for part in zip(*render_in_chunks(data, scene), strict=True))
        colours = torch.tensor(COLOURS, device=data.device) / 255
        colour = (scene["rgb"][:, :, None] - colours).abs().sum(-1).argmin(-1)
        answers = scene["shape"], colour, (scene["half"] < sum(RADII) / 2).long(), scene["metal"].long()
        return images, labels, dict(zip(PROPERTIES, answers, strict=True))
    images, labels = data.scenes(split, n)
    folder = Path(data.files[split][0]).parent.name
    scenes = read_json(data.root / "scenes" / f"CLEVR_{folder}_scenes.json")["scenes"]
    objects = {scene["image_filename"]: scene["objects"] for scene in scenes}
    every = [objects[Path(file).name] for file in data.files[split][:n]]
    return images, labels, {name: as_integers([[o[name] for o in one] for one in every]) for name in PROPERTIES}


def render_in_chunks(data, scene):
    for first in range(0, len(scene["present"]), CHUNK):
        yield data.render({name: value[first : first + CHUNK] for name, value in scene.items()})


def as_integers(words):
    """Lists of words, one a scene -> (n, K) places in their sorted vocabulary."""
    known = sorted({word for one in words for word in one})
    table = torch.zeros(len(words), max(map(len, words)), dtype=torch.long)
    for row, one in zip(table, words, strict=True):
        row[: len(one)] = torch.tensor([known.index(word) for word in one])
    return table


def crops(images, label, k):
    """A square about object k of one scene, cut out of each of images (M, 3, H, W): (M, 3, CROP, CROP)."""
    side = label.shape[-1]
    y, x = ((2 * v.float() + 1) / side - 1 for v in torch.nonzero(label == k, as_tuple=True))
    centre = torch.stack([(v.min() + v.max()) / 2 for v in (y, x)])
    half = MARGIN * torch.stack([(v.max() - v.min()) / 2 for v in (y, x)]).max() + 1 / side
    m = len(images)
    return resample(images, half.expand(m), centre.expand(m, 2), CROP)


@torch.no_grad()
def matched_slots(model, data, split, n):
    """Of every object that shows VISIBLE_SHARE: mu (M, D), true crops, drawn crops (M, 3, CROP, CROP), answers (M,)."""
    images, labels, answers = described_scenes(data, split, n)
    rows = []
    for b, image in enumerate(images.split(1)):
        encoding = model.encode(image)
        layer = model.decode(encoding.mu, encoding.cell)
        segment = model.responsibilities(layer, encoding.background)[0].argmax(0)
        objects, slots, iou, _, _ = match(segment, labels[b], layer.shape[1])
        for k, slot, overlap in zip(objects.tolist(), slots.tolist(), iou.tolist(), strict=True):
            if overlap > 0 and (labels[b] == k).float().mean() >= VISIBLE_SHARE:
                alone = model.alone(layer[:, slot : slot + 1], encoding.background)[0]
                both = crops(torch.cat([image, alone]), labels[b], k)
                rows.append([encoding.mu[0, slot], *both, [answers[name][b, k - 1] for name in PROPERTIES]])
    mu, true, drawn, answer = zip(*rows, strict=True)
    columns = dict(zip(PROPERTIES, torch.tensor(np.array(answer)).T, strict=True))
    return torch.stack(mu), torch.stack(true), torch.stack(drawn), columns


def train_classifier(net, x, answer, epochs):
    """Adam on shuffled batches of 64, learning rate falling to 0."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * -(-len(x) // 64))
    generator = random_generator("classifier")
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            loss = F.cross_entropy(net(x[batch]), answer[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def read(net, x, answer):
    with torch.no_grad():
        return float((net(x).argmax(1) == answer).float().mean())


def read_latents(learnt, asked, name):
    """Accuracy of a property by a small MLP of mu; learnt from and asked of what `matched_slots` gives."""
    (mu, *_, answers), (test_mu, *_, test_answers) = learnt, asked
    mean, deviation = mu.mean(0), mu.std(0) + 1e-6
    torch.manual_seed(0)
    hidden = nn.Linear(mu.shape[1], 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()
    mlp = nn.Sequential(*hidden, nn.Linear(128, int(answers[name].max()) + 1))
    train_classifier(mlp, (mu - mean) / deviation, answers[name], 30)
    return read(mlp, (test_mu - mean) / deviation, test_answers[name])


def measure(model, start, data, n_train, n_test):
    """{property: {score: accuracy}} of test objects, `start` being the model at step 0; how many objects there were."""
    whole, whole_start = (
        [matched_slots(one, data, split, n) for split, n in (("train", n_train), ("test", n_test))]
        for one in (model, start)
    )
    (mu, true, _, learnt), (test_mu, test_true, test_drawn, asked) = whole
    scores = {"objects": {"train": len(mu), "test": len(test_mu)}}
    for name in PROPERTIES:
        classes, answer = int(learnt[name].max()) + 1, learnt[name]
        torch.manual_seed(0)
        layers = []
        for channels in ((3, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(*channels, 3, stride=2, padding=1), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(64 * (CROP // 8) ** 2, classes)]
        of_crops = train_classifier(nn.Sequential(*layers), true, answer, 10)
        scores[name] = {
            "mu": read_latents(*whole, name),
            "mu at step 0": read_latents(*whole_start, name),
            "drawn": read(of_crops, test_drawn, asked[name]),
            "true crops": read(of_crops, test_true, asked[name]),
            "commonest": float((asked[name] == answer.mode().values).float().mean())
        }  # fmt: skip
    return scores


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=FOLDER)
@click.option("--data-root", type=FOLDER, help="The run's data, where they are not where its config.json has them.")
@click.option("--scenes", type=click.IntRange(2), default=1200, help="Train scenes to learn from.")
def main(run_dir, data_root, scenes):
    """How well properties of objects are read from the slots of RUN_DIR, a run of train_mvae.py on CLEVR."""
    model, data = load_run(run_dir, data_root)
    if model.config["options"]["dataset"] != "clevr":
        raise click.UsageError(f"{run_dir}: sprites and sounds have no such properties; expected a run on CLEVR")
    scores = measure(model, load_start(model, data), data, scenes, TESTED)
    (run_dir / "properties.json").write_text(json.dumps(scores, indent=1))
    objects = scores.pop("objects")
    click.echo("{train} objects of train scenes learnt from, {test} of test scenes read".format(**objects))
    click.echo("| % right | from mu | at step 0 | from what slots draw | from true crops | commonest answer |")
    click.echo("|-|-|-|-|-|-|")
    for name, score in scores.items():
        click.echo(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in score.values()) + " |")


if __name__ == "__main__":
    main()
