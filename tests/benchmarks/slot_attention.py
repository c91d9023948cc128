"""Slot Attention for object discovery (Locatello et al. 2020, arXiv:2006.15055), to compare the MVAE with.

Layers, sizes, initial weights and learning rate are those of the paper's CLEVR model and of the authors' TensorFlow
(google-research/slot_attention: model.py, object_discovery/train.py). Of 128 x 128 pixels that is the model itself: a
decoder of 8 x 8 cells and four steps of stride 2. Of 64 x 64 it has three such steps, which is the cheapest decoder
that keeps the paper's layers; with 32 `channels`, as others have for pictures so small, it is cheaper still: no
comparison is stacked against it. `python -m tests.experiments.race` trains it.
"""

import math

import torch
from torch import nn

SLOT, HIDDEN = 64, 128  # of a slot, of its MLP
BROADCAST = 8  # cells a side that the decoder starts from
LR, WARM_UP_STEPS, WARM_UP, HALVING = 4e-4, 10_000, 0.02, 100_000  # Adam's rate; its rise, in a short run; its fall
EPSILON = 1e-8  # of attention, before it is normalised over pixels


class PositionEmbedding(nn.Module):
    """Adds a linear map of the distances to the four edges, each in [0, 1]: (B, C, n, n) -> the same shape."""

    def __init__(self, channels, n):
        super().__init__()
        axis = torch.linspace(0, 1, n)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("edges", torch.stack([y, x, 1 - y, 1 - x])[None], persistent=False)
        self.linear = nn.Conv2d(4, channels, 1)

    def forward(self, features):
        return features + self.linear(self.edges)


def decoder(channels, steps):
    """(M, SLOT, 8, 8) -> (M, 4, 8 * 2^steps, 8 * 2^steps): colours, and a mask's logit."""
    layers = []
    for k in range(steps):
        wide = channels if k else SLOT
        layers += [nn.ConvTranspose2d(wide, channels, 5, stride=2, padding=2, output_padding=1), nn.ReLU()]
    layers += [nn.Conv2d(channels, channels, 5, padding=2), nn.ReLU(), nn.Conv2d(channels, 4, 3, padding=1)]
    return nn.Sequential(*layers)


def start_as_keras(module):
    """Initial weights as the authors' framework draws them: PyTorch's own are smaller by sqrt(3), layer after layer."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.GRUCell):
        for name, parameter in module.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            elif name == "weight_hh":
                for gate in parameter.data.chunk(3):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.xavier_uniform_(parameter)


class SlotAttention(nn.Module):
    """image (B, 3, size, size) in [0, 1] -> slots by iterated attention -> colours and masks -> image."""

    def __init__(self, size, n_slots=7, iterations=3, channels=64):
        super().__init__()
        steps = math.log2(size / BROADCAST)
        if steps < 1 or steps % 1:
            raise ValueError(f"size {size}: expected 16, 32, 64, ...")
        self.n_slots, self.iterations = n_slots, iterations
        convolutions = [nn.Conv2d(c, channels, 5, padding=2) for c in (3, channels, channels, channels)]
        self.encoder = nn.Sequential(*[layer for conv in convolutions for layer in (conv, nn.ReLU())])
        self.encoder_position = PositionEmbedding(channels, size)
        self.decoder_position = PositionEmbedding(SLOT, BROADCAST)
        norm, first, second = nn.LayerNorm(channels), nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.features = nn.Sequential(norm, first, nn.ReLU(), second, nn.LayerNorm(channels))
        self.key, self.value = (nn.Linear(channels, SLOT, bias=False) for _ in range(2))
        self.query, self.gru = nn.Linear(SLOT, SLOT, bias=False), nn.GRUCell(SLOT, SLOT)
        self.norm = nn.LayerNorm(SLOT)
        self.mlp = nn.Sequential(nn.LayerNorm(SLOT), nn.Linear(SLOT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, SLOT))
        self.mu, self.log_sigma = (nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, SLOT))) for _ in range(2))
        self.decoder = decoder(channels, int(steps))
        self.apply(start_as_keras)

    def attend(self, key, slots):
        """key (B, P, SLOT), slots (B, n_slots, SLOT) -> how much every slot has of every pixel (B, n_slots, P)."""
        query = self.query(self.norm(slots)) * SLOT**-0.5
        return (query @ key.mT).softmax(dim=1)  # slots compete for pixels

    def encode(self, image, noise):
        """image (B, 3, size, size), noise (B, n_slots, SLOT) -> slots (B, n_slots, SLOT)."""
        x = self.encoder_position(self.encoder(2 * image - 1)).flatten(2).mT  # (B, P, channels)
        x = self.features(x)
        key, value = self.key(x), self.value(x)
        slots = self.mu + self.log_sigma.exp() * noise
        for _ in range(self.iterations):
            share = self.attend(key, slots) + EPSILON
            update = share / share.sum(2, keepdim=True) @ value  # of every slot, the mean over its pixels
            slots = self.gru(update.flatten(0, 1), slots.flatten(0, 1)).unflatten(0, noise.shape[:2])
            slots = slots + self.mlp(slots)
        return slots

    def decode(self, slots):
        """slots (B, n_slots, SLOT) -> colours (B, n_slots, 3, H, W) in [0, 1], masks (B, n_slots, H, W)."""
        cells = slots.flatten(0, 1)[:, :, None, None].expand(-1, -1, BROADCAST, BROADCAST)
        drawn = self.decoder(self.decoder_position(cells)).unflatten(0, slots.shape[:2])
        return (drawn[:, :, :3] + 1) / 2, drawn[:, :, 3].softmax(dim=1)

    def forward(self, image, noise):
        """image (B, 3, H, W), noise (B, n_slots, SLOT) -> image (B, 3, H, W), masks (B, n_slots, H, W), slots."""
        slots = self.encode(image, noise)
        colours, masks = self.decode(slots)
        return (masks[:, :, None] * colours).sum(1), masks, slots


def learning_rate_at(progress, step, lr):
    """The paper's: a linear rise, then halved every 100,000 steps; rises for 10,000 steps or WARM_UP of a run.

    The paper's warm-up is 2 % of its 500,000 steps; in a shorter run it is the same share of `progress`.
    """
    risen = max(progress / WARM_UP, step / WARM_UP_STEPS)
    return lr * min(1.0, risen) * 0.5 ** (step / HALVING)
