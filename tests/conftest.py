"""One thread, so that tests run side by side; a home of their own, so that they leave no trace; and
the same random numbers whatever ran before. pytest-randomly shuffles the order and prints its seed:
`--randomly-seed=N` brings that order back, `-p no:randomly` takes that of the files.
"""

from __future__ import annotations

import random
import signal

import numpy as np
import pytest
import torch

from trackkit import ablations, sampling
from trackkit.got10k import GOT10k
from trackkit.paths import SAMPLES

torch.set_num_threads(1)

# a shell without job control starts background jobs deaf to ctrl-C, and their children with them:
# tests that press it would wait for ever
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.option.randomly_reset_seed = False  # the order is random, the numbers are not


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    seed()  # for the fixtures of a module, which are made before `seeded`


@pytest.fixture(autouse=True)
def seeded():
    seed()


def seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKKIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRACKKIT_GOT10K", raising=False)


@pytest.fixture(autouse=True)
def no_pool(monkeypatch):
    """No minutes for a pool: trainings without data draw theirs as they go (`test_pool.py` has
    the pool; other processes are told `--data stream`).
    """
    monkeypatch.setattr(sampling, "pool", lambda: sampling.training_set(sampling.STREAM))
    monkeypatch.setattr(ablations, "held_out", lambda: GOT10k(SAMPLES, "val"))
