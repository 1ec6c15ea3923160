"""Runs put on the Hugging Face hub, with a model card that the run fills in."""

from retinanet.hub.push import Pushed, prepare, push

__all__ = ["Pushed", "prepare", "push"]
