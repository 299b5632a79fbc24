"""The encoder: torch modules without Lightning."""
