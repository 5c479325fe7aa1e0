"""Searches beside faiss, hnswlib and LanceDB's defaults."""
