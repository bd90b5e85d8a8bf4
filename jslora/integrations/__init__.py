"""jslora inside other systems; each module needs the extra that bears its system's name."""
