"""One thread, so that tests run side by side, and a home of their own, so that they leave no
trace.
"""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKKIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRACKKIT_GOT10K", raising=False)
