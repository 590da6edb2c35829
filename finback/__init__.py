"""finback builds, teaches, checks and serves DeepSeek-class language models, and shows the bill for every step."""

__version__ = "0.1.0"
