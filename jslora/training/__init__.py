"""Training LoRA adapters on the model that is served."""
