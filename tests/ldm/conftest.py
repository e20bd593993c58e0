from pathlib import Path

import pytest
from hypothesis import settings

from tests.ldm.shard_files import write_set

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture
def shard_set(tmp_path: Path) -> str:
    """Write ten samples into two shards."""
    return write_set(tmp_path / "shards", 10)
