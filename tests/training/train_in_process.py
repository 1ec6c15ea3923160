"""Run by tests in a process of its own: train the tiny recipe on a folder.

Arguments: data, out, then key=value settings.
"""

from __future__ import annotations

import sys

import torch
from tiny import tiny_recipe

from retinanet.training.trainer import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    data, out, *settings = sys.argv[1:]
    train(tiny_recipe(*settings), data, out, device="cpu")
