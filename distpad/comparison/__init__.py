"""A user's own step beside that of one device: what ``certify`` compares when it is given a model or a step."""
