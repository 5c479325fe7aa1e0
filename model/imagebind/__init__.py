"""ImageBind: its three towers, what they take in, and its published file of weights."""
