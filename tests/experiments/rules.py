"""Data with a rule that can be checked: sprites of one colour, in a row, mirrored, apart, counted; notes a fifth apart.

`python -m tests.experiments.prior` fits priors to them. What an encoder has to see is as in train_mvae.py's own data,
but for "count", whose backgrounds are grey: it needs a run of its own,

    python -m tests.experiments.rules count --objects 1 4 --steps 3500 --out runs/count
"""

import click
import torch

import train_mvae
from train_mvae import Mixtures, Sprites

DARK, BRIGHTER = -0.05, 0.12  # grey of a background, and by how much an object makes it brighter


class RuledSprites(Sprites):
    """The built-in sprites, made to obey `rule`, one of RULES."""

    rule = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.source += f", rule: {self.rule}"

    def sample(self, n, generator):
        scene = super().sample(n, generator)
        return getattr(self, self.rule)(scene, *scene["present"].shape, generator)

    def colour(self, scene, n, k, generator):
        """All have one colour."""
        return scene | {"rgb": scene["rgb"][:, :1].expand(-1, k, -1)}

    def row(self, scene, n, k, generator):
        """They stand side by side, at one height."""
        some = torch.rand(2, n, k, generator=generator, device=self.device)
        place = some[0].argsort(1) + 0.3 + 0.4 * some[1]
        y = scene["centre"][:, :1, 0].expand(-1, k)
        return scene | {"centre": torch.stack([y, 1.8 / k * place - 0.9], dim=2)}

    def apart(self, scene, n, k, generator):
        """None overlap."""
        reach = scene["radius"][:, :, None] + scene["radius"][:, None]
        return scene | {"centre": self.place_apart(n, k, 0.75, reach, generator)}

    def mirror(self, scene, n, k, generator):
        """They come in pairs, one on the left, one on the right."""
        y, x = scene["centre"].unbind(2)
        scene["centre"] = torch.stack([y, 0.35 + 0.45 * x.abs()], dim=2)
        turned = {"centre": torch.tensor([1.0, -1.0], device=self.device), "angle": -1.0}
        for name, value in scene.items():
            right = value[:, ::2]
            scene[name] = torch.stack([right, right * turned.get(name, 1)], dim=2).flatten(1, 2)[:, :k]
        return scene

    def count(self, scene, n, k, generator):
        """The more there are, the brighter the background."""
        noise = 0.04 * torch.rand(n, generator=generator, device=self.device) - 0.02
        return scene | {"grey": DARK + BRIGHTER * scene["present"].sum(1) + noise}

    def render(self, scene):
        image, label = super().render(scene)
        if "grey" in scene:
            drawn = super().render(scene | {"rgb": torch.ones_like(scene["rgb"])})[0]  # how much of a pixel is objects
            image = image + (1 - drawn) * scene["grey"][:, None, None, None].clamp(min=0)
        return image, label


class Fifths(Mixtures):
    """Mixtures of two notes, one a fifth above the other."""

    def compatible(self, pitch, other):
        return (pitch - other).abs() == 7


RULES = {"sprites": ("colour", "row", "apart", "mirror", "count"), "nsynth-duo": ("fifth",)}


def ruled(rule):
    """The class of data that obey a rule."""
    return Fifths if rule == "fifth" else type(f"{rule}Sprites", (RuledSprites,), {"rule": rule})


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("rule", type=click.Choice(RULES["sprites"]))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(rule, options):
    """Train on sprites that obey a rule; options of train_mvae.py follow."""
    train_mvae.Sprites = ruled(rule)
    train_mvae.main(["--dataset", "sprites", *options])


if __name__ == "__main__":
    main()
