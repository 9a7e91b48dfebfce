"""The logger inside training frameworks: `transformers` and `lightning` have callbacks, each a module of its own.

Accelerate needs none: `ForceLogger(optimizer, model)` behind `accelerator.prepare`,
`accelerator.register_for_checkpointing(log)`, and `accelerator.log(log.scalars(), step=log.step)`.
"""
