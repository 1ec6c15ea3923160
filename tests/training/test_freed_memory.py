"""Freed memory is kept for the next tensors of a training on a CPU."""

import subprocess
import sys

import pytest

from retinanet.training.memory import keep_freed_memory

PAGE_FAULTS = """
import resource, torch
from retinanet.training.memory import keep_freed_memory
keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16, 1024, 1024)  # 64 MB, more than glibc ever keeps by itself
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_freed_tensor_is_not_mapped_anew():
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    # A process of its own: in this one other tests have shaped the heap.
    run = subprocess.run([sys.executable, "-c", PAGE_FAULTS], check=True, stdout=subprocess.PIPE)
    first, *others = map(int, run.stdout.split())
    assert first > 10_000  # of 16,384 pages
    assert min(others) < 1000
