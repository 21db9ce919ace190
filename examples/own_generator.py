"""A network of your own learns our latents, by flow matching with our fused operators, and draws with our sampler.

aligntok cache-latents --tokenizer runs/quickstart/tokenizer --images embedded --image_size 64 --output latents
python examples/own_generator.py latents runs/quickstart/tokenizer drawn.png --steps 500
"""

import argparse

import torch
from torch import Tensor, nn
from torchvision.utils import save_image

import aligntok
from aligntok.config import SamplerConfig
from aligntok.data.latent_cache import LatentCache
from aligntok.diffusion.condition import Condition
from aligntok.kernels import flow_interpolate, flow_loss, noise_key


class Mixer(nn.Module):
    """Velocity [B, d, h, w] from z_t, t and classes: a few convolutions. Any network with these arguments will do."""

    def __init__(self, channels: int, classes: int, width: int = 128) -> None:
        super().__init__()
        self.label, self.time = nn.Embedding(classes + 1, width), nn.Linear(1, width)  # the last class: none
        self.into = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        x = self.into(z)
        condition = (self.label(labels) + self.time(t[:, None]))[:, :, None, None]
        for block in self.blocks:
            x = x + block(nn.functional.silu(x + condition))
        return self.out(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", help="folder of aligntok cache-latents")
    parser.add_argument("tokenizer")
    parser.add_argument("output", help="sheet of pictures, one for each class")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = aligntok.load_tokenizer(options.tokenizer)
    cache = LatentCache(options.latents, tokenizer.fingerprint())
    classes = int(cache.labels(torch.arange(len(cache))).max()) + 1
    model = Mixer(tokenizer.latent_channels, classes)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(options.steps):
        rows = torch.randint(len(cache), (options.batch,))
        data = cache.latents(rows, torch.rand(options.batch) < 0.5).float()  # half of them of the mirror image
        labels = torch.where(torch.rand(options.batch) < 0.1, classes, cache.labels(rows))  # a tenth without a class
        key, t = noise_key(), torch.sigmoid(torch.randn(options.batch))  # the noise is drawn inside, twice the same
        velocity = model(flow_interpolate(data, t, key), t, labels)
        loss, (mse, direction) = flow_loss(velocity, data, key, direction_weight=1.0)  # of the target noise - data
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == options.steps - 1:
            print(f"{step}: mse {mse:.3f}, direction {direction:.3f}")

    shape = data.shape[1:]
    condition = Condition.of_labels(torch.arange(classes), null_class=classes)
    sampler, noise = SamplerConfig(steps=50, guidance=2.0), torch.randn(classes, *shape)
    drawn = aligntok.integrate(model.eval(), noise, condition, sampler)
    with torch.inference_mode():
        save_image(tokenizer.decode(drawn).clamp(-1, 1) / 2 + 0.5, options.output)
    print(f"{options.output}: one picture for each of {classes} classes")


if __name__ == "__main__":
    main()
