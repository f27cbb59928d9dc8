"""The drop-in: POT's functions under POT's own names."""
