"""Training steps on several ranks are those of one process: losses, every gradient, and where twenty steps lead.

Mostly in double precision, where what is wrong and what is rounding are many powers of ten apart.
"""

import itertools

import pytest

from tests.parallel.step_cases import compare_steps

LAYOUTS = {
    "zero 2": {"dp_replicate": 2},
    "fsdp 2": {"dp_shard": 2},
    "zero 2 ep 2": {"dp_replicate": 2, "ep": 2},
    "fsdp 2 ep 2": {"dp_shard": 2, "ep": 2},
    "zero 4 ep 2": {"dp_replicate": 4, "ep": 2},
    "zero 4 ep 4": {"dp_replicate": 4, "ep": 4},
    "fsdp 4": {"dp_shard": 4},
    "fsdp 4 ep 2": {"dp_shard": 4, "ep": 2},
    "fsdp 4 ep 4": {"dp_shard": 4, "ep": 4},
    "hsdp 2x2": {"dp_replicate": 2, "dp_shard": 2},
    "hsdp 2x2 ep 2": {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    "hsdp 2x2 ep 4": {"dp_replicate": 2, "dp_shard": 2, "ep": 4},
}


@pytest.fixture
def run(request):
    """Compare in the world that a layout needs."""

    def check(name: str, limit: float, *, each: float | None = None, **case) -> None:
        """each: the limit for every single gradient, if that is another than for all together."""
        layout = LAYOUTS[name]
        size = layout.get("dp_replicate", 1) * layout.get("dp_shard", 1)
        world = request.getfixturevalue(f"world{size}")
        for rank, worst in enumerate(world.run(compare_steps, layout=layout, **case)):
            for what, difference in worst.items():
                allowed = each if each and what == "gradient" else limit
                assert difference <= allowed, f"rank {rank}: {what} differs by {difference:.2g}"

    return check


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("zero 2", {"micro_batch_size": 1, "recompute": "full", "mtp_weight": 0.0}),
        ("fsdp 2", {"micro_batch_size": 2, "recompute": "selective", "batch": 5}),
        ("zero 2 ep 2", {"micro_batch_size": 2, "recompute": "full", "steps": 20}),
        ("fsdp 2 ep 2", {"recompute": "full", "alpha": 0.0, "first_experts_only": True}),
        ("zero 4 ep 2", {"micro_batch_size": 1, "batch": 3, "gamma": 0.0}),
        ("zero 4 ep 4", {"node_size": 2, "recompute": "selective", "first_experts_only": True}),
        ("fsdp 4 ep 2", {"micro_batch_size": 1, "batch": 6}),
        ("hsdp 2x2 ep 2", {"steps": 3, "recompute": "full", "batch": 7, "micro_batch_size": 1}),
        ("hsdp 2x2 ep 4", {"steps": 2, "mtp_weight": 0.0}),
        ("zero 4 ep 2", {"optimizer": "muon"}),
        ("hsdp 2x2 ep 2", {"optimizer": "muon"}),
    ],
)
def test_steps_are_those_of_one_process(run, seed, name, case):
    run(name, 1e-9, seed=seed, **{"steps": 2, **case})


@pytest.mark.parametrize("name", ["zero 2 ep 2", "fsdp 2"])
def test_in_single_precision_gradients_agree_to_a_millionth(run, seed, name):
    # One process's own gradients of the latents' norms, a few values each, are a millionth or two off those in FP64.
    run(name, 1e-6, each=5e-6, seed=seed, dtype="float32", micro_batch_size=2, steps=0)


@pytest.mark.parametrize("name", ["zero 2 ep 2", "fsdp 2 ep 2"])
def test_in_bf16_gradients_agree_to_its_rounding(run, seed, name):
    run(name, 2e-2, seed=seed, dtype="bfloat16", micro_batch_size=2, steps=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_everything_with_everything(run, seed, name):
    options = itertools.product([6, 1], ["none", "selective", "full"], [0.3, 0.0], [(0.01, 0.0), (0.0, 0.001)])
    for micro_batch_size, recompute, mtp_weight, (alpha, gamma) in options:
        case = {"recompute": recompute, "mtp_weight": mtp_weight, "alpha": alpha, "gamma": gamma}
        run(name, 1e-9, seed=seed, micro_batch_size=micro_batch_size, **case)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_steps(run, seed, name):
    run(name, 1e-9, seed=seed, steps=20, micro_batch_size=1, batch=7)
