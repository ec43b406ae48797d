"""A ground for each test, with a program that was compiled once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .ground import RUNTIMES, Ground, build_asker, ground, why_not


@pytest.fixture(scope="session")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    problem = why_not(*RUNTIMES)
    if problem:
        pytest.skip(problem)
    return build_asker(tmp_path_factory.mktemp("asker"))


@pytest.fixture
def bare(asker: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Ground]:
    """Without a guard."""
    with ground(tmp_path, asker, f"{abs(hash(request.node.name)) % 10**8}") as made:
        yield made


@pytest.fixture
def guarded(bare: Ground) -> Ground:
    """With one."""
    bare.start_guard()
    return bare
