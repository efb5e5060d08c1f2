"""What nights may look like when nothing changed: noise models for `tools/simulate_gate.py`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from perf_tests.harness.noise import Array
from perf_tests.harness.policy import Policy, policy_for

RECORDED = pathlib.Path(__file__).parents[1] / "tests" / "data" / "process_medians.json"
"""{slug: {level: [process median in seconds, ...]}} of real runs; the tables gain a row a slug once it exists."""

NIGHTS, MANY_NIGHTS = 20_000, 100_000
GPU, CPU = policy_for("h200-700w"), policy_for("cpu")
GPU_SPREAD, CPU_SPREAD = 0.003, 0.02
LOOP_SHARE, REST_SPREAD = 0.8, 0.05
"""On an H200 the loop is 0.79 of a call with float8, and half of the rest, text encoding, spreads by 8 %."""
DRIFT = "nights drift by 0.2 %, levels by 0.1 %"

Draw = Callable[[np.random.Generator, int, int, int, int], Array]
"""(generator, date, nights, levels, processes) -> log medians of shape (nights, levels, processes).

Date 0 is the baseline's, 1 tonight's, others belong to the history; only a drift tells them apart.
"""


def gaussian(sd: float) -> Draw:
    return lambda rng, date, *shape: rng.normal(0, sd, shape)


def heavy_tailed(sd: float) -> Draw:
    """Student's t with three degrees of freedom: now and then a process far out."""
    return lambda rng, date, *shape: sd * rng.standard_t(3, shape) / np.sqrt(3)


def bimodal(slow: float, levels: int | None = None, within: float = 0.002, gap: float = 0.13) -> Draw:
    """Each process has a mode of its own (newton-physics/newton#2534: 22.5 or 25.5 ms), on the first so many levels."""

    def draw(rng: np.random.Generator, date: int, *shape: int) -> Array:
        mode: Array = (rng.random(shape) < slow) * np.log1p(gap)
        if levels is not None:
            mode[:, levels:] = 0
        return rng.normal(0, within, shape) + mode

    return draw


def mixed(rng: np.random.Generator, date: int, *shape: int) -> Array:
    """Half the levels bimodal, each with its own share of slow processes, other ones every night."""
    nights, levels, _ = shape
    # Seeded by the shape, so that baseline, run and confirmation of a night agree on who is what.
    kind = np.random.default_rng(nights * 1000 + levels)
    share = kind.random((nights, levels, 1)) * (kind.random((nights, levels, 1)) < 0.5)
    mode: Array = (rng.random(shape) < share) * np.log1p(0.13)
    return rng.normal(0, 0.002, shape) + mode


def uneven(rng: np.random.Generator, date: int, *shape: int) -> Array:
    """Levels of very different spread: 0.1 % to 2 %, evenly spaced in the logarithm."""
    return rng.normal(0, 1, shape) * np.geomspace(0.001, 0.02, shape[1])[:, None]


def two_kinds(loud: float, quiet: float, many: int | None = None) -> Draw:
    """Some levels wait for the host: the first so many, or every other one."""

    def draw(rng: np.random.Generator, date: int, *shape: int) -> Array:
        levels = np.arange(shape[1])
        is_loud = levels % 2 == 0 if many is None else levels < many
        return rng.normal(0, 1, shape) * np.where(is_loud, loud, quiet)[:, None]

    return draw


def drifting(machine: float, level: float, sd: float = GPU_SPREAD) -> Draw:
    """Nights that move as a whole, and each level for itself; run and confirmation share a date."""

    def draw(rng: np.random.Generator, date: int, *shape: int) -> Array:
        nights, levels, _ = shape
        night = np.random.default_rng((nights, levels, date))
        shift = night.normal(0, machine, (nights, 1, 1)) + night.normal(0, level, (nights, levels, 1))
        return rng.normal(0, sd, shape) + shift

    return draw


def recorded(medians: Mapping[str, Sequence[float]]) -> Draw:
    """Process medians of a real run, drawn with replacement; levels are repeated to fill the ladder."""
    pools = [np.log(values) for values in medians.values()]

    def draw(rng: np.random.Generator, date: int, *shape: int) -> Array:
        nights, levels, processes = shape
        columns = [rng.choice(pools[level % len(pools)], (nights, processes)) for level in range(levels)]
        return np.stack(columns, axis=1)

    return draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Null nights: who draws them, how they are judged, how many earlier ones are known, how many to draw."""

    draw: Draw
    """Of whole calls or, with `rest_sd`, of their denoising loops."""
    policy: Policy = GPU
    rest_sd: float | None = None
    """Spread of the rest of a call between processes; None: loops are not looked at."""
    history: int = 0
    nights: int = NIGHTS


def null_models() -> dict[str, Model]:
    """Name -> model, at the default settings of GPU and CPU."""
    models = {
        "tight, 0.3 %": Model(draw=gaussian(GPU_SPREAD)),
        "heavy-tailed, 0.3 %": Model(draw=heavy_tailed(GPU_SPREAD)),
        "noisy, 2 %": Model(draw=gaussian(0.02)),
        "uneven, 0.1 to 2 %": Model(draw=uneven),
        "every other level 4 %, the rest 0.3 %": Model(draw=two_kinds(0.04, GPU_SPREAD), nights=MANY_NIGHTS),
        "12 level(s) 4 %, the rest 0.1 %": Model(draw=two_kinds(0.04, 0.001, 12), nights=MANY_NIGHTS),
        "mixed bimodal and tight": Model(draw=mixed),
        DRIFT: Model(draw=drifting(0.002, 0.001)),
        f"{DRIFT}, 3 nights of history": Model(draw=drifting(0.002, 0.001), history=3),
        f"{DRIFT}, 10 nights of history": Model(draw=drifting(0.002, 0.001), history=10),
        "CPU, 2 %, one process": Model(draw=gaussian(CPU_SPREAD), policy=CPU),
        "CPU, 9 %, one process": Model(draw=gaussian(0.09), policy=CPU),
        "CPU, 6 level(s) 20 %, the rest 1 %": Model(draw=two_kinds(0.2, 0.01, 6), policy=CPU, nights=MANY_NIGHTS),
        "CPU, heavy-tailed 2 %, one process": Model(draw=heavy_tailed(CPU_SPREAD), policy=CPU),
        "CPU, mixed bimodal, one process": Model(draw=mixed, policy=CPU),
        "CPU, three levels bimodal, 60 % slow": Model(draw=bimodal(0.6, levels=3), policy=CPU),
    }
    # The hardest null for five baseline processes: rates near the bound need more nights to be told from it.
    for levels in (None, 1, 3, 6, 8, 12, 20):
        for slow in (0.2, 0.5, 0.7, 0.75, 0.8) if levels is None else (0.65,):
            name = f"{'every level' if levels is None else f'{levels} level(s)'} bimodal, {100 * slow:.0f} % slow"
            models[name] = Model(draw=bimodal(slow, levels=levels), nights=MANY_NIGHTS)
    for name, draw in (
        ("tight, 0.3 %", gaussian(GPU_SPREAD)),
        ("uneven, 0.1 to 2 %", uneven),
        ("every level bimodal, 80 % slow", bimodal(0.8)),
        ("6 level(s) bimodal, 65 % slow", bimodal(0.65, levels=6)),
    ):
        models[f"loops: {name}; the rest of a call 5 %"] = Model(draw=draw, rest_sd=REST_SPREAD, nights=MANY_NIGHTS)
    for name, draw in (("tight, 0.3 %", gaussian(GPU_SPREAD)), (DRIFT, drifting(0.002, 0.001))):
        models[f"loops: {name}; the rest 5 %, 10 nights of history"] = Model(draw=draw, rest_sd=REST_SPREAD, history=10)
    if RECORDED.exists():
        for slug, medians in json.loads(RECORDED.read_text()).items():
            models[f"recorded, {slug}"] = Model(draw=recorded(medians), policy=policy_for(slug))
    return models
