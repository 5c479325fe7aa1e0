"""Jobs that keep a store up to date, and the gate before publishing."""
