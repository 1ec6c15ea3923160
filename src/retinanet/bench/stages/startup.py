"""Start-up time."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from retinanet.bench.benchmark import Benchmark, Case, Setting
from retinanet.errors import RetinaNetError

_HELP = "from retinanet.cli import main; raise SystemExit(main(['--help']))"
# Prints the seconds of the statement alone, after torch is imported.
_AFTER_TORCH = (
    "import sys, time, torch; start = time.perf_counter(); {}; "
    "sys.stdout.write(str(time.perf_counter() - start))"
)


def startup(setting: Setting) -> list[Case]:
    """Run the command line's help, and imports after ``import torch``; each in a new process."""

    def after_torch(statement: str) -> Benchmark:
        call = partial(_run_python, _AFTER_TORCH.format(statement))
        return Benchmark(call, seconds=float, memory=False)

    def help_text() -> Benchmark:
        return Benchmark(partial(_run_python, _HELP), memory=False)

    statements = {
        "import retinanet": "import retinanet",
        "retinanet.load": "import retinanet; retinanet.load",
    }
    return [
        Case("retinanet --help", "a new process", help_text),
        *(
            Case(name, "after torch", partial(after_torch, code))
            for name, code in statements.items()
        ),
    ]


def _run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RetinaNetError(f"startup: python failed: {last}")
    return done.stdout
