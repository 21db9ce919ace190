"""Options of `aligntok evaluate text-to-image`, as a dataclass: `--help` and the checks are made from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EvaluateTextConfig:
    """`aligntok evaluate text-to-image`: pictures on a disk against the prompts that they were drawn from.

    Each number is there if what it needs is given, and of the others it is said what they lack.

    Args:
        pictures: folder that aligntok sample --prompts FILE --separate true has written, or one in GenEval's layout.
        prompts: the file that they were drawn from: .txt (a prompt a line), .jsonl, .tsv, .json (COCO's captions,
            HPSv2's lists), or DPG-Bench's folder; null = as the folder of pictures says.
        clip: CLIPModel for the CLIP score, x100: openai/clip-vit-large-patch14 in most publications. No package carries
            weights of CLIP or of the next scores: give a path, or the hub's OWNER/NAME[@REVISION]; null = not measured.
        hpsv2: HPSv2.0, x100: HPS_v2_compressed.pt, or xswu/HPSv2 of the hub.
        hpsv2_1: HPSv2.1, x100: HPS_v2.1_compressed.pt, or xswu/HPSv2 of the hub. The two cannot be compared.
        pickscore: PickScore: yuvalkirstain/PickScore_v1.
        pickscore_processor: its preprocessing, laion/CLIP-ViT-H-14-laion2B-s32B-b79K; null = beside its weights.
        image_reward: ImageReward: ImageReward.pt, or THUDM/ImageReward of the hub.
        image_reward_tokenizer: its vocabulary, bert-base-uncased.
        reference: real pictures for gFID: folder, .tar, "embedded", or an .npz, as for evaluate generation.
        fid_count: 6K, 30K or a number: refuse other numbers of pictures and of real ones; null = take what there is.
            The number is in the name: gFID-6K and gFID-30K cannot be compared.
        inception: weights for gFID, as for evaluate generation; without them there are gFD and gKD of
            EfficientNet-Lite0, which a package carries.
        real: real pictures with captions, folder, .tar or "embedded": probes of them give the share of pictures that
            find their caption among others, and that are of their caption's class, beside other real pictures. Needs no
            weights but those that packages carry.
        real_captions: their captions, as data.captions of a recipe; null = files beside the pictures.
        held_out: share of `real` that the probes do not see: the ceiling.
        candidates: captions that one is found among.
        text_encoder: of captions, for `real`: minilm-l6, which a package carries, or what generators take.
        image_size: side of the centre crops for gFID and `real`; null = the shorter side of the first picture.
        geneval: new folder for the pictures in GenEval's layout; needs its metadata as `prompts`.
        dpg: new folder for the pictures in DPG-Bench's layout; needs its prompts as `prompts`.
        seed: of folds and kernel subsets.
        output: JSON file for the numbers; null = print only.
        device: auto, cpu, cuda or cuda:N.
    """

    pictures: str
    prompts: str | None = None
    clip: str | None = None
    hpsv2: str | None = None
    hpsv2_1: str | None = None
    pickscore: str | None = None
    pickscore_processor: str | None = None
    image_reward: str | None = None
    image_reward_tokenizer: str = "bert-base-uncased"
    reference: str | None = None
    fid_count: str | None = None
    inception: str | None = None
    real: str | None = None
    real_captions: str | None = None
    held_out: float = 0.25
    candidates: int = 10
    text_encoder: str = "minilm-l6"
    image_size: int | None = None
    geneval: str | None = None
    dpg: str | None = None
    seed: int = 0
    output: str | None = None
    device: str = "auto"
