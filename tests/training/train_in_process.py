"""Run by tests in processes of their own: train the tiny recipe, several times if asked.

Arguments: data, out, then key=value settings; ``--`` before each further training.
"""

from __future__ import annotations

import sys
from itertools import groupby

import torch
from tiny import tiny_recipe

from retinanet.training.trainer import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for is_separator, group in groupby(sys.argv[1:], key=lambda argument: argument == "--"):
        if not is_separator:
            data, out, *settings = group
            train(tiny_recipe(*settings), data, out, device="cpu")
