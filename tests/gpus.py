"""What tests of tests/gpu share."""

from __future__ import annotations

import pytest


def on_gpus(*numbers: int) -> pytest.MarkDecorator:
    """Parametrize a test with ``num_ranks``, each rank on a GPU of its own."""
    params = [pytest.param(n, marks=pytest.mark.gpu(n), id=str(n)) for n in numbers]
    return pytest.mark.parametrize("num_ranks", params)
