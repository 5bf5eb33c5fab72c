"""A reader of handwriting, trained on several devices at once. Start with ``train.py``."""
