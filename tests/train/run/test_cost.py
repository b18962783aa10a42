"""What a pack costs, against products counted one by one, launches that a step made, and what deals packs to ranks."""

import numpy as np
import pytest

from data.plan import make_plan
from data.sizes import Size, Sizes
from tests.bench import launches, step
from train.config.load import load_config
from train.run.cost import CARDS, Cost, Processor, distinct_tiles, pack_cost, pairs
from vl2.config import VL2Config

GROUPS = "lora.groups=[attention,experts,shared_experts]"


@pytest.fixture
def config(arguments, tmp_path):
    def make(*more: str):
        given = () if any(key.startswith("lora.rank=0") for key in more) else (GROUPS,)
        return load_config(arguments(tmp_path, *given, *more))

    return make


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_products_of_a_step(config, attention):
    """`bench step` counts whole squares of attention: 2 products of 1024 x 1024 forward and 4 back, of every head."""
    model = VL2Config.from_dict(step.model_config(attention, "toy"))
    cost, data = pack_cost(model, config(), on_gpu=False), step.batch()
    work = cost.of([1024], tiles=3, supervised=343)
    squares = cost.pair.flops * (1024**2 - pairs(np.array([1024]))[0])
    assert work.flops + squares == pytest.approx(step.products(step.build(attention, "toy"), data), rel=2e-3)


def test_what_makes_it_cheaper_and_dearer(config):
    model = VL2Config.from_dict(step.model_config("mha", "toy"))

    def flops(*more: str, tower: bool = True) -> float:
        cost = pack_cost(model, config(*more), on_gpu=False, tower=tower)
        return cost.of([512, 512], tiles=3, supervised=100).flops

    plain = flops()
    assert flops("recompute=1") > flops("recompute=2") > plain
    trained = [f"trainable=[{parts}]" for parts in ("projector,language", "vision,projector,language")]
    assert plain < flops("lora.rank=0", trained[0]) < flops("lora.rank=0", trained[1])
    assert 0 < flops(tower=False) < 0.7 * plain
    together = pack_cost(model, config(), on_gpu=False).of([1024], tiles=3, supervised=100).flops
    assert together > plain  # one conversation as long as two sees more keys


@pytest.mark.slow
def test_launches_of_a_gpu_s_step(config, monkeypatch):
    """Counted in a step that is made the GPU's way, of three layers with eight experts and four blocks of a tower."""
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: True)
    monkeypatch.setattr("vl2.expert_rows.choose_blocks", launches.blocks_of(launches.BOTH))
    model = launches.narrow(3, 8, 4)
    prepared = launches.prepare(model)
    made = launches.count(lambda: launches.whole(prepared)).total()
    cost = pack_cost(model, config("recompute=1"), on_gpu=True)
    work = cost.of([launches.TOKENS], tiles=1, supervised=70) + cost.update
    assert work.launches == pytest.approx(made, rel=0.2)


def test_seconds():
    work = Cost(flops=4e12, num_bytes=1e9, launches=1000)
    rates = {"name": "x", "flops": 1e12, "num_bytes": 1e9, "launch": 1e-2}
    assert Processor(**rates, overlaps=False).seconds(work) == 4 + 1 + 10
    assert Processor(**rates, overlaps=True).seconds(work) == 10
    assert (work + work * 2).flops == 12e12
    assert sorted(CARDS) == [24, 40, 80]


def test_tiles_that_are_encoded():
    sizes = Sizes.of(Size(tokens=9, supervised=1, grids=grids) for grids in ([], [(1, 1)], [(1, 1), (2, 1)], [(3, 3)]))
    assert distinct_tiles(sizes).tolist() == [0, 1, 4, 10]


def test_ranks_get_similar_work_by_the_model(config):
    """A token of this model costs far more than a patch of its small tower, so tokens decide who takes which pack."""
    model = VL2Config.from_dict(step.model_config("mha", "toy"))
    sizes = Sizes.of(
        Size(tokens=3000 if i % 2 else 1500, supervised=1, grids=[] if i % 2 else [(3, 3)]) for i in range(8)
    )
    work = pack_cost(model, config(), on_gpu=False).of_samples(sizes)
    plans = [
        make_plan(sizes, max_tokens=3000, max_tiles_per_pack=10, packs_per_step=8, epochs=1, seed=0, work=given)
        for given in (None, work)
    ]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert [pack.samples for pack in plans[0].packs] == [pack.samples for pack in plans[1].packs]
    gaps = []
    for plan in plans:
        loads = [sum(work[s] for i in own for s in plan.packs[i].samples) for own in plan.rank_order(0, 4)]
        gaps.append(max(loads) - min(loads))
    assert gaps[1] <= gaps[0]
    assert [pack.cost for pack in plans[1].packs] == [work[list(pack.samples)].sum() for pack in plans[1].packs]
