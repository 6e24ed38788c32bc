"""Settings as small frozen pydantic models, and how they are read from TOML. No JAX here."""
