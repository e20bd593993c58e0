"""Names of batch entries that the data give and the models read. What else a batch holds is named in configs."""

DRAW = "draw"  # B strings: each names the random numbers which a training step draws for its sample
IS_PRIOR = "is_prior"  # bool (B,): samples that are there to be remembered
# What a frozen model was asked and said of a prior's sample: a timestep, an integer from 0, (B,); the noise
# (B, C, h, w); and the output (B, C, h, w), whatever it predicts. A stored sample has K of each.
TIMESTEPS, NOISE, PREDICTION = TEACHER_KEYS = ("t", "noise", "prediction")
