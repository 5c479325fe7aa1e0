"""Searches compared with faiss, hnswlib and LanceDB's defaults."""
