"""Settings of the service: what it serves, to whom, and how much of it at once."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.fields import LONGEST_TEXT, MANY, key
from train.config.schema import (
    BASE_DOC,
    CHECK_DOC,
    CHECKPOINT_DOC,
    DEVICES,
    FROZEN,
    FROZEN_DOC,
    MODEL_DOC,
    PRECISIONS,
    TF32_DOC,
)


@dataclass(kw_only=True)
class ServeConfig:
    """Answers over HTTP, as OpenAI's API: `bash launch.sh serve model=FOLDER key=value ...`.

    POST /v1/chat/completions, GET /v1/models, /health, /metrics (Prometheus), and a page to try it on at /. SIGTERM or
    Ctrl-C lets running answers end, refuses new ones with 503, and ends with 0; a second one ends at once.
    """

    model: str = key("", MODEL_DOC, path=True)
    base: str = key("", BASE_DOC, path=True)
    checkpoint: str = key("", CHECKPOINT_DOC)
    check: str = key("sizes", CHECK_DOC, choices=("sizes", "full"))
    name: str = key("", "What requests call the model; empty: its folder's name, of a run's export the run's.")
    adapters: dict[str, str] = key(
        factory=dict,
        doc="Adapters or runs on the same base beside it, each by a name that requests give as their model: "
        "adapters.cats=outputs/cats.",
        path=True,
    )
    host: str = key("127.0.0.1", "Address to listen at; 0.0.0.0: every one of this machine's.")
    port: int = key(8000, "Port to listen at; 0: a free one, which is said.", low=0, high=65535)
    api_key: str = key("", "Key that requests to /v1 must have (Authorization: Bearer KEY); empty: none.")
    api_key_file: str = key("", "File with that key, which others on this machine then do not see.", path=True)
    max_batch_tokens: int = key(
        32768,
        "Tokens of all requests that are answered at the same time: of the prompts, and room for the answers.",
        unit="tokens",
        low=64,
        high=MANY,
    )
    max_waiting: int = key(
        256, "Requests that may wait; more are refused with 429.", unit="requests", low=1, high=100_000
    )
    max_new_tokens: int = key(
        4096, "Most tokens that a request may ask for as its answer.", unit="tokens", low=1, high=LONGEST_TEXT
    )
    chunk: int = key(
        512,
        "Tokens of waiting prompts that are read between two tokens of the running answers.",
        unit="tokens",
        low=1,
        high=LONGEST_TEXT,
    )
    deadline: float = key(
        600.0,
        "A request that takes longer is given up; an ending service waits as long.",
        unit="seconds",
        low=1,
        high=MANY,
    )
    max_body: int = key(64_000_000, "Larger requests are refused.", unit="bytes", low=1000, high=MANY)
    max_messages: int = key(1000, "Most messages of a request.", unit="messages", low=1, high=MANY)
    max_images: int = key(16, "Most pictures of a request.", unit="pictures", low=0, high=1000)
    max_image_bytes: int = key(20_000_000, "Largest picture, as it is encoded.", unit="bytes", low=1, high=MANY)
    max_pixels: int = key(
        50_000_000, "Pictures with more are refused before they are decoded.", unit="pixels", low=1, high=178_956_970
    )
    media_root: str = key("", "Folder of pictures that requests may name as file:///...; empty: none.", path=True)
    allow_private_urls: bool = key(False, "Fetch pictures from addresses of private and local networks too.")
    precision: str = key("auto", "auto: as the weights are stored.", choices=("auto", *PRECISIONS))
    frozen: str = key("auto", FROZEN_DOC, choices=("auto", *FROZEN))
    tf32: bool = key(False, TF32_DOC)
    device: str = key("auto", "auto: the GPU when there is one.", choices=DEVICES)
