"""The command line. Nothing else prints; torch is imported inside commands alone."""

from retinanet.cli.app import main

__all__ = ["main"]
