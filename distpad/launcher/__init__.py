"""``distpad launch``: starts a job's workers with the engine's own launcher, and says what became of them."""
