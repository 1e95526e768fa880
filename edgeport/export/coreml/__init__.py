"""Lower to a Core ML model package."""
