"""The generated corpus: a world of things that are seen and heard, rendered to mp4."""
