"""training.compile: the same curve from fused operations."""

from pathlib import Path

import pytest

from tests import engine_proofs
from tests.conftest import write_store
from tests.engine_proofs import job, plain


def test_compiled_steps_follow_plain_ones_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten images over two ranks, three at once: micro-batches of two sizes."""
    monkeypatch.setenv("CVAE_HOME", str(tmp_path))
    write_store(tmp_path, captioned=False)
    jobs = [
        job(name, 0, 8, plain("DDP", micro_batch_size=3, compile=compiled))
        for name, compiled in (("plain", False), ("compiled", True))
    ]
    found = engine_proofs.run_jobs(tmp_path, 2, jobs)
    assert found["compiled"]["losses"] == pytest.approx(found["plain"]["losses"], rel=1e-5)
    # Other kernels: had nothing been compiled, not a bit would differ.
    assert found["compiled"]["losses"] != found["plain"]["losses"]
