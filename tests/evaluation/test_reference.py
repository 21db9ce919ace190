"""Reference files: which of their parts are there, what is said of them, damage, and what is refused."""

import io
import zipfile

import numpy as np
import pytest
import torch

from aligntok.errors import UserError
from aligntok.evaluation.adm import read_samples
from aligntok.evaluation.distances import frechet_distance
from aligntok.evaluation.reference import read_reference


def reference_arrays() -> dict[str, np.ndarray]:
    images = np.zeros((4, 2, 2, 3), np.uint8)
    return {"arr_0": images, "mu": np.arange(3.0), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}


def test_reference_batch(tmp_path):
    np.savez(tmp_path / "r.npz", **reference_arrays())
    found = read_reference(tmp_path / "r.npz")
    assert torch.equal(found.pooled.mean, torch.arange(3.0, dtype=torch.float64))
    assert (found.pooled.dimension, found.spatial.dimension, found.images) == (3, 2, 4)
    assert found.sha256[:16] in found.protocol and "4 images" in found.protocol
    assert frechet_distance(found.pooled, found.pooled) == pytest.approx(0)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_damaged_files_are_refused(write, tmp_path):
    """Whichever byte is damaged: refused as a user's mistake, or of no consequence."""
    write(tmp_path / "r.npz", **reference_arrays())
    right = bytearray((tmp_path / "r.npz").read_bytes())
    refused = 0
    for place in range(0, len(right), 3):
        damaged = right.copy()
        damaged[place] ^= 0xFF
        (tmp_path / "d.npz").write_bytes(damaged)
        try:
            found = read_reference(tmp_path / "d.npz")
            torch.cat(list(read_samples(tmp_path / "d.npz", 3)))
            assert found.spatial.dimension == 2
            assert torch.equal(found.pooled.mean, torch.arange(3.0, dtype=torch.float64))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50
    for length in (0, 1, 40, len(right) // 2, len(right) - 1):
        (tmp_path / "d.npz").write_bytes(right[:length])
        with pytest.raises(UserError, match="undamaged file"):
            read_reference(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mu", np.array([None, {}, 1], dtype=object), "mu is object, expected numbers"),
        ("sigma", np.array([["a"] * 3] * 3), "sigma is <U1, expected numbers"),
        ("mu_s", np.array([1j, 2j]), "mu_s is complex128, expected numbers"),
        ("mu", np.array([1.0, np.nan, 1.0]), "mu holds values that are not finite"),
        ("sigma_s", np.full((2, 2), np.inf), "sigma_s holds values that are not finite"),
        ("sigma", np.eye(2), "do not fit"),
        ("mu", np.ones((1, 3)), "do not fit"),
        ("mu", np.float64(1), "do not fit"),
        ("mu_s", np.zeros(0), "do not fit"),
        ("sigma", np.triu(np.ones((3, 3))), "not symmetric"),
        ("sigma", np.diag([1.0, -1.0, 1.0]), "a negative variance"),
        ("arr_0", np.zeros((4, 2, 2, 3)), "arr_0 is float64"),
        ("arr_0", np.array([None, {}], dtype=object), "arr_0 is stored by columns or as objects"),
    ],
)
def test_moments_that_are_refused(key, value, message, tmp_path):
    np.savez(tmp_path / "r.npz", **reference_arrays() | {key: value})
    with pytest.raises(UserError, match=message):
        read_reference(tmp_path / "r.npz")


PARTS = {
    "moments": (["mu", "sigma"], (None, 0, None), ["sFID", "precision", "recall"]),
    "all moments": (["mu", "sigma", "mu_s", "sigma_s"], (2, 0, None), ["precision", "recall"]),
    "no spatial moments": (["arr_0", "mu", "sigma"], (None, 4, (2, 2)), []),
    "everything": (["arr_0", "mu", "sigma", "mu_s", "sigma_s"], (2, 4, (2, 2)), []),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_reference_batch(name, tmp_path):
    keys, expected, left_out = PARTS[name]
    np.savez_compressed(tmp_path / "r.npz", **{key: reference_arrays()[key] for key in keys})
    found = read_reference(tmp_path / "r.npz")
    spatial = None if found.spatial is None else found.spatial.dimension
    assert (spatial, found.images, found.size) == expected and found.pooled.dimension == 3
    assert list(found.left_out) == left_out
    assert ("not verified" in found.protocol) == (expected[1] == 0)


def test_images_alone_are_no_moments(tmp_path):
    np.savez(tmp_path / "r.npz", reference_arrays()["arr_0"])
    assert read_reference(tmp_path / "r.npz") is None


def test_moments_by_columns_and_in_half_precision(tmp_path):
    """A covariance may have been transposed before it was stored, or rounded."""
    cov = np.array([[2.0, 1.0], [1.0, 3.0]])
    np.savez(tmp_path / "r.npz", mu=np.arange(2, dtype=np.float16), sigma=np.asfortranarray(cov).astype(np.float32))
    found = read_reference(tmp_path / "r.npz").pooled
    assert found.mean.tolist() == [0, 1] and found.cov.tolist() == cov.tolist() and found.cov.dtype == torch.float64


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "holds nothing, expected images \\(arr_0\\), moments"),
        (["other"], r"holds other\.npy, expected images \(arr_0\), moments"),
        (["mu"], "holds mu and lacks sigma"),
        (["arr_0", "sigma"], "holds sigma and lacks mu"),
        (["mu", "sigma", "sigma_s"], "holds sigma_s and lacks mu_s"),
        (["arr_0", "mu_s", "sigma_s"], "holds mu_s and sigma_s and lacks mu and sigma"),
    ],
)
def test_halves_are_refused(keys, message, tmp_path):
    arrays = reference_arrays() | {"other": np.zeros(3)}
    np.savez(tmp_path / "r.npz", **{key: arrays[key] for key in keys})
    with pytest.raises(UserError, match=message):
        read_reference(tmp_path / "r.npz")


def test_what_a_header_announces_need_not_fit_into_memory(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(tmp_path / "r.npz", "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(UserError, match="mu cannot be read"):
        read_reference(tmp_path / "r.npz")
