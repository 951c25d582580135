"""Settings of published experiments, and published figures, as YAML files."""
