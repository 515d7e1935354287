"""The bundled model, its task and its data."""
