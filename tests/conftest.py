"""What holds for every test: one thread, no user's cache, slow tests only when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported anywhere: two pytest workers on two cores must not fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (real models)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or "slow" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stages go into a fresh cache a session; wheels that were downloaded before are shared, by their sha256.

    HOME stays, because pip reads the user's configuration from it.
    """
    from edgeport.storage import cache_root

    packages = cache_root().absolute() / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    cache = tmp_path_factory.mktemp("cache")
    (cache / "packages").symlink_to(packages, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPORT_CACHE", str(cache))
        patch.setenv("HF_HOME", str(cache / "huggingface"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    cache = tmp_path / "own-cache"
    monkeypatch.setenv("EDGEPORT_CACHE", str(cache))
    return cache
