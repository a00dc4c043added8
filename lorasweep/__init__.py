"""lorasweep: sweeps that show when LoRA matches full fine-tuning. Importing it does no work."""

__version__ = "0.3.0"
