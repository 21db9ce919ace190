"""The `aligntok` command: one thin function per job.

Nothing heavy is imported before the job is known, so that `aligntok --help` answers at once. A mistake of the user's
ends with one line on standard error and status 2; SIGINT with 130 and SIGTERM with 143 (128 + the signal's number),
in training after a checkpoint, unless a second signal asks to stop at once; anything else is a defect of ours and
keeps its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import takewhile
from typing import Any, NoReturn

from aligntok.config.options import (
    CacheLatentsConfig,
    CacheTextConfig,
    ConvertConfig,
    EvaluateGenerationConfig,
    EvaluateProbeConfig,
    EvaluateReconstructionConfig,
    ExportConfig,
    PushConfig,
    ReconstructConfig,
    SampleConfig,
    StatisticsConfig,
    StudyConfig,
)
from aligntok.config.parsing import at_home, nearest, parse_options, parse_recipe
from aligntok.config.text_options import EvaluateTextConfig
from aligntok.errors import UserError
from aligntok.runtime.world import refuse_several

OVERVIEW = """\
usage: aligntok COMMAND [options]        aligntok COMMAND --help explains its options

  quickstart        the whole method at small size, on a laptop: tokenizer, generator, evaluation, a page
  train-tokenizer   a pretrained vision encoder becomes a tokenizer, in three stages
  train-generator   LightningDiT, or a FLUX-type transformer that reads captions, on the latents of a tokenizer
  cache-latents     latents of an image set, computed once: Stage 3 and the generator then need no encoder
  cache-text        features of an image set's captions, computed once, for text to image
  plan              what a recipe will take: parameters, memory per GPU, FLOPs, hours, before anything runs
  train-rival       VAE, VA-VAE, FLUX's, RAE, MAETok or REPA-E instead, in the same loop on the same images
  convert           published weights of VA-VAE, LightningDiT, RAE, DiT^DH, FLUX, SD become folders for all commands
  export            a tokenizer or a generator as a folder of diffusers, for its pipelines and tools
  push              a tokenizer's or a generator's folder to the Hugging Face hub, with a card
  study             every rival and ablation at a laptop's size, with tables and plots; hours on two cores
  sample            pictures from a trained generator
  reconstruct       pictures through a tokenizer and back
  evaluate          reconstruction, generation, probe, text-to-image, each number with its protocol; self-test
  statistics        latent statistics for a tokenizer that has none
  doctor            what is installed, built and selected here, and why not otherwise

  aligntok quickstart                                                     ten minutes on two cores, no GPU
  aligntok quickstart --data ~/pictures                                   the same on your own images
  aligntok quickstart --ablation                                          and Stage 2 without its semantic loss
  aligntok quickstart --text "a green car" "a sad cat"                    text to image: captions in place of classes
  aligntok train-tokenizer --config imagenet256_f16d32 --data.path /data/imagenet/train
  torchrun --nproc-per-node 8 -m aligntok cache-latents --tokenizer T --images /data/imagenet/train --output CACHE
  aligntok train-tokenizer --config imagenet256_f16d32 --print_config     every value, with your overrides
  aligntok train-tokenizer --config ablations/w_sp_0 --dry-run            full size, every shape, no memory, no data
  aligntok plan --config imagenet256_f16d32 --gpus 1 8 --gpu a100-80gb
  aligntok plan --config imagenet256_f16d32 --step --parts generator --gpus 8    where the time of a step goes

Recipes are YAML files (configs/); --config takes a path or the name of one that ships. Any value can be overridden with
its dotted name. Training that is interrupted (Ctrl-C: status 130, SIGTERM: 143) or killed is resumed by giving the same
command again; Ctrl-C and SIGTERM write a checkpoint first, a second one stops at once.
"""


def _quickstart(arguments: list[str]) -> None:
    text, rest = take_text(arguments)
    default = "t2i_quickstart" if text else "quickstart"
    recipe = parse_recipe("quickstart", expand_short_options(rest), default_recipe=default, epilog=QUICKSTART_HELP)
    from aligntok.commands.quickstart import quickstart

    quickstart(recipe, " ".join(["aligntok quickstart", *arguments]))


def take_text(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether --text is among the arguments, and the others; captions behind it become those of the page."""
    if "--text" not in arguments:
        return False, arguments
    place = arguments.index("--text")
    captions = list(takewhile(lambda word: not word.startswith("-"), arguments[place + 1 :]))
    rest = arguments[:place] + arguments[place + 1 + len(captions) :]
    return True, rest + ([f"--evaluation.prompts={json.dumps(captions)}"] if captions else [])


def expand_short_options(arguments: list[str]) -> list[str]:
    """The quickstart's short options: --data PATH and --ablation."""
    short = {"--data": "--data.path", "--ablation": "--evaluation.ablation=true"}
    expanded = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        expanded.append(short.get(name, name) + equals + value)
    return expanded


QUICKSTART_HELP = (
    "--data FOLDER: your own pictures. --text: text to image (the recipe t2i_quickstart), with captions in files "
    "beside the pictures or in data.captions; --text 'a green car' 'a sad cat' draws these on the page. --ablation: "
    "also Stage 2 without its semantic loss."
)
DRY_RUN_HELP = (
    "--dry-run builds the full-size networks without memory, takes every phase of a step, prints the plan and ends: "
    "no data is read, no weights are downloaded, nothing is written."
)
PLAN_HELP = (
    "Beside the recipe: --gpus 1 8 (numbers of GPUs), --gpu a100-80gb, h100-sxm, h200 or l40s, --mfu 0.4 (assumed "
    "share of the GPU's peak), --parts stage1 stage2 stage3 generator rival (some of them), --json FILE. --step gives "
    "the ledger of one training step instead: every operator, what bounds it, the sums for eager, compiled, CUDA "
    "graphs and fp8, and what each lever is worth; --all prints every line, --measured gpu_check_DEVICE.json puts "
    "measured numbers in the place of assumed ones. Everything printed is a prediction; nothing is downloaded or run."
)


def take_dry_run(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether --dry-run (or --dry_run true) is among the arguments, and the others."""
    values = {"true": True, "false": False}
    found, rest = False, list(arguments)
    for index, argument in reversed(list(enumerate(arguments))):
        name, equals, value = argument.partition("=")
        if name not in ("--dry-run", "--dry_run"):
            continue
        following = rest[index + 1] if index + 1 < len(rest) else ""
        if equals and value not in values:
            raise UserError(f"{name} is {value!r}, expected true or false")
        found = values[value] if equals else values.get(following, True)
        del rest[index : index + (1 if equals or following not in values else 2)]
    return found, rest


def _train_tokenizer(arguments: list[str]) -> None:
    dry_run, arguments = take_dry_run(arguments)
    recipe = parse_recipe("train-tokenizer", arguments, epilog=DRY_RUN_HELP)
    if dry_run:
        from aligntok.commands.plan import STAGES
        from aligntok.commands.plan import dry_run as run_dry

        run_dry(recipe, STAGES)
        return
    from aligntok.training.train_tokenizer import train_tokenizer

    train_tokenizer(recipe)


def _train_generator(arguments: list[str]) -> None:
    dry_run, arguments = take_dry_run(arguments)
    recipe = parse_recipe("train-generator", arguments, epilog=DRY_RUN_HELP)
    if dry_run:
        from aligntok.commands.plan import dry_run as run_dry

        run_dry(recipe, ("generator",))
        return
    from aligntok.training.train_generator import train_generator

    train_generator(recipe)


def _train_rival(arguments: list[str]) -> None:
    dry_run, arguments = take_dry_run(arguments)
    recipe = parse_recipe("train-rival", arguments, epilog=DRY_RUN_HELP)
    if dry_run:
        from aligntok.commands.plan import dry_run as run_dry

        run_dry(recipe, ("rival",))
        return
    from aligntok.zoo.train_rival import train_rival

    train_rival(recipe)


CONVERT_USAGE = """\
aligntok convert --from LAYOUT FILE --output FOLDER [options]

  aligntok convert --from hustvl-vavae vavae.pt --statistics latents_stats.pt --output vavae
  aligntok convert --from hustvl-lightningdit lightningdit.pt --tokenizer vavae --preset 800ep --output generator
  aligntok convert --from rae-decoder model.pt --encoder vit_base_patch14_reg4_dinov2.lvd142m --statistics stat.pt \\
      --output rae
  aligntok convert --from rae-ditdh stage2_model.pt --tokenizer rae --output generator
  aligntok convert --from flux-ae ae.safetensors --output flux
  aligntok convert --from diffusers-vae stable-diffusion/vae --output sd
  aligntok convert --from diffusers-aligntok exported --output folders"""


def _convert(arguments: list[str]) -> None:
    arguments = expand_convert_options(arguments)
    given = {argument.partition("=")[0] for argument in arguments}
    if not {"--layout", "--file"} <= given and not {"-h", "--help"} & given:
        raise UserError("what to convert is missing: give --from LAYOUT FILE; aligntok convert --help has examples")
    shown = {"--layout LAYOUT": "--from LAYOUT", "--layout": "--from", "--file FILE": "FILE"}
    options = parse_options("convert", ConvertConfig, arguments, CONVERT_USAGE, shown)
    from aligntok.zoo.converters import convert

    print(convert(**asdict(options)))


def expand_convert_options(arguments: list[str]) -> list[str]:
    """`--from LAYOUT FILE` as the options --layout LAYOUT --file FILE."""
    expanded, value_follows = [], False
    for argument in arguments:
        if argument.startswith("-"):
            name, equals, value = argument.partition("=")
            expanded.append(("--layout" if name == "--from" else name) + equals + value)
            value_follows = not equals and name not in ("-h", "--help")
        else:
            expanded += [argument] if value_follows else ["--file", argument]
            value_follows = False
    return expanded


def _export(arguments: list[str]) -> None:
    options = parse_options("export", ExportConfig, arguments)
    from aligntok.commands.export import export

    print(export(options))


PUSH_USAGE = """\
aligntok push FOLDER USER/NAME [options]

  aligntok push runs/quickstart/tokenizer me/emoji-tokenizer --data "Fluent emoji" --metrics reconstruction.json
  aligntok sample --tokenizer me/emoji-tokenizer --generator me/emoji-generator@v2"""


def _push(arguments: list[str]) -> None:
    arguments = in_place(arguments, ["folder", "name"])
    given = {argument.partition("=")[0] for argument in arguments}
    if not {"--folder", "--name"} <= given and not {"-h", "--help"} & given:
        raise UserError("what to push where is missing: give FOLDER USER/NAME; aligntok push --help has examples")
    shown = {"--folder FOLDER": "FOLDER", "--folder": "FOLDER", "--name NAME": "USER/NAME", "--name": "USER/NAME"}
    options = parse_options("push", PushConfig, arguments, PUSH_USAGE, shown)
    from aligntok.commands.push import push

    print(push(options))


def in_place(arguments: list[str], names: list[str]) -> list[str]:
    """The first arguments, as far as they are no options, as the options of these names."""
    found = list(takewhile(lambda word: not word.startswith("-"), arguments))[: len(names)]
    named = [word for name, value in zip(names, found, strict=False) for word in (f"--{name}", value)]
    return named + arguments[len(found) :]


def _cache_latents(arguments: list[str]) -> None:
    options = parse_options("cache-latents", CacheLatentsConfig, arguments)
    from aligntok.commands.cache_latents import cache_latents

    cache_latents(**asdict(options))


def _cache_text(arguments: list[str]) -> None:
    options = parse_options("cache-text", CacheTextConfig, arguments)
    from aligntok.commands.cache_text import cache_text

    cache_text(**asdict(options))


def _plan(arguments: list[str]) -> None:
    options, arguments = take_plan_options(arguments)
    recipe = parse_recipe("plan", arguments, epilog=PLAN_HELP)
    from aligntok.commands.plan import PlanConfig, print_plan
    from aligntok.commands.plan_step import print_step_plan

    given = PlanConfig(**options)
    (print_step_plan if given.step else print_plan)(recipe, given)


def take_plan_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of `plan` that are not the recipe's, and the other arguments."""
    from argparse import SUPPRESS, ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message)

    parser = Parser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
    parser.add_argument("--gpus", nargs="+", type=int)
    parser.add_argument("--gpu", choices=("a100-80gb", "h100-sxm", "h200", "l40s"))
    parser.add_argument("--mfu", type=float)
    parser.add_argument("--json")
    parser.add_argument("--parts", nargs="+", choices=("stage1", "stage2", "stage3", "generator", "rival"))
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--measured")
    options, rest = parser.parse_known_args(arguments)
    return at_home(vars(options)), rest


def _sample(arguments: list[str]) -> None:
    options = parse_options("sample", SampleConfig, arguments)
    from aligntok.commands.sample import sample

    sample(**asdict(options))


def _reconstruct(arguments: list[str]) -> None:
    options = parse_options("reconstruct", ReconstructConfig, arguments)
    from aligntok.commands.pictures import reconstruct

    reconstruct(**asdict(options))


EVALUATE_HELP = """\
usage: aligntok evaluate PART [options]        aligntok evaluate PART --help explains its options

  reconstruction    rFID, PSNR, SSIM, LPIPS of images and what a tokenizer makes of them
  generation        gFID, sFID, IS, precision, recall of a generator or of a file of samples, by ADM's protocol
  probe             linear probe of the latents, and their alignment with an encoder (CKNNA)
  text-to-image     pictures with their prompts: CLIP score, HPSv2, PickScore, ImageReward, gFID, retrieval of captions
  self-test         every metric on distributions with a known answer; needs no weights and no images

FID, sFID, IS, precision and recall are those of the Inception network, whose weights no package carries: --inception.
Without them, distances are taken from EfficientNet-Lite0 and say so in their names. Nor does any carry weights of CLIP,
HPSv2, PickScore or ImageReward: each is measured where they are given, by path or by the hub's name.
Under torchrun all processes draw the samples of `generation`, which are the same however many there are.
"""


def _evaluate(arguments: list[str]) -> None:
    parts: dict[str, tuple[str, type | None]] = {
        "reconstruction": ("evaluate.evaluate_reconstruction", EvaluateReconstructionConfig),
        "generation": ("evaluate.evaluate_generation", EvaluateGenerationConfig),
        "probe": ("evaluate.evaluate_probe", EvaluateProbeConfig),
        "text-to-image": ("evaluate_text.evaluate_text", EvaluateTextConfig),
        "self-test": ("evaluate.evaluate_self_test", None),
    }
    part, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if part in ("-h", "--help") or (part == "self-test" and rest):
        print(EVALUATE_HELP, end="")
        raise SystemExit(0)
    if part not in parts:
        raise UserError(f"evaluate {part!r}: expected one of {', '.join(parts)}{nearest(part, parts)}")
    place, options_class = parts[part]
    options = {} if options_class is None else asdict(parse_options(f"evaluate {part}", options_class, rest))
    from importlib import import_module

    module, name = place.split(".")
    getattr(import_module(f"aligntok.commands.{module}"), name)(**options)


def _statistics(arguments: list[str]) -> None:
    options = parse_options("statistics", StatisticsConfig, arguments)
    from aligntok.commands.pictures import statistics

    statistics(**asdict(options))


def _study(arguments: list[str]) -> None:
    options = parse_options("study", StudyConfig, arguments)
    from aligntok.study.run import study

    study(options)


def _doctor(arguments: list[str]) -> None:
    if arguments:
        print("usage: aligntok doctor\n\nPrints what is installed, built and selected here, and why not otherwise.")
        return
    from aligntok.commands.doctor import print_report

    print_report()


# Commands for as many processes as torchrun starts; the others refuse to run in several.
TOGETHER = (
    "train-tokenizer",
    "train-generator",
    "train-rival",
    "cache-latents",
    "cache-text",
    "plan",
    "evaluate generation",
)
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": _quickstart,
    "train-tokenizer": _train_tokenizer,
    "train-generator": _train_generator,
    "cache-latents": _cache_latents,
    "cache-text": _cache_text,
    "plan": _plan,
    "train-rival": _train_rival,
    "convert": _convert,
    "sample": _sample,
    "reconstruct": _reconstruct,
    "evaluate": _evaluate,
    "statistics": _statistics,
    "export": _export,
    "push": _push,
    "study": _study,
    "doctor": _doctor,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    name, rest = arguments[0], arguments[1:]
    # Before torch is loaded: large CPU tensors in huge pages, 512 times fewer page faults (docs/environment.md)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        if name == "--version":
            from importlib.metadata import version

            print(f"aligntok {version('aligntok')}")
        elif name not in COMMANDS:
            raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}; aligntok --help lists them")
        else:
            job = " ".join([name, *rest[:1]]) if name == "evaluate" else name
            if job not in TOGETHER:
                refuse_several(job)
            COMMANDS[name](rest)
    except UserError as error:
        print(f"aligntok: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aligntok: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        code = getattr(error, "exit_code", None)  # training.guard.Interrupted, not imported: it would load torch
        if code is None:
            raise
        print(f"aligntok: {error}", file=sys.stderr)
        return code
    return 0
