"""``retinanet serve`` as a process: start, shutdown and messages."""

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
from typing import Any

import httpx
import pytest
import torch
from small_service import form, png_image

from retinanet.cli import main
from retinanet.inference import Detector
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from tiny_backbone import tiny_network

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    network = tiny_network(backbone="mobilenet_v2")  # known to other processes
    folder = tmp_path_factory.mktemp("runs") / "squares"
    return str(save_checkpoint(folder, Checkpoint(network, ("a", "b"), (1, 2), 64, 128)))


def serve(
    capsys: Capture, *arguments: str, use: Callable[[str], None], end: signal.Signals
) -> tuple[int, str]:
    """Run the command in this process's main thread, where signals arrive.

    `use` is called with the URL in another thread, then the signal is sent. Returns the exit code
    and the messages.
    """
    failures: list[BaseException] = []
    ended = threading.Event()
    out = ""

    def run_client() -> None:
        nonlocal out
        while not (match := re.search(r"serving at (http://\S+);", out)):
            if ended.wait(0.05):
                return
            out += "".join(capsys.readouterr())
        try:
            use(match[1].replace("0.0.0.0", "127.0.0.1"))
        except BaseException as error:
            failures.append(error)
        os.kill(os.getpid(), end)

    thread = threading.Thread(target=run_client)
    thread.start()
    try:
        code = main(["serve", *arguments, "--port=0"])
    finally:
        ended.set()
        thread.join(120)
    assert failures == []
    return code, out + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("end", "host", "code", "message"),
    [
        (signal.SIGINT, "127.0.0.1", 130, "stopped\n"),
        (signal.SIGTERM, "0.0.0.0", 0, "warning: no API key set; anyone who can reach this"),
    ],
)
def test_signal_finishes_running_requests(
    model: str,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    end: signal.Signals,
    host: str,
    code: int,
    message: str,
) -> None:
    entered = threading.Event()
    detect = Detector.detect_prepared
    responses: list[httpx.Response] = []
    files = form(*3 * [png_image()])

    def detect_slowly(*images: Any, **options: Any) -> Any:
        entered.set()
        time.sleep(0.3)  # the signal comes meanwhile
        return detect(*images, **options)

    def use(url: str) -> None:
        def post() -> None:
            responses.append(httpx.post(f"{url}/v1/detect", files=files, timeout=120))

        monkeypatch.setattr(Detector, "detect_prepared", detect_slowly)  # the networks are warm
        threads.append(threading.Thread(target=post))
        threads[0].start()
        assert entered.wait(120)

    threads: list[threading.Thread] = []
    result, output = serve(capsys, model, "--host", host, use=use, end=end)
    threads[0].join(120)
    assert result == code
    assert message in output
    [response] = responses
    assert (response.status_code, len(response.json()["images"])) == (200, 3)


def test_second_ctrl_c_exits_at_once(model: str) -> None:
    files = form(*100 * [png_image(512, 512)])
    options = ("--image-size=640", "--port=0")
    server = subprocess.Popen(
        [sys.executable, "-m", "retinanet", "serve", model, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert server.stdout is not None
        match = re.search(r"serving at (http://\S+);", server.stdout.readline())
        assert match, server.communicate()

        def post() -> None:
            with suppress(httpx.HTTPError):
                httpx.post(f"{match[1]}/v1/detect", files=files, timeout=120)

        thread = threading.Thread(target=post)
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
    model: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(url: str) -> None:
        with httpx.Client(base_url=url, timeout=120) as line:
            assert line.get("/readyz").json() == {"status": "ready"}
            assert "server" not in line.get("/").headers
            assert line.get("/v1/model").status_code == 401
            line.headers["X-API-Key"] = "open sesame"
            models = line.get("/v1/model").json()["models"]
            assert [item["name"] for item in models] == ["first", "second"]
            assert models[0]["thresholds"]["score_threshold"] == 0.25
            response = line.post("/v1/detect", files={"images": ("a.png", png_image())})
            assert response.json()["images"][0]["width"] == 192

    monkeypatch.setenv("RETINANET_API_KEY", "open sesame")
    threads = torch.get_num_threads()
    options = (f"first={model}", f"second={model}", "--workers=2", "--score-threshold=0.25")
    try:
        code, output = serve(capsys, *options, use=use, end=signal.SIGTERM)
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    assert "sesame" not in output
    assert len(output.splitlines()) == 3  # the two networks, and the URL


def test_used_port_is_a_one_line_error(model: str, capsys: Capture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", model, "--port", str(port)]) == 1
    assert capsys.readouterr().err == (
        f"error: cannot serve at 127.0.0.1 port {port}: Address already in use; "
        "use another --host or --port\n"
    )


def test_missing_extra_is_a_one_line_error(
    model: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    assert main(["serve", model]) == 1
    assert "pip install 'retinanet[serve]'" in capsys.readouterr().err
