"""Compares models on the same questions: differences, their significance, and the cost of an answer."""
