"""The Triton kernels without a GPU: right under the interpreter, and compilable for an H100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed")


def test_kernels_under_the_interpreter() -> None:
    """All of triton_interpreted.py, in a process that had the variable before Triton."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         str(Path(__file__).with_name("triton_interpreted.py"))],
        env=dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from retinanet.kernels.triton_focal import loss_and_gradient, scale

def ptx(kernel, types, constants, **options):
    names = kernel.arg_names
    signature = dict(zip(names, types.split())) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Triton sees for itself which addresses and counts of 64 bits are multiples of 16.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(types.split()) if kind[0] == "*" or kind == "i64"
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

for kind, classes, group in (("bf16", 80, 16), ("fp32", 1, 1)):
    text = ptx(
        loss_and_gradient,
        f"*{kind} *i64 *fp32 *fp32 *fp32 *{kind} *fp32 i64 fp32 fp32",
        dict(CLASSES=classes, GROUP=group, STAR=False, POWER=2, CLASS_ALPHA=False, WANTED=True,
             BLOCK=4096),
        num_warps=8, enable_fp_fusion=True,
    )
    # 128 bits at a time, in and out
    print(kind, classes, "ld.global.v4" in text and "st.global.v4" in text)
ptx(scale, "*bf16 *fp32 i64", dict(BLOCK=4096), num_warps=8, enable_fp_fusion=True)
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """ptxas comes with Triton, and wants no GPU."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    environment.pop("TRITON_INTERPRET", None)
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split("\n")[:-1] == ["bf16 80 True", "fp32 1 True"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_on_a_gpu(dtype: torch.dtype) -> None:
    from retinanet.kernels.triton_focal import sum_and_gradient, supports
    from retinanet.losses.focal import plain_label_loss

    logits = (torch.randn(5003, 80, device="cuda") * 4 - 4).to(dtype)
    labels = torch.randint(-2, 80, (5003,), device="cuda")
    weights = torch.rand(5003, device="cuda") * (labels != -2)
    alpha = torch.tensor(0.25, device="cuda"), torch.tensor(0.75, device="cuda")
    wide = logits.double().requires_grad_()
    for formula in (("focal", 2.0, 0.0), ("focal", 0.5, 0.0), ("focal_star", 2.0, 1.0)):
        assert supports(logits, formula)
        expected = plain_label_loss(
            wide, labels, weights.double(), *(one.double() for one in alpha), formula
        )
        (expected_gradient,) = torch.autograd.grad(expected, wide)
        gradient = torch.empty(logits.shape, device="cuda")
        loss = sum_and_gradient(logits, labels, weights, *alpha, formula, gradient)
        assert_close(loss, expected.detach().float(), rtol=1e-5, atol=1e-5)
        assert_close(gradient, expected_gradient.float(), rtol=1e-4, atol=1e-6)
        again = sum_and_gradient(logits, labels, weights, *alpha, formula, gradient)
        assert torch.equal(again, loss)
