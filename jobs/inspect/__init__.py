"""Commands that read a store: one clip, search, export, failures."""
