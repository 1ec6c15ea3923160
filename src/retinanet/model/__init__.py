"""The network: backbone, pyramid and heads; checkpoints and pretrained weights."""

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
