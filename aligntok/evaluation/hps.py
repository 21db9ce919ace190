"""Human Preference Score v2: ViT-H-14 of open_clip, tuned on people's choices (Wu et al. 2023, arXiv 2306.09341).

    100 mean_i cos(E(picture_i), E(prompt_i))

2.0 (HPS_v2_compressed.pt) and 2.1 (HPS_v2.1_compressed.pt) are two networks whose numbers cannot be compared: each is
called by its version. A picture enters as the package hpsv2 1.2.0 shows it to the network: values in [0, 1], the longer
side resized to the network's by an antialiased bicubic filter, the rest black, then CLIP's mean and standard deviation.
That package takes products in fp16 on a GPU, these are float32; with torchvision before 0.17 its resize was not
antialiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aligntok.data.geometry import to_tensor
from aligntok.errors import UserError
from aligntok.evaluation.scorer_weights import asked_of_hub, hub_file, place_of
from aligntok.runtime.published import read_published
from aligntok.runtime.weights import load_strictly

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}  # of xswu/HPSv2 on the hub


class HumanPreferenceScore:
    """HPSv2.0 or HPSv2.1 of pictures and prompts.

    Args:
        version: goes into the number's name; nothing in a file says which one it is.
        weights: the checkpoint by path, or the hub's name of its repository.
        device: to compute on, in float32.
        architecture: as open_clip calls it.

    Raises:
        UserError: open_clip is absent, or the file does not hold the network's weights.
    """

    floor = None

    def __init__(
        self, version: Literal["2.0", "2.1"], weights: str, device: torch.device, architecture: str = "ViT-H-14"
    ) -> None:
        option = "hpsv2" if version == "2.0" else "hpsv2_1"
        place = place_of(option, weights)
        self.names, self.device, self.cut = (f"HPSv{version} x100",), device, 0
        self.file, self.sha256, told = hub_file(option, place, FILES[version])
        self.model, self.tokenizer = asked_of_hub(option, place, lambda: _blank(architecture))
        load_strictly(self.model, read_published(self.file), self.file)
        self.model.to(device).eval()
        side = self.model.visual.image_size
        self.size = int(side[0] if isinstance(side, (tuple, list)) else side)
        self.protocol = (
            f"HPSv{version}, 100 cos: {architecture} of open_clip, {told}; longer side to {self.size} px (bicubic, "
            f"antialiased), the rest black; at most {self.tokenizer.context_length} text tokens; float32"
        )

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """RGB pictures and as many prompts [n] -> [n, 1] float64 on the CPU."""
        images = torch.stack([shown(picture, self.size) for picture in pictures]).to(self.device)
        length = self.tokenizer.context_length
        self.cut += sum(len(self.tokenizer.encode(prompt)) + 2 > length for prompt in prompts)  # start and end token
        texts = self.tokenizer(list(prompts)).to(self.device)
        seen, read = self.model.encode_image(images), self.model.encode_text(texts)
        return 100 * F.cosine_similarity(seen.double(), read.double()).cpu()[:, None]


def shown(picture: Image.Image, size: int) -> Tensor:
    """RGB picture -> [3, size, size], as the module's docstring says."""
    values = to_tensor(picture).float()[None] / 255
    scale = size / max(picture.size)
    height, width = max(1, round(picture.height * scale)), max(1, round(picture.width * scale))
    if scale != 1:
        values = F.interpolate(values, (height, width), mode="bicubic", antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    values = F.pad(values, (left, size - width - left, top, size - height - top))
    return (values[0] - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def _blank(architecture: str) -> tuple[Any, Any]:
    """Network and tokenizer without weights; nothing is downloaded."""
    import open_clip

    return open_clip.create_model(architecture, pretrained=None), open_clip.get_tokenizer(architecture)


def refuse_one_for_both(first: HumanPreferenceScore, second: HumanPreferenceScore) -> None:
    """UserError where both versions were given the same file."""
    if first.sha256 == second.sha256:
        raise UserError(f"--hpsv2 and --hpsv2_1 have the same weights ({first.file}): 2.0 and 2.1 are two networks")
