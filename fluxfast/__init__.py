"""FLUX.1 made faster, one optimisation at a time.

A level is data (`levels.py`), is applied in `build.py`, and is proven by the counts of `proof.py`.
"""

from fluxfast.levels import LADDER, Level, get_level
from fluxfast.workloads import Workload, get_workload

__all__ = ["LADDER", "Level", "Workload", "get_level", "get_workload"]
