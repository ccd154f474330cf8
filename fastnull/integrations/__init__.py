"""fastnull in the training loops of other libraries: one module per library, which imports that library.

timm: `fastnull.integrations.timm`; Hugging Face Trainer: `.transformers`; Lightning: `.lightning` or
`.pytorch_lightning`. A plain loop, also with accelerate, needs only NullspaceAugment.
"""
