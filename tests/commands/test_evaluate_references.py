"""`aligntok evaluate generation` against .npz files: whole reference batches, images alone, moments alone, refusals."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_weights import TinyInception, use_small_networks
from PIL import Image

from aligntok.cli import main
from aligntok.commands import evaluate as job
from aligntok.evaluation.generated import ImageFeatures

ADM, OTHER = "generation, ADM protocol", "generation, EffNetLite0"
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
TINY = (
    "sha256 6726825d00000000) as ported by torch-fidelity; 8-bit images, TensorFlow 1's bilinear resize to 299x299 px"
)
FEW = "(not more than d=16: biased upwards, compare only at equal n)"
FEWER = "(not more than d=12: biased upwards, compare only at equal n)"


@pytest.fixture(autouse=True)
def no_cached_inception(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))


@pytest.fixture
def inception(monkeypatch):
    use_small_networks(monkeypatch)


def images(count: int, seed: int, size: int = 32, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (count, size, size, 3), dtype=np.uint8)


def arrays() -> dict[str, np.ndarray]:
    """A reference batch: eleven images, and moments of 40 of which they are the first; `inception` is in use."""
    training = images(40, 0)
    whole = ImageFeatures(TinyInception(), [], 0)
    whole.add(torch.from_numpy(training).permute(0, 3, 1, 2))
    pooled, spatial = whole.pooled.statistics, whole.spatial
    moments = (pooled.mean, pooled.cov, spatial.mean, spatial.cov)
    named = {name: value.numpy() for name, value in zip(MOMENTS, moments, strict=True)}
    return {"arr_0": training[:11]} | named


@dataclass
class Run:
    """What a command has left: numbers, its output and its messages."""

    numbers: dict
    printed: str
    said: str


@pytest.fixture
def against(tmp_path, capsys):
    """Ten samples against a reference, which is a path or a file of the given arrays."""

    def run(reference: Path | dict[str, np.ndarray], *more: str) -> Run:
        np.savez(tmp_path / "samples.npz", images(10, 1, low=40))
        if isinstance(reference, dict):
            np.savez_compressed(tmp_path / "reference.npz", **reference)
            reference = tmp_path / "reference.npz"
        files = ("--samples_file", tmp_path / "samples.npz", "--reference", reference)
        output = ("--output", tmp_path / "numbers.json", *more)
        assert main(["evaluate", "generation", *map(str, (*files, *output))]) == 0
        captured = capsys.readouterr()
        return Run(json.loads((tmp_path / "numbers.json").read_text()), captured.out, captured.err)

    return run


def test_a_whole_reference_batch(against, inception):
    """All five numbers, none left out, and the protocol to the letter."""
    found = against(arrays())
    assert list(found.numbers) == [ADM] and list(found.numbers[ADM]) == ["values", "protocol"]
    assert list(found.numbers[ADM]["values"]) == ["gFID", "sFID", "IS", "precision", "recall"]
    sha256 = found.said.partition("sha256 ")[2][:64]
    own = found.numbers[ADM]["protocol"].partition("; reference: ")[0]
    assert own == (
        f"Inception (2015-12-05, the published weights, {TINY}; n=10 {FEW}; ADM reference batch sha256 {sha256[:16]}, "
        f"11 images for precision and recall; sFID: first 7 channels behind Mixed_6d.branch1x1, n=10 {FEWER}; "
        "IS in splits of 5000; precision and recall: k=3, 10 samples, 11 reference images"
    )
    assert "left out" not in found.printed + found.said


def test_images_alone_are_measured_like_a_folder_of_them(against, inception, tmp_path):
    real = arrays()["arr_0"]
    (tmp_path / "pictures").mkdir()
    for number, pixels in enumerate(real):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number:03d}.png")
    folder, file = against(tmp_path / "pictures").numbers, against({"arr_0": real})
    assert list(file.numbers) == list(folder) == [ADM, OTHER]
    assert list(file.numbers[ADM]["values"]) == ["gFID", "gKID", "sFID", "IS", "precision", "recall"]
    for name in folder:
        assert file.numbers[name]["values"] == folder[name]["values"] and "left out" not in file.numbers[name]
        own, of_folder = (found[name]["protocol"].partition("; reference: ")[0] for found in (file.numbers, folder))
        assert own == of_folder
    assert "11 images without moments, measured like a folder's" in file.said


def test_images_alone_need_no_inception_weights(against, monkeypatch):
    use_small_networks(monkeypatch)
    monkeypatch.setattr(job, "find_inception", lambda given: (None, "no Inception weights, so no FID"))
    found = against({"arr_0": images(11, 0)})
    assert list(found.numbers) == [OTHER] and "so no FID" in found.said
    assert list(found.numbers[OTHER]["values"]) == ["gFD-EffNetLite0", "gKD-EffNetLite0"]


def test_moments_without_images(against, inception):
    """Their numbers are those of the whole batch; what they do not allow is left out, with the reason."""
    batch = arrays()
    whole = against(batch).numbers[ADM]["values"]
    for keys, left_out in ((MOMENTS, ["precision", "recall"]), (MOMENTS[:2], ["sFID", "precision", "recall"])):
        found = against({key: batch[key] for key in keys})
        assert list(found.numbers) == [ADM]
        numbers = found.numbers[ADM]
        assert numbers["values"] == {name: value for name, value in whole.items() if name not in left_out}
        assert list(numbers["left out"]) == left_out
        assert f"({', '.join(keys)}), not verified: no images beside them" in numbers["protocol"]
        for unmeasured in ("Mixed_6d" if "sFID" in left_out else "k=3", "k=3"):
            assert unmeasured not in numbers["protocol"]
        line = "precision, recall: no images (arr_0) in the reference file"
        if "sFID" in left_out:
            line = f"sFID: no spatial moments (mu_s, sigma_s) and no images (arr_0) in the reference file; {line}"
        assert f"{ADM}: left out: {line}\n" in found.printed and f"left out: {line}\n" in found.said


def test_moments_beside_images_but_for_spatial_ones(against, inception):
    """gFID is of the moments, the rest of the images: the protocol says which."""
    batch = arrays()
    whole, alone = against(batch).numbers[ADM]["values"], against({"arr_0": batch["arr_0"]}).numbers[ADM]["values"]
    found = against({key: batch[key] for key in ("arr_0", "mu", "sigma")}).numbers[ADM]
    assert found["values"] == pytest.approx(whole | {"sFID": alone["sFID"]}, rel=1e-9)
    assert whole["sFID"] != pytest.approx(alone["sFID"], rel=0.01), "the moments are of more images"
    assert f"11 images for precision and recall; sFID against these images, n=11 {FEWER};" in found["protocol"]
    assert "reference batch without mu_s and sigma_s, sha256" in found["protocol"] and "left out" not in found


def bad(**changed: np.ndarray | None):
    """The whole batch with other arrays; None = without."""
    return lambda: {key: value for key, value in (arrays() | changed).items() if value is not None}


NO_IMAGES = {"arr_0": None}
IMAGES_ALONE = dict.fromkeys(MOMENTS)
NO_SPATIAL = {"mu_s": None, "sigma_s": None}
REFUSED = {
    "neither": (
        lambda: {"features": np.zeros(3)},
        "holds features.npy, expected images (arr_0), moments (mu and sigma",
    ),
    "half": (bad(arr_0=None, sigma=None, **NO_SPATIAL), "holds mu and lacks sigma"),
    "shapes": (bad(sigma=np.eye(15), **NO_IMAGES), "mu [16] and sigma [15, 15] do not fit"),
    "deviations": (bad(sigma=np.ones(16), **NO_IMAGES), "mu [16] and sigma [16] do not fit: expected [d] and [d, d]"),
    "NaN": (bad(mu=np.full(16, np.nan), **NO_IMAGES), "mu holds values that are not finite"),
    "objects": (bad(sigma=np.full((16, 16), None), **NO_IMAGES), "sigma is object, expected numbers"),
    "width": (
        bad(mu=np.zeros(768), sigma=np.eye(768), **NO_IMAGES, **NO_SPATIAL),
        "another extractor than Inception: mu has 768 values, expected 16",
    ),
    "size": (bad(arr_0=images(11, 0, 64), **IMAGES_ALONE), "images of 64x64 px, the samples have 32x32 px"),
    "size of a batch": (bad(arr_0=images(11, 0, 64)), "images of 64x64 px, the samples have 32x32 px"),
    "oblong": (bad(arr_0=images(11, 0)[:, :16], **IMAGES_ALONE), "images of 32x16 px, the samples have 32x32 px"),
    "few images": (bad(arr_0=images(3, 0), **IMAGES_ALONE), "3 reference images: "),
    "few images of a batch": (bad(arr_0=images(3, 0)), "3 reference images: "),
    "images of floats": (bad(arr_0=np.zeros((4, 32, 32, 3)), **IMAGES_ALONE), "expected uint8 [n, H, W, 3]"),
    "images of objects": (bad(arr_0=np.array([None] * 4), **IMAGES_ALONE), "arr_0 is stored by columns or as objects"),
}


def refusal(reference: Path, capsys, *more: str) -> str:
    """The line with which a command ends."""
    samples = reference.with_name("samples.npz")
    np.savez(samples, images(10, 1))
    options = ("--samples_file", samples, "--reference", reference, *more)
    assert main(["evaluate", "generation", *map(str, options)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("aligntok: error: ") for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_refused_before_a_network_runs(name, tmp_path, inception, capsys, monkeypatch):
    make, message = REFUSED[name]
    np.savez(tmp_path / "reference.npz", **make(), allow_pickle=True)
    monkeypatch.setattr(TinyInception, "everything", lambda *arguments: pytest.fail("images were measured"))
    assert message in refusal(tmp_path / "reference.npz", capsys)


def test_what_is_no_npz_is_refused(tmp_path, inception, capsys):
    for name in ("damaged.npz", "absent.npz", "fidelity.pt"):
        if name != "absent.npz":
            (tmp_path / name).write_bytes(b"no zip")
        expected = "numpy.savez writes one" if name.endswith(".pt") else "the file cannot be read as .npz"
        assert expected in refusal(tmp_path / name, capsys)


def test_moments_of_other_images_than_those_beside_them_are_refused(tmp_path, inception, capsys):
    for keys in (("mu", "sigma"), MOMENTS):
        batch = {key: value for key, value in arrays().items() if key in ("arr_0", *keys)}
        np.savez(tmp_path / "reference.npz", **batch | {"mu": batch["mu"] + 9})
        assert "the reference batch's mu is" in refusal(tmp_path / "reference.npz", capsys)


def test_moments_need_the_published_weights_and_no_second_opinion(tmp_path, inception, capsys, monkeypatch):
    moments = {key: arrays()[key] for key in MOMENTS[:2]}
    np.savez(tmp_path / "reference.npz", **moments)
    line = refusal(tmp_path / "reference.npz", capsys, "--fidelity", "true")
    assert "--fidelity true compares images" in line and "holds moments alone" in line
    other = TinyInception()
    other.sha256 = "f" * 64
    monkeypatch.setattr(job, "find_inception", lambda given: (other, "other"))
    assert "(sha256 ffffffffffffffff): their features" in refusal(tmp_path / "reference.npz", capsys)
    monkeypatch.setattr(job, "find_inception", lambda given: (None, "none"))
    np.savez_compressed(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert "no Inception weights here" in refusal(tmp_path / "reference.npz", capsys)
