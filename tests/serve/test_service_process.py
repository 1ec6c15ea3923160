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
from collections.abc import Callable
from contextlib import suppress
from importlib import util
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from small_service import png_image

from retinanet.cli import main
from retinanet.inference import Detector
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.model.retinanet import RetinaNet

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = RetinaNet(backbone="resnet18", num_classes=2, channels=16, head_depth=1, norm="group")
    folder = tmp_path_factory.mktemp("runs") / "squares"
    return save_checkpoint(folder, Checkpoint(network, ("a", "b"), (1, 2), 64, 128))


class Command:
    """``retinanet serve`` in this process's main thread, where signals arrive."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""
        self._ended = threading.Event()

    def read(self) -> None:
        captured = self._capsys.readouterr()
        self.out += captured.out
        self.err += captured.err

    def run(self, *arguments: object, use: Callable[[str], None], end: signal.Signals) -> int:
        """The exit code; `use` is called with the address, then the signal is sent."""
        failures: list[BaseException] = []

        def client() -> None:
            while not (match := re.search(r"serving at (http://\S+);", self.out)):
                if self._ended.wait(0.05):
                    return
                self.read()
            try:
                use(match[1].replace("0.0.0.0", "127.0.0.1"))
            except BaseException as error:
                failures.append(error)
            os.kill(os.getpid(), end)

        thread = threading.Thread(target=client)
        thread.start()
        try:
            code = main(["serve", *map(str, arguments), "--port=0"])
        finally:
            self._ended.set()
            thread.join(120)
        self.read()
        assert failures == []
        return code


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.mark.parametrize(
    ("sent", "host", "code", "says"),
    [
        (signal.SIGINT, "127.0.0.1", 130, ["stopped"]),
        (
            signal.SIGTERM,
            "0.0.0.0",
            0,
            [
                "warning: no API key set; anyone who can reach this address can use the service; "
                "set one with --api-key"
            ],
        ),
    ],
)
def test_signal_finishes_running_requests(
    model: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    sent: signal.Signals,
    host: str,
    code: int,
    says: list[str],
) -> None:
    entered, resume = threading.Event(), threading.Event()
    detect = Detector.detect_prepared
    answers: list[httpx.Response] = []
    files = [("images", (f"{i}.png", png_image())) for i in range(3)]

    def slow(*given: Any, **options: Any) -> Any:
        entered.set()
        resume.wait(120)
        return detect(*given, **options)

    def post(address: str) -> None:
        answers.append(httpx.post(f"{address}/v1/detect", files=files, timeout=120))
        resume_late.join()

    def use(address: str) -> None:
        monkeypatch.setattr(Detector, "detect_prepared", slow)  # the networks are warm
        threads.append(threading.Thread(target=post, args=(address,)))
        threads[0].start()
        assert entered.wait(120)
        resume_late.start()  # after the signal

    threads: list[threading.Thread] = []
    resume_late = threading.Timer(0.5, resume.set)
    assert command.run(model, "--host", host, use=use, end=sent) == code
    threads[0].join(120)
    assert [answer.status_code for answer in answers] == [200]
    assert len(answers[0].json()["images"]) == 3
    lines = command.err.splitlines()
    assert [line for line in lines if not line.startswith("squares: torch")] == says


def test_second_ctrl_c_exits_at_once(model: Path) -> None:
    many = [("images", (f"{i}.png", png_image(512, 512))) for i in range(100)]
    options = ("--max-images=100", "--image-size=640", "--port=0")
    server = subprocess.Popen(
        [sys.executable, "-m", "retinanet", "serve", str(model), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert server.stdout is not None
        match = re.search(r"serving at (http://\S+);", server.stdout.readline())
        assert match, server.communicate()

        def ask() -> None:
            with suppress(httpx.HTTPError):
                httpx.post(f"{match[1]}/v1/detect", files=many, timeout=120)

        thread = threading.Thread(target=ask)
        thread.start()
        with httpx.Client(timeout=120) as line:
            while "retinanet_images_total" not in line.get(f"{match[1]}/metrics").text:
                time.sleep(0.01)
        server.send_signal(signal.SIGINT)
        time.sleep(0.5)
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=120)
        thread.join(120)
    finally:
        server.kill()
    assert server.returncode == 130
    assert err.splitlines()[-1] == "stopped without finishing running requests"
    assert "Traceback" not in err


def test_command_serves_models_with_its_options(
    model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(address: str) -> None:
        assert address.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=address, timeout=120) as line:
            assert line.get("/readyz").json() == {"status": "ready"}
            assert line.get("/v1/model").status_code == 401
            line.headers["X-API-Key"] = "open sesame"
            known = line.get("/v1/model").json()
            assert [model["name"] for model in known["models"]] == ["first", "second"]
            assert known["models"][0]["thresholds"]["score_threshold"] == 0.25
            assert line.get("/openapi.json").json()["info"]["title"] == "retinanet"
            answer = line.post("/v1/detect", files={"images": ("a.png", png_image())})
            assert answer.json()["images"][0]["width"] == 192
            assert line.get("/").status_code == 200

    monkeypatch.setenv("RETINANET_API_KEY", "open sesame")
    threads = torch.get_num_threads()
    options = (f"first={model}", f"second={model}", "--workers=2", "--score-threshold=0.25")
    try:
        assert command.run(*options, use=use, end=signal.SIGTERM) == 0
    finally:
        torch.set_num_threads(threads)
    assert "sesame" not in command.out + command.err
    assert len(command.err.splitlines()) == 2  # the two networks


def test_used_port_is_a_one_line_error(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", str(model), "--port", str(port)]) == 1
    assert capsys.readouterr().err == (
        f"error: cannot serve at 127.0.0.1 port {port}: Address already in use; "
        "use another --host or --port\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["{model}/nothing"], 1, "nothing"),
        (["{model}", "--port=-1"], 2, "--port is out of range: -1"),
        (["{model}", "--host=256.256.256.256", "--port=0"], 2, "invalid --host: 256.256.256.256"),
        (["{model}", "{model}"], 2, "two models named squares"),
        (["{model}", "--queue=3"], 2, "--queue 3 is smaller than --max-images 32"),
        (["{model}", "--max-bytes=0"], 2, "--max-bytes is out of range: 0"),
        (["{model}", "--api-key="], 2, "invalid API key"),
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


def test_missing_extra_is_a_one_line_error(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "fastapi" else known(name))
    assert main(["serve", str(model)]) == 1
    assert "pip install 'retinanet[serve]'" in capsys.readouterr().err
