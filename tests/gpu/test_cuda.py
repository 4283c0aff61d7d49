"""The run on one CUDA device, when there is one: it trains, resumes and repeats its bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import digest, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_trains_and_repeats_its_bits_on_cuda(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        folder = tmp_path / name
        words = ("launch.device=cuda", "run.exact=true", "run.steps=20", "launch.processes=1")
        train(folder, *words, "run.precision=fp32")
        digests.add(digest(folder))
    assert len(digests) == 1
