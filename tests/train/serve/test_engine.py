"""The thread that computes: what it takes in between two tokens, and what is left when nobody waits any more."""

import queue
import threading
import time

import numpy as np
import pytest

from data.images.ref import ImageRef
from tests.train.serve.conftest import RAMBLING
from tests.train.serve.conftest import picture as png
from train.ask.answer import prepare
from train.ask.load import load
from train.config.load import load_serve_config
from train.config.schema import NANO
from train.serve.chat import Chat
from train.serve.engine import Engine, Job
from train.serve.errors import ApiError
from train.serve.metrics import Metrics
from train.serve.models import Served
from vl2.adapter.switch import Switch
from vl2.batch import Batch, Growing
from vl2.generate import generate
from vl2.prompt import Message

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded():
    return load(NANO)


class Watched:
    """An engine on nano whose pieces are gathered by job; `passes` are the passes of the model, tokens of each."""

    def __init__(self, loaded, monkeypatch, chunk=64, max_batch_tokens=100_000):
        self.came, self.passes, self.loaded = queue.Queue(), [], loaded
        served = Served(name="nano", loaded=loaded, switch=Switch(loaded.model), adapter=None)
        self.engine = Engine(
            {"nano": served},
            chunk=chunk,
            max_batch_tokens=max_batch_tokens,
            deliver=lambda pieces: [self.came.put((len(self.passes), *each)) for each in pieces],
            failed=lambda: self.came.put(None),
        )
        decode = type(loaded.model).decode_stream

        def watched(model, x_TD, *args, **kwargs):
            self.passes.append(x_TD.shape[0])
            return decode(model, x_TD, *args, **kwargs)

        monkeypatch.setattr(type(loaded.model), "decode_stream", watched)

    def job(self, prompt, limit=20, **options):
        options = {
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
            "stops": (),
            "deadline": time.monotonic() + 300,
            **options,
        }
        return Job(model="nano", prompt=prompt, limit=limit, **options)

    def text(self, text=RAMBLING, **options):
        return self.job(prepare([Message("user", text)], [], self.loaded), **options)

    def run(self, jobs, seconds=120):
        """Wait until all of them have ended; (passes before it, piece) of each piece, by job."""
        found, going = {job: [] for job in jobs}, set(jobs)
        while going:
            passes, job, piece = self.came.get(timeout=seconds)
            found.setdefault(job, []).append((passes, piece))
            if piece.finish:
                going.discard(job)
        return found


@pytest.fixture
def watched(loaded, monkeypatch):
    made = []

    def make(**options):
        made.append(Watched(loaded, monkeypatch, **options))
        return made[-1]

    yield make
    for each in made:
        each.engine.stop()


def ids_of(found):
    return list(found[-1][1].ids)


def test_ids_are_those_of_generate_whatever_else_is_computed(loaded, watched):
    """Sixteen prompts of all lengths, greedy and drawn, longer ones in pieces, some of which come late."""
    one = watched(chunk=100)
    rng = np.random.default_rng(0)
    prompts = [{"input_ids": rng.integers(20, 900, int(n))} for n in rng.integers(3, 300, 16)]
    ways = [{"temperature": 1.3, "top_p": 0.8, "seed": i} if i % 3 == 0 else {} for i in range(16)]
    eos = loaded.tokenizer.eos_id
    expected = [
        generate(loaded.model, [prompt], eos_id=eos, max_new_tokens=20, **way)[0] for prompt, way in zip(prompts, ways)
    ]
    jobs = [one.job(prompt, **way) for prompt, way in zip(prompts, ways)]
    one.engine.start()
    for i, job in enumerate(jobs):
        one.engine.submit(job)
        if i % 5 == 4:
            time.sleep(0.05)
    found = one.run(jobs)
    assert [ids_of(found[job]) for job in jobs] == expected
    assert max(map(len, expected)) > 10
    assert one.engine.kv_bytes == 0 and one.engine.num_running == one.engine.num_waiting == 0


def test_a_long_prompt_delays_the_next_token_of_others_by_one_chunk(watched):
    """4,000 tokens come amid 8 answers: every pass of the model has a token for each of them, and one chunk at most."""
    one = watched(chunk=256)
    short = [one.text(limit=40) for _ in range(8)]
    long = one.job({"input_ids": np.arange(4000) % 800 + 20}, limit=3)
    one.engine.start()
    for job in short:
        one.engine.submit(job)
    first = [one.came.get(timeout=60) for _ in short]
    one.engine.submit(long)
    found = one.run([*short, long])
    for passes, job, piece in first:
        found[job].insert(0, (passes, piece))
    for job in short:
        at = [passes for passes, _ in found[job]]
        assert max(np.diff(at)) == 1 and len(ids_of(found[job])) == 40
    assert max(one.passes) <= 8 + 256
    assert sum(n > 100 for n in one.passes) >= 4000 // 256
    assert ids_of(found[long]) and found[long][0][0] < found[short[0]][-1][0] + 20


def test_tiles_are_encoded_slice_by_slice_between_tokens(loaded, monkeypatch):
    """A picture of ten tiles comes while another answer grows, which gets its token at every step."""
    picture = ImageRef(kind="bytes", name="a", data=png("red", (1152, 1152)))
    seen = prepare([Message("user", "<image>\nWhat is this?")], [picture], loaded)
    eos, tiles = loaded.tokenizer.eos_id, []
    expected = generate(loaded.model, [seen], eos_id=eos, max_new_tokens=5)[0]
    encode = type(loaded.model.vision).forward
    monkeypatch.setattr(
        type(loaded.model.vision), "forward", lambda self, x, *more: tiles.append(x.shape[0]) or encode(self, x, *more)
    )
    batch = Batch(loaded.model, eos_id=-1, chunk=300)
    grows = Growing({"input_ids": np.arange(20, 40)}, limit=50, temperature=0.0, top_p=1.0, seed=[0])
    looks = Growing(seen, limit=len(expected) or 1, temperature=0.0, top_p=1.0, seed=[0])
    batch.add(grows)
    batch.step()
    batch.add(looks)
    encoded = []
    while not looks.done:
        tiles.clear()
        assert grows in batch.step()
        encoded.append(sum(tiles))
    assert encoded == [1] * 10 + [0] * (len(encoded) - 10)  # on a CPU a tile at a time
    assert looks.ids[: len(expected)] == expected


def test_who_leaves_frees_the_place_at_the_next_token(watched):
    one = watched()
    jobs = [one.text(limit=3000) for _ in range(8)]
    one.engine.start()
    for job in jobs[:4]:
        one.engine.submit(job)
    while one.came.qsize() < 40:
        time.sleep(0.01)
    before = one.engine.kv_bytes
    for job in jobs[4:]:
        one.engine.submit(job)
    while one.engine.kv_bytes <= before or one.engine.num_running < 8:
        time.sleep(0.01)
    for job in jobs[4:]:
        job.gone = True
    passes = len(one.passes)
    while one.engine.num_running > 4:
        time.sleep(0.001)
    assert len(one.passes) - passes <= 3
    one.engine.stop()
    assert one.engine.kv_bytes in (before, 2 * before)  # of 4 places; the answers may have grown beyond their room


def test_jobs_wait_for_room_and_for_their_deadline(watched):
    one = watched(max_batch_tokens=100)
    jobs = [one.text(limit=60) for _ in range(3)]
    late = one.text(limit=60, deadline=time.monotonic() - 1)
    for job in (*jobs, late):
        one.engine.submit(job)
    one.engine.start()
    found = one.run([*jobs, late])
    assert [piece.finish for _, piece in found[late]] == ["deadline"]
    ends = [found[job][-1][0] for job in jobs]
    starts = [found[job][0][0] for job in jobs]
    assert starts[1] > ends[0] and starts[2] > ends[1]
    assert max(one.passes[ends[0] - 1 : ends[0]]) <= 64


def test_a_fault_ends_the_answers_it_is_in_and_no_others(watched, monkeypatch):
    one = watched()
    broken, sound = one.text(limit=5), one.text(limit=5)
    with monkeypatch.context() as patch:
        patch.setattr("vl2.batch.sample", lambda *args: 1 / 0)
        broken.temperature = 1.0
        one.engine.start()
        one.engine.submit(broken)
        assert one.run([broken])[broken][-1][1].finish == "failed"
    one.engine.submit(sound)
    assert ids_of(one.run([sound])[sound])
    assert [t.name for t in threading.enumerate()].count("model") == 1


def test_what_waits_is_counted_and_more_than_memory_allows_is_put_off(loaded, monkeypatch):
    """256 requests of 16 pictures may wait: their tiles are 14 GB."""
    watched = Watched(loaded, monkeypatch)
    tiles = {"input_ids": np.zeros(10, np.int64), "tiles": np.zeros((2, 3, 384, 384), np.float32)}
    engine, size = watched.engine, 80 + 2 * 3 * 384 * 384 * 4
    chat = Chat(load_serve_config([f"model={NANO}"]), {}, engine, Metrics(), key="")
    chat._check_memory(2**40)  # alone it may be as large as it likes
    for count in range(1, 4):
        engine.submit(watched.job(tiles))
        assert engine.waiting_bytes == count * size
    chat._check_memory(2**30 - 3 * size)
    with pytest.raises(ApiError) as found:
        chat._check_memory(2**30 - 3 * size + 1)
    assert (found.value.status, found.value.headers["Retry-After"]) == (429, "2")
