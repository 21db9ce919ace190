"""Options of the commands that take no recipe, as dataclasses: `--help` and the checks are made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aligntok.config.run import PrecisionChoice
from aligntok.config.text import TextEncoderConfig
from aligntok.config.tokenizer import PerceptualKind


@dataclass
class SampleConfig:
    """`aligntok sample`: pictures from a trained generator.

    Args:
        generator: folder written by train-generator.
        tokenizer: folder of the tokenizer that it was trained on.
        output: PNG file of the grid; single pictures go to a folder of the same name with --separate true.
        labels: class names or numbers, one or [several, of, them]; null = every class.
        prompt: captions to draw, one or [several, of, them], of a generator that reads text.
        prompts: the same from a file: .txt (one a line), .jsonl, .tsv, COCO's .json, or a folder of .txt.
        negative: caption that guidance leads away from; the empty one where none is given.
        text_encoder: folder of the generator's text encoder, where it is not found by its own name.
        size: [height, width] in pixels, multiples of the tokenizer's downsampling; null = as in training.
        per_class: pictures per class or caption.
        steps: network evaluations per picture; null = the generator's own setting.
        guidance: classifier-free guidance scale, 1 = none; null = the generator's own setting.
        guidance_channels: null = all, 3 = the first three (the reference code's way).
        seed: of the noise.
        separate: also write every picture as its own file, as it is drawn; of captions with a list of them at the end,
            prompts.jsonl. The grid then has the first 100 classes or captions.
        device: auto, cpu, cuda or cuda:N.
    """

    generator: str
    tokenizer: str
    output: str = "samples.png"
    labels: list[str | int] | int | str | None = None
    prompt: list[str] | str | None = None
    prompts: str | None = None
    negative: str = ""
    text_encoder: str | None = None
    size: tuple[int, int] | None = None
    per_class: int = 8
    steps: int | None = None
    guidance: float | None = None
    guidance_channels: int | None = None
    seed: int = 0
    separate: bool = False
    device: str = "auto"


@dataclass
class ReconstructConfig:
    """`aligntok reconstruct`: pictures through a tokenizer and back.

    Args:
        tokenizer: folder written by train-tokenizer.
        images: folder, .tar or "embedded".
        output: PNG file: originals above, reconstructions below.
        image_size: centre crops of this size, a multiple of the tokenizer's downsampling.
        count: how many pictures.
        device: auto, cpu, cuda or cuda:N.
    """

    tokenizer: str
    images: str = "embedded"
    output: str = "reconstructions.png"
    image_size: int = 256
    count: int = 16
    device: str = "auto"


@dataclass
class EvaluateReconstructionConfig:
    """`aligntok evaluate reconstruction`: PSNR, SSIM, a perceptual distance, and feature distances of what comes back.

    Args:
        tokenizer: folder written by train-tokenizer.
        images: the originals: folder, .tar or "embedded"; published rFID is that of ImageNet's validation images.
        held_out: share of the images kept out of training, measured on alone; 0 = all.
        image_size: centre crops of this size, a multiple of the tokenizer's downsampling.
        perceptual: network of LPIPS (torchvision's weights) or of its shift-tolerant variant (carried by a package).
        perceptual_weights: trunk weights of LPIPS by path; null = downloaded by torchvision.
        inception: weights for rFID: a file or a URL; null = the published file, if it lies in torch.hub's cache.
        output: JSON file for the numbers; null = print only.
        device: auto, cpu, cuda or cuda:N.
    """

    tokenizer: str
    images: str = "embedded"
    held_out: float = 0.0
    image_size: int = 256
    perceptual: PerceptualKind = "st-lpips-alex"
    perceptual_weights: str | None = None
    inception: str | None = None
    output: str | None = None
    device: str = "auto"


@dataclass
class EvaluateGenerationConfig:
    """`aligntok evaluate generation`: gFID, sFID, IS, precision and recall of samples by ADM's protocol.

    Args:
        generator: folder written by train-generator; with it the tokenizer that it was trained on.
        tokenizer: folder of that tokenizer.
        samples_file: .npz of samples (arr_0 uint8 [n, H, W, 3]) to measure instead of drawing some.
        reference: folder, .tar or "embedded" of real images, cut to the samples' size; or an .npz: ADM's reference
            batch (arr_0, mu, sigma, mu_s, sigma_s), images alone (arr_0; all numbers, as of a folder), or moments alone
            (mu, sigma, as of pytorch-fid: gFID and IS only; mu_s, sigma_s beside them: sFID too). Where arr_0, mu and
            sigma have no mu_s and sigma_s, sFID is against the images in the file.
        labels: of drawn samples: random (uniform, independent) or balanced (every class as often); balanced labels
            give a lower FID.
        count: samples to draw; 50,000 is what published numbers have.
        steps: network evaluations per sample; null = the generator's own setting.
        guidance: classifier-free guidance scale, 1 = none; null = the generator's own setting.
        guidance_channels: null = the generator's own setting, 0 = all, 3 = the first three (the reference code's way).
        guidance_interval: [from, to] of the times at which guidance acts; null = the generator's own setting.
        seed: of noise, random labels and kernel subsets.
        npz: file to keep drawn samples in, written before anything is measured; for ADM's own evaluator, for example.
        inception: weights for gFID, sFID, IS, precision, recall: a file or a URL; null = the published file, if it
            lies in torch.hub's cache. Without them there are gFD and gKD of EfficientNet-Lite0 only.
        fidelity: also print torch-fidelity's numbers; drawn samples need --npz for it.
        output: JSON file for the numbers; null = print only.
        device: auto, cpu, cuda or cuda:N.
    """

    generator: str | None = None
    tokenizer: str | None = None
    samples_file: str | None = None
    reference: str = "embedded"
    labels: Literal["random", "balanced"] = "random"
    count: int = 50_000
    steps: int | None = None
    guidance: float | None = None
    guidance_channels: int | None = None
    guidance_interval: tuple[float, float] | None = None
    seed: int = 0
    npz: str | None = None
    inception: str | None = None
    fidelity: bool = False
    output: str | None = None
    device: str = "auto"


@dataclass
class EvaluateProbeConfig:
    """`aligntok evaluate probe`: what a linear classifier reads out of the latents, and how they align with an encoder.

    Args:
        tokenizer: folder written by train-tokenizer.
        images: labelled images of a small set (a sub-folder per class): cross-validated logistic regression.
        train: training images of a large set, instead of `images`: a probe trained by minibatches...
        val: ...and judged on these.
        image_size: centre crops of this size, a multiple of the tokenizer's downsampling.
        epochs: of the minibatch probe.
        batch_size: of the minibatch probe.
        encoder: timm name of the encoder that CKNNA compares with, vit_large_patch14_dinov2.lvd142m for example; null =
            the tokenizer's own, as it is now.
        encoder_weights: its weights: pretrained, embedded, random, or a file in timm's layout.
        alignment_images: images that CKNNA is taken on, the first readable ones of `images` or `val`; 0 = no CKNNA.
        neighbours: k of CKNNA.
        seed: of folds, batches and initial weights.
        output: JSON file for the numbers; null = print only.
        device: auto, cpu, cuda or cuda:N.
    """

    tokenizer: str
    images: str = "embedded"
    train: str | None = None
    val: str | None = None
    image_size: int = 256
    epochs: int = 90
    batch_size: int = 1024
    encoder: str | None = None
    encoder_weights: str = "pretrained"
    alignment_images: int = 10_000
    neighbours: int = 10
    seed: int = 0
    output: str | None = None
    device: str = "auto"


@dataclass
class StatisticsConfig:
    """`aligntok statistics`: compute and store the latent statistics of a tokenizer.

    Args:
        tokenizer: folder to complete.
        images: folder, .tar or "embedded".
        image_size: centre crops of this size.
        count: images to use.
        device: auto, cpu, cuda or cuda:N.
    """

    tokenizer: str
    images: str
    image_size: int = 256
    count: int = 10_000
    device: str = "auto"


@dataclass
class ConvertConfig:
    """`aligntok convert`: published weights become a tokenizer or generator folder; every tensor is accounted for.

    Args:
        layout: hustvl-vavae, hustvl-lightningdit, rae-decoder, rae-ditdh, flux-ae, diffusers-vae, or diffusers-aligntok
            for a folder of aligntok export: it becomes a tokenizer's, or one with `tokenizer` and `generator` inside.
        file: the published checkpoint: .pt, .ckpt (read without executing anything) or .safetensors.
        output: folder to write.
        statistics: published latent statistics of a tokenizer: mean and std or var. Without them, aligntok statistics
            computes some, but a published generator needs the published ones.
        tokenizer: folder of the converted tokenizer that a generator belongs to.
        preset: of a LightningDiT checkpoint: 64ep (null) or 800ep, whose published guidance becomes the default.
        encoder: timm name of the encoder that an RAE decoder belongs to, which its file does not tell:
            vit_base_patch14_reg4_dinov2.lvd142m, vit_base_patch16_siglip_256.v2_webli or vit_base_patch16_224.mae.
        encoder_weights: its weights: pretrained (null), random, or a file in timm's layout.
    """

    layout: str
    file: str
    output: str
    statistics: str | None = None
    tokenizer: str | None = None
    preset: str | None = None
    encoder: str | None = None
    encoder_weights: str | None = None


@dataclass
class ExportConfig:
    """`aligntok export`: a tokenizer, or a generator with its tokenizer, as a folder of diffusers.

    Args:
        to: diffusers: an AutoencoderAlignTok, or with a generator an AlignTokPipeline or AlignTokTextToImagePipeline
            with FlowMatchEulerDiscreteScheduler. They are loaded with aligntok installed beside diffusers.
        tokenizer: folder of a tokenizer, AlignTok's or a rival's.
        output: folder to write.
        generator: folder of a generator that was trained on its latents.
        dtype: of the weights: fp32, or fp16 or bf16, which are a variant of that name.
        shard_size: of a file of weights at most.
    """

    to: Literal["diffusers"]
    tokenizer: str
    output: str
    generator: str | None = None
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    shard_size: str = "10GB"


@dataclass
class PushConfig:
    """`aligntok push FOLDER USER/NAME`: a tokenizer's or a generator's folder as a repository on the hub, with a card.

    Where a tokenizer or a generator is asked for, USER/NAME or USER/NAME@REVISION does instead of a folder.

    Args:
        folder: of a tokenizer or of a generator.
        name: of the repository: USER/NAME. It is made where there is none.
        private: make it visible to you alone, where it is made.
        revision: branch to write to; it is made where there is none. null = main.
        message: of the commit.
        data: what it was trained on, for the card.
        license: of the weights, as the hub calls it (apache-2.0, cc-by-nc-4.0), for the card.
        metrics: files that aligntok evaluate --output has written, for the card.
    """

    folder: str
    name: str
    private: bool = False
    revision: str | None = None
    message: str = "Upload with aligntok"
    data: str | None = None
    license: str | None = None
    metrics: list[str] | None = None


@dataclass
class CacheLatentsConfig:
    """`aligntok cache-latents`: encode an image set once, for training Stage 3 and generators without the encoder.

    Args:
        tokenizer: folder of a tokenizer. Stage 3 does not change latents: a cache of Stage 2's tokenizer serves both.
        images: folder, .tar or "embedded".
        output: folder of the cache: what tokenizer.stages.stage3.latents and generator.latents ask for. The same
            command again continues an interrupted cache, and checks a finished one. f16d32 latents of ImageNet at
            256 px take 42 GB.
        image_size: centre crops of this size, a multiple of the tokenizer's downsampling.
        flip: also of the mirror images.
        shard_size: images per file; what an interruption costs at most.
        batch_size: images encoded at once, by each of the processes that torchrun starts.
        workers: processes that decode images, per process that encodes.
        precision: of the encoder: bf16, tf32, fp32, or auto = bf16 where the device has it. Latents are stored as bf16.
        device: auto, cpu, cuda or cuda:N.
    """

    tokenizer: str
    images: str
    output: str
    image_size: int = 256
    flip: bool = True
    shard_size: int = 4096
    batch_size: int = 64
    workers: int = 8
    precision: PrecisionChoice = "auto"
    device: str = "auto"


@dataclass
class CacheTextConfig:
    """`aligntok cache-text`: features of the captions of an image set, computed once, for training without the encoder.

    Args:
        images: folder, .tar or "embedded".
        output: folder of the cache: what generator.text.features asks for. The same command again continues an
            interrupted cache, and checks a finished one. A token of Qwen3-0.6B takes 2 KiB, one of T5-XXL 8 KiB.
        captions: null = NAME.txt beside each NAME.jpg, in folders and tars; or a .jsonl, .json (COCO's too) or
            .parquet file, or a folder of .parquet or .txt files.
        encoder: folder or hub name of a language model; minilm-l6 = all-MiniLM-L6-v2 as a package carries it.
        revision: of the hub.
        layer: whose hidden states: -1 the last, as the model gives it, -2 the one before, 0 the embeddings.
        tokens: of a caption at most; the rest is cut off and counted.
        shard_size: captions per file; what an interruption costs at most.
        batch_size: captions encoded at once, by each of the processes that torchrun starts.
        precision: of the encoder: bf16, tf32, fp32, or auto = bf16 where the device has it; of minilm-l6 not bf16.
            Features are stored as bf16.
        device: auto, cpu, cuda or cuda:N.
    """

    images: str
    output: str
    captions: str | None = None
    encoder: str = TextEncoderConfig.name
    revision: str | None = None
    layer: int = TextEncoderConfig.layer
    tokens: int = TextEncoderConfig.tokens
    shard_size: int = 4096
    batch_size: int = 64
    precision: PrecisionChoice = "auto"
    device: str = "auto"


@dataclass
class StudyConfig:
    """`aligntok study`: the paper's tokenizers and ablations at a laptop's size, with one generator on each; hours.

    Args:
        output: folder of the study. The same command continues an interrupted one. Several processes may share it when
            they have different seeds; one thread each (OMP_NUM_THREADS=1) makes the most of a processor.
        seeds: every row is trained once for each.
        text: text to image: the generators read captions (the names of the pictures) instead of classes, the rows are
            the paper's rivals there, and a caption retrieval is measured beside the distances. Another output folder.
        only: names of rows (recipes of configs/study); null = all.
        budget: factor on all numbers of training steps of the recipes, of tokenizers and generators alike; another one
            needs another output folder.
        samples: generated pictures behind every gFD and gKD.
        guidance: scale of the guided column, on all channels.
        sampling_steps: network evaluations per sample at which the finished generators are compared.
        report: Markdown file to write from everything found in the output folder, with its pictures in a folder of
            the same name; null = OUTPUT/study.md.
        report_only: train and measure nothing.
    """

    output: str = "runs/study"
    seeds: tuple[int, ...] = (0, 1, 2)
    text: bool = False
    only: list[str] | None = None
    budget: int = 1
    samples: int = 192
    guidance: float = 2.0
    sampling_steps: tuple[int, ...] = (10, 20, 30, 50, 120, 250)
    report: str | None = None
    report_only: bool = False
