import os
from pathlib import Path

import pytest


if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Two tests at once, each on a core of its own: threads that wait for one another's cores make both many times slower.
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, encoders and official tensors; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("VRPO_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir() or not (folder / "encoders").is_dir():
        pytest.skip(f"no shared data at {folder} (set VRPO_SHARED)")
    return folder.resolve()


def pytest_collection_modifyitems(items):
    """Slow tests come last; where several workers share the tests, first."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None) != bool(worker))
