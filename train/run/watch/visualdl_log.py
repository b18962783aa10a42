"""A run's numbers for VisualDL: `visualdl --logdir RUN_DIR/visualdl` shows them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from train.run.watch.sink import Sample, Sink, flat
from train.store.names import VISUALDL_FILE


class VisualDLLog(Sink):
    """Writes run_dir/visualdl.

    Args:
        run_dir: of the run.
        first_step: steps made already; records of later ones are removed.
    """

    def __init__(self, run_dir: Path, *, first_step: int):
        from visualdl import LogWriter  # takes a second, and few ask for it

        path = run_dir / VISUALDL_FILE
        keep_records(path, first_step)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # it says that it adds to a file
            self._writer = LogWriter(logdir=str(path.parent), file_name=path.name)

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """A curve for each number, `train/loss`."""
        self._write("train", step, values)

    def validation(self, step: int, numbers: Mapping[str, Any]) -> None:
        """A curve for each number, `eval/exact_match`."""
        self._write("eval", step, numbers)

    def _write(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in flat(values):
            if name != "step":
                self._writer.add_scalar(f"{group}/{_tag(name)}", value, step)

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Of each sample its picture and its texts, by tags of their own: it goes by the kind that it saw first."""
        for number, row in enumerate(rows, 1):
            if row.picture is not None:
                self._writer.add_image(f"samples/{number}/picture", np.asarray(row.picture.convert("RGB")), step)
            text = f"question: {row.question}\n\nexpected: {row.expected}\n\nanswer: {row.answer}"
            self._writer.add_text(f"samples/{number}/text", text, step)

    def saved(self) -> None:
        """Have it on the disk, as the checkpoint is."""
        self._writer._get_file_writer().flush()

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


def _tag(name: str) -> str:
    """A name as VisualDL takes it: `%` it refuses."""
    return name.replace("%", "_")


def keep_records(path: Path, last: int) -> None:
    """Drop records after step `last`, and one that was cut off while it was written."""
    if not path.is_file():
        return
    from google.protobuf.message import DecodeError
    from visualdl.proto.record_pb2 import Record
    from visualdl.reader.record_reader import RecordReader
    from visualdl.writer.record_writer import RecordWriter

    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        writer = RecordWriter(file)
        for data in RecordReader(filepath=str(path)).get_remain():
            record = Record()
            try:
                record.ParseFromString(data)
            except DecodeError:
                break
            (value,) = record.values
            if value.id <= last and value.WhichOneof("one_value") != "meta_data":  # which each writer writes anew
                writer.write(data)
    os.replace(temporary, path)
