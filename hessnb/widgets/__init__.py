"""Explorers that compute in Jupyter and, on the book's pages, show ready-made states with no kernel and no network."""

from hessnb.widgets.attack import attack_explorer
from hessnb.widgets.explorer import Choice, Explorer
from hessnb.widgets.landscape import landscape_explorer, leading_directions

__all__ = ["Choice", "Explorer", "attack_explorer", "landscape_explorer", "leading_directions"]
