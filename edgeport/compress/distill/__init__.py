"""Distillation: train a model towards what another one gives. One method a file."""

from edgeport.compress.distill.distance import Sample, Teacher, distance

__all__ = ["Sample", "Teacher", "distance"]
