"""A collection on a cluster of several Ray nodes, one of which dies in the middle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from small_collection import (
    SETTINGS,
    assert_same_rows,
    jsonl_rows,
    local_rows,
    parquet_rows,
    save_images,
    save_small_model,
    shard_metadata,
)

from retinanet.batch.collection import detect_collection
from retinanet.data.cpus import usable_cpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        usable_cpus() < 4, reason="on fewer than 4 cores one node is done before the others start"
    ),
    pytest.mark.xdist_group("ray"),
    # Of Ray itself, and of what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_a_node_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    model = save_small_model(tmp_path / "model")
    images = save_images(tmp_path / "images", 24)
    out = tmp_path / "out"
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        lost = cluster.add_node(**node)
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        before: list[int] = []

        def kill(done: int, of: int) -> None:
            processes = {shard["process"] for shard in shard_metadata(out)}
            if before or len(processes) < 3:
                return  # until each node has had a shard
            before.append(done)
            cluster.remove_node(lost, allow_graceful=False)

        summary = detect_collection(
            model, images, out, workers=3, shard_size=1, on_progress=kill, **SETTINGS
        )
        alive = [one for one in ray.nodes() if one["Alive"]]
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
    assert before, "no node was killed"
    assert before[0] < 24
    assert len(alive) == 2
    assert (summary.images, summary.errors, summary.shards) == (24, 0, 24)
    assert_same_rows(jsonl_rows(out), local_rows(model, images))
    assert parquet_rows(out) == jsonl_rows(out)
