"""The grouped GEMMs with their activation, and the sum over experts."""
