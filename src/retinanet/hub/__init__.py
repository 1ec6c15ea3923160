"""Push runs to the Hugging Face hub, with a model card filled in from the run."""

from retinanet.hub.push import Pushed, prepare, push

__all__ = ["Pushed", "prepare", "push"]
