"""Reads what a run on wandb wrote offline: wandb's own messages, in the log file that holds them."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _FULL, _LAST = 1 << 15, 1, 4  # bytes; kinds of a piece: a whole message, the last of several pieces


def messages(folder: Path) -> Iterator[Record]:
    """The messages of an offline run's folder.

    After seven bytes come blocks of 32 KB with pieces of messages, each behind its checksum, length and kind, as
    LevelDB writes a log; wandb itself reads it in Go only.
    """
    (path,) = folder.glob("*.wandb")
    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # no room for another piece
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(message)
            message = b""


def history(folder: Path) -> list[dict]:
    """The rows of numbers that were logged; of a table by source, `loss_of.cats`."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in message.history.item}
        for message in messages(folder)
        if message.WhichOneof("record_type") == "history"
    ]
