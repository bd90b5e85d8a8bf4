"""How an adapter's factors follow their gradients; every adapter has an optimiser of its own."""

import optax

from jslora.training.config import AdapterSection


def optimiser(section: AdapterSection) -> optax.GradientTransformation:
    """Clip, then AdamW (arXiv 1711.05101) or plain gradient descent, at the scheduled rate."""
    steps = [] if section.clip is None else [optax.clip_by_global_norm(section.clip)]
    rate = schedule(section)
    if section.optimizer == "adamw":
        return optax.chain(*steps, optax.adamw(rate, weight_decay=section.weight_decay))
    if section.weight_decay:
        steps.append(optax.add_decayed_weights(section.weight_decay))
    return optax.chain(*steps, optax.sgd(rate))


def schedule(section: AdapterSection) -> optax.Schedule:
    """Learning rate by the number of updates before: a warm-up from zero, then as configured."""
    peak, left = section.learning_rate, section.steps - section.warmup_steps
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, left),
        "cosine": optax.cosine_decay_schedule(peak, left),
    }[section.schedule]
    if not section.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, section.warmup_steps)
    return optax.join_schedules([warmup, after], [section.warmup_steps])
