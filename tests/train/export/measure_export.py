"""Run as a program by test_export_memory: exports a run and prints how much memory each phase took at most."""

import json
import sys
from pathlib import Path

from train.door.cli import import_paddle_quietly


def peak_since_reset() -> int:
    """Bytes; `reset` begins anew, from what is held now."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(run: str, out: str, layout: str) -> None:
    import_paddle_quietly()
    import train.export.merged as module
    import vl2.adapter.folder  # noqa: F401  # imports PaddleNLP
    from train.ask.load import load
    from train.config.schema import NANO, ExportConfig
    from train.export.verify import logits_of, make_probe

    # What computing takes by itself, kernels that are compiled above all, is no part of an export.
    nano = load(NANO)
    logits_of(nano.model, make_probe(nano.tokenizer, nano.candidates))
    reset()
    peaks = {"baseline": peak_since_reset()}

    def measured(name: str):
        original = getattr(module, name)

        def phase(*arguments):
            reset()
            result = original(*arguments)
            peaks[name] = peak_since_reset()
            return result

        setattr(module, name, phase)

    for name in ("open_merge", "write_weights", "verify"):
        measured(name)
    module.export(ExportConfig(run=run, out=out, layout=layout, device="cpu"))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(*sys.argv[1:])
