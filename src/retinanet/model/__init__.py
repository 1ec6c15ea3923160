"""The network: backbone, pyramid, heads, and weights in and out."""

from retinanet.model.checkpoint import (
    Checkpoint,
    TransferReport,
    load_checkpoint,
    save_checkpoint,
    transfer_weights,
    write_checkpoint,
)
from retinanet.model.retinanet import RetinaNet, build_retinanet

__all__ = [
    "Checkpoint",
    "RetinaNet",
    "TransferReport",
    "build_retinanet",
    "load_checkpoint",
    "save_checkpoint",
    "transfer_weights",
    "write_checkpoint",
]
