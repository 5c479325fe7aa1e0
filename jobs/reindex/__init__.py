"""Jobs that keep a store fresh, and the gate before what they publish."""
