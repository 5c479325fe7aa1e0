"""Looking into a store: one clip, a search, a table, an export, what failed."""
