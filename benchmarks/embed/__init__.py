"""The towers compared with the limit of the machine and with others."""
