"""Real inputs: data cards from `calibration/`, fetched by pinned package and sha256."""
