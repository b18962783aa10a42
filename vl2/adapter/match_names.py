"""Run as a process of its own by module_patterns.py, within limits of the operating system: matches names.

python -I -S match_names.py CPU_SECONDS MEMORY_BYTES: reads {"names": [...], "expressions": [[text, whether ends of a
name count too], ...]} and answers each expression with one line, the indices of the names it matches or {"error": ...}.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import sys


def main(cpu_seconds: int, memory_bytes: int) -> None:
    """Answer the request on the standard input; a limit that is reached ends the process."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    with contextlib.suppress(ValueError, OSError):  # macOS refuses this one
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    request = json.load(sys.stdin)
    answer: list[int] | dict[str, str]
    for text, ends in request["expressions"]:
        try:
            pattern = re.compile(text)
            if ends:
                pattern = re.compile(rf"(.*\.)?({text})")
            answer = [index for index, name in enumerate(request["names"]) if pattern.fullmatch(name)]
        except (re.error, RecursionError, OverflowError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
