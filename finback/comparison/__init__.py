"""Models side by side on the same questions: what differs, how sure that is, and what an answer cost."""
