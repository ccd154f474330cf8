"""fastnull inside other people's training loops: one module a library, which imports that library.

timm: `fastnull.integrations.timm`; Hugging Face Trainer: `.transformers`; Lightning: `.lightning` or
`.pytorch_lightning`. A plain loop, with accelerate or without, needs none of them: NullspaceAugment is enough.
"""
