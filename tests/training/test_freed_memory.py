"""Freed memory is kept for the next tensors of a training on a CPU."""

import resource
import sys

import pytest
import torch

from retinanet.training.memory import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_freed_tensor_is_not_mapped_anew():
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")

    def page_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16, 1024, 1024)  # 64 MB, more than glibc ever keeps by itself
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # A freed tensor may be a few bytes too short for the next one of its size.
    assert min(page_faults() for _ in range(4)) < 1000  # of 16,384
