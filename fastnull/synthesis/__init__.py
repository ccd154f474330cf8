"""Noise synthesis: universal banks, noise for each image, and noise on the boundary of the approximate nullspace.

- `universal`: all images share one noise. It is drawn from U(−limit, limit) and optimised until the outputs are those
  without noise, up to influence < ε (paper, Eq. 7 and 9; by AdamW on the logits as in its code, or faster by
  Gauss-Newton). Unlike the published code, the influence is judged on held-out images, the cosine decays over the steps
  that run, and an unmet ε is always reported.
- `per_image`: every image has its own noise, which stops when its own influence is below ε (ours).
- `boundary`: the noise of every image is driven to influence = ε from either side in a few steps (ours; related:
  virtual adversarial training, friendly adversarial training, level-set methods).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnull.lazy import lazy_names

if TYPE_CHECKING:
    from fastnull.noise import Noise
    from fastnull.synthesis.config import LR, MODES, ON_UNMET, SCHEDULES, SOLVERS, STOPS, SynthesisConfig
    from fastnull.synthesis.run import (
        EpsilonNotMetError,
        NoiseNotFiniteError,
        SynthesisInterrupted,
        SynthesisOutOfMemoryError,
        measure_influence,
        synthesize,
    )
    from fastnull.synthesis.starts import warm_start
else:
    __getattr__, __dir__ = lazy_names(
        __name__, "fastnull.synthesis.config", "fastnull.noise", "fastnull.synthesis.starts", "fastnull.synthesis.run"
    )

__all__ = [
    "LR",
    "MODES",
    "ON_UNMET",
    "SCHEDULES",
    "SOLVERS",
    "STOPS",
    "EpsilonNotMetError",
    "Noise",
    "NoiseNotFiniteError",
    "SynthesisConfig",
    "SynthesisInterrupted",
    "SynthesisOutOfMemoryError",
    "measure_influence",
    "synthesize",
    "warm_start",
]
