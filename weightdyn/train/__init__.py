"""The reference trainer: small language models on real text, every force on record."""
