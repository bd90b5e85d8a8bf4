"""Where compiled programs are kept, so that no later start compiles them again."""

from pathlib import Path

import jax


def keep_programs(cache_dir: Path) -> None:
    """Let jax keep them below a private folder, which is made where it is missing."""
    folder = cache_dir / "xla"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
