"""``retinanet serve`` as a process: how it starts, how it ends, what it says."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import util
from pathlib import Path

import httpx
import pytest
import torch
from small_service import png_image

from retinanet.cli import main
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.model.retinanet import RetinaNet

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = RetinaNet(backbone="resnet18", num_classes=2, channels=16, head_depth=1, norm="group")
    folder = tmp_path_factory.mktemp("runs") / "squares"
    return save_checkpoint(folder, Checkpoint(network, ("a", "b"), (1, 2), 64, 128))


class Process:
    """The command, with its port and what it wrote."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "retinanet", "serve", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )

    def ready(self) -> str:
        """The address, once it is served."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"serving at (http://\S+);", line)
        assert found, self.process.communicate()
        return found[1]

    def end(self, *signals: signal.Signals) -> tuple[int, str]:
        """Exit code and standard error, after these signals."""
        for one in signals:
            self.process.send_signal(one)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[Process]:
    one = Process(*arguments, "--port", 0, **environment)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize(
    ("sent", "host", "code", "says"),
    [
        (signal.SIGINT, "127.0.0.1", 130, ["stopped"]),
        (
            signal.SIGTERM,
            "0.0.0.0",
            0,
            ["whoever reaches this address may use it: --api-key asks for a key"],
        ),
    ],
)
def test_a_request_that_runs_is_finished(
    model: Path, sent: signal.Signals, host: str, code: int, says: list[str]
) -> None:
    # Many images, so that the signal comes while they are searched.
    many = [("images", (f"{i}.png", png_image(256, 256 + 32 * (i % 9)))) for i in range(40)]
    options = ("--max-images", 40, "--image-size", 256, "--host", host)
    with serving(model, *options) as one:
        address = one.ready().replace("0.0.0.0", "127.0.0.1")
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{address}/v1/detect", files=many, timeout=120)
            )
        )
        thread.start()
        with httpx.Client() as line:
            while "retinanet_images_total" not in (text := line.get(f"{address}/metrics").text):
                time.sleep(0.01)
            assert 'route="/v1/detect"' not in re.sub("(?m)^#.*", "", text)
        ended, err = one.end(sent)
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200]
    assert len(answers[0].json()["images"]) == 40
    assert ended == code
    # What runs is said, then how it ended; no traceback.
    assert [line for line in err.splitlines() if not line.startswith("squares: torch")] == says


def test_a_second_signal_ends_at_once(model: Path) -> None:
    many = [("images", (f"{i}.png", png_image(512, 512))) for i in range(100)]
    with serving(model, "--max-images", 100, "--image-size", 640) as one:
        address = one.ready()

        def ask() -> None:
            with suppress(httpx.HTTPError):
                httpx.post(f"{address}/v1/detect", files=many, timeout=120)

        thread = threading.Thread(target=ask)
        thread.start()
        with httpx.Client() as line:
            while "retinanet_images_total" not in line.get(f"{address}/metrics").text:
                time.sleep(0.01)
        began = time.monotonic()
        one.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        code, err = one.end(signal.SIGINT)
        thread.join(60)
    assert code == 130
    assert time.monotonic() - began < 15
    assert "Traceback" not in err


def test_it_serves_what_it_says(model: Path) -> None:
    given = (f"first={model}", f"second={model}", "--workers", 2, "--score-threshold", 0.25)
    with serving(*given, RETINANET_API_KEY="open sesame") as one:
        address = one.ready()
        assert address.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=address) as line:
            assert line.get("/readyz").json() == {"status": "ready"}
            assert line.get("/v1/model").status_code == 401
            line.headers["X-API-Key"] = "open sesame"
            told = line.get("/v1/model").json()
            assert [model["name"] for model in told["models"]] == ["first", "second"]
            assert told["models"][0]["thresholds"]["score_threshold"] == 0.25
            assert line.get("/openapi.json").json()["info"]["title"] == "retinanet"
            answer = line.post("/v1/detect", files={"images": ("a.png", png_image())})
            assert answer.json()["images"][0]["width"] == 192
            assert line.get("/").status_code == 200
        code, err = one.end(signal.SIGTERM)
    assert code == 0
    assert "sesame" not in err
    assert len(err.splitlines()) == 2  # the two networks


def test_a_taken_port_is_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", str(model), "--port", str(port)]) == 1
    assert capsys.readouterr().err == (
        f"error: cannot serve at 127.0.0.1 port {port}: Address already in use; "
        "give another --host or --port\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["{model}/nothing"], 1, "nothing"),
        (["{model}", "--port=-1"], 2, "--port -1 is not in 0..65535"),
        (["{model}", "--host=256.256.256.256", "--port=0"], 2, "--host 256.256.256.256: "),
        (["{model}", "{model}"], 2, "would both be called squares"),
        (["{model}", "--queue=3"], 2, "--queue 3 is under --max-images 32"),
        (["{model}", "--max-bytes=0"], 2, "--max-bytes 0 is under 1"),
        (["{model}", "--api-key="], 2, "the API key is empty"),
        (["{model}", "--port=0", "--score-threshold=2"], 2, "score_threshold"),
        (["{model}", "--port=0", "--precision=f32"], 2, "float32"),
        ([], 2, "MODEL"),
    ],
)
def test_errors_are_one_line(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    given = [one.format(model=model) for one in arguments]
    assert main(["serve", *given]) == code
    err = capsys.readouterr().err
    assert says in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_a_missing_extra_is_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "fastapi" else known(name))
    assert main(["serve", str(model)]) == 1
    assert "pip install 'retinanet[serve]'" in capsys.readouterr().err
