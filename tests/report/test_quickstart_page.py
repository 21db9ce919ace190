"""The quickstart's page: everything in its order, whatever is missing, below its size limit."""

import re

import pytest
import torch

from aligntok import cli
from aligntok.config import parsing
from aligntok.errors import UserError
from aligntok.report import findings, quickstart_page
from aligntok.report.quickstart_page import build_page

CLASSES = ["animal", "food & <drink>", "face"]


def images(count: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def run_pictures(side: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: images(4, side) for name in ("originals", "stage1", "stage2", "stage3", "stage2_w_sp_0")}
    tensors |= {"samples": images(6, side), "samples_guided": images(6, side, 1)}
    tensors["encoder_tokens"] = torch.randn(4, 16, 24, generator=generator)
    tensors |= {f"latents_stage{i}": torch.randn(4, 8, 4, 4, generator=generator) for i in (1, 2)}
    return tensors


def run_results() -> dict:
    def metrics(psnr: float, distance: float) -> dict[str, float]:
        return {"PSNR [dB]": psnr, "SSIM": 0.7, "ST-LPIPS": 0.3, "rFD-EffNetLite0": distance}

    return {
        "machine": {"device": "cpu", "threads": 2, "PyTorch": "2.14.1"},
        "times": {"features": 9.0, "stage1": 180.0, "stage2": 200.0, "stage3": 100.0, "generator": 90.0},
        "reconstruction": {
            "stage1": metrics(16.9, 60.0),
            "stage2": metrics(18.4, 44.0),
            "stage3": metrics(19.2, 31.0),
            "stage2_w_sp_0": metrics(19.6, 38.0),
        },
        "probe": {
            part: {"mean": mean, "std": 0.014}
            for part, mean in (
                ("encoder", 0.571),
                ("stage1", 0.477),
                ("stage2", 0.545),
                ("stage2_w_sp_0", 0.439),
            )
        },
        "generation": {"no guidance": {"gFD-EffNetLite0": 112.0}, "guidance 2.0": {"gFD-EffNetLite0": 87.3}},
        "protocols": {"reconstruction": "64 held-out pictures", "probe": "5 folds", "generation": "seed 0"},
        "classes": CLASSES,
        "config": {"tokenizer": {"stages": {"stage2": {"semantic": {"weight": 1.0}}}}, "output": "runs/x"},
        "skipped_images": ["broken<1>.jpg"],
        "command": "aligntok quickstart",
        "latents_unchanged": True,
        "dataset": {"name": "Fluent emoji", "images": 1306, "held_out": 130, "licence": "MIT"},
        "encoder": "DINOv2 ViT-S/14",
    }


def run_records() -> list[dict]:
    parts = ("stage1", "stage2", "stage2_w_sp_0", "stage3")
    records = [{"part": part, "step": step, "l1": 1 / step} for part in parts for step in (10, 20, 30)]
    return records + [{"part": "generator", "step": step, "mse": 1 / step} for step in (10, 20, 30)]


def titles(html: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", html)


ORDER = [
    "Samples",
    "Reconstructions",
    "What the tokenizer keeps",
    "Meaning against detail",
    "Training",
    "Metrics",
    "Time and machine",
    "Data and configuration",
    "What to do next",
]


def test_a_full_run_shows_everything_in_the_readers_order():
    html = build_page(run_results(), run_pictures(), run_records()).html()
    assert titles(html) == ORDER
    assert (
        "In 9 min 39 s, three stages turned DINOv2 ViT-S/14 into an image tokenizer that reconstructs "
        "held-out pictures at 19.2\N{NO-BREAK SPACE}dB, and a LightningDiT learned to draw new ones from its "
        "latents." in html
    )
    for text in (
        "Stage 3 · 19.2 dB",
        "not by a bit",
        "Stage 2, w_sp = 1",
        "Stage 2, w_sp = 0",
        "With guidance 2.0",
    ):
        assert text in html
    assert "food &amp; &lt;drink&gt;" in html and "<drink>" not in html and "broken&lt;1&gt;.jpg" in html
    assert "tokenizer.stages.stage2.semantic.weight: 1.0" in html


def test_the_same_run_gives_the_same_page():
    pages = [build_page(run_results(), run_pictures(), run_records()).html() for _ in range(2)]
    assert pages[0] == pages[1]


def test_the_best_stage_stands_out_but_not_the_encoder():
    html = build_page(run_results(), run_pictures(), run_records()).html()
    best = re.findall(r'<td class="best">([\d.]+)', html)
    assert best == ["0.545", "19.60", "31.00", "19.60", "87.3"]  # SSIM and ST-LPIPS are all equal here


@pytest.mark.parametrize("missing", sorted(run_results()))
def test_each_result_may_be_missing(missing):
    results = {key: value for key, value in run_results().items() if key != missing}
    html = build_page(results, run_pictures(), run_records()).html()
    gone = {"probe": {"Meaning against detail"}}.get(missing, set())
    assert titles(html) == [title for title in ORDER if title not in gone]


@pytest.mark.parametrize("missing", sorted(run_pictures()))
def test_each_picture_may_be_missing(missing):
    pictures = {key: value for key, value in run_pictures().items() if key != missing}
    html = build_page(run_results(), pictures, run_records()).html()
    gone = {"originals": {"Reconstructions", "What the tokenizer keeps"}}.get(missing, set())
    assert titles(html) == [title for title in ORDER if title not in gone]


def test_an_empty_run_is_a_short_page():
    html = build_page({}, {}, []).html()
    assert titles(html) == ["What to do next"] and "three stages turned" not in html.split("<p")[0]


def test_images_without_classes_are_shown_as_one_set():
    results = run_results() | {"classes": ["all"]}
    html = build_page(results, run_pictures(), run_records()).html()
    assert "<h3>" not in html and "The generator turns noise" in html and ">Classes<" not in html
    pictures = {key: value for key, value in run_pictures().items() if key != "samples_guided"}
    assert "Without guidance" in html and "Without guidance" not in build_page(results, pictures, []).html()


def test_many_large_pictures_stay_below_the_size_limit():
    classes = [f"class {i}" for i in range(40)]
    pictures = {"samples": images(80, 128), "originals": images(12, 128), "stage1": images(12, 128)}
    html = build_page({"classes": classes}, pictures, []).html()
    assert len(html.encode()) <= quickstart_page.SIZE_LIMIT
    assert "the first 24 of 40 classes" in html and "class 23" in html and "class 24<" not in html


def test_a_run_that_held_nothing_out_says_so():
    results = run_results()
    results["dataset"]["held_out"] = 0
    html = build_page(results, run_pictures(), run_records()).html()
    assert "none was held out" in html and "reconstructs training pictures" in html
    assert "held-out pictures at" not in html and "no stage was trained on" not in html


def test_time_names_the_threads_of_a_cpu_and_any_other_device():
    results = run_results()
    assert "from images to this page on 2 CPU threads" in findings.headline(results)[-1]
    results["machine"]["device"] = "cuda:0"
    assert "from images to this page on cuda:0" in findings.headline(results)[-1]


def test_moved_latents_are_said_to_be_a_defect():
    html = build_page(run_results() | {"latents_unchanged": False}, run_pictures(), []).html()
    assert "Stage 3 moved the latents" in html


@pytest.mark.parametrize("results", [{}, run_results()], ids=["empty", "full"])
def test_the_commands_of_the_page_are_understood_by_the_command_line(results):
    commands = findings.next_commands(results)
    options = {"sample": cli.SampleConfig, "reconstruct": cli.ReconstructConfig}
    for _, line in commands:
        spelled_out = line.replace("--data ", "--data.path ").replace("--config imagenet256_f16d32 ", "")
        program, command, *arguments = spelled_out.split()
        assert program == "aligntok" and command in cli.COMMANDS
        if command in options:
            parsing.parse_options(command, options[command], arguments)
        else:
            parsing.parse_recipe(command, cli.expand_short_options(arguments))
    assert any("--ablation" in line for _, line in commands) == (not results)


WRONG = {
    "counts": ({"stage1": images(3)}, "different counts"),
    "shape": ({"stage2": torch.zeros(4, 16, 16)}, r"stage2: got a tensor of shape \(4, 16, 16\)"),
    "nan": ({"stage3": images(4) * float("nan")}, "stage3: 4 of 4 images hold NaN"),
    "classes": ({"samples": images(7)}, "7 pictures do not divide into 3 classes"),
    "tokens": ({"encoder_tokens": torch.randn(4, 9, 24)}, "grid of 4x4"),
    "latents": ({"latents_stage1": torch.randn(4, 8, 16)}, "PCA"),
}


@pytest.mark.parametrize("case", WRONG)
def test_pictures_that_do_not_belong_together_are_refused(case):
    wrong, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        build_page(run_results(), run_pictures() | wrong, run_records())
