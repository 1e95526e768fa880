"""Compression: a chain of passes from Model to Model, each recording what it did to every layer."""

from edgeport.compress.apply import LayerRecord, apply_recipe
from edgeport.compress.assign import Assignment, assign

__all__ = ["Assignment", "LayerRecord", "apply_recipe", "assign"]
