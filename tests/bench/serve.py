"""Answers a second of the service, one request at a time and many, by hand: `bash launch.sh bench serve`.

Starts the service on nano (or `--model`), asks `--requests` mixed questions (text, one picture, three; greedy and
drawn) one after the other, then again by `--clients` at a time, and compares each answer with `infer`'s. `--leave` lets
half of the clients go mid-stream, `--soak` asks that many more and watches the memory, `--fuzz` sends nonsense for so
many minutes. The last line is JSON; the service is reached at 127.0.0.1 alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.bench.serve_fuzz import fuzz
from tests.train.serve.conftest import RAMBLING, data_uri, picture, ready, shown, start, user

PICTURES = [data_uri(picture(colour)) for colour in ("red", "blue", "green", "black")]
SECONDS = 600  # until an answer counts as not coming


def questions(count: int, tokens: int) -> list[dict[str, Any]]:
    """Mixed requests: of eight one shows a picture and one three; of three one is drawn."""
    draw, found = random.Random(0), []
    for i in range(count):
        pictures = [draw.choice(PICTURES) for _ in range((0, 0, 1, 0, 0, 3, 0, 0)[i % 8])]
        prompt = draw.choice((RAMBLING, RAMBLING.replace("red", "blue"), "<|ref|>green square<|/ref|>"))
        options = {"temperature": 1.8, "seed": i} if i % 3 == 0 else {}
        found.append({"messages": [user(*map(shown, pictures), prompt)], "max_tokens": tokens, **options})
    return found


class Client:
    """Asks one service, over one connection a request."""

    def __init__(self, url: str, model: str):
        self.place, self.model = urlsplit(url).netloc, model

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Stream an answer; its text, tokens, and seconds until its first piece."""
        began = time.perf_counter()
        document = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **question}
        answer = self._post(document)
        text, first, usage = "", None, None
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            if event["choices"] and (piece := event["choices"][0]["delta"].get("content")):
                first = first or time.perf_counter() - began
                text += piece
            usage = event.get("usage") or usage
        return {"text": text, "tokens": usage["completion_tokens"], "first": first or time.perf_counter() - began}

    def leave(self, question: dict[str, Any]) -> None:
        """Go away after the first bytes of an answer."""
        answer = self._post({"model": self.model, "stream": True, **question})
        answer.read(200)
        answer.close()

    def metrics(self) -> dict[str, float]:
        """What /metrics tells, without what has labels."""
        connection = http.client.HTTPConnection(self.place, timeout=SECONDS)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return {
            name: float(value)
            for name, value in (line.split() for line in lines if "#" not in line and "{" not in line)
        }

    def settle(self) -> dict[str, float]:
        """Wait until no request is under way."""
        while (found := self.metrics())["vl2_requests_running"] or found["vl2_requests_waiting"]:
            time.sleep(0.05)
        return found

    def _post(self, document: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.place, timeout=SECONDS)
        connection.request("POST", "/v1/chat/completions", json.dumps(document), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.read()[:300]!r}")
        return answer


def as_infer_says(model: str, asked: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """What `infer` answers to each, one by one, in this process: text, and number of tokens."""
    from train.ask.infer import infer
    from train.ask.load import load
    from train.config.load import model_folder
    from train.config.schema import InferConfig

    loaded, found = load(model_folder(model)), []
    for question in asked:
        *pictures, text = question["messages"][0]["content"]
        options = {key: question[key] for key in ("temperature", "seed") if key in question}
        config = InferConfig(
            prompt=text["text"],
            image=[each["image_url"]["url"] for each in pictures],
            max_new_tokens=question["max_tokens"],
            **options,
        )
        said = infer(loaded, config)
        found.append((said["text"], len(said["ids"])))
    return found


def main(arguments: list[str]) -> int:
    """Entry script."""
    parser = argparse.ArgumentParser(prog="bash launch.sh bench serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--alone", type=int, default=200, help="of them, how many are asked one at a time")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="most of an answer")
    parser.add_argument("--leave", type=int, default=32, help="clients of which half go mid-stream")
    parser.add_argument("--soak", type=int, default=0, help="further requests, over which the memory is watched")
    parser.add_argument("--fuzz", type=float, default=0, help="minutes of nonsense")
    asked = parser.parse_args(arguments)
    began = time.perf_counter()
    running = ready(start(f"model={asked.model}", "name=served"))
    found: dict[str, Any] = {"start_seconds": round(time.perf_counter() - began, 2)}
    client = Client(running.url, "served")
    try:
        found["start_bytes"] = client.metrics()["vl2_resident_bytes"]
        found |= measure(client, asked, running.process.pid)
        if asked.leave:
            found |= leave(client, asked)
        if asked.soak:
            found |= soak(client, asked)
        if asked.fuzz:
            found |= fuzz(client.place, asked.fuzz * 60, client.model)
            found["fuzz_bytes"] = client.settle()["vl2_resident_bytes"]
    finally:
        running.process.terminate()
    found["exit"] = running.process.wait(60)
    print(json.dumps(found))
    return 0


def measure(client: Client, asked: argparse.Namespace, process: int) -> dict[str, Any]:
    """Tokens a second one at a time and together, and whether the answers are `infer`'s."""
    mixed = questions(asked.requests, asked.tokens)
    client.ask(mixed[0])
    alone, alone_seconds, alone_work = timed(process, lambda: [client.ask(each) for each in mixed[: asked.alone]])
    with ThreadPoolExecutor(asked.clients) as clients:
        together, seconds, work = timed(process, lambda: list(clients.map(client.ask, mixed)))
    expected = as_infer_says(asked.model, mixed)
    wrong = [
        sum((answer["text"], answer["tokens"]) != said for answer, said in zip(answers, expected, strict=False))
        for answers in (alone, together)
    ]
    few, many = (sum(answer["tokens"] for answer in answers) for answers in (alone, together))
    firsts = [answer["first"] for answer in together]
    found = {
        "requests": [len(alone), len(together)],
        "tokens": [few, many],
        "tokens_a_second": [round(few / alone_seconds, 1), round(many / seconds, 1)],
        "times_alone": round(many / seconds / (few / alone_seconds), 2),
        "tokens_a_cpu_second": [round(few / alone_work, 1), round(many / work, 1)],
        "first_token_p50": round(statistics.median(firsts), 3),
        "first_token_p95": round(statistics.quantiles(firsts, n=20)[-1], 3),
        "unlike_infer": wrong,
    }
    print(f"{found}", file=sys.stderr)
    return found


def timed(process: int, call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call gives, the seconds it took, and the processor's seconds that the service worked meanwhile."""
    began, work = time.perf_counter(), cpu_seconds(process)
    return call(), time.perf_counter() - began, cpu_seconds(process) - work


def cpu_seconds(process: int) -> float:
    """Seconds that a process has computed so far, on all cores together."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def leave(client: Client, asked: argparse.Namespace) -> dict[str, Any]:
    """Half of the clients go; the places of all are free afterwards."""
    long = [
        {**question, "max_tokens": 1000}
        for question in questions(asked.leave, 0)
        if len(question["messages"][0]["content"]) == 1
    ]
    with ThreadPoolExecutor(len(long)) as clients:
        list(clients.map(lambda pair: (client.leave if pair[0] % 2 else client.ask)(pair[1]), enumerate(long)))
    after = client.settle()
    return {"left": len(long) // 2, "kv_bytes_after": after["vl2_kv_cache_bytes"]}


def soak(client: Client, asked: argparse.Namespace) -> dict[str, Any]:
    """Memory before and after many requests, in tenths."""
    mixed, sizes = questions(asked.soak, 12), []
    for part in range(10):
        with ThreadPoolExecutor(asked.clients) as clients:
            list(clients.map(client.ask, mixed[part::10]))
        sizes.append(client.settle()["vl2_resident_bytes"])
    return {"soak": asked.soak, "resident_mb": [round(size / 1e6, 1) for size in sizes]}
