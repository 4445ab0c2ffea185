"""SGLang on a plain CPU: a platform, and what it needs. The engine does not import it."""
