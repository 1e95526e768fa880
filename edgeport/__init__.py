"""edgeport: ship a trained PyTorch or Hugging Face model to phones and edge boards, with proof."""

__version__ = "0.1.0"
