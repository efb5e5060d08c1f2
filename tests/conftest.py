"""What several test files share; nothing here runs unless it is asked for."""

from __future__ import annotations

import pytest

from fluxfast.workloads import Workload


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """A workload of a FLUX small enough to compile in seconds."""
    from micro_flux import make_micro_flux

    return make_micro_flux(tmp_path_factory.mktemp("micro_flux"))
