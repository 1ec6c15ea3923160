"""How long a person waits for the first sign of life."""

from __future__ import annotations

import subprocess
import sys

from retinanet.bench.contest import Case, Contest, Setting
from retinanet.errors import RetinaNetError

# Seconds of the second statement alone; what torch itself takes is not ours to change.
_BEYOND_TORCH = (
    "import sys, time, torch; start = time.perf_counter(); {}; "
    "sys.stdout.write(str(time.perf_counter() - start))"
)


def startup(setting: Setting) -> list[Case]:
    """The command line's help, and imports beyond ``import torch``; each in a fresh process."""
    help_text = "from retinanet.cli import main; raise SystemExit(main(['--help']))"

    def whole() -> str:
        return _python(help_text)

    def beyond(statement: str) -> Contest:
        return Contest(
            lambda: _python(_BEYOND_TORCH.format(statement)), seconds=float, memory=False
        )

    return [
        Case("retinanet --help", "a fresh process", lambda: Contest(whole, memory=False)),
        Case("import retinanet", "beyond torch", lambda: beyond("import retinanet")),
        Case("retinanet.load", "beyond torch", lambda: beyond("import retinanet; retinanet.load")),
    ]


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it died"])[-1]
        raise RetinaNetError(f"startup: python failed: {last}")
    return done.stdout
