"""A running service on nano, which the tests of this folder share; what `infer` says to the same requests."""

import base64
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.places import ROOT
from train.config.schema import NANO

RAMBLING = "<|ref|>red circle<|/ref|>"  # nano goes on and on about it, where there is no picture


@dataclass(frozen=True)
class Running:
    """A service in a process of its own."""

    url: str
    process: subprocess.Popen

    @property
    def api(self) -> str:
        return f"{self.url}/v1"


def start(*arguments: str) -> subprocess.Popen:
    """`serve` with these arguments, on a free port."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        ["bash", str(ROOT / "launch.sh"), "serve", "port=0", "device=cpu", *arguments],
        env={**os.environ, "VENV": "none", "PATH": search, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ready(process: subprocess.Popen) -> Running:
    """Wait until it says where it listens."""
    line = process.stdout.readline()
    assert " at http://" in line, line + process.stderr.read()
    return Running(line.split(" at ")[1].split()[0], process)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """Two adapters of nano that change its answers: of other groups, ranks and values."""
    from train.ask.load import load
    from vl2.adapter.folder import save_adapter
    from vl2.lora import apply_lora
    from vl2.lora_settings import LoRASettings

    folders = {}
    for name, groups, rank in (("cats", ("attention", "experts"), 4), ("dogs", ("dense_mlp", "vision"), 2)):
        lora = apply_lora(load(NANO).model, LoRASettings(groups=groups, rank=rank, alpha=8.0))
        rng = np.random.default_rng(rank)
        for path, factor in lora.factors().items():
            if path.endswith("_B"):
                factor.set_value(rng.normal(0, 1.0, factor.shape).astype("float32"))
        folders[name] = tmp_path_factory.mktemp(name)
        save_adapter(lora, folders[name], {"base": str(NANO)})
    return folders


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """A folder of pictures that requests may name, with a picture outside and a link to it."""
    outside = tmp_path_factory.mktemp("outside")
    folder = outside / "media"
    folder.mkdir()
    Image.open(io.BytesIO(picture("red"))).save(folder / "red.png")
    Image.open(io.BytesIO(picture("blue"))).save(outside / "secret.png")
    (folder / "link.png").symlink_to(outside / "secret.png")
    return folder


@pytest.fixture(scope="session")
def service(adapters, media) -> Iterator[Running]:
    """nano, two adapters of it, and a folder of pictures; limits that the tests can reach."""
    named = [f"adapters.{name}={folder}" for name, folder in adapters.items()]
    limits = ("max_body=4000000", "max_pixels=1000000", "max_messages=50", "max_images=4", "chunk=256")
    process = start(f"model={NANO}", f"media_root={media}", *named, *limits)
    yield ready(process)
    process.terminate()
    assert process.wait(60) == 0


def picture(colour: str, size: tuple[int, int] = (200, 150)) -> bytes:
    """A circle, as PNG."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((60, 40, 130, 110), fill=colour)
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def shown(address: str) -> dict:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": address}}


def user(*parts: object) -> dict:
    """A user's message; a text stands for itself."""
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


@pytest.fixture(scope="session")
def infer_says(adapters) -> Callable[..., dict]:
    """infer_says(model, prompt, images, ...): what `infer` finds, one by one, in this process."""
    from train.ask.infer import infer
    from train.ask.load import load
    from train.config.schema import InferConfig

    models = {name: load(folder) for name, folder in {"nano": NANO, **adapters}.items()}

    def ask(model: str, prompt: str, images: tuple[str, ...] = (), **options) -> dict:
        return infer(models[model], InferConfig(prompt=prompt, image=list(images), **options))

    return ask
