"""A small experiment with made-up outcomes, for the tests of results and claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retinanet.paper.claims import collect_results
from retinanet.paper.results import Outcome, Result, TableResult
from retinanet.paper.tables import Claim, Experiment, Published, Row

ABOUT = {
    "command": "retinanet paper run table3 --data nuclei",
    "data": "nuclei",
    "steps": 1200,
    "seeds": 3,
    "machine": "4 cores",
    "settings": [("data.image_size", 600, 256), ("loss.box", "smooth_l1", "l1|giou")],
    "coco": False,
}
OVER = Claim("gamma 2 over gamma 0", "over", ("a",), ("b",))


def metrics(ap: float, ap_large: float | None = 0.5) -> dict[str, Any]:
    """Return metrics (0..1) of an evaluation, the others in proportion to AP."""
    sizes = {"ap_small": ap, "ap_medium": ap, "ap_large": ap_large}
    return {"ap": ap, "ap50": 2 * ap, "ap75": ap / 2, **sizes, "images": 10}


def done(*aps: float, name: str = "x") -> list[Outcome]:
    return [
        Outcome(seed, Result("done", metrics=metrics(ap)), f"runs/{name}/seed-{seed}")
        for seed, ap in enumerate(aps)
    ]


def trainings(**aps: Sequence[float]) -> dict[str, list[Outcome]]:
    """Return trainings per row, in run folders of their own."""
    return {key: done(*of_row, name=key) for key, of_row in aps.items()}


def collect(
    outcomes: Mapping[str, Sequence[Outcome]],
    *claims: Claim,
    about: Mapping[str, Any] = ABOUT,
    milliseconds: Mapping[str, float] | None = None,
) -> TableResult:
    rows = (
        Row("a", "gamma 2", published=Published(34.0, 52.5, 36.5, milliseconds=98)),
        Row("b", "gamma 0", published=Published(31.1)),
        Row("c", "hinge"),
    )
    columns = ("AP", "AP50", "AP75", "APl", "ms")
    experiment = Experiment(
        "table1b", "Gamma", "Sec. 5", "COCO", columns, rows, claims, note="A note."
    )
    return collect_results(experiment, outcomes, about, milliseconds=milliseconds)
