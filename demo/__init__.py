"""A FLUX pipeline takes LoRA A, LoRA B and none, compiled and eager, with times and errors."""
