"""Adapters on a real vLLM."""
