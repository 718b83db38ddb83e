"""Dispatch and combine over peer memory."""
