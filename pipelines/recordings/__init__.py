"""A recording from outside the store, and the clips retrieved for it."""
