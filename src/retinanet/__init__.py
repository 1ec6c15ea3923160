"""RetinaNet and Focal Loss (Lin et al. 2017, arXiv:1708.02002)."""

__version__ = "0.1.0"
