"""Fixtures and rules for every test."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from longseq.launch.processes import ConsoleHandler

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers beside each other: threads that wait for a core spin, and all of them crawl.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. It is chosen where they are decorated: before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

# A test must never wait for a hub, nor write into the user's cache.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-xdist keep the order below, and not begin with the files of most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: none begins when the other worker has nothing left to do.

    Tests marked `gpu` skip themselves on a machine without one.
    """
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A run in this process sets up logging to the console: whichever test is next has none of it."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, ConsoleHandler)]:
        root.removeHandler(handler)
    logging.getLogger("longseq").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cache_of_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token shards of all tests go into one folder that goes with the session."""
    monkeypatch.setenv("LONGSEQ_CACHE", str(tmp_path_factory.getbasetemp() / "longseq-cache"))


@pytest.fixture
def kernel_device() -> str:
    """Where Triton's kernels run: the GPU, or the CPU in their interpreter (bf16 is truncated there)."""
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"
