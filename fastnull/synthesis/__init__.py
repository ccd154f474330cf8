"""Noise synthesis: universal banks, noise for each image, and noise on the boundary of the approximate nullspace.

- `universal`: one noise is shared by all images: drawn from U(−limit, limit), moved until the outputs are those without
  it, stopped at influence < ε (paper, Eq. 7 and 9; by AdamW on the logits as its code does it, or faster by
  Gauss-Newton). Here the influence is judged on held-out images, the cosine decays over the steps that run, and an
  unmet ε is never silent.
- `per_image`: every image has its own noise, which stops at its own ε (ours).
- `boundary`: every image's noise is driven to influence = ε from either side in a few steps (ours; related: virtual
  adversarial training, friendly adversarial training, level-set methods).
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
