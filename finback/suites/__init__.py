"""Evaluation suites: fixed lists of questions with prompts and judges, and the statistics of scores. Does not import torch."""
