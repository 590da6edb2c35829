"""Fixed lists of questions from many sources, how each is put and judged, and what their scores can say. Does not import torch."""
